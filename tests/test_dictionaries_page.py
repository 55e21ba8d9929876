"""The Python on the page about dictionaries runs, and its tables list what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vesalius.dictionaries import KINDS, Dictionary
from vesalius.dictionaries.config import CODERS

PAGE = (Path(__file__).parents[1] / "docs" / "dictionaries.md").read_text()


def test_the_python_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "dictionaries.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("Dictionary(topk, k=3, 32 latents, ")
    assert printed.rstrip().endswith("True")
    sae = names["sae"]
    assert isinstance(sae, Dictionary)
    assert sae.history is not None
    assert sae.history.last()["fvu"] < 0.2


def test_the_tables_list_every_kind_and_coder() -> None:
    first = re.findall(r"(?m)^\| `(\w+)` \|", PAGE)
    assert set(first) - {"kind", "coder"} == set(KINDS) | (set(CODERS) - {"auto"})
