"""The public sweep: one edit at many places, one at a time, with the metric of every edited run.

Activation patching (Meng et al. 2022, section 2; Zhang & Nanda 2024 on the choice of metric and direction) is
`edit="patch"`: `base="corrupted"` asks what is enough to bring the clean behaviour back (denoising), `base="clean"`
what is needed for it (noising).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Pairs
from vesalius.intervention import Intervention
from vesalius.jobs import Blocks, Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.patching.edits import Setting, fixed_parts
from vesalius.patching.evaluate import TOKENS_PER_BATCH, evaluate
from vesalius.patching.examples import Examples
from vesalius.patching.plan import Cost, Plan, announcement, tokens_in
from vesalius.patching.record import Recording, record
from vesalius.patching.scores import Scores
from vesalius.patching.scoring import base_values
from vesalius.patching.sources import Source, source_for
from vesalius.patching.targets import PROMPTS, Targets, Variant, requested, to_record, writes_at
from vesalius.protocol import content_hash


def sweep(
    model: Model,
    pairs: Pairs,
    *,
    sites: Any,
    each: str | None = None,
    group: int = 1,
    edit: str = "patch",
    scale: float = 0.0,
    metric: Metric = logit_diff,
    base: str = "corrupted",
    given: Sequence[Intervention] = (),
    hold_patterns: bool = False,
    compute: str = "float32",
    budget: int | None = None,
    memory: int | None = None,
    check: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink | None = None,
) -> Scores:
    """Edit every site, one at a time, and measure every example.

    sites: names, globs or Sites (embed, and inside layers resid_pre, resid_post, attn_out, mlp_in, mlp_out, mlp_post,
    q, k, v, z; or module:<path>|in and |out of any network that gives logits [example, pos, vocab] or [example, class],
    by whole runs), Parts (a Direction, Subspace, latent ...), or a dictionary with each="latent". `embed` is the first
    layer's input: with learned positions it holds token and position embedding.
    each: "position" edits one absolute token index at a time (with images and other floats for inputs one index of the
    tensor's second axis: a ViT's patches, class token first, a convolution's channels, an MLP's units); "head" one head
    at all positions (sites z, q, k or v; on k and v key-value heads); "neuron" one neuron (mlp_post), "latent" one
    latent of a dictionary, or `group` neighbours together; None the whole site at all positions.
    edit: "patch" the other prompts' value at the same position; "zero"; "mean" over the other prompts' positions (the
    first position has its own mean, and is left alone when all prompts begin alike); "resample" the value of another
    example of the other prompts, drawn by `seed`; "steer" `scale` added to what is there.
    base: the prompts that are run and edited; the other prompts give the values.
    given: edits (Ablate, Patch, Freeze, Interchange) that all runs on the base prompts have in common: with head A
    ablated, what does patching B do? hold_patterns: attention patterns stay the base run's, so that edits act through
    values alone.
    compute: "bfloat16" rounds the factors of matrix products; `Scores.error` then says what that changed.
    budget: tokens run together (an input that is no tokens counts as one for every 768 numbers); memory: bytes for them
    instead. Values depend on neither. check: re-run a few random cells plainly. out: folder that keeps finished sites,
    so that an interrupted sweep goes on where it was. sink: hears the cost before the first edited run, then progress;
    None shows both on standard error.

    Raises UnknownNameError for an unknown site, each, edit or base; InputError for a site that cannot be swept or
    that has no heads; NotFiniteError for a metric that is NaN or infinite; SelfCheckError when a plain run disagrees.
    """
    _check_types(pairs, metric, budget)
    if not pairs.raw:
        pairs = replace(pairs, decoder=model.begun(pairs.tokens("clean")).decoder)
    targets = requested(model, sites, each, group, edit, base)
    setting = Setting((), hold_patterns, compute)
    tokens = TOKENS_PER_BATCH if budget is None else budget
    tokens = tokens_in(model, memory) if memory is not None else tokens
    knobs = [each, edit, base, seed, tokens, group, scale, hold_patterns, compute]
    plan = content_hash(_plan(model, pairs, metric, given, targets, knobs)) if out else ""
    rows, row_metric, fold = metric.rows_of(pairs)
    with shown(sink) as screen:
        runs, setting, seconds = _recorded(model, rows, targets, base, given, setting)
        _check_labels(runs[0], pairs)
        source = source_for(edit, *runs, seed, scale)
        if given:
            # The two runs differ from the first token on: only one of them has what is given.
            source = replace(source, first=torch.zeros_like(source.first))
        work = _Sweep(targets, runs, source, pairs, rows, row_metric, fold, setting, tokens, edit, seed, base, screen)
        return work.scores(Blocks(out, plan, screen), check, seconds)


def _plan(
    model: Model, pairs: Pairs, metric: Metric, given: Sequence[Intervention], targets: Targets, knobs: Sequence[Any]
) -> dict[str, Any]:
    """What a sweep computes: finished sites in a folder are of this and no other."""
    return {
        "model": model.content_hash,
        "pairs": pairs.content_hash,
        "metric": [metric.name, metric.unit],
        "given": [one.to_json() for one in given],
        "parts": [part.ref for part in targets.parts],
        "knobs": list(knobs),
    }


def _check_types(pairs: Any, metric: Any, budget: int | None) -> None:
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"a sweep takes vs.Pairs (from vs.data.ioi, vs.data.load_pairs, or vs.Pairs(clean=...)); got "
            f"{type(pairs).__name__}"
        )
    if not isinstance(metric, Metric):
        raise InputError(f"metric= takes a vs.Metric such as vs.logit_diff; got {metric!r}")
    if budget is not None and budget < 1:
        raise InputError(f"budget= is the number of tokens that run together, at least 1; got {budget}")


def _check_labels(run: Recording, pairs: Pairs) -> None:
    size = run.logits.shape[-1] if run.logits is not None else run.model.architecture[1].vocab
    for name in ("answer", "distractor"):
        highest = int(getattr(pairs, name).max())
        if highest >= size:
            raise InputError(f"{name} {highest} is outside the {size} logits of {run.model.name}, numbered from 0")


BLOCK = 64.0
"""Forward equivalents of a block at least: seconds of work."""


def _recorded(
    model: Model, pairs: Pairs, targets: Targets, base: str, given: Sequence[Intervention], setting: Setting
) -> tuple[tuple[Recording, Recording], Setting, float]:
    """The base run (with what is given) and the source run, the setting, and the seconds that a forward pass took."""
    if given and pairs.raw:
        raise InputError("given= takes edits of prompts; edits that all runs on images have in common are not built")
    fixed = fixed_parts(given, pairs.tokens(base)) if given else ()
    sites = to_record([*targets.parts, *(one.part for one in fixed)])
    other = PROMPTS[1 - PROMPTS.index(base)]
    began = time.perf_counter()
    first = record(model, pairs.inputs(base), sites, given)
    seconds = (time.perf_counter() - began) / len(pairs)
    return (first, record(model, pairs.inputs(other), sites)), replace(setting, fixed=fixed), seconds


@dataclass(frozen=True, eq=False)
class _Sweep:
    """A sweep whose base and source runs are recorded."""

    targets: Targets
    runs: tuple[Recording, Recording]
    source: Source
    pairs: Pairs
    rows: Pairs
    """What is run: the pairs, or two teacher-forced rows for each of them."""
    metric: Metric
    """Of a row."""
    fold: Callable[[Tensor], Tensor]
    """From values of rows to values of pairs, on the last axis."""
    setting: Setting
    budget: int
    edit: str
    seed: int
    prompts: str
    sink: Sink

    def scores(self, blocks: Blocks, check: bool, seconds: float) -> Scores:
        """Say the cost, then run."""
        variants = self._variants()
        plans = [Plan(self.runs[0], some, self.source, self.rows.ends) for some in variants.values()]
        reason = next((plan.why_plain for plan in plans if plan.why_plain), "")
        if reason:
            self.sink(Event("note", "sweep", message=f"no replay: {reason}; every edited run is one whole forward"))
        mask = self._mask(plans[0].variants)
        estimates = [plan.estimate() for plan in plans]
        total = self._bill(sum(estimates, Cost()), mask, len(variants))
        self.sink(announcement("sweep", total, self.runs, seconds, self.budget))
        groups = _together([cost.spent for cost in estimates])
        return self._scores(variants, self._results(list(variants.values()), groups, blocks, check), mask)

    def _variants(self) -> Mapping[Part, tuple[Variant, ...]]:
        """The edited runs of every row. Raises InputError for rows that do not count the same units."""
        each, found = self.targets.each, {}
        for row in self.targets.rows:
            found[row] = tuple(self.targets.variants(row, self._count(row)))
        counts = {len(some): str(row) for row, some in found.items()}
        if len(counts) > 1:
            listed = ", ".join(f"{name} has {count}" for count, name in counts.items())
            raise InputError(f"the rows of a sweep count the same {each}s: {listed}. Sweep them apart")
        return found

    def _count(self, row: Part) -> int:
        """Positions or units of a row."""
        site = writes_at(row)[0]
        if self.targets.each == "position":
            # Positions of the prompt: what follows it in teacher-forced rows is not one.
            return self.pairs.clean.shape[1] if self.pairs.several else self.runs[0].real_at(site).shape[1]
        units = self.targets.each in ("head", "neuron")
        return self.runs[0][site].shape[self.targets.axis_of(row)] if units else 0

    def _mask(self, variants: Sequence[Variant]) -> Bool[Tensor, "variant example"]:
        """True where the example has the variant's position, at the site that is edited."""
        if self.pairs.several:
            sizes = [self.pairs.size] * len(variants)
        else:
            sizes = [self.runs[0].real_at(writes_at(one.parts[0])[0]).sum(1) for one in variants]
        return torch.stack([size > (one.position or 0) for size, one in zip(sizes, variants, strict=True)])

    def _results(
        self, variants: Sequence[Sequence[Variant]], groups: Sequence[range], blocks: Blocks, check: bool
    ) -> list[Mapping[str, NDArray[Any]]]:
        """One block per group of rows: values [row and variant, example], cost, and error where it was looked at.

        Rows of a group go up the layers together, so that batches are full.
        """
        names = [f"{group.start}-{group.stop} {self.targets.rows[group.start]}" for group in groups]
        pending = [name for name in names if name not in blocks]
        checked = pending[self.seed % len(pending)] if pending and check else None

        def compute(group: range, name: str) -> dict[str, NDArray[Any]]:
            together = [one for number in group for one in variants[number]]
            found = evaluate(
                self.runs[0],
                together,
                self.source,
                self.rows,
                self.metric,
                budget=self.budget,
                check=name == checked,
                seed=self.seed,
                setting=self.setting,
            )
            cost = torch.tensor([found.cost.spent, found.cost.naive, found.cost.skipped], dtype=torch.float64)
            error = torch.tensor([] if found.error is None else [found.error], dtype=torch.float64)
            return {"values": found.values.cpu().numpy(), "cost": cost.numpy(), "error": error.numpy()}

        results: list[Mapping[str, NDArray[Any]]] = []
        self.sink(Event("start", "sweep", 0, len(variants)))
        for group, name in zip(groups, names, strict=True):
            results.append(blocks.get(name, lambda group=group, name=name: compute(group, name)))  # type: ignore[misc]
            self.sink(Event("advance", "sweep", group.stop, len(variants)))
        self.sink(Event("end", "sweep", len(variants), len(variants)))
        return results

    def _scores(
        self, variants: Mapping[Part, Sequence[Variant]], results: Sequence[Mapping[str, NDArray[Any]]], mask: Tensor
    ) -> Scores:
        each, rows = self.targets.each, tuple(variants)
        values = torch.cat([torch.from_numpy(result["values"].copy()) for result in results])
        values = self.fold(values).unflatten(0, (len(rows), -1))
        mask = mask.expand(len(values), -1, -1)
        costs = [Cost(float(c[0]), float(c[1]), int(c[2])) for c in (result["cost"] for result in results)]
        plain = [self.fold(base_values(run, self.rows, self.metric, self.runs[0])) for run in self.runs]
        errors = [float(worst) for result in results for worst in result["error"]]
        units = each not in (None, "position")
        return Scores(
            values=values if each else values[:, 0],
            base=plain[0],
            source=plain[1],
            mask=mask if each else mask[:, 0],
            cost=self._bill(sum(costs, Cost()), mask[0], len(values)),
            items=tuple(one.item for some in variants.values() for one in some) if units else rows,
            each=each,
            edit=self.edit,
            metric=self.metric.name,
            unit=self.metric.unit,
            prompts=self.prompts,
            error=max(errors, default=None),
            compute=self.setting.compute,
            rows=rows,
            examples=Examples.of(self.runs[0].model, self.pairs, self.prompts),
        )

    def _bill(self, cost: Cost, mask: Bool[Tensor, "variant example"], count: int) -> Cost:
        """With the base and source runs, and without the cells past an example's end, which nobody would run."""
        runs = 2.0 * len(self.rows)
        past = count * int((~mask).sum()) * len(self.rows) // len(self.pairs)
        return Cost(cost.spent + runs, cost.naive - past + runs, cost.skipped - past)


def _together(costs: Sequence[float]) -> list[range]:
    """Neighbouring rows that make one block: enough work to fill batches, little enough to lose when killed."""
    groups, first, size = [], 0, 0.0
    for number, cost in enumerate(costs):
        size += cost
        if size >= BLOCK or number == len(costs) - 1:
            groups.append(range(first, number + 1))
            first, size = number + 1, 0.0
    return groups
