"""Models spread with `device_map`: forwards that are wrapped, weights that are put in place for the length of a call.

The stand-in does what accelerate's hooks do; where accelerate is installed, its own do the same.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from families import FAMILIES
from vesalius.adapters.base import device_of, parameter, spread, weight_of
from vesalius.errors import InputError
from vesalius.jobs import Event
from vesalius.model.direct import direct_effects

NAMES = ["layers.*.z", "layers.1.result", "layers.0.pattern", "layers.1.resid_mid", "final_norm"]
SPREAD = ["llama", "gemma3", "opt", "olmoe", "gpt2"]


class Away:
    """Keeps a module's weights elsewhere, and puts them in place for the length of a call."""

    def __init__(self, module: nn.Module) -> None:
        self.weights_map = {name: weight.detach().clone() for name, weight in module.named_parameters(recurse=False)}
        self.execution_device = torch.device("cpu")
        self.calls = 0

    def put(self, module: nn.Module, there: bool) -> None:
        for name, kept in self.weights_map.items():
            module._parameters[name] = nn.Parameter(kept if there else kept.to("meta"), requires_grad=False)

    def wrap(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.put(module, True)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.put(module, False)

    def install(self, module: nn.Module) -> None:
        self.forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(self.wrap, module), self.forward)  # type: ignore[method-assign]
        module._hf_hook = self  # type: ignore[assignment]
        self.put(module, False)


def build(name: str) -> Any:
    return tiny.gpt2(layers=2) if name == "gpt2" else FAMILIES[name].build()


def stand_in(net: Any) -> Any:
    for module in net.modules():
        if next(module.parameters(recurse=False), None) is not None:
            Away(module).install(module)
    return net


def on_disk(net: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(net, str(folder), execution_device=torch.device("cpu"))


def dispatched(net: Any, _folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(net, device_map={"": "cpu"}, force_hooks=True)


WAYS = {"stand-in": lambda net, folder: stand_in(net), "disk": on_disk, "dispatched": dispatched}


@pytest.fixture(params=[(way, name) for way in WAYS for name in SPREAD], ids=" ".join)
def two(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[vs.Model, vs.Model]:
    """The model as it is, and spread."""
    way, name = request.param
    return vs.Model(build(name)), vs.Model(WAYS[way](build(name), tmp_path))


def edits(model: vs.Model) -> list[Any]:
    width = model.architecture[1].d_model
    return [
        vs.Ablate("layers.0.z[1]"), vs.Steer("layers.1.resid_post", scale=1.0, vector=torch.ones(width) / 4,
        positions=[2]), vs.Ablate("layers.1.pattern[0]", positions=[3]), vs.Noise("embed", scale=0.1),
        vs.Patch("layers.0.resid_mid", source=torch.zeros(width), positions=[1]),
        vs.Replace("layers.0.mlp_in", "layers.1.mlp_out", torch.sin, "sin", positions="last"),
    ]  # fmt: skip


def test_captures_and_edits_are_those_of_the_model_as_it_is(two: tuple[vs.Model, vs.Model]) -> None:
    tokens = tiny.pairs(n=4).tokens("clean")
    plain, away = (model.run(tokens, capture=NAMES, interventions=edits(model)) for model in two)
    assert torch.equal(plain.logits, away.logits)
    for site in plain.activations:
        assert torch.equal(plain[site], away[site]), site
    assert [entry["norm_ratio"] for entry in plain.diagnostics] == [entry["norm_ratio"] for entry in away.diagnostics]


def test_it_writes_sums_up_and_has_the_same_hash(two: tuple[vs.Model, vs.Model]) -> None:
    plain, away = two
    pairs = tiny.pairs(n=4)
    made = [model.generate(pairs.tokens("clean"), 3, edits(model)[:3]).new for model in two]
    assert made[0] == made[1]
    assert away.content_hash == plain.content_hash
    totals = [direct_effects(model, pairs, pairs.tokens("clean")).total() for model in two]
    assert torch.allclose(*totals, atol=1e-5)


def test_sweeps_are_the_same(two: tuple[vs.Model, vs.Model]) -> None:
    heard: list[Event] = []
    found = [
        vs.sweep(model, tiny.pairs(n=4), sites="layers.*.z", each="head", sink=heard.append) for model in two
    ]  # fmt: skip
    assert torch.allclose(found[0].values, found[1].values, atol=1e-4)
    told = any("its weights lie on several devices; every edited run" in event.message for event in heard)
    assert told == spread(two[1].module)


def test_gradients_reach_captured_sites(two: tuple[vs.Model, vs.Model]) -> None:
    tokens = tiny.pairs(n=4).tokens("clean")
    grads: list[Tensor] = []
    for model in two:
        run = model.run(tokens, capture=["layers.0.z"], grad=True)
        grads += torch.autograd.grad(run.logits[:, 3, 5].sum(), [run["layers.0.z"]])
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    assert grads[0].any()


def test_the_stand_in_keeps_its_weights_away_and_is_called() -> None:
    net = stand_in(FAMILIES["llama"].build())
    assert {weight.device.type for weight in net.parameters()} == {"meta"}
    assert (device_of(net), spread(net)) == (torch.device("cpu"), True)
    vs.Model(net).run(torch.tensor([[1, 2, 3]]))
    assert net.lm_head._hf_hook.calls == 1
    assert {weight.device.type for weight in net.parameters()} == {"meta"}
    plain = families.model("llama").module
    assert (device_of(plain), spread(plain)) == (torch.device("cpu"), False)


def test_weights_that_are_nowhere_are_refused() -> None:
    layer = nn.Linear(3, 2, bias=False, device="meta")
    with pytest.raises(InputError, match="weight of a Linear is on the meta device and has no values"):
        weight_of(layer)
    with pytest.raises(InputError, match="a ReLU has no weight"):
        weight_of(nn.ReLU())
    assert parameter(layer, "bias") is None
