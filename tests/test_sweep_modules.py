"""Sweeps of any network that maps token ids to logits: `module:` sites, whole runs, announced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Event

VOCAB, WIDTH = 11, 6


class Recurrent(nn.Module):
    """A residual block around an LSTM, whose output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=True), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.mix(x)[0])


class Net(nn.Module):
    """Reads both ways, so padding would be felt; `pooled` has no token axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCAB, WIDTH), nn.Sequential(Recurrent(), Recurrent())
        self.pooled, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embed(ids))
        return self.head(x + self.pooled(x.mean(1))[:, None])


class Rows(nn.Sequential):
    """Its first module's tensor counts all tokens of the batch on one axis."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return self[1](self[0](ids.flatten())).unflatten(0, ids.shape)


@pytest.fixture(scope="module")
def model() -> vs.Model:
    torch.manual_seed(0)
    return vs.Model(Net().eval())


def pairs(lengths: Tensor | None = None) -> vs.Pairs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, VOCAB, (5, 4), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 1] = (clean[:, 1] + 3) % VOCAB
    return vs.Pairs(clean=clean, corrupted=corrupted, answer=torch.arange(5), distractor=torch.arange(5) + 1,
                    lengths=lengths)  # fmt: skip


RAGGED = torch.tensor([4, 3, 4, 2, 3])


def by_hand(net: nn.Module, given: vs.Pairs, path: str, position: int | None, row: int) -> float:
    """Corrupted run of one example whose module gives the clean run's output, with a raw hook."""
    size = int(given.size[row])
    seen: list[Tensor] = []
    module = net.get_submodule(path)

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    def write(_module: nn.Module, _args: Any, out: Any) -> Any:
        whole = (out if isinstance(out, Tensor) else out[0]).clone()
        where = slice(None) if position is None else slice(position, position + 1)
        whole[:, where] = seen[0][:, where]
        return whole if isinstance(out, Tensor) else (whole, *out[1:])

    with torch.no_grad():
        handle = module.register_forward_hook(keep)
        net(given.clean[row : row + 1, :size])
        handle.remove()
        handle = module.register_forward_hook(write)
        logits = net(given.corrupted[row : row + 1, :size])
        handle.remove()
    return float(logits[0, size - 1, given.answer[row]] - logits[0, size - 1, given.distractor[row]])


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.mix", "embed"])
def test_a_sweep_of_modules_equals_raw_hooks(model: vs.Model, path: str, lengths: Tensor | None) -> None:
    given = pairs(lengths)
    scores = vs.sweep(model, given, sites=f"module:{path}|out", each="position")
    whole = vs.sweep(model, given, sites=f"module:{path}|out")
    assert scores.values.shape == (1, 4, 5)
    for row in range(5):
        assert float(whole.values[0, row]) == pytest.approx(by_hand(model.module, given, path, None, row), abs=1e-5)
        for position in range(int(given.size[row])):
            expected = by_hand(model.module, given, path, position, row)
            assert float(scores.values[0, position, row]) == pytest.approx(expected, abs=1e-5)
        assert not scores.mask[0, int(given.size[row]) :, row].any()
    assert not torch.allclose(whole.values, whole.base, atol=1e-3)


def test_it_is_announced_with_the_reason_and_the_cost(model: vs.Model) -> None:
    heard: list[Event] = []
    scores = vs.sweep(model, pairs(), sites="module:blocks.0|out", sink=heard.append)
    assert heard[0].kind == "note"
    assert heard[0].message == "no replay: Net has no adapter; every edited run is one whole forward"
    assert scores.cost.naive == scores.cost.spent == 15  # two runs of five, and one edited run of each


@pytest.mark.parametrize("edit", ["zero", "mean", "resample"])
def test_other_edits_change_the_numbers_and_pass_their_check(model: vs.Model, edit: str) -> None:
    for lengths in (None, RAGGED):
        scores = vs.sweep(model, pairs(lengths), sites=["module:blocks.0|out", "module:blocks.1|in"], edit=edit)
        assert scores.values.shape == (2, 5)
        assert not torch.allclose(scores.values, scores.base, atol=1e-3)


def test_an_ablated_module_gives_zeros(model: vs.Model) -> None:
    scores, given = vs.sweep(model, pairs(), sites="module:pooled|out", edit="zero"), pairs()
    with torch.no_grad():
        net = model.module
        logits = net.head(net.blocks(net.embed(given.corrupted)))
    assert torch.allclose(scores.values[0], vs.logit_diff(logits, given), atol=1e-5)


def test_globs_name_modules(model: vs.Model) -> None:
    scores = vs.sweep(model, pairs(), sites="module:blocks.*.out|in")
    assert scores.sites == ("module:blocks.0.out|in", "module:blocks.1.out|in")


def test_a_tensor_without_tokens_is_patched_whole_or_refused(model: vs.Model) -> None:
    assert vs.sweep(model, pairs(), sites="module:pooled|out").values.shape == (1, 5)
    with pytest.raises(InputError, match=r"module:pooled\|out is \[example, 6\] here, which does not count the 4"):
        vs.sweep(model, pairs(), sites="module:pooled|out", each="position")
    ragged = vs.sweep(model, pairs(RAGGED), sites="module:pooled|out")
    for row in range(5):
        expected = by_hand(model.module, pairs(RAGGED), "pooled", None, row)
        assert float(ragged.values[0, row]) == pytest.approx(expected, abs=1e-5)


def test_modules_of_a_model_with_an_adapter_are_swept_too() -> None:
    model, given, heard = families.model("llama"), tiny.pairs(n=4), list[Event]()
    by_path = vs.sweep(model, given, sites="module:model.layers.1.mlp|out", each="position", sink=heard.append)
    by_site = vs.sweep(model, given, sites="layers.1.mlp_out", each="position")
    assert torch.allclose(by_path.values, by_site.values, atol=1e-4)
    assert heard[0].message.startswith("no replay: module edits are not replayed")


def test_what_cannot_be_swept_is_refused(model: vs.Model) -> None:
    with pytest.raises(InputError, match=r"module:blocks.0\|out has no heads to go through"):
        vs.sweep(model, pairs(), sites="module:blocks.0|out", each="head")
    with pytest.raises(InputError, match=r"no module 'block' in Net .* its children: embed, blocks, pooled, head"):
        vs.sweep(model, pairs(), sites="module:block|out")
    with pytest.raises(UnknownNameError, match=r"unknown site 'module:b\*\.7\|out'"):
        vs.sweep(model, pairs(), sites="module:b*.7|out")
    with pytest.raises(InputError, match="has no adapter"):
        vs.sweep(model, pairs(), sites="layers.0.z")
    deep = vs.Model(nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Unflatten(2, (2, 3))))
    with pytest.raises(InputError, match=r"or \[example, class\]; Sequential gives \(5, 4, 2, 3\)"):
        vs.sweep(deep, pairs(), sites="module:0|out")
    with pytest.raises(InputError, match=r"module:0\|out is not \[example, pos, ...\], so prompts of unequal"):
        vs.sweep(vs.Model(Rows()), pairs(RAGGED), sites="module:0|out")
