"""One of several outputs or arguments of a module, by number or name: an LSTM's states, a mapping's entries."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.errors import InputError, InterventionError, NotFiniteError
from vesalius.model.direct import direct_effects

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["left", "right"])


class Reader(nn.Module):
    """Reads the last hidden state, which is the second output, and adds the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.lstm(x)
        return self.out(hidden[-1] + 0.1 * cell[-1])


class Split(nn.Module):
    """Returns whatever `shape` says of its two halves."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor, *, gain: Tensor) -> Any:
        halves = {"left": x * gain, "right": x + 1, "note": "no tensor"}
        made: dict[str, Any] = {
            "mapping": halves, "tuple": (halves["left"], halves["right"], "no tensor"), "list": [*halves.values()],
            "named": Pair(halves["left"], halves["right"]), "nested": ([halves], "no tensor"),
        }  # fmt: skip
        return made[self.shape]


class Two(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.split, self.shape = Split(shape), shape

    def forward(self, x: Tensor) -> Tensor:
        made = self.split(x, gain=torch.full_like(x, 3.0))
        made = made[0][0] if self.shape == "nested" else made
        if isinstance(made, Pair):
            return made.left - made.right
        return made["left"] - made["right"] if isinstance(made, dict) else made[0] - made[1]


@pytest.fixture(scope="module")
def reader() -> vs.Model:
    torch.manual_seed(0)
    return vs.Model(Reader().eval())


def test_the_states_of_an_lstm_are_read(reader: vs.Model) -> None:
    run = reader.run(X, ["module:lstm|out", "module:lstm|out.0", "module:lstm|out.1.0", "module:lstm|out.1.1"])
    with torch.no_grad():
        out, (hidden, cell) = reader.module.lstm(X)
    assert torch.equal(run["module:lstm|out.0"], out)
    assert torch.equal(run["module:lstm|out"], out)
    assert torch.equal(run["module:lstm|out.1.0"], hidden)
    assert torch.equal(run["module:lstm|out.1.1"], cell)


def test_the_states_of_an_lstm_are_edited_apart(reader: vs.Model) -> None:
    with torch.no_grad():
        _, (hidden, cell) = reader.module.lstm(X)
        other = reader.run(-X, ["module:lstm|out.1.0"]).activations
        edits = [vs.Patch("module:lstm|out.1.0", source=other), vs.Ablate("module:lstm|out")]
        run = reader.run(X, interventions=edits)
        expected = reader.module.out(other["module:lstm|out.1.0"][-1] + 0.1 * cell[-1])
        assert torch.allclose(run.logits, expected, atol=1e-6)
        assert not torch.allclose(run.logits, reader.module(X), atol=1e-3)
        cut = reader.run(X, interventions=[vs.Ablate("module:lstm|out.1.1")]).logits
        assert torch.allclose(cut, reader.module.out(hidden[-1]), atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in reader.module.modules())


@pytest.mark.parametrize(
    ("shape", "left", "right"),
    [
        ("mapping", "left", "right"), ("tuple", "0", "1"), ("list", "0", "1"), ("named", "0", "1"),
        ("nested", "0.0.left", "0.0.right"),
    ],
)  # fmt: skip
def test_every_shape_keeps_its_other_items(shape: str, left: str, right: str) -> None:
    model, x = vs.Model(Two(shape)), torch.arange(6.0).view(2, 3)
    run = model.run(x, [f"module:split|out.{left}", f"module:split|out.{right}"])
    assert torch.equal(run[f"module:split|out.{left}"], 3 * x)
    assert torch.equal(run[f"module:split|out.{right}"], x + 1)
    assert torch.equal(run.logits, 2 * x - 1)
    edited = model.run(x, interventions=[vs.Ablate(f"module:split|out.{right}")])
    assert torch.equal(edited.logits, 3 * x)
    both = model.run(x, interventions=[vs.Ablate(f"module:split|out.{left}"), vs.Ablate(f"module:split|out.{right}")])
    assert not both.logits.any()


def test_arguments_are_named_by_number_or_keyword() -> None:
    model, x = vs.Model(Two("tuple")), torch.arange(6.0).view(2, 3)
    run = model.run(x, ["module:split|in.0", "module:split|in.gain"])
    assert torch.equal(run["module:split|in.0"], x)
    assert torch.equal(run["module:split|in.gain"], torch.full_like(x, 3.0))
    doubled = model.run(x, interventions=[vs.Steer("module:split|in.gain", scale=1.0, vector=torch.ones(3))])
    assert torch.equal(doubled.logits, 4 * x - x - 1)
    moved = model.run(x, interventions=[vs.Ablate("module:split|in.0")])
    assert torch.equal(moved.logits, -torch.ones(2, 3))


def test_names_parse_print_and_glob(reader: vs.Model) -> None:
    site = vs.Site.parse("module:lstm|out.1.0")
    assert (site.module, site.side, str(site)) == ("lstm", "out.1.0", "module:lstm|out.1.0")
    assert reader.sites("module:l*|out.1.0") == [site]
    edit = vs.Ablate(site)
    assert edit.to_json()["part"]["site"] == "module:lstm|out.1.0"


def test_a_star_stands_for_one_name_and_two_for_any_number() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = vs.Model(nn.Sequential(block, nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    assert [str(site) for site in model.sites("module:*|out")] == ["module:|out", "module:0|out", "module:1|out"]
    assert [str(site) for site in model.sites("module:*.0|in")] == ["module:0.0|in", "module:1.0|in"]
    assert len(model.sites("module:**|out")) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module:lstm|out.2", r"this module returns a tuple of 2, which has no item '2'"),
        ("module:lstm|out.hidden", r"this module returns a tuple of 2, which has no item 'hidden'"),
        ("module:lstm|out.1", r"that item of what this module returns is a tuple of 2, not a tensor"),
        ("module:lstm|out.0.1", r"this module returns a Tensor, which has no item '1'"),
        ("module:lstm|in.1", r"this module was called with a tuple of 1, which has no item '1'"),
        ("module:lstm|in.mask", r"this module was called with an empty mapping, which has no item 'mask'"),
    ],
)
def test_an_item_that_is_not_there_says_what_is(reader: vs.Model, name: str, message: str) -> None:
    with pytest.raises(InterventionError, match=message):
        reader.run(X, name)


def test_an_output_without_a_first_tensor_says_how_to_name_one() -> None:
    model = vs.Model(Two("nested"))
    with pytest.raises(InterventionError, match=r"returns a tuple of 2 with no tensor first; name the item, .*out\.1"):
        model.run(torch.ones(2, 3), "module:split|out")


def test_nan_in_a_second_output_is_found(reader: vs.Model) -> None:
    broken = vs.Replace("module:lstm|out.1.0", "module:lstm|out.1.0", lambda h: h / 0 * 0, "nan")
    with pytest.raises(NotFiniteError, match=r"module:lstm\|out\.1\.0 is the first site with NaN"):
        reader.run(X, interventions=[broken], check_finite=True)


def test_a_sweep_needs_examples_first(reader: vs.Model) -> None:
    pairs = vs.Pairs(clean=X, corrupted=-X, answer=torch.arange(4), distractor=torch.arange(4) + 1)
    with pytest.raises(InputError, match=r"module:lstm\|out\.1\.0 is \(2, 4, 6\) for 4 examples: a sweep needs them"):
        vs.sweep(reader, pairs, sites="module:lstm|out.1.0")


def test_models_with_an_adapter_have_them_too() -> None:
    model, tokens = tiny.model("llama"), tiny.pairs().tokens("clean")
    run = model.run(tokens, ["module:model.layers.1.self_attn|out.0", "layers.1.attn_out"])
    assert torch.equal(run["module:model.layers.1.self_attn|out.0"], run["layers.1.attn_out"])
    named = model.run(tokens, ["module:model.layers.1|in.0", "layers.1.resid_pre"])
    assert torch.equal(named["module:model.layers.1|in.0"], named["layers.1.resid_pre"])


# ------------------------------------------------------------------------------------------------ changes in place


class InPlace(torch.nn.Module):
    """Goes on in place: an activation, and a sum onto the stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(inplace=True))
        self.second, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
        self.adds = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.adds:  # autograd cannot go back through the sum in place
            return self.last(x + self.second(x))
        x += self.second(x)
        return self.last(x)


