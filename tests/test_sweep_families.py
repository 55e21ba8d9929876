"""Sweeps of every family equal one plain forward per edited run: by replay where there is one, else by whole runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from families import FAMILIES, distinct
from patching import edited
from vesalius.adapters import submodule
from vesalius.errors import InputError, NotFiniteError
from vesalius.jobs import Event
from vesalius.patching.evaluate import Outcome, evaluate
from vesalius.patching.plain import plain_value
from vesalius.patching.plan import Plan
from vesalius.patching.record import Recording, record, window_of
from vesalius.patching.sources import Source, source_for
from vesalius.patching.targets import Variant

EDITS = ("patch", "zero", "mean", "resample")
KINDS = ("z", "q", "k", "v", "attn_out", "mlp_in", "mlp_post", "mlp_out", "router", "expert_out")
REPLAYED = sorted(name for name, family in FAMILIES.items() if family.replayed)
WHOLE = sorted(set(FAMILIES) - set(REPLAYED))


@dataclass(frozen=True)
class Bench:
    model: vs.Model
    pairs: vs.Pairs
    clean: Recording
    corrupted: Recording
    parts: list[vs.Site]

    def source(self, mode: str) -> Source:
        return source_for(mode, self.clean, self.corrupted, 0)

    def run(self, variants: list[Variant], mode: str = "patch", **options: Any) -> Outcome:
        return evaluate(self.clean, variants, self.source(mode), self.pairs, vs.logit_diff, **options)

    def worst(self, variants: list[Variant], mode: str, out: Outcome) -> float:
        """Largest difference from plain runs of one example each, in units of the values' range."""
        source, found = self.source(mode), []
        for number, variant in enumerate(variants):
            example = number % len(self.pairs)
            plain = plain_value(self.clean, variant, source, self.pairs, vs.logit_diff, example)
            found.append(abs(plain - float(out.values[number, example])))
        return max(found) / float(out.values.max() - out.values.min())


def bench(name: str, **changes: Any) -> Bench:
    model, pairs = families.model(name, **changes), tiny.pairs(n=4)
    inside = [site for site in model.sites() if site.layer is not None]
    sites = [site for site in inside if site.kind in KINDS]
    runs = [record(model, pairs.tokens(which), sites) for which in ("clean", "corrupted")]
    indexed = [site[1] for site in inside if site.kind in ("z", "q", "k", "v", "mlp_post", "router", "expert_out")]
    whole = [site for site in inside if site.kind in (*KINDS, "resid_pre", "resid_post")]
    return Bench(model, pairs, *runs, [*indexed, *whole, vs.Site("embed")])


@pytest.fixture(scope="module", params=distinct(sorted(FAMILIES)))
def table(request: pytest.FixtureRequest) -> Bench:
    return bench(request.param)


