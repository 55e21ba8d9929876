"""Evaluate variants: metric values of many edited runs, with what they cost and a self-check against plain runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink, silent
from vesalius.metric import Metric
from vesalius.patching.edits import PLAIN, Setting
from vesalius.patching.plain import PlainRun, at_read, first_bad_site, plain_runs, self_check
from vesalius.patching.plan import Cost, Plan
from vesalius.patching.record import Recording
from vesalius.patching.replay import Replay, base_pattern
from vesalius.patching.scoring import at_reads, base_logits, plain_metric, score
from vesalius.patching.sources import Source
from vesalius.patching.targets import Variant
from vesalius.site import Site

TOKENS_PER_BATCH = 1024
_NOT_WATCHED = ("resid_pre", "resid_mid", "resid_post", "scores", "result", "expert_out")


@dataclass(frozen=True, eq=False)
class Outcome:
    """values: [variant, example]. base: [example]. watched: site -> [variant, example, ...] at the read position.

    All on the CPU.
    """

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
    base: Recording,
    variants: Sequence[Variant],
    source: Source,
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
    setting: Setting = PLAIN,
) -> Outcome:
    """Metric of every variant on every example of the base run.

    others: the same prompts with other labels, scored from the same runs. budget: live tokens per batch (memory grows
    with it). check: re-run random cells plainly and raise SelfCheckError when they differ (see `self_check`). watch:
    whole sites inside layers whose value at the read position is kept (`pattern` too). setting: what all edited runs
    have in common; the base run must have been recorded with the same. Raises NotFiniteError for a metric that is NaN
    or infinite, InputError for a metric that reads all positions or a site that cannot be watched. What replay does not
    cover is run as whole forwards, and a note event says why.
    """
    if metric.needs.positions == "all":
        raise InputError(f"{metric.name} reads every position; sweeps take metrics of the read position. Use Model.run")
    for site in watch:
        if site.layer is None or site.index is not None or site.kind in _NOT_WATCHED:
            raise InputError(
                f"{site} cannot be watched; watch whole sites inside layers: pattern, z, q, k, v, mlp_out ..."
            )
    job = _Job(Plan(base, variants, source, pairs.ends), (pairs, *others), metric, watch, budget, setting, task, sink)
    reason = job.plan.why_plain
    if reason:
        sink(Event("note", task, message=f"no replay: {reason}; every edited run is one whole forward"))
    sink(Event("start", task, 0, len(variants)))
    done = job.whole() if reason else job.replayed()
    error = None
    if check and variants:
        error = self_check(base, variants, source, pairs, metric, done.values, seed, job.ran, setting)
    sink(Event("end", task, len(variants), len(variants)))
    return replace(done, error=error)


@dataclass(eq=False)
class _Job:
    """The edited runs of one call. labels: the pairs that are scored, the true ones first."""

    plan: Plan
    labels: tuple[Pairs, ...]
    metric: Metric
    watch: Sequence[Site]
    budget: int
    setting: Setting
    task: str
    sink: Sink
    ran: Tensor = field(init=False)
    """[variant, example], True where a run was needed."""

    def __post_init__(self) -> None:
        self.ran = torch.zeros(len(self.plan.variants), len(self.plan.base), dtype=torch.bool)

    def replayed(self) -> Outcome:
        """By replay of the recorded layers."""
        plan, base, reads, spent = self.plan, self.plan.base, self.labels[0].reads, 0.0
        end = at_reads(base, self.labels[0])
        everyone = torch.arange(len(base))
        bases = [score(base, end, everyone, label, self.metric, end) for label in self.labels]
        values = self._start(bases)
        watched = {site: self._base_watched(site) for site in self.watch}
        for batch in plan.batches(self.budget, self.setting.fixed):
            number, example = batch.cell.T
            replay = Replay(
                base,
                batch.rows,
                batch.edits,
                self.watch,
                read=reads[example],
                patterns=self.setting.patterns,
                compute=self.setting.compute,
            )
            hidden, seen = replay.run()
            for label, filled in zip(self.labels, values, strict=True):
                filled[number, example] = score(base, hidden, example, label, self.metric, end)
            for site, found in seen.items():
                watched[site][number, example] = found.cpu()
            self.ran[number, example] = True
            spent += plan.work(batch.rows)
            self.sink(Event("advance", self.task, int(self.ran.any(1).sum()), len(plan.variants)))
        return self._outcome(values, bases, watched, spent)

    def whole(self) -> Outcome:
        """By ordinary forwards."""
        plan, pairs, logits = self.plan, self.labels[0], base_logits(self.plan.base)
        everyone = torch.arange(len(plan.base))
        bases = [plain_metric(logits, logits, everyone, label, self.metric) for label in self.labels]
        values = self._start(bases)
        seen = plan.base.model.run(plan.base.inputs, capture=list(self.watch)) if self.watch else None
        watched = {
            site: at_read(seen[site], pairs.read_at(site), site)[None].cpu().repeat_interleave(len(plan.variants), 0)
            for site in self.watch
            if seen is not None
        }

        def keep(run: PlainRun) -> None:
            for label, filled in zip(self.labels, values, strict=True):
                filled[run.number, run.example] = plain_metric(run.logits, logits, run.example, label, self.metric)
            for site, found in run.watched.items():
                watched[site][run.number, run.example] = found.cpu()
            self.sink(Event("advance", self.task, run.number + 1, len(plan.variants)))

        self.ran = plan.live()
        plain_runs(plan.base, plan.variants, plan.source, self.ran, pairs, self.watch, self.budget, self.setting, keep)
        return self._outcome(values, bases, watched, float(self.ran.sum()))

    def _start(self, bases: Sequence[Tensor]) -> list[Tensor]:
        """Values [variant, example] per label, which begin as the base run's."""
        self._refuse_nan(bases[0], None)
        return [base.repeat(len(self.plan.variants), 1) for base in bases]

    def _outcome(
        self, values: Sequence[Tensor], bases: Sequence[Tensor], watched: Mapping[Site, Tensor], spent: float
    ) -> Outcome:
        for number, variant in enumerate(self.plan.variants):
            self._refuse_nan(values[0][number], variant)
        cost = Cost(spent, float(self.ran.numel()), int((~self.ran).sum()))
        return Outcome(values[0], bases[0], watched, cost, tuple(values[1:]), tuple(bases[1:]))

    def _refuse_nan(self, values: Float[Tensor, " example"], variant: Variant | None) -> None:
        """Raises NotFiniteError naming the example, what was edited and the first site that is not finite."""
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            example, edited = int(bad.nonzero()[0, 0]), "nothing" if variant is None else variant.item
            where = first_bad_site(self.plan.base, variant, self.plan.source, example)
            raise NotFiniteError(f"the metric is not finite for example {example} with {edited} edited{where}")

    def _base_watched(self, site: Site) -> Tensor:
        """The base run's value at the read position, for every variant."""
        base, at = self.plan.base, self.labels[0].at
        everyone = torch.arange(len(base))
        found = base_pattern(base, site, everyone, at) if site.kind == "pattern" else base[site][everyone, at]
        return found[None].cpu().repeat(len(self.plan.variants), *[1] * found.ndim)