@pytest.mark.parametrize("grad", [False, True])
def test_a_captured_tensor_is_what_the_module_gave_whatever_happens_to_it_later(grad: bool) -> None:
    net = InPlace().eval()
    net.adds = not grad
    model, x = vs.Model(net), torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        linear = net.first[0](x)
        hidden = linear.relu()
        total = hidden + net.second(hidden)
    run = model.run(x, capture=["module:first.0|out", "module:first|out", "module:last|in"], grad=grad)
    assert torch.equal(run["module:first.0|out"], linear)
    assert torch.equal(run["module:first|out"], hidden)
    assert torch.equal(run["module:last|in"], total)
    assert torch.equal(run.logits, net(x))
    if grad:
        (got,) = torch.autograd.grad(run.logits.sum(), run["module:first|out"])
        through = net.last.weight.sum(0)
        torch.testing.assert_close(got, (through + through @ net.second.weight).expand_as(got))


def test_another_runs_values_survive_a_model_that_changes_them_in_place() -> None:
    net = InPlace().eval()
    model, (x, y) = vs.Model(net), torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    other = model.run(y, capture="module:first.0|out")
    before = other["module:first.0|out"].clone()
    patched = model.run(x, interventions=[vs.Patch("module:first.0|out", source=other.activations)])
    torch.testing.assert_close(patched.logits, other.logits)
    assert torch.equal(other["module:first.0|out"], before)
    assert bool((before < 0).any())


