"""Precisions, autocast, gradients, NaN, and a thousand runs that fail: nothing breaks, nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.errors import NotFiniteError

SITE = vs.Site.parse("layers.1.resid_post")
FAMILIES = sorted(tiny.FAMILIES)


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    return tiny.pairs().tokens("clean")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_edit(model: vs.Model, tokens: vs.Tokens) -> list[Any]:
    """Held tensors are float32 whatever the model runs in."""
    captured = model.run(tokens, capture=["*"]).activations
    source = vs.Activations({site: captured[site].float() for site in captured}, captured.tokens)
    space = vs.Subspace(SITE, randn(3, 48))
    ones = torch.ones(6, 9)
    return [
        vs.Patch("layers.0.z[1]", source=source, positions=[2]),
        vs.Patch(vs.Direction(SITE, randn(48)), source=ones),
        vs.Ablate("layers.0.mlp_out", mode="mean", reference=source),
        vs.Ablate("layers.0.k[0]", mode="resample", reference=source),
        vs.Ablate("layers.1.pattern[0]", positions=[4]),
        vs.Steer(SITE, scale=2.0, vector=randn(48)),
        vs.Steer("layers.1.resid_mid", scale=0.5, vector=randn(48)),
        vs.Project(space),
        vs.Project(space, keep=True, centre=source),
        vs.Interchange(space, source=source, positions=[1]),
        vs.Freeze("layers.2.attn_out", source=source),
        vs.Noise("embed", scale=3.0, std=0.1),
        vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", torch.tanh, "tanh"),
    ]


# ----------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str
)
def test_every_edit_keeps_the_models_precision_and_does_the_same_in_it(
    family: str, dtype: torch.dtype, error: float, tokens: vs.Tokens
) -> None:
    exact, model = vs.Model(tiny.FAMILIES[family](0).double()), vs.Model(tiny.FAMILIES[family](0).to(dtype))
    for wanted, edit in zip(every_edit(exact, tokens), every_edit(model, tokens), strict=True):
        run = model.run(tokens, capture=["*"], interventions=[edit])
        reference = exact.run(tokens, capture=["layers.0.pattern"], interventions=[wanted])
        assert run.logits.dtype == dtype
        assert all(run[site].dtype == dtype for site in run.activations), edit
        spread = float(reference.logits.max() - reference.logits.min())
        assert float((run.logits.double() - reference.logits)[tokens.real].abs().max()) <= error * spread, edit
        assert run.diagnostics[0]["intervention"] == edit.describe()


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_edits_are_computed_in_the_tensors_own_precision(family: str, tokens: vs.Tokens) -> None:
    model = tiny.model(family)
    space = vs.Subspace(SITE, randn(5, 48))
    plain = model.run(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        base = model.run(tokens, capture=[SITE])[SITE]
        assert base.dtype == torch.float32  # the residual stream stays wide
        removed = model.run(tokens, capture=[SITE], interventions=[vs.Project(space)])[SITE]
        for edit in every_edit(model, tokens):
            assert bool(torch.isfinite(model.run(tokens, interventions=[edit]).logits[tokens.real]).all()), edit
        attention = model.run(tokens, capture=["layers.0.pattern"]).logits
    assert float((removed @ space.basis.T).abs().max()) < 1e-5  # bfloat16 would leave 1e-2
    spread = float(plain.logits.max() - plain.logits.min())
    assert float((attention.float() - plain.logits)[tokens.real].abs().max()) < 0.05 * spread


def test_writing_works_in_bfloat16_and_under_autocast(tokens: vs.Tokens) -> None:
    model = vs.Model(tiny.llama().bfloat16())
    edit = vs.Steer(SITE, scale=3.0, vector=randn(48), positions=[2, 9])
    made = model.generate(tokens, 3, interventions=[edit], capture=["layers.0.z"])
    assert made.logits.dtype == made["layers.0.z"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert len(tiny.model("llama").generate(tokens, 3, interventions=[edit]).new[0]) == 3


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_what_edits_hold(family: str, tokens: vs.Tokens) -> None:
    """Against a central difference in a random direction."""
    model = vs.Model(tiny.FAMILIES[family](0).double())
    source = model.run(tokens, capture=[SITE]).activations
    held = {
        "steer": lambda x: vs.Steer(SITE, scale=1.0, vector=x),
        "patch": lambda x: vs.Patch(SITE, source=x, positions=[3]),
        "noise": lambda x: vs.Noise(SITE, scale=1.0, std=x),
        "project": lambda x: vs.Project(vs.Direction(SITE, x)),
        "keep": lambda x: vs.Project(vs.Direction(SITE, x), keep=True, centre=source),
        "interchange": lambda x: vs.Interchange(
            vs.Direction(SITE, x), source=source, examples=torch.tensor([1, 2, 3, 4, 5, 0]), positions=range(6)
        ),
        "replace": lambda x: vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", lambda y: y * x, "times"),
    }
    step = 1e-3 * randn(48, seed=1).double()
    for name, make in held.items():
        start = randn(48, seed=2).double()

        def output(x: Tensor, make: Any = make) -> Tensor:
            return model.run(tokens, interventions=[make(x)], grad=True).logits[:, 5, 7].sum()

        x = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(output(x), x)
        ends = [float(output(start + sign * step).detach()) for sign in (1, -1)]
        assert ends[0] - ends[1] == pytest.approx(float(2 * gradient @ step), rel=2e-2, abs=1e-7), name
        assert float(gradient.abs().max()) > 1e-6, name


# ------------------------------------------------------------------------------------------------------------------ NaN


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_is_reported_with_the_first_site_where_it_appears(family: str, tokens: vs.Tokens) -> None:
    model = tiny.model(family)
    model.run(tokens, check_finite=True, capture=["*"])
    cases = {
        "layers.1.mlp_out": "layers.1.mlp_out is the first site with NaN: example 2, position 3",
        "layers.0.q": "layers.0.q is the first site with NaN: example 2, position 3",
        "layers.2.resid_mid": "layers.2.resid_mid is the first site with NaN: example 2, position 3",
        "logits": "logits is the first site with NaN: example 2, position 3",
    }
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[2, 3] = True
    for name, message in cases.items():
        broken = vs.Replace(name, name, lambda x: x * float("nan"), "nan", positions=mask)
        with pytest.raises(NotFiniteError, match=message):
            model.run(tokens, interventions=[broken], check_finite=True)
        assert bool(model.run(tokens, interventions=[broken]).logits.isnan().any())


@pytest.mark.parametrize(
    ("family", "path", "site"),
    [
        ("llama", "model.layers.1.self_attn.v_proj", "layers.1.v"),
        ("gpt2", "transformer.h.1.mlp.c_fc", "layers.1.mlp_post"),
        ("llama", "model.norm", "final_norm"),
    ],
)
def test_a_broken_weight_is_found(family: str, path: str, site: str, tokens: vs.Tokens) -> None:
    model = tiny.model(family)
    with torch.no_grad():
        model.module.get_submodule(path).weight.view(-1)[5] = float("inf")
    with pytest.raises(NotFiniteError, match=rf"^{site} is the first site with (NaN|infinity): example 0, position 0"):
        model.run(tokens, check_finite=True)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == 0


def test_padding_may_hold_what_it_likes(tokens: vs.Tokens) -> None:
    model = tiny.model("llama")
    last = "layers.2.resid_post"  # earlier, attention would carry it to the others: 0 times NaN is NaN
    broken = vs.Replace(last, last, lambda x: x * float("nan"), "nan", positions=~tokens.real)
    model.run(tokens, interventions=[broken], check_finite=True)


def test_modules_without_adapter_are_looked_at_too() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"log": x.log()}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.log, self.out = nn.LSTM(4, 4, batch_first=True), Logarithm(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.log(self.lstm(x)[0])["log"])

    torch.manual_seed(0)
    model = vs.Model(Net())
    with pytest.raises(NotFiniteError, match=r"module:out\|out is the first site with NaN"):
        model.run(randn(2, 3, 4), check_finite=True)


# ------------------------------------------------------------------------------------------------- nothing stays behind


THOUSAND = """
import gc
import sys

