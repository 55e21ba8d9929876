"""Recording and replay gives what one plain forward per edited run gives, and says so when it does not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from patching import edited
from vesalius.errors import InputError, InterventionError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.jobs import Event
from vesalius.patching import replay
from vesalius.patching.evaluate import Outcome, evaluate
from vesalius.patching.plain import plain_value
from vesalius.patching.plan import Plan
from vesalius.patching.record import Recording, record
from vesalius.patching.sources import Source, source_for
from vesalius.patching.targets import Variant, normal

FAMILIES = sorted(tiny.FAMILIES)
EDITS = ("patch", "zero", "mean", "resample")
KINDS = ("z", "q", "k", "v", "attn_out", "mlp_in", "mlp_post", "mlp_out")
WHOLE = ("q", "attn_out", "mlp_in", "mlp_out", "resid_pre", "resid_post")


@dataclass(frozen=True)
class Bench:
    """A tiny model with both runs of its pairs, and every site a sweep can edit."""

    model: vs.Model
    pairs: vs.Pairs
    clean: Recording
    corrupted: Recording
    sites: list[vs.Site]
    captured: vs.Activations
    """The corrupted run, by ordinary hooks."""

    def source(self, mode: str) -> Source:
        return source_for(mode, self.clean, self.corrupted, 0)

    def run(
        self, variants: list[Variant], mode: str = "patch", metric: vs.Metric = vs.logit_diff, **options: Any
    ) -> Outcome:
        return evaluate(self.clean, variants, self.source(mode), self.pairs, metric, **options)


def bench(family: str, layers: int = 2) -> Bench:
    model, pairs = tiny.model(family, layers=layers), tiny.pairs(n=4)
    sites = [site for kind in KINDS for site in model.sites(f"layers.*.{kind}")]
    runs = [record(model, pairs.tokens(which), sites) for which in ("clean", "corrupted")]
    heads = [site[h] for site in model.sites("layers.*.z") for h in range(model.architecture[1].n_heads)]
    whole = [s for kind in WHOLE for s in model.sites(f"layers.*.{kind}")]
    single = [site[1] for kind in ("k", "v") for site in model.sites(f"layers.*.{kind}")]
    neurons = [site[5] for site in model.sites("layers.*.mlp_post")]
    names = [f"layers.*.{kind}" for kind in (*KINDS, "resid_pre", "resid_post")]
    captured = model.run(pairs.tokens("corrupted"), capture=names).activations
    return Bench(model, pairs, *runs, [*heads, *whole, *single, *neurons, vs.Site("embed")], captured)


@pytest.fixture(scope="module", params=FAMILIES)
def table(request: pytest.FixtureRequest) -> Bench:
    return bench(request.param)


def values_by_hand(table: Bench, site: vs.Site, mode: str) -> Tensor:
    """What an edit writes at a whole site, [example, pos, ...], from an ordinary run and the words of each edit."""
    given, sizes = table.captured[site].clone(), table.pairs.size.tolist()
    if mode == "patch":
        return given
    if mode == "zero":
        return torch.zeros_like(given)
    if mode == "mean":
        later = torch.cat([row[1:size] for row, size in zip(given, sizes, strict=True)]).mean(0)
        first = given[:, 0].mean(0)
        return torch.stack([first, *[later] * (given.shape[1] - 1)])[None].expand_as(given)
    for row, size in zip(given, sizes, strict=True):
        row[size:] = row[size - 1]
    return given[table.source("resample").example]


def where_by_hand(table: Bench, variant: Variant, mode: str) -> Tensor:
    """[example, pos]: the positions a variant edits."""
    differs = table.pairs.clean != table.pairs.corrupted
    mask = table.pairs.real & ((differs.cumsum(1) > 0) if mode == "patch" else True)
    return mask if variant.position is None else mask & (torch.arange(9) == variant.position)


def edits_by_hand(table: Bench, variant: Variant, mode: str) -> list[vs.Patch]:
    mask, edits = where_by_hand(table, variant, mode), []
    for part in variant.parts:
        assert isinstance(part, vs.Unit)
        site = vs.Site("resid_pre", 0) if part.site.kind == "embed" else part.site
        source = vs.Unit(site).read(values_by_hand(table, site.whole, mode))
        edits.append(vs.Patch(site, source=source, positions=mask))
    return edits


def worst(table: Bench, variants: list[Variant], mode: str, out: Outcome, metric: vs.Metric = vs.logit_diff) -> float:
    """Largest difference from one ordinary run with hooks per variant, in units of the values' range."""
    tokens = table.pairs.tokens("clean")
    base = table.model.run(tokens).logits
    runs = [table.model.run(tokens, interventions=edits_by_hand(table, v, mode)) for v in variants]
    plain = torch.stack([metric(run.logits, table.pairs, base) for run in runs])
    return float((plain - out.values).abs().max() / (plain.max() - plain.min()))


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("mode", EDITS)
def test_every_head_layer_and_part_equals_a_plain_run(table: Bench, mode: str) -> None:
    variants = [edited((site,)) for site in table.sites]
    assert worst(table, variants, mode, table.run(variants, mode)) < 1e-5


