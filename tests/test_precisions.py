"""Captures, edits and sweeps in every precision, each against the same thing in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from families import FAMILIES, distinct
from patching import edited
from vesalius.errors import SelfCheckError
from vesalius.patching.plain import self_check
from vesalius.patching.record import record
from vesalius.patching.sources import source_for

# Largest error, in units of the values' range.
DTYPES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}
# Routing is a choice: rounding the router's logits can send a token to another expert.
CHOOSE = ("deepseek_v3", "deepseek_v3 (plain queries)", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
SMOOTH = sorted(set(FAMILIES) - set(CHOOSE))


def model(name: str, dtype: torch.dtype) -> vs.Model:
    net = FAMILIES[name].build()
    net.config._experts_implementation = "eager"  # the fast one knows no float64
    return vs.Model(net.to(dtype))


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / (exact.max() - exact.min()))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("name", distinct(SMOOTH))
def test_captures_and_edits_equal_those_in_float64(name: str, dtype: torch.dtype) -> None:
    tokens = tiny.pairs(n=4).tokens("clean")
    exact, here = model(name, torch.float64), model(name, dtype)
    width = here.architecture[1].d_model
    edits = [
        vs.Steer("layers.1.resid_post", scale=1.0, vector=torch.ones(width) / 4, positions=[2]),
        vs.Ablate("layers.0.z[1]"), vs.Ablate("layers.1.pattern[0]", positions=[3]),
    ]  # fmt: skip
    names = [site for site in here.sites() if site.kind not in ("scores", "result")]
    runs = [m.run(tokens, capture=names, interventions=edits) for m in (here, exact)]
    for site in names:
        assert runs[0][site].dtype == dtype, site
        real = tokens.real if site.kind != "pattern" else tokens.real[:, None, :, None].expand_as(runs[0][site])
        assert worst(runs[0][site][real], runs[1][site][real]) < DTYPES[dtype], site
    assert worst(runs[0].logits[tokens.real], runs[1].logits[tokens.real]) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("name", distinct(sorted(FAMILIES)))
def test_sweeps_pass_their_check_and_equal_those_in_float64(name: str, dtype: torch.dtype) -> None:
    pairs = tiny.pairs(n=4)
    sites = ["layers.0.mlp_out", "layers.1.resid_post"]
    found, exact = (
        vs.sweep(model(name, d), pairs, sites=sites, each="position", metric=vs.answer_logprob)
        for d in (dtype, torch.float64)
    )
    assert found.values.dtype == torch.promote_types(dtype, torch.float32)
    assert bool(torch.isfinite(found.values).all())
    if name in SMOOTH:
        assert worst(found.values, exact.values.double()) < DTYPES[dtype]


@pytest.mark.parametrize("name", distinct(SMOOTH))
def test_captures_and_edits_under_autocast_equal_those_in_float64(name: str) -> None:
    tokens = tiny.pairs(n=4).tokens("clean")
    exact, here = model(name, torch.float64), model(name, torch.float32)
    width = here.architecture[1].d_model
    space = vs.Subspace(vs.Site("resid_post", 1), torch.eye(width)[:3])
    edits = [
        vs.Steer("layers.0.resid_post", scale=1.0, vector=torch.ones(width) / 4, positions=[2]),
        vs.Ablate("layers.0.z[1]"), vs.Ablate("layers.1.pattern[0]", positions=[3]), vs.Project(space),
        vs.Noise("embed", scale=0.1),
    ]  # fmt: skip
    names = ["layers.0.q", "layers.1.pattern", "layers.1.mlp_out", "layers.1.resid_post"]
    expected = exact.run(tokens, capture=names, interventions=edits)
    with torch.autocast("cpu", torch.bfloat16):
        found = here.run(tokens, capture=names, interventions=edits)
    assert worst(found.logits[tokens.real], expected.logits[tokens.real]) < DTYPES[torch.bfloat16]
    for site in names:
        real = tokens.real if "pattern" not in site else tokens.real[:, None, :, None].expand_as(found[site])
        assert worst(found[site][real], expected[site][real]) < DTYPES[torch.bfloat16], site


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_a_sweep_under_autocast_passes_its_check(name: str) -> None:
    wrapped = tiny.model("gpt2") if name == "gpt2" else families.model(name)
    pairs = tiny.pairs(n=4)
    plain = vs.sweep(wrapped, pairs, sites="layers.*.z", each="head")
    with torch.autocast("cpu", torch.bfloat16):
        found = vs.sweep(wrapped, pairs, sites="layers.*.z", each="head")
    assert worst(found.values, plain.values.double()) < DTYPES[torch.bfloat16]


@pytest.mark.parametrize(("dtype", "small", "large"), [
    (torch.float32, 1e-6, 1e-3), (torch.bfloat16, 0.02, 0.3), (torch.float16, 0.004, 0.05)], ids=str)  # fmt: skip
def test_the_check_lets_rounding_through_and_nothing_larger(dtype: torch.dtype, small: float, large: float) -> None:
    """The size of the error in units of the range of the logits."""
    wrapped, pairs = model("llama", dtype), tiny.pairs(n=4)
    site = vs.Site("z", 0)
    base = record(wrapped, pairs.tokens("clean"), [site])
    source, variants = source_for("zero", base, base, 0), [edited((site[1],)), edited((site[2],))]
    plain = torch.stack([
        vs.logit_diff(wrapped.run(pairs.tokens("clean"), interventions=[
            vs.Ablate(site[head], positions=pairs.real)]).logits, pairs) for head in (1, 2)
    ])  # fmt: skip
    logits = wrapped.run(pairs.tokens("clean")).logits[0, pairs.at[0]]
    span = float(logits.max() - logits.min())
    assert self_check(base, variants, source, pairs, vs.logit_diff, plain + small * span, 0) <= 3 * small * span
    with pytest.raises(SelfCheckError, match="replay gave"):
        self_check(base, variants, source, pairs, vs.logit_diff, plain + large * span, 0)
