"""docs/adapters.md: its table is the adapters, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import vesalius as vs
from vesalius.adapters import KNOWN, Adapter
from vesalius.model.direct import direct_effects

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"


def row(adapter: Adapter) -> str:
    kinds: set[str] = set()
    for stack in map(adapter.stack, adapter.stack_names):
        kinds |= {*stack.sites, "result", *(("scores", "pattern") if stack.attention else ())}
        kinds |= {"cross_result", "cross_scores", "cross_pattern"} if stack.cross_attention else set()
    sweeps = "replay" if adapter.replay and adapter.causal else "whole runs"
    direct = "yes" if adapter.direct else "no"
    return f"| {adapter.family} | {', '.join(adapter.classes)} | {' '.join(sorted(kinds))} | {sweeps} | {direct} |"


def test_the_table_lists_every_family_as_it_is() -> None:
    shown = PAGE.read_text("utf-8").split("<!-- families -->")[1].split("<!-- end -->")[0].strip().splitlines()
    # A family that other releases of transformers build otherwise has an adapter for each, and one row.
    assert shown[2:] == sorted({row(adapter) for adapter in KNOWN})


def test_the_example_runs_and_its_model_works_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.splitlines() == [
        "torch.Size([1, 5, 4, 8])", "torch.Size([2, 4, 2])", "torch.Size([1, 8, 4])"
    ]  # fmt: skip
    model, pairs, scores = names["model"], names["pairs"], names["scores"]
    assert isinstance(model, vs.Model)
    assert isinstance(pairs, vs.Pairs)
    source = model.run(pairs.tokens("clean"), capture=["layers.1.z"]).activations
    run = model.run(pairs.tokens("corrupted"), interventions=[vs.Patch("layers.1.z[2]", source=source)])
    assert torch.allclose(scores.values[1, 2], vs.logit_diff(run.logits, pairs), atol=1e-5)  # type: ignore[attr-defined]
    direct = direct_effects(model, pairs, pairs.tokens("clean"))
    assert torch.allclose(direct.total(), scores.source, atol=1e-4)  # type: ignore[attr-defined]
    assert {"result", "resid_mid"} <= {site.kind for site in model.sites("layers.0.*")}