@pytest.mark.parametrize("mode", EDITS)
def test_every_position_equals_a_plain_run(table: Bench, mode: str) -> None:
    names = ("layers.0.resid_post", "layers.1.z[1]", "layers.0.k[0]", "embed")
    variants = [edited((vs.Site.parse(name),), position) for name in names for position in range(9)]
    assert worst(table, variants, mode, table.run(variants, mode)) < 1e-5


@pytest.mark.parametrize("mode", EDITS)
def test_parts_edited_together_equal_a_plain_run(table: Bench, mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    picks = [torch.randperm(len(table.sites), generator=generator)[:size].tolist() for size in (2, 3, 5, 9, 9)]
    variants = [edited(tuple(table.sites[i] for i in pick), 5 if n == 2 else None) for n, pick in enumerate(picks)]
    assert worst(table, variants, mode, table.run(variants, mode)) < 1e-5


@pytest.mark.parametrize("mode", EDITS)
def test_the_self_checks_plain_run_agrees_with_ordinary_patches(table: Bench, mode: str) -> None:
    variants = [
        edited((table.sites[1], table.sites[-1])),
        edited((table.sites[7],), 4),
        edited((vs.Site("resid_post", 1),)),
    ]
    out = table.run(variants, mode)
    for number, variant in enumerate(variants):
        for example in (0, 3):
            plain = plain_value(table.clean, variant, table.source(mode), table.pairs, vs.logit_diff, example)
            assert plain == pytest.approx(float(out.values[number, example]), abs=1e-4)


@pytest.mark.parametrize("metric", [vs.kl_divergence, vs.answer_logprob], ids=lambda metric: metric.name)
def test_metrics_of_the_whole_vocabulary_equal_a_plain_run(table: Bench, metric: vs.Metric) -> None:
    variants = [edited((site,)) for site in table.sites[::3]]
    assert worst(table, variants, "patch", table.run(variants, metric=metric), metric) < 1e-5


def test_an_earlier_read_position_is_read_there(table: Bench) -> None:
    pairs = replace(table.pairs, read=torch.tensor([4, 5, 4, 5]))
    early = replace(table, pairs=pairs)
    variants = [edited((site,)) for site in table.sites[::4]]
    out = early.run(variants)
    assert worst(early, variants, "patch", out) < 1e-5
    assert not torch.allclose(out.values, table.run(variants).values)


def test_patching_everything_gives_the_other_run(table: Bench) -> None:
    other = vs.logit_diff(table.model.run(table.pairs.tokens("corrupted")).logits, table.pairs)
    out = table.run([edited((vs.Site("embed"),)), edited((vs.Site("resid_post", 1),))])
    assert torch.allclose(out.values, other.expand(2, -1), atol=1e-5)


def test_the_base_is_the_plain_run(table: Bench) -> None:
    plain = vs.logit_diff(table.model.run(table.pairs.tokens("clean")).logits, table.pairs)
    assert torch.allclose(table.run([edited((table.sites[0],))]).base, plain, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_budget_does_not_change_the_values(table: Bench, budget: int) -> None:
    variants = [edited((site,), position) for site in table.sites[::3] for position in (None, 4)]
    reference = table.run(variants)
    out = table.run(variants, budget=budget)
    assert float((out.values - reference.values).abs().max()) < 1e-5 * float(
        reference.values.max() - reference.values.min()
    )
    assert out.cost == reference.cost or out.cost.spent == pytest.approx(reference.cost.spent)


def test_a_small_budget_makes_more_batches(table: Bench) -> None:
    variants = [edited((site,)) for site in table.sites]
    plan = Plan(table.clean, variants, table.source("patch"), table.pairs.ends)
    counts = [len(list(plan.batches(budget))) for budget in (1, 100, 10_000)]
    assert counts[0] > counts[1] > counts[2] == 1


# --------------------------------------------------------------------------------------------- what is provably skipped


def test_a_cell_that_nothing_can_change_is_exactly_the_base(table: Bench) -> None:
    differs = (table.pairs.clean != table.pairs.corrupted).long().argmax(1)
    variants = [edited((vs.Site("resid_post", 0),), position) for position in range(9)]
    out = table.run(variants)
    for position in range(9):
        skipped = (position < differs) | (position >= table.pairs.size)
        assert torch.equal(out.values[position][skipped], out.base[skipped])
        assert skipped.any() == bool((out.values[position] == out.base).any())
    assert out.cost.skipped == int(sum(((p < differs) | (p >= table.pairs.size)).sum() for p in range(9)))


def test_a_replay_costs_less_than_plain_runs(table: Bench) -> None:
    variants = [edited((site,)) for site in table.sites]
    cost = table.run(variants).cost
    assert cost.naive == len(variants) * 4
    assert cost.spent < 0.7 * cost.naive
    assert cost.describe().startswith(f"{cost.spent:.0f} forward equivalents (plain: {cost.naive:.0f}")


def test_the_estimate_is_the_bill(table: Bench) -> None:
    variants = [edited((site,), position) for site in table.sites for position in (None, 2, 8)]
    bill = table.run(variants).cost
    estimate = Plan(table.clean, variants, table.source("patch"), table.pairs.ends).estimate()
    assert (estimate.naive, estimate.skipped) == (bill.naive, bill.skipped)
    assert estimate.spent == pytest.approx(bill.spent)


# ------------------------------------------------------------------------------------------------------ what is watched


@pytest.mark.parametrize(
    "name", ["layers.1.pattern", "layers.1.z", "layers.0.attn_out", "layers.1.mlp_post", "layers.1.q"]
)
def test_watched_sites_equal_the_captures_of_a_plain_run(table: Bench, name: str) -> None:
    site = vs.Site.parse(name)
    variants = [edited((part,), position) for part in table.sites[::4] for position in (None, 4)]
    watched = table.run(variants, "zero", watch=[site]).watched[site]
    rows = torch.arange(4)
    for number, variant in enumerate(variants):
        edits = edits_by_hand(table, variant, "zero")
        run = table.model.run(table.pairs.tokens("clean"), capture=[site], interventions=edits)
        expected = run[name][rows, :, table.pairs.at] if site.kind == "pattern" else run[name][rows, table.pairs.at]
        assert torch.allclose(watched[number], expected, atol=1e-5), variant


@pytest.mark.parametrize("name", ["layers.0.resid_pre", "layers.0.z[1]", "embed", "layers.1.scores"])
def test_a_site_that_cannot_be_watched_is_refused(table: Bench, name: str) -> None:
    with pytest.raises(InputError, match="cannot be watched; watch whole sites inside layers"):
        table.run([edited((table.sites[0],))], watch=[vs.Site.parse(name)])


def test_a_site_that_was_not_recorded_is_named(table: Bench) -> None:
    bare = record(table.model, table.pairs.tokens("clean"))
    with pytest.raises(UnknownNameError, match=r"unknown recorded site 'layers.0.z'.*Add it to record"):
        bare[vs.Site("z", 0)]


# ----------------------------------------------------------------------------------------------- sources, by their word


def test_the_mean_source_holds_means_over_real_positions(table: Bench) -> None:
    site = vs.Site("mlp_out", 1)
    values, real = table.corrupted[site], table.pairs.real.clone()
    given = table.source("mean").tensor(site)
    real[:, 0] = False
    assert torch.allclose(given[0, 3], values[real].mean(0), atol=1e-6)
    assert torch.allclose(given[0, 0], values[:, 0].mean(0), atol=1e-6)


def test_the_first_position_is_left_alone_when_all_prompts_begin_alike() -> None:
    table = bench("llama")
    assert table.source("mean").first.tolist() == [0] * 4
    clean, corrupted = table.pairs.clean.clone(), table.pairs.corrupted.clone()
    clean[:, 0] = corrupted[:, 0] = 5
    same = replace(table.pairs, clean=clean, corrupted=corrupted)
    runs = [record(table.model, same.tokens(which), [vs.Site("z", 0)]) for which in ("clean", "corrupted")]
    for mode in ("mean", "resample"):
        source = source_for(mode, runs[0], runs[1], 0)
        assert source.first.tolist() == [1] * 4
    # The first position sees only itself, so leaving it alone is exact.
    assert torch.allclose(runs[0][vs.Site("z", 0)][:, 0], runs[1][vs.Site("z", 0)][[1, 2, 3, 0], 0], atol=1e-6)


def test_the_resample_source_gives_another_examples_values(table: Bench) -> None:
    source, site, sizes = table.source("resample"), vs.Site("mlp_out", 0), table.pairs.size
    assert not bool((source.example == torch.arange(4)).any())
    # Real tokens everywhere: a donor is at least as long.
    assert bool((sizes[source.example] >= sizes).all())
    assert torch.equal(source.tensor(site), table.corrupted[site])


def test_a_prompt_longer_than_all_others_cannot_be_resampled() -> None:
    pairs = replace(tiny.pairs(n=4), lengths=torch.tensor([6, 9, 7, 7]), read=None)
    with pytest.raises(InputError, match="no other prompt of the reference has the 9 tokens resampled in prompt 1"):
        vs.sweep(tiny.model("llama"), pairs, sites="layers.0.z", edit="resample")


def test_an_unknown_edit_lists_the_known(table: Bench) -> None:
    with pytest.raises(UnknownNameError, match="unknown edit 'median'; known: mean, patch, resample, steer, zero"):
        table.source("median")


def test_sources_must_be_aligned_with_the_base(table: Bench) -> None:
    fewer = record(table.model, table.pairs.subset([0, 1]).tokens("clean"))
    for mode in ("patch", "resample"):
        with pytest.raises(InputError, match="aligned example by example"):
            source_for(mode, table.clean, fewer, 0)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_sabotaged_replay_is_caught(table: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = replay.Replay.run

    def wrong(self: replay.Replay) -> tuple[Tensor, dict[vs.Site, Tensor]]:
        hidden, seen = real(self)
        return hidden + 0.1 * torch.linspace(-1, 1, hidden.shape[-1]), seen

    monkeypatch.setattr(replay.Replay, "run", wrong)
    variants = [edited((site,)) for site in table.sites]
    with pytest.raises(SelfCheckError, match=r"replay gave .* and a plain run .*; please report this model"):
        table.run(variants)
    table.run(variants, check=False)


def test_a_tensor_argument_without_a_replay_rule_is_refused(table: Bench) -> None:
    calls = tuple({**call, "surprise": (torch.zeros(1),)} for call in table.clean.calls)
    base = replace(table.clean, calls=calls)
    with pytest.raises(
        InterventionError, match="layer 0 takes a tensor 'surprise' that its adapter has no replay rule for"
    ):
        evaluate(base, [edited((vs.Site("z", 0),))], table.source("patch"), table.pairs, vs.logit_diff)


def test_a_metric_that_is_not_a_number_is_refused(table: Bench) -> None:
    values = table.corrupted[vs.Site("mlp_out", 0)].clone()
    values[2] = float("nan")
    broken = replace(table.corrupted, sites={**table.corrupted.sites, vs.Site("mlp_out", 0): values})
    source = source_for("patch", table.clean, broken, 0)
    with pytest.raises(NotFiniteError, match=r"not finite for example 2 with layers.0.mlp_out edited"):
        evaluate(table.clean, [edited((vs.Site("mlp_out", 0),))], source, table.pairs, vs.logit_diff)


def test_a_metric_of_all_positions_is_refused(table: Bench) -> None:
    with pytest.raises(InputError, match="next_token_loss reads every position"):
        table.run([edited((table.sites[0],))], metric=vs.next_token_loss)


@pytest.mark.parametrize("name", ["layers.0.pattern", "layers.0.resid_mid", "layers.0.result", "logits"])
def test_a_site_that_cannot_be_swept_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot be swept; sweep embed, resid_pre"):
        normal(vs.Site.parse(name))


def test_a_variant_without_parts_is_refused(table: Bench) -> None:
    with pytest.raises(InputError, match="a variant without parts edits nothing"):
        table.run([edited(())])


def test_left_padding_is_refused(table: Bench) -> None:
    mask = torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match="right-padded prompts"):
        record(table.model, vs.Tokens(torch.tensor([[0, 5, 6]]), mask))


def test_hooks_and_attention_are_put_back_after_a_sweep(table: Bench) -> None:
    plain = table.model.run(table.pairs.tokens("clean")).logits
    table.run([edited((site,)) for site in table.sites])
    assert table.model.module.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in table.model.module.modules()) == 0
    assert torch.equal(table.model.run(table.pairs.tokens("clean")).logits, plain)


def test_progress_is_told_and_ends_at_the_total(table: Bench) -> None:
    events: list[Event] = []
    table.run([edited((site,)) for site in table.sites], budget=50, sink=events.append)
    done = [event.done for event in events]
    assert (events[0].kind, events[-1].kind) == ("start", "end")
    assert done == sorted(done)
    assert events[-1].done == events[-1].total == len(table.sites)


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("mode", EDITS)
def test_random_cells_of_smollm2_equal_plain_runs(demo: vs.Model, mode: str) -> None:
    """Within 1e-5 of the range of the logits (measured rounding: 1e-4 of 33)."""
    pairs = vs.data.ioi(demo, n=8, seed=0).split("discovery")
    layers, heads = range(30), range(9)
    sites = [*demo.sites("layers.*.z"), *demo.sites("layers.*.mlp_out")]
    clean, corrupted = (record(demo, pairs.tokens(which), sites) for which in ("clean", "corrupted"))
    parts = (
        [vs.Site("z", n, h) for n in layers for h in heads]
        + [vs.Site("mlp_out", n) for n in layers]
        + [vs.Site("embed")]
    )
    source = source_for(mode, corrupted, clean, 0)
    generator = torch.Generator().manual_seed(0)
    variants = [edited((parts[int(i)],)) for i in torch.randperm(len(parts), generator=generator)[:40]]
    variants += [edited(tuple(parts[int(i)] for i in torch.randperm(len(parts), generator=generator)[:60]))]
    out = evaluate(corrupted, variants, source, pairs, vs.logit_diff)
    logits = demo.run(pairs.tokens("corrupted")).logits
    for number, variant in enumerate(variants):
        example = number % len(pairs)
        plain = plain_value(corrupted, variant, source, pairs, vs.logit_diff, example)
        assert abs(plain - float(out.values[number, example])) <= 1e-5 * float(logits.max() - logits.min()), variant


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("each", ["position", "head"])
def test_every_cell_of_smollm2_equals_a_naive_run(demo: vs.Model, each: str) -> None:
    """All 30 layers x positions, and all 270 heads: within 1e-4 of the metric's range."""
    pairs = vs.data.ioi(demo, n=4, seed=0).split("discovery")
    kind = "resid_post" if each == "position" else "z"
    scores = vs.sweep(demo, pairs, sites=f"layers.*.{kind}", each=each, check=False)
    clean = demo.run(pairs.tokens("clean"), capture=[f"layers.*.{kind}"]).activations
    tokens, spread = pairs.tokens("corrupted"), float(scores.values.max() - scores.values.min())
    for layer in range(30):
        for place in range(scores.values.shape[1]):
            if each == "position":
                mask = pairs.real & (torch.arange(pairs.clean.shape[1]) == place)
                edit = vs.Patch(f"layers.{layer}.{kind}", source=clean, positions=mask)
            else:
                edit = vs.Patch(f"layers.{layer}.{kind}[{place}]", source=clean)
            plain = vs.logit_diff(demo.run(tokens, interventions=[edit]).logits, pairs)
            assert float((plain - scores.values[layer, place]).abs().max()) <= 1e-4 * spread, (layer, place)
