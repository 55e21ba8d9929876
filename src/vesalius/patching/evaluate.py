"""Evaluate variants: metric values of many edited runs, with what they cost and a self-check against plain runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink, silent
from vesalius.metric import Metric
from vesalius.patching.changes import Changes
from vesalius.patching.checking import self_check
from vesalius.patching.cost import Cost, work
from vesalius.patching.donors import Donor
from vesalius.patching.flat import Rows
from vesalius.patching.held import PLAINLY, Under
from vesalius.patching.plain import (
    PlainRun,
    at_read,
    base_logits,
    first_bad_site,
    live_cells,
    plain_metric,
    plain_runs,
    why_plain,
)
from vesalius.patching.record import Record
from vesalius.patching.replay import Replay, base_pattern
from vesalius.patching.scoring import refuse_nan, score
from vesalius.patching.variants import Variant, batches
from vesalius.patching.what import name_of
from vesalius.site import Site

TOKENS_PER_BATCH = 1024
_UNWATCHED = ("resid_pre", "resid_mid", "resid_post", "scores", "result", "expert_out")


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
    error: float | None = None
    """Largest difference from plain float32 runs among the cells that were run again; None when none was."""


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
    under: Under = PLAINLY,
) -> Outcome:
    """Metric of every variant on every example of the base run.

    others: the same prompts with other labels, scored from the same runs. budget: live tokens per batch (memory grows
    with it). check: re-run random cells plainly and raise SelfCheckError when they differ (see `self_check`). watch:
    whole sites inside layers whose value at the read position is kept (`pattern` too). under: what all edited runs have
    in common; the record must have been made with the same. Raises NotFiniteError for a metric that is NaN or
    infinite, InputError for a metric that reads all positions or a site that cannot be watched. What replay does not
    cover is run as whole forwards, and a note event says why.
    """
    if metric.needs.positions != "read":
        raise InputError(f"{metric.name} reads every position; sweeps take metrics of the read position. Use Model.run")
    _check_watch(watch)
    reason = why_plain(record, variants)
    if reason:
        sink(Event("note", task, message=f"no replay: {reason}; every edited run is one whole forward"))
    job = _Job(record, tuple(variants), donor, (pairs, *others), metric, tuple(watch), budget, under, task, sink)
    sink(Event("start", task, 0, len(variants)))
    done = job.whole() if reason else job.replayed()
    error = None
    if check and variants:
        error = self_check(record, variants, donor, pairs, metric, done.values, seed, job.ran, under)
    sink(Event("end", task, len(variants), len(variants)))
    return replace(done, error=error)


@dataclass(eq=False)
class _Job:
    """The edited runs of one call. labels: the pairs that are scored, the true ones first."""

    record: Record
    variants: tuple[Variant, ...]
    donor: Donor
    labels: tuple[Pairs, ...]
    metric: Metric
    watch: tuple[Site, ...]
    budget: int
    under: Under
    task: str
    sink: Sink
    ran: Tensor = field(init=False)
    """[variant, example], True where a run was needed."""

    def __post_init__(self) -> None:
        self.ran = torch.zeros(len(self.variants), len(self.record), dtype=torch.bool)

    def replayed(self) -> Outcome:
        """By replay of the record's layers."""
        record, pairs, spent = self.record, self.labels[0], 0.0
        everyone = torch.arange(len(record))
        end = record.resid[-1][everyone, pairs.at]
        bases = [score(record, end, everyone, label, self.metric, end) for label in self.labels]
        values = self._start(bases)
        watched = {site: _base_watch(record, site, pairs, len(self.variants)) for site in self.watch}
        changes = Changes(record, self.donor)
        for batch in batches(self.variants, changes, pairs.at + 1, self.budget, self.under.held):
            patterns, compute = self.under.patterns, self.under.compute
            hidden, seen = Replay(record, batch.rows, batch.edits, self.watch, patterns=patterns, compute=compute).run()
            number, example = batch.cell.T
            for label, filled in zip(self.labels, values, strict=True):
                filled[number, example] = score(record, hidden, example, label, self.metric, end)
            for site, found in seen.items():
                watched[site][number, example] = found
            self.ran[number, example] = True
            spent += work(record, batch.rows)
            self.sink(Event("advance", self.task, int(self.ran.any(1).sum()), len(self.variants)))
        return self._outcome(values, bases, watched, spent)

    def whole(self) -> Outcome:
        """By ordinary forwards."""
        record, pairs = self.record, self.labels[0]
        base = base_logits(record)
        bases = [plain_metric(base, base, torch.arange(len(record)), label, self.metric) for label in self.labels]
        values = self._start(bases)
        seen = record.model.run(record.inputs, capture=list(self.watch)) if self.watch else None
        watched = {
            site: at_read(seen[site], pairs.read_at(site), site)[None].repeat_interleave(len(self.variants), 0)
            for site in self.watch
            if seen is not None
        }

        def keep(run: PlainRun) -> None:
            for label, filled in zip(self.labels, values, strict=True):
                filled[run.number, run.example] = plain_metric(run.logits, base, run.example, label, self.metric)
            for site, found in run.watched.items():
                watched[site][run.number, run.example] = found
            self.sink(Event("advance", self.task, run.number + 1, len(self.variants)))

        self.ran = live_cells(self.variants, Changes(record, self.donor), pairs.at + 1)
        plain_runs(
            record, self.variants, self.donor, self.ran, pairs, self.watch, self.budget, self.under, keep
        )  # fmt: skip
        return self._outcome(values, bases, watched, float(self.ran.sum()))

    def _start(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """Values [variant, example] per label, which begin as the base run's."""
        refuse_nan(bases[0][None], "nothing", lambda example: first_bad_site(self.record, None, self.donor, example))
        return [base.repeat(len(self.variants), 1) for base in bases]

    def _outcome(
        self, values: Sequence[Tensor], bases: Sequence[Tensor], watched: Mapping[Site, Tensor], spent: float
    ) -> Outcome:
        for number, variant in enumerate(self.variants):
            refuse_nan(
                values[0][number : number + 1],
                name_of(variant.parts[0]),
                lambda example, variant=variant: first_bad_site(self.record, variant, self.donor, example),  # type: ignore[misc]
            )
        cost = Cost(spent, float(self.ran.numel()), int((~self.ran).sum()))
        return Outcome(values[0], bases[0], watched, cost, tuple(values[1:]), tuple(bases[1:]))


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
