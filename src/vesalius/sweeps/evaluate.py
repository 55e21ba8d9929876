"""Evaluate variants: metric values of many edited runs, with what they cost and a self-check against plain runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.attention import capped
from vesalius.errors import InputError, NotFiniteError, SelfCheckError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink, silent
from vesalius.metric import Metric, wide
from vesalius.site import Site
from vesalius.sweeps.plain import (
    PlainRun,
    at_read,
    base_logits,
    live_cells,
    plain_metric,
    plain_runs,
    plain_value,
    why_plain,
)  # fmt: skip
from vesalius.sweeps.record import Record
from vesalius.sweeps.replay import Replay, Rows, base_pattern
from vesalius.sweeps.variants import Batch, Donor, Variant, batches, rows_of

TOKENS_PER_BATCH = 1024
TOLERANCE, ROUNDING, EPSILONS = 1e-4, 1e-5, 8
_UNWATCHED = ("resid_pre", "resid_mid", "resid_post", "scores", "result", "expert_out")


@dataclass(frozen=True)
class Cost:
    """In forward passes of one example: what was spent, and what one whole forward per edited run would take."""

    spent: float
    naive: float
    skipped: int
    """Edited runs that provably change nothing."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.spent + other.spent, self.naive + other.naive, self.skipped + other.skipped)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.spent - other.spent, self.naive - other.naive, self.skipped - other.skipped)

    def describe(self) -> str:
        return f"{self.spent:.0f} forward equivalents (plain: {self.naive:.0f}; {self.skipped} provably without effect)"


@dataclass(frozen=True, eq=False)
class Outcome:
    """values: [variant, example]. base: [example]. watched: site -> [variant, example, ...] at the read position."""

    values: Float[Tensor, "variant example"]
    base: Float[Tensor, " example"]
    watched: Mapping[Site, Tensor]
    cost: Cost
    others: tuple[Float[Tensor, "variant example"], ...] = ()
    """The same edited runs scored with other labels (answers and distractors)."""
    others_base: tuple[Float[Tensor, example], ...] = ()


def estimate(record: Record, variants: Sequence[Variant], donor: Donor, ends: Int[Tensor, " example"]) -> Cost:
    """What `evaluate` would cost; nothing is run."""
    cells = len(variants) * len(record)
    if why_plain(record, variants):
        live = int(live_cells(record, variants, donor, ends).sum())
        return Cost(float(live), float(cells), cells - live)
    found = [rows for variant in variants for rows in rows_of(variant, donor, ends)]
    return Cost(sum(_work(record, rows) for rows in found), float(cells), cells - sum(len(rows) for rows in found))


def _work(record: Record, rows: Rows) -> float:
    n_layers = record.model.described[1].n_layers
    return float((rows.sizes * (n_layers - rows.layer)).sum() / (record.lengths.float().mean() * n_layers))


