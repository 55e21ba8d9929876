"""docs/quality.md: its example runs, its table holds every figure by its definition, its picture is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from vesalius.dictionaries import WORDS
from vesalius.dictionaries.evaluation.geometry import SHARED

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "quality.md").read_text("utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, demo: vs.Model) -> None:
    code = CODE[0]
    names: dict[str, Any] = {}
    exec(compile(code.replace("mkdtemp()", repr(str(tmp_path))), "quality.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    found = names["found"]
    assert found.data["seen"] is False
    assert printed[0] == found.data["words"]
    assert printed[1].split() == [str(getattr(found, name)) for name in ("fvu", "l0", "dead", "loss_recovered_mean")]
    assert "'pca'" in printed[3] and "'untrained'" in printed[3]
    assert (tmp_path / "page" / "quality.html").exists()
    assert len(names["scores"]["latents", 1].values) == 2


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_example_on_superposition_runs_on_little(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = CODE[1]
    for long, short in (("4096", "64"), ("batch_size=1024, steps=600", "batch_size=64, steps=3"), ("60_000", "400")):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "quality.md", "exec"), {})
    assert capsys.readouterr().out.count("Superposition(medians: latents_per_neuron") == 2


def test_the_table_holds_every_figure_as_the_code_defines_it() -> None:
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", PAGE))
    assert {name: rows[name] for name in WORDS} == dict(WORDS)
    assert f"a cosine of at least {SHARED:g}".replace("0.", ".") in " ".join(PAGE.split())


def test_every_metric_on_the_page_can_be_called() -> None:
    section = PAGE.split("## Concepts")[1].split("##")[0]
    names = re.findall(r"(?m)^\| `(\w+)` \|", section)
    assert len(names) == 5
    assert all(callable(getattr(vs.concepts, name)) for name in names)


def test_the_picture_is_small() -> None:
    assert 10_000 < (DOCS / "quality.png").stat().st_size < 200_000