def drawn(table: Bench, count: int, seed: int) -> list[Variant]:
    """Random parts and positions, alone and together."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    def part() -> vs.Site:
        return table.parts[draw(len(table.parts))]

    return [edited(tuple({part() for _ in range(1 + draw(3))}), None if draw(2) else draw(9)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("mode", EDITS)
def test_random_parts_and_positions_equal_plain_runs(table: Bench, mode: str) -> None:
    variants = drawn(table, 6, seed=EDITS.index(mode))
    assert table.worst(variants, mode, table.run(variants, mode)) < 1e-5


def test_replayed_parts_of_every_layer_equal_plain_runs(table: Bench) -> None:
    """Without routers and experts, which send a whole batch to ordinary runs."""
    variants = [edited((part,)) for part in table.parts if part.kind not in ("router", "expert_out")]
    variants = variants[:: 1 if table.clean.reason == "" else 4]
    heard: list[Event] = []
    out = table.run(variants, sink=heard.append)
    assert table.worst(variants, "patch", out) < 1e-5
    assert any(event.message.startswith("no replay") for event in heard) == bool(table.clean.reason)


@pytest.mark.parametrize("name", REPLAYED)
def test_these_families_are_replayed(name: str) -> None:
    assert bench(name).clean.reason == ""


@pytest.mark.parametrize(
    ("name", "windows", "caps"),
    [
        ("llama", (None, None), (None, None)),
        ("mistral", (4, 4), (None, None)),
        ("phi3", (4, 4), (None, None)),
        ("qwen2", (None, 3), (None, None)),
        ("gemma2", (3, None), (2.0, 2.0)),
        ("gemma3", (3, None), (None, None)),
    ],
)
def test_windows_and_caps_are_read_off_the_run(name: str, windows: Any, caps: Any) -> None:
    table = bench(name)
    assert (table.clean.windows, table.clean.caps) == (windows, caps)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "phi3"])
def test_the_window_under_test_changes_the_numbers(name: str) -> None:
    narrow, wide = bench(name), bench(name, sliding_window=50)
    assert wide.clean.windows == (None, None)
    assert not torch.allclose(narrow.clean.resid[-1][:, 8], wide.clean.resid[-1][:, 8], atol=1e-2)


def test_the_caps_under_test_change_the_numbers() -> None:
    capped, free = bench("gemma2"), bench("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert not torch.allclose(capped.clean.resid[-1], free.clean.resid[-1], atol=1e-2)
    variants = drawn(free, 8, seed=3)
    assert free.worst(variants, "patch", free.run(variants)) < 1e-5


def test_the_base_is_the_plain_run(table: Bench) -> None:
    plain = vs.logit_diff(table.model.run(table.pairs.tokens("clean")).logits, table.pairs)
    assert torch.allclose(table.run([edited((vs.Site("embed"),))]).base, plain, atol=1e-4)


def test_patching_everything_gives_the_other_run(table: Bench) -> None:
    other = vs.logit_diff(table.model.run(table.pairs.tokens("corrupted")).logits, table.pairs)
    out = table.run([edited((vs.Site("embed"),)), edited((vs.Site("resid_post", 1),))])
    last = table.model.architecture[1].n_layers == 2
    assert torch.allclose(out.values[: 1 + last], other.expand(1 + last, -1), atol=1e-4)


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", WHOLE)
def test_whole_runs_are_announced_with_the_reason(name: str) -> None:
    heard: list[Event] = []
    bench(name).run([edited((vs.Site("z", 0, 1),))], sink=heard.append)
    assert heard[0].kind == "note"
    expected = "reads later positions too" if not FAMILIES[name].causal else "does not say how to replay a layer"
    assert heard[0].message.startswith("no replay: ")
    assert expected in heard[0].message
    assert [heard[1].kind, heard[-1].kind] == ["start", "end"]


@pytest.mark.parametrize("name", ["bloom", "bert"])
@pytest.mark.parametrize("budget", [1, 20, 10_000])
def test_whole_runs_do_not_depend_on_the_budget(name: str, budget: int) -> None:
    table = bench(name)
    variants = drawn(table, 6, seed=1)
    assert torch.allclose(table.run(variants, budget=budget).values, table.run(variants).values, atol=1e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_the_estimate_of_whole_runs_is_the_bill(name: str) -> None:
    table = bench(name)
    variants = [edited((vs.Site("z", 0, 1),), position) for position in (None, 0, 5, 8)]
    bill = table.run(variants).cost
    assert Plan(table.clean, variants, table.source("patch"), table.pairs.ends).estimate() == bill
    assert bill.spent + bill.skipped == bill.naive == 16


def test_where_attention_reads_both_ways_earlier_positions_differ_too() -> None:
    """A causal model's values before the first differing token are equal; BERT's are not, and are patched."""
    table = bench("bert")
    assert table.source("patch").first.tolist() == [0, 0, 0, 0]
    out = table.run([edited((vs.Site("resid_post", 0),), 0)])
    assert float((out.values - out.base).abs().min()) > 1e-4
    assert bench("llama").source("patch").first.min() >= 2


def test_a_position_past_the_end_is_not_run() -> None:
    table = bench("bert")
    out = table.run([edited((vs.Site("resid_post", 0),), 8)])
    short = table.pairs.size <= 8
    assert short.any()
    assert torch.equal(out.values[0][short], out.base[short])
    assert out.cost.skipped == int(short.sum())


@pytest.mark.parametrize("name", ["bloom", "bert", "gemma2", "mistral"])
@pytest.mark.parametrize("kind", ["pattern", "z", "mlp_out"])
def test_watched_sites_equal_the_captures_of_plain_runs(name: str, kind: str) -> None:
    table, site = bench(name), vs.Site(kind, 1)
    variants = [edited((vs.Site("z", 0, 1),)), edited((vs.Site("mlp_out", 0),), 5)]
    watched = table.run(variants, "zero", watch=[site]).watched[site]
    rows, pos = torch.arange(4), torch.arange(9)
    for number, variant in enumerate(variants):
        where = table.pairs.real & (True if variant.position is None else pos == variant.position)
        edits = [vs.Ablate(part, positions=where) for part in variant.parts]
        run = table.model.run(table.pairs.tokens("clean"), capture=[site], interventions=edits)
        expected = run[site][rows, :, table.pairs.at] if kind == "pattern" else run[site][rows, table.pairs.at]
        assert torch.allclose(watched[number], expected, atol=1e-5), variant


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_other_labels_are_scored_from_the_same_runs(name: str) -> None:
    table = bench(name)
    swapped = replace(table.pairs, answer=table.pairs.distractor, distractor=table.pairs.answer)
    out = table.run(drawn(table, 4, seed=2), others=[swapped])
    assert torch.allclose(out.others[0], -out.values, atol=1e-5)
    assert torch.allclose(out.others_base[0], -out.base, atol=1e-5)


@pytest.mark.parametrize("metric", [vs.kl_divergence, vs.answer_logprob], ids=lambda metric: metric.name)
@pytest.mark.parametrize("name", ["bloom", "bert", "gemma2"])
def test_metrics_of_the_whole_vocabulary_equal_plain_runs(name: str, metric: vs.Metric) -> None:
    table = bench(name)
    variants, source = drawn(table, 5, seed=4), table.source("mean")
    out = evaluate(table.clean, variants, source, table.pairs, metric)
    for number, variant in enumerate(variants):
        plain = plain_value(table.clean, variant, source, table.pairs, metric, 2)
        assert plain == pytest.approx(float(out.values[number, 2]), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma3"])
def test_a_weight_that_is_not_a_number_is_named_by_the_first_site_it_shows_in(name: str) -> None:
    table = bench(name)
    layer = table.model.layer(1)
    path = table.model.architecture[0].o_proj
    with torch.no_grad():
        layer.get_submodule(path).weight.view(-1)[3] = float("nan")
    base = record(table.model, table.pairs.tokens("clean"), [vs.Site("z", 0)])
    source = source_for("zero", base, base, 0)
    with pytest.raises(NotFiniteError, match=r"with nothing edited: layers.1.attn_out is the first site with NaN"):
        evaluate(base, [edited((vs.Site("z", 0, 1),))], source, table.pairs, vs.logit_diff)


def test_a_value_that_is_not_a_number_is_refused_in_whole_runs() -> None:
    table, site = bench("bloom"), vs.Site("mlp_out", 0)
    broken = table.corrupted[site].clone()
    broken[2] = float("nan")
    source = source_for("patch", table.clean, replace(table.corrupted, sites={site: broken}), 0)
    told = r"not finite for example 2 with layers.0.mlp_out edited: layers.0.mlp_out is the first site with NaN"
    with pytest.raises(NotFiniteError, match=told):
        evaluate(table.clean, [edited((site,))], source, table.pairs, vs.logit_diff)


@pytest.mark.parametrize("kind", ["router", "expert_out"])
def test_routers_and_experts_are_swept_by_whole_runs(kind: str) -> None:
    heard: list[Event] = []
    table = bench("mixtral")
    out = table.run([edited((vs.Site(kind, 1, 2),))], sink=heard.append)
    assert heard[0].message == f"no replay: {kind} edits are not replayed; every edited run is one whole forward"
    assert not torch.allclose(out.values[0], out.base)


def test_a_layer_with_a_tensor_nobody_told_about_is_run_whole() -> None:
    model, pairs = families.model("llama"), tiny.pairs(n=4)
    adapter = model.architecture[0]
    unaware = {name: rule for name, rule in adapter.replay.items() if name != "position_embeddings"}
    model.adapter = replace(adapter, replay=unaware)
    base = record(model, pairs.tokens("clean"), [vs.Site("z", 0)])
    assert "takes a tensor 'position_embeddings' that its adapter has no replay rule for" in base.reason
    heard: list[Event] = []
    source, variants = source_for("zero", base, base, 0), [edited((vs.Site("z", 0, 1),))]
    out = evaluate(base, variants, source, pairs, vs.logit_diff, sink=heard.append)
    known = bench("llama")
    assert torch.allclose(out.values, known.run(variants, "zero").values, atol=1e-4)
    assert heard[0].kind == "note"


# ---------------------------------------------------------------------------------------------------------- masks


def additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]


def test_the_window_of_a_mask() -> None:
    lengths, pos = torch.tensor([6, 4]), torch.arange(6)
    back = pos[:, None] - pos
    real = (pos < lengths[:, None])[:, None, :]
    causal = (back >= 0) & real
    assert window_of(additive(causal), lengths) is None
    assert window_of(causal[:, None], lengths) is None
    assert window_of(additive(causal & (back < 2)), lengths) == 2
    assert window_of(additive(real.expand(-1, 6, -1)), lengths) == 0  # both ways
    assert window_of(additive(causal & (back % 2 == 0)), lengths) == 0  # dilated
    assert window_of(additive(causal & (pos[:, None] // 3 == pos // 3)), lengths) == 0  # in chunks
    assert window_of(additive(causal).expand(-1, 2, -1, -1), lengths) == 0  # a mask per head may differ by head


# ------------------------------------------------------------------------------------------------ the public sweep


@pytest.mark.parametrize("name", ["bloom", "bert", "gemma3", "olmoe"])
def test_a_public_sweep_of_heads_equals_hooks(name: str) -> None:
    model, pairs = families.model(name), tiny.pairs(n=4)
    heard: list[Event] = []
    scores = vs.sweep(model, pairs, sites="layers.*.z", each="head", sink=heard.append)
    assert scores.values.shape == (2, 6, 4)
    source = model.run(pairs.tokens("clean"), capture=["layers.*.z"]).activations
    for layer, head in ((0, 2), (1, 5)):
        patch = vs.Patch(f"layers.{layer}.z[{head}]", source=source, positions=pairs.real)
        run = model.run(pairs.tokens("corrupted"), interventions=[patch])
        assert torch.allclose(scores.values[layer, head], vs.logit_diff(run.logits, pairs), atol=1e-4)
    for which, found in (("corrupted", scores.base), ("clean", scores.source)):
        plain = vs.logit_diff(model.run(pairs.tokens(which)).logits, pairs)
        assert torch.allclose(found, plain, atol=1e-4)
    assert any("no replay" in event.message for event in heard) == (name in WHOLE)


def test_left_padding_is_refused_by_families_without_replay_too() -> None:
    mask = torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match="right-padded prompts"):
        record(families.model("bloom"), vs.Tokens(torch.tensor([[0, 5, 6]]), mask))


def test_hooks_and_attention_are_put_back(table: Bench) -> None:
    module = table.model.module
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()) == 0
    assert module.config._attn_implementation != "vesalius"
    assert submodule(module, table.model.architecture[0].layers) is not None