import torch

import tiny
import vesalius as vs

tokens = vs.Tokens(torch.tensor([[5, 6, 7]]))
model = vs.Model(tiny.FAMILIES[sys.argv[1]](0, 1))
errors = [None, RuntimeError, KeyboardInterrupt, ValueError]


def live():
    gc.collect()
    found = gc.get_objects()
    return sum(issubclass(type(item), torch.Tensor) for item in found), len(found)


def attempt(number):
    def fail(tensor):
        if errors[number % 4] is not None:
            raise errors[number % 4]("stop")
        return tensor

    name = ["layers.0.pattern", "layers.0.mlp_out"][number % 8 // 4]
    edits = [vs.Noise("embed", scale=1.0), vs.Replace(name, name, fail, "fail")]
    try:
        if number % 16 < 8:
            model.run(tokens, capture=["layers.0.z", "layers.0.pattern"], interventions=edits)
        else:
            model.generate(tokens, 2, edits[1:], capture=["layers.0.z", "layers.0.pattern"])
    except (RuntimeError, KeyboardInterrupt, ValueError):
        return 1
    return 0


for number in range(32):
    attempt(number)
tensors, objects = live()
failed = sum(attempt(number) for number in range(int(sys.argv[2])))
more = live()
hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
print(failed, more[0] - tensors, more[1] - objects < 500, hooks, model.module.config._attn_implementation)
"""


@pytest.mark.parametrize("runs", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_that_fail_leave_no_hook_and_no_memory(family: str, runs: int) -> None:
    """Three of four fail: in an edit, inside attention, while writing, or by ctrl-C.

    In a process of its own, without shape checks. Neither tensors nor other objects grow in number.
    """
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", THOUSAND, family, str(runs)]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, env=one_thread)
    assert done.stdout.split() == [str(runs * 3 // 4), "0", "True", "0", "sdpa"]
