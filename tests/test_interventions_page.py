"""docs/interventions.md: its table names every edit, and its example runs and does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vesalius as vs
from vesalius.intervention.stored import KINDS

PAGE = (Path(__file__).parent.parent / "docs" / "interventions.md").read_text("utf-8")


def test_the_table_names_every_edit() -> None:
    assert sorted(re.findall(r"(?m)^\| `([A-Z]\w+)\(", PAGE)) == sorted(kind.__name__ for kind in KINDS.values())


@pytest.mark.demo_model
def test_the_example_runs(
    demo: vs.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "interventions.md", "exec"), names)
    run, made = names["run"], names["made"]
    assert [entry["intervention"]["edit"] for entry in run.diagnostics] == ["ablate", "patch", "replace"]
    assert (tmp_path / "edits.json.safetensors").exists()
    assert len(made.new[0]) == 3
    plain = demo.run(names["pairs"].tokens("corrupted")).logits
    assert not torch.allclose(run.logits, plain)
    assert "tensor(" in capsys.readouterr().out