def test_layers_that_add_in_place_are_swept_by_whole_runs_to_the_same_values() -> None:
    pairs = tiny.pairs(n=3)
    plain = vs.sweep(tiny.model("llama"), pairs, sites=["layers.*.resid_post", "layers.0.resid_pre"])
    net = tiny.llama()
    for layer in net.model.layers:
        # As where the stream is added to with +=: a layer's input is gone once it has returned.
        layer.register_forward_hook(lambda _, args, out: args[0].copy_(out))
    model = vs.Model(net)
    captured = model.run(pairs.tokens("clean"), capture="layers.*.resid_pre")
    expected = tiny.model("llama").run(pairs.tokens("clean"), capture="layers.*.resid_pre")
    for site in expected.activations:
        assert torch.equal(captured[site], expected[site]), site
    found = vs.sweep(model, pairs, sites=["layers.*.resid_post", "layers.0.resid_pre"])
    torch.testing.assert_close(found.values, plain.values, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------- training mode


def test_a_model_in_training_mode_is_refused_where_runs_are_compared() -> None:
    pairs, net = tiny.pairs(n=3), tiny.gpt2(attn_pdrop=0.1)
    model = vs.Model(net.train())
    calls = [
        lambda: vs.sweep(model, pairs, sites="layers.0.z", each="head"),
        lambda: vs.attribution_patching(model, pairs, sites="layers.0.z"),
        lambda: direct_effects(model, pairs, pairs.tokens("clean")),
        lambda: vs.Runs(model, {"corrupted": pairs}).metric("clean"),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"is in training mode, .*; call model\.module\.eval\(\) first"):
            call()
    images = vs.Pairs(clean=torch.randn(2, 4), corrupted=torch.randn(2, 4), answer=torch.tensor([0, 1]),
                      distractor=torch.tensor([1, 0]))  # fmt: skip
    dropping = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 3))
    with pytest.raises(InputError, match="is in training mode"):
        vs.sweep(vs.Model(dropping), images, sites="module:0|out")
    vs.sweep(vs.Model(dropping.eval()), images, sites="module:0|out")
    # Where nothing is random, the mode is of no account.
    vs.sweep(vs.Model(torch.nn.Sequential(torch.nn.Linear(4, 3))), images, sites="module:0|in")
    net.eval()
    vs.sweep(model, pairs, sites="layers.0.z", each="head")
