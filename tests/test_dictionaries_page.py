"""The Python on the page about dictionaries runs, and its tables list what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vesalius.dictionaries import KINDS, Dictionary, dimensionality
from vesalius.dictionaries.config import CODERS

PAGE = (Path(__file__).parents[1] / "docs" / "dictionaries.md").read_text()


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_python_on_the_page_about_ground_truth_runs_and_finds_what_was_planted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "ground-truth.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "ground-truth.md", "exec"), names)
    found, null = (float(line.split("(")[1].rstrip(")")) for line in capsys.readouterr().out.splitlines()[:2])
    assert found > 0.9 > 0.4 > null
    toys = names["toys"]
    torch.testing.assert_close(dimensionality(toys.W[toys.best]).float(), torch.full((5,), 0.4), atol=0.05, rtol=0.0)


def test_the_page_about_ground_truth_names_tests_that_are_there() -> None:
    page = (Path(__file__).parents[1] / "docs" / "ground-truth.md").read_text()
    named = set(re.findall(r"test_\w+\.py", page))
    assert len(named) >= 4
    assert [name for name in named if not (Path(__file__).parent / name).exists()] == []
