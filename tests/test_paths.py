"""Path patching equals three runs with plain hooks, and keeps the laws of linear paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.jobs import Event
from vesalius.model.direct import frozen_norm
from vesalius.patching import replay

SENDERS = ["embed", "layers.*.z", "layers.*.mlp_out", "layers.0.attn_out"]
RECEIVERS = [
    ["layers.2.q[1]", "layers.2.k"],
    ["layers.1.v[0]", "layers.2.mlp_in"],
    ["layers.2.mlp_in"],
    ["layers.1.q", "layers.2.v"],
    ["logits"],
]


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs()


# ------------------------------------------------------------------------------------------------------ by plain hooks


Place = tuple[nn.Module, str, slice]


def place(model: vs.Model, name: str) -> Place:
    """The module, its side, and the columns of a site; written here again, on purpose."""
    site = vs.Site.parse(name)
    if name == "embed":
        return model.layer(0), "in", slice(None)
    assert site.layer is not None
    layer, gpt2 = model.layer(site.layer), hasattr(model.layer(site.layer), "attn")
    depth = 12 if gpt2 else 8
    columns = slice(None) if site.index is None else slice(site.index * depth, (site.index + 1) * depth)
    if site.kind == "z":
        return layer.get_submodule("attn.c_proj" if gpt2 else "self_attn.o_proj"), "in", columns
    if site.kind in ("q", "k", "v") and gpt2:
        start = "qkv".index(site.kind) * 48
        wide = range(48)[columns]
        return layer.attn.c_attn, "out", slice(start + wide.start, start + wide.stop)
    if site.kind in ("q", "k", "v"):
        return layer.get_submodule(f"self_attn.{site.kind}_proj"), "out", columns
    if site.kind == "attn_out":
        return layer.get_submodule("attn.c_proj" if gpt2 else "self_attn.o_proj"), "out", columns
    return layer.mlp, "in" if site.kind == "mlp_in" else "out", columns


def hooked(module: nn.Module, side: str, visit: Callable[[Tensor], Tensor]) -> Any:
    if side == "in":
        return module.register_forward_pre_hook(lambda _m, args: (visit(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _m, _i, out: visit(out))


def run(model: vs.Model, ids: Tensor, read: list[str], write: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of one unpadded prompt, what was read (before it is written), with some places overwritten."""
    seen: dict[str, Tensor] = {}
    handles = []

    def reader(name: str, columns: slice) -> Callable[[Tensor], Tensor]:
        def visit(tensor: Tensor) -> Tensor:
            seen[name] = tensor[..., columns].clone()
            return tensor

        return visit

    def writer(name: str, columns: slice) -> Callable[[Tensor], Tensor]:
        def visit(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            tensor[..., columns] = write[name]
            return tensor

        return visit

    for names, make in ((read, reader), (list(write), writer)):
        for name in names:
            module, side, columns = place(model, name)
            handles.append(hooked(module, side, make(name, columns)))
    with torch.no_grad():
        logits = model.module(ids).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def order(name: str) -> float:
    """When a sender acts."""
    site = vs.Site.parse(name)
    return -1.0 if site.layer is None else site.layer + (0.5 if site.kind == "mlp_out" else 0.0)


def three_runs(model: vs.Model, pairs: vs.Pairs, sender: str, receivers: list[str], freeze_mlps: bool) -> list[float]:
    """Per example: clean prompt, corrupted sender, heard by the receivers only."""
    values = []
    for row in range(len(pairs)):
        size = int(pairs.size[row])
        clean, corrupted = pairs.clean[row : row + 1, :size], pairs.corrupted[row : row + 1, :size]
        others = [f"layers.{n}.z" for n in range(3)] + (
            [f"layers.{n}.mlp_out" for n in range(3)] if freeze_mlps else []
        )
        later = [name for name in others if order(name) > order(sender)]
        base = run(model, clean, later, {})[1]
        sent = run(model, corrupted, [sender], {})[1]
        inside = [name for name in receivers if name != "logits"]
        logits, heard = run(model, clean, inside, {**base, **sent})
        if inside:
            logits = run(model, clean, [], heard)[0]
        last = logits[0, -1]
        values.append(float(last[pairs.answer[row]] - last[pairs.distractor[row]]))
    return values


@pytest.mark.parametrize("freeze_mlps", [True, False])
@pytest.mark.parametrize("receivers", RECEIVERS, ids=" ".join)
def test_every_path_equals_three_runs_with_plain_hooks(
    model: vs.Model, pairs: vs.Pairs, receivers: list[str], freeze_mlps: bool
) -> None:
    few = pairs.subset([0, 3])
    found = vs.path_patching(model, few, senders=SENDERS, receivers=receivers, each="head", freeze_mlps=freeze_mlps,
                             freeze_norm=False)  # fmt: skip
    plain = torch.tensor([three_runs(model, few, name, receivers, freeze_mlps) for name in found.sites])
    assert torch.allclose(found.values, plain, atol=2e-5)
    assert int((found.effects.abs() > 1e-3).sum()) > 4


def test_noising_and_denoising_are_each_others_mirror(model: vs.Model, pairs: vs.Pairs) -> None:
    swapped = replace(pairs, clean=pairs.corrupted, corrupted=pairs.clean)
    options: dict[str, Any] = {"senders": ["layers.0.z[1]", "layers.1.mlp_out"], "receivers": "layers.2.q"}
    found = vs.path_patching(model, pairs, base="corrupted", **options)
    assert torch.allclose(found.values, vs.path_patching(model, swapped, **options).values, atol=1e-5)
    plain = [vs.logit_diff(model.run(pairs.tokens(which)).logits, pairs) for which in ("corrupted", "clean")]
    assert torch.allclose(found.base, plain[0], atol=1e-5)
    assert torch.allclose(found.source, plain[1], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- laws


def test_a_path_to_the_logits_is_the_direct_effect_with_the_frozen_norm(model: vs.Model, pairs: vs.Pairs) -> None:
    found = vs.path_patching(model, pairs, senders=SENDERS[1:3], receivers="logits", each="head")
    names, rows = ["layers.*.z", "layers.*.mlp_out", "layers.2.resid_post"], torch.arange(len(pairs))
    clean, corrupted = (model.run(pairs.tokens(which), capture=names) for which in ("clean", "corrupted"))
    frozen = frozen_norm(model, clean["layers.2.resid_post"][rows, pairs.at], pairs.answer, pairs.distractor)
    for number, name in enumerate(found.sites):
        site = vs.Site.parse(name)
        change = (corrupted[site.whole] - clean[site.whole])[rows, pairs.at]
        write = change if site.index is None else model.head_writes(site.layer or 0, change)[:, site.index]
        assert torch.allclose(found.effects[number], frozen.of(write), atol=1e-5), name


def test_a_sender_after_its_receivers_has_no_effect_and_costs_nothing(model: vs.Model, pairs: vs.Pairs) -> None:
    found = vs.path_patching(model, pairs, senders=["layers.1.z[0]", "layers.2.mlp_out"], receivers="layers.1.q")
    assert torch.equal(found.effects, torch.zeros(2, 6))
    assert found.cost.spent == 2 * len(pairs)


def test_a_receiver_that_ignores_the_sender_passes_nothing_on(pairs: vs.Pairs) -> None:
    model = tiny.model("llama")
    options: dict[str, Any] = {"senders": "layers.0.z", "receivers": "layers.2.q[3]", "each": "head"}
    heard = vs.path_patching(model, pairs, **options)
    assert float(heard.effects.abs().max()) > 1e-3
    with torch.no_grad():
        model.layer(2).self_attn.q_proj.weight[24:32] = 0  # head 3 asks the same whatever it reads
    assert float(vs.path_patching(model, pairs, **options).effects.abs().max()) == 0.0


class Scaled(nn.Module):
    """A norm that is none: its output is linear in its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.linspace(0.5, 1.5, 48)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_in_a_linear_residual_net_the_direct_paths_add_up_to_the_total_effect(pairs: vs.Pairs) -> None:
    """Every part's own path to the logits; the embedding at the read position is the same in both prompts."""
    net = tiny.llama()
    net.model.norm = Scaled()
    model = vs.Model(net)
    pairs = replace(pairs, read=torch.tensor([4, 4, 4, 4, 4, 4]))  # a position where the tokens differ: embed sends too
    found = vs.path_patching(model, pairs, senders=SENDERS[:3], receivers="logits", each="head", freeze_norm=False)
    total = found.source - found.base
    assert float(found.effects[0].abs().max()) > 1e-2
    assert torch.allclose(found.effects.sum(0), total, atol=1e-4)
    # The control: with the model's own norm they do not.
    curved = vs.path_patching(tiny.model("llama"), pairs, senders=SENDERS[:3], receivers="logits", each="head",
                              freeze_norm=False)  # fmt: skip
    assert not torch.allclose(curved.effects.sum(0), curved.source - curved.base, atol=1e-2)


def test_a_whole_layer_of_receivers_and_the_rest_frozen_is_the_sum_of_what_they_heard(
    model: vs.Model, pairs: vs.Pairs
) -> None:
    """All that leaves the last layer's MLP open: sender -> its input, against patching it by hand."""
    found = vs.path_patching(model, pairs, senders="layers.1.mlp_out", receivers="layers.2.mlp_in")
    alone = vs.path_patching(model, pairs.subset([2]), senders="layers.1.mlp_out", receivers="layers.2.mlp_in")
    assert float(alone.values[0, 0]) == pytest.approx(float(found.values[0, 2]), abs=1e-5)


@pytest.mark.parametrize("budget", [9, 60, 10_000])
def test_the_budget_does_not_change_the_values(model: vs.Model, pairs: vs.Pairs, budget: int) -> None:
    options: dict[str, Any] = {"senders": SENDERS, "receivers": ["layers.2.q", "layers.2.mlp_in"], "each": "head"}
    reference = vs.path_patching(model, pairs, **options)
    found = vs.path_patching(model, pairs, budget=budget, **options)
    assert torch.allclose(found.values, reference.values, atol=1e-5)
    assert found.cost.spent == pytest.approx(reference.cost.spent)
    assert found.cost.spent < 0.6 * found.cost.naive


@pytest.mark.parametrize("receivers", ["layers.2.q", "logits"])
def test_the_cost_is_told_first_and_is_the_bill(model: vs.Model, pairs: vs.Pairs, receivers: str) -> None:
    heard: list[Event] = []
    found = vs.path_patching(model, pairs, senders="layers.*.z", each="head", receivers=receivers, sink=heard.append)
    assert heard[0].kind == "note"
    assert heard[0].message.startswith(f"paths: {found.cost.describe()}; about ")
    assert "of memory" in heard[0].message


def test_metrics_of_the_whole_vocabulary_and_of_the_base_run_work(model: vs.Model, pairs: vs.Pairs) -> None:
    for metric in (vs.kl_divergence, vs.answer_logprob):
        for receivers, frozen in (("layers.2.q", True), ("logits", True), ("logits", False)):
            found = vs.path_patching(
                model, pairs, senders="layers.0.z", receivers=receivers, each="head", metric=metric, freeze_norm=frozen
            )
            assert float(found.effects.abs().max()) > 1e-5
    assert torch.allclose(found.base, vs.answer_logprob(model.run(pairs.tokens("clean")).logits, pairs), atol=1e-5)


# ------------------------------------------------------------------------------------------------ fallback and refusals


def test_a_model_that_cannot_be_replayed_gives_the_same_by_plain_runs_and_says_so(pairs: vs.Pairs) -> None:
    model, events = tiny.model("llama"), []
    assert model.adapter is not None
    slow = vs.Model(model.module, adapter=replace(model.adapter, replay={}))
    for receivers in (["layers.2.q[1]", "layers.2.mlp_in"], "logits"):
        options: dict[str, Any] = {"senders": SENDERS, "receivers": receivers, "each": "head"}
        found = vs.path_patching(slow, pairs, sink=events.append, **options)
        assert torch.allclose(found.values, vs.path_patching(model, pairs, **options).values, atol=1e-5)
    assert any(event.kind == "note" and "no replay" in event.message for event in events if isinstance(event, Event))


def test_where_attention_looks_both_ways_every_position_is_sent_and_held() -> None:
    model, pairs = families.model("bert"), tiny.pairs()
    found = vs.path_patching(model, pairs, senders="layers.0.z", receivers="layers.1.mlp_in")
    n_layers, rows = model.architecture[1].n_layers, torch.arange(len(pairs))
    names = ["layers.*.z", "layers.*.mlp_out"]
    base, other = (model.run(pairs.tokens(which), capture=names).activations for which in ("clean", "corrupted"))
    held = [vs.Freeze(f"layers.{n}.z", source=base) for n in range(1, n_layers)]
    held += [vs.Freeze(f"layers.{n}.mlp_out", source=base) for n in range(n_layers)]
    edits = [vs.Patch("layers.0.z", source=other), *held]
    heard = model.run(pairs.tokens("clean"), capture=["layers.1.mlp_in"], interventions=edits).activations
    patch = vs.Patch("layers.1.mlp_in", source=heard)
    last = model.run(pairs.tokens("clean"), interventions=[patch]).logits[rows, pairs.at]
    assert torch.allclose(found.values[0], last[rows, pairs.answer] - last[rows, pairs.distractor], atol=1e-5)
    assert float(found.effects.abs().max()) > 1e-3
    with pytest.raises(InputError, match="no direct effects with frozen norms; pass freeze_norm=False"):
        vs.path_patching(model, pairs, senders="layers.0.z", receivers="logits")


def test_a_sabotaged_replay_is_caught(model: vs.Model, pairs: vs.Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = replay.Replay.run

    def wrong(self: replay.Replay) -> tuple[Tensor, dict[vs.Site, Tensor]]:
        hidden, seen = real(self)
        return hidden + 0.1 * torch.linspace(-1, 1, hidden.shape[-1]), seen

    monkeypatch.setattr(replay.Replay, "run", wrong)
    options: dict[str, Any] = {"senders": "layers.0.z", "receivers": "layers.2.q", "each": "head"}
    with pytest.raises(SelfCheckError, match="replay and plain runs differ by"):
        vs.path_patching(model, pairs, **options)
    vs.path_patching(model, pairs, check=False, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"senders": "layers.0.q"}, InputError, "layers.0.q does not send; senders are embed, z, attn_out, mlp_out"),
        ({"receivers": "layers.2.z"}, InputError, "layers.2.z does not receive; receivers are q, k, v, mlp_in, logits"),
        ({"receivers": ["logits", "layers.2.q"]}, InputError, "logits receive alone"),
        ({"receivers": []}, InputError, "needs at least one receiver"),
        ({"senders": []}, InputError, "needs at least one sender"),
        ({"senders": "layers.9.z"}, InputError, "has 3 layers"),
        ({"each": "position"}, UnknownNameError, "unknown each 'position'; known: head"),
        ({"base": "dirty"}, UnknownNameError, "unknown base 'dirty'; known: clean, corrupted"),
        ({"metric": vs.next_token_loss}, InputError, "next_token_loss reads every position"),
    ],
)
def test_what_cannot_send_or_receive_is_refused(
    model: vs.Model, pairs: vs.Pairs, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        vs.path_patching(model, pairs, **{"senders": "layers.0.z", "receivers": "layers.2.q", **options})


def test_a_metric_that_is_not_a_number_names_the_sender(pairs: vs.Pairs) -> None:
    metric = replace(vs.logit_diff, of=lambda logits, _base, chosen: torch.where(
        logits[:, 0] == logits[:, 0], torch.full((len(chosen),), float("nan")), 0.0))  # fmt: skip
    with pytest.raises(NotFiniteError, match=r"not finite for example 0 with layers.0.z as sender"):
        vs.path_patching(tiny.model("llama"), pairs, senders="layers.0.z", receivers="layers.2.q", metric=metric)


def test_hooks_are_gone_after_path_patching(model: vs.Model, pairs: vs.Pairs) -> None:
    vs.path_patching(model, pairs, senders="layers.0.z", receivers=["layers.2.q", "layers.1.mlp_in"])
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == 0
    assert model.module.config._attn_implementation == "sdpa"