def evaluate(
    record: Record,
    variants: Sequence[Variant],
    donor: Donor,
    pairs: Pairs,
    metric: Metric,
    *,
    others: Sequence[Pairs] = (),
    watch: Sequence[Site] = (),
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    task: str = "sweep",
    sink: Sink = silent,
) -> Outcome:
    """Metric of every variant on every example of the base run.

    others: the same prompts with other labels, scored from the same runs. budget: live tokens per batch (memory grows
    with it). check: re-run two random cells plainly and raise
    SelfCheckError when they differ (see `self_check`). watch: whole sites inside layers whose value at the read
    position is kept (`pattern` too). Raises NotFiniteError for a metric that is NaN or infinite, InputError for a
    metric that reads all positions or a site that cannot be watched. What replay does not cover is run as whole
    forwards, and a note event says why.
    """
    if metric.needs.positions != "read":
        raise InputError(f"{metric.name} reads every position; sweeps take metrics of the read position. Use Model.run")
    _check_watch(watch)
    reason = why_plain(record, variants)
    if reason:
        sink(Event("note", task, message=f"no replay: {reason}; every edited run is one whole forward"))
        return _whole_forwards(record, variants, donor, pairs, metric, others, watch, budget, check, seed, task, sink)
    ends = pairs.at + 1
    base_hidden = record.resid[-1][torch.arange(len(record)), pairs.at]
    base = score(record, base_hidden, torch.arange(len(record)), pairs, metric, base_hidden)
    _refuse_nan(base[None], "nothing")
    values, ran = base.repeat(len(variants), 1), torch.zeros(len(variants), len(record), dtype=torch.bool)
    everyone = torch.arange(len(record))
    other_bases = tuple(score(record, base_hidden, everyone, labels, metric, base_hidden) for labels in others)
    other_values = tuple(other.repeat(len(variants), 1) for other in other_bases)
    watched = {site: _base_watch(record, site, pairs, len(variants)) for site in watch}
    spent = 0.0
    sink(Event("start", task, 0, len(variants)))
    for batch in batches(variants, donor, ends, budget):
        hidden, seen = Replay(record, batch.rows, batch.edits, watch).run()
        number, example = batch.cell.T
        values[number, example] = score(record, hidden, example, pairs, metric, base_hidden)
        for labels, filled in zip(others, other_values, strict=True):
            filled[number, example] = score(record, hidden, example, labels, metric, base_hidden)
        ran[number, example] = True
        for site, found in seen.items():
            watched[site][number, example] = found
        spent += _work(record, batch.rows)
        sink(Event("advance", task, int(ran.any(1).sum()), len(variants)))
    for number, variant in enumerate(variants):
        _refuse_nan(values[number : number + 1], str(variant.parts[0]))
    if check and variants:
        self_check(record, variants, donor, pairs, metric, values, seed, ran)
    sink(Event("end", task, len(variants), len(variants)))
    cost = Cost(spent, float(ran.numel()), int((~ran).sum()))
    return Outcome(values, base, watched, cost, other_values, other_bases)


def _whole_forwards(
    record: Record, variants: Sequence[Variant], donor: Donor, pairs: Pairs, metric: Metric, others: Sequence[Pairs],
    watch: Sequence[Site], budget: int, check: bool, seed: int, task: str, sink: Sink,
) -> Outcome:  # fmt: skip
    """`evaluate` by ordinary forwards."""
    live, base = live_cells(record, variants, donor, pairs.at + 1), base_logits(record)
    labels, everyone = [pairs, *others], torch.arange(len(record))
    bases = [plain_metric(base, base, everyone, label, metric) for label in labels]
    _refuse_nan(bases[0][None], "nothing")
    values = [first.repeat(len(variants), 1) for first in bases]
    seen = record.model.run(record.tokens, capture=list(watch)) if watch else None
    watched = {site: at_read(seen[site], pairs.read_at(site), site)[None].repeat_interleave(len(variants), 0)
               for site in watch if seen is not None}  # fmt: skip

    def keep(run: PlainRun) -> None:
        for label, filled in zip(labels, values, strict=True):
            filled[run.number, run.example] = plain_metric(run.logits, base, run.example, label, metric)
        for site, found in run.watched.items():
            watched[site][run.number, run.example] = found
        _refuse_nan(values[0][run.number : run.number + 1], str(variants[run.number].parts[0]))
        sink(Event("advance", task, run.number + 1, len(variants)))

    sink(Event("start", task, 0, len(variants)))
    plain_runs(record, variants, donor, live, pairs, watch, budget, keep)
    if check and variants:
        self_check(record, variants, donor, pairs, metric, values[0], seed, live)
    sink(Event("end", task, len(variants), len(variants)))
    cost = Cost(float(live.sum()), float(live.numel()), int((~live).sum()))
    return Outcome(values[0], bases[0], watched, cost, tuple(values[1:]), tuple(bases[1:]))


def base_values(record: Record, pairs: Pairs, metric: Metric, reference: Record) -> Float[Tensor, " example"]:
    """The metric of a recorded run without edits. reference: the run that metrics with a base are measured from."""
    rows = torch.arange(len(record))
    if record.reason:
        return plain_metric(base_logits(record), base_logits(reference), rows, pairs, metric)
    ends = [run.resid[-1][rows, pairs.at] for run in (record, reference)]
    return score(record, ends[0], rows, pairs, metric, ends[1])


def _check_watch(watch: Sequence[Site]) -> None:
    for site in watch:
        if site.layer is None or site.index is not None or site.kind in _UNWATCHED:
            raise InputError(
                f"{site} cannot be watched; watch whole sites inside layers: pattern, z, q, k, v, mlp_out ..."
            )


def _base_watch(record: Record, site: Site, pairs: Pairs, count: int) -> Tensor:
    rows = Rows(torch.arange(len(record)), pairs.at * 0, pairs.at, pairs.at + 1)
    base = base_pattern(record, site, rows) if site.kind == "pattern" else record.at(site)[rows.example, pairs.at]
    return base[None].repeat(count, *[1] * base.ndim)


def score(
    record: Record, hidden: Float[Tensor, "row d_model"], example: Int[Tensor, " row"], pairs: Pairs, metric: Metric,
    base_hidden: Float[Tensor, "example d_model"],
) -> Float[Tensor, " row"]:  # fmt: skip
    """Metric from final residual vectors: the model's own final norm, and only the logits the metric reads."""
    chosen = pairs.subset(example.tolist())
    tokens = metric.tokens(pairs)
    base = (
        _logits(record, base_hidden[example], None if tokens is None else tokens[example])
        if metric.needs.base
        else None
    )
    with torch.no_grad():
        return metric.of(_logits(record, hidden, None if tokens is None else tokens[example]), base, chosen)


def _logits(record: Record, hidden: Tensor, tokens: Tensor | None) -> Tensor:
    adapter, _ = record.model.described
    unembed = submodule(record.model.module, adapter.unembed)
    with torch.no_grad():
        normed = submodule(record.model.module, adapter.final_norm)(hidden)
        if tokens is None:
            logits = unembed(normed)
        else:
            weight, bias = unembed.weight, getattr(unembed, "bias", None)
            logits = torch.einsum("rd,rkd->rk", normed, weight[tokens])  # type: ignore[index]
            logits = logits if bias is None else logits + bias[tokens]
        return wide(capped(logits, getattr(record.model.module.config, adapter.cap) if adapter.cap else None))


def _refuse_nan(values: Tensor, edited: str) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        example = int(bad.nonzero()[0, 1])
        raise NotFiniteError(f"the metric is not finite for example {example} with {edited} edited")


def self_check(
    record: Record,
    variants: Sequence[Variant],
    donor: Donor,
    pairs: Pairs,
    metric: Metric,
    values: Tensor,
    seed: int,
    ran: Bool[Tensor, "variant example"] | None = None,
) -> float:
    """Re-run two random cells as plain forwards with hooks; the largest difference. Raises SelfCheckError.

    ran: cells to choose from; default all. Tolerance: 1e-4 of the metric's range, and not under 1e-5 of the logits'
    range, which is what rounding alone gives; under half precision it gives more: 8 units in the last place of that
    range (bfloat16: 6 %, float16: 0.8 %).
    """
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.ones_like(values, dtype=torch.bool) if ran is None or not bool(ran.any()) else ran).nonzero()
    allowed = max(TOLERANCE * float(values.max() - values.min()), _rounding(record) * _logit_range(record, pairs))
    worst = 0.0
    for pick in torch.randint(len(cells), (2,), generator=generator):
        number, example = (int(i) for i in cells[pick])
        plain, fast = (
            plain_value(record, variants[number], donor, pairs, metric, example),
            float(values[number, example]),
        )
        worst = max(worst, abs(plain - fast))
        if worst > allowed:
            parts = variants[number].parts
            raise SelfCheckError(
                f"replay gave {fast:.6g} and a plain run {plain:.6g} for example {example} with {len(parts)} parts "
                f"edited ({parts[0]}, ...); please report this model"
            )
    return worst


def _rounding(record: Record) -> float:
    """What rounding alone may change, in units of the range of the logits."""
    kind, dtype = record.model.device.type, next(record.model.module.parameters()).dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return max(ROUNDING, EPSILONS * torch.finfo(dtype).eps)


def _logit_range(record: Record, pairs: Pairs) -> float:
    end = pairs.read_at()[0]
    logits = _logits(record, record.resid[-1][:1, end], None) if record.logits is None else record.logits[0, end]
    return float(logits.max() - logits.min())


def batch_count(variants: Sequence[Variant], donor: Donor, ends: Tensor, budget: int = TOKENS_PER_BATCH) -> int:
    """How many batches `evaluate` would run."""
    return sum(1 for _ in batches(variants, donor, ends, budget))


__all__ = [
    "Batch", "Cost", "Outcome", "base_values", "estimate", "evaluate", "plain_value", "score", "self_check",
]  # fmt: skip
