"""The public sweep: one edit at many places, one at a time, with the metric of every edited run.

Activation patching (Meng et al. 2022, section 2; Zhang & Nanda 2024 on the choice of metric and direction) is
`edit="patch"`: `base="corrupted"` asks what is enough to bring the clean behaviour back (denoising), `base="clean"`
what is needed for it (noising).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from vesalius.patching.cost import Cost, estimate
from vesalius.patching.donors import Donor, donor_for
from vesalius.patching.evaluate import TOKENS_PER_BATCH, evaluate
from vesalius.patching.held import Under, held_of
from vesalius.patching.memory import announcement, tokens_in
from vesalius.patching.places import Asked, asked_for, variants_of
from vesalius.patching.plain import why_plain
from vesalius.patching.record import Record, record
from vesalius.patching.scores import PROMPTS, Scores
from vesalius.patching.scoring import base_values
from vesalius.patching.variants import Variant
from vesalius.patching.what import What, name_of, place_of, reference_of
from vesalius.protocol import content_hash
from vesalius.site import Site


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
    asked = asked_for(model, sites, each, group, edit, base)
    under = Under((), hold_patterns, compute)
    tokens = TOKENS_PER_BATCH if budget is None else budget
    tokens = tokens_in(model, memory) if memory is not None else tokens
    plan = {"model": model.content_hash if out else "", "pairs": pairs.content_hash, "each": each, "edit": edit,
            "metric": [metric.name, metric.unit], "base": base, "seed": seed, "budget": tokens, "group": group,
            "scale": scale, "given": [one.to_json() for one in given], "patterns": hold_patterns,
            "compute": compute, "whats": [reference_of(what) for what in asked.whats] if out else []}  # fmt: skip
    with shown(sink) as told:
        work = _recorded(model, pairs, asked, edit, scale, base, given, under, metric, tokens, seed, told)
        return work.scores(Blocks(out, content_hash(plan), told), check)


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


NOTHING = Cost(0.0, 0.0, 0)
BLOCK = 64.0
"""Forward equivalents of a block at least: seconds of work."""


@dataclass(frozen=True, eq=False)
class _Work:
    """A sweep whose base and source runs are recorded."""

    asked: Asked
    runs: tuple[Record, Record]
    donor: Donor
    variants: Mapping[What, list[Variant]]
    pairs: Pairs
    metric: Metric
    under: Under
    budget: int
    edit: str
    seed: int
    prompts: str
    seconds: float
    """Of one forward pass of one example, as it took to record the base run."""
    sink: Sink

    def scores(self, blocks: Blocks, check: bool) -> Scores:
        """Tell the cost, then run."""
        every = [variant for rows in self.variants.values() for variant in rows]
        reason = why_plain(self.runs[0], every)
        if reason:
            self.sink(Event("note", "sweep", message=f"no replay: {reason}; every edited run is one whole forward"))
        mask = _mask(next(iter(self.variants.values())), self.runs[0])
        quotes = [estimate(self.runs[0], rows, self.donor, self.pairs.at + 1) for rows in self.variants.values()]
        quote = _bill(sum(quotes, NOTHING), mask, len(self.variants))
        self.sink(announcement("sweep", quote, self.runs, self.seconds, self.budget))
        results = self._results(_together([quote.spent for quote in quotes]), blocks, check)
        return self._scores(results, mask)

    def _results(self, groups: Sequence[range], blocks: Blocks, check: bool) -> list[Mapping[str, NDArray[Any]]]:
        """One block per group of sites: values [site and variant, example], cost, and error when it was looked at.

        Sites of a group go up the layers together, so that batches are full.
        """
        whats = list(self.variants)
        names = [f"{group.start}-{group.stop} {name_of(whats[group.start])}" for group in groups]
        pending = [name for name in names if name not in blocks]
        checked = pending[self.seed % len(pending)] if pending and check else None

        def compute(group: range, name: str) -> dict[str, NDArray[Any]]:
            found = evaluate(
                self.runs[0], [variant for number in group for variant in self.variants[whats[number]]], self.donor,
                self.pairs, self.metric, budget=self.budget, check=name == checked, seed=self.seed, under=self.under,
            )  # fmt: skip
            cost = torch.tensor([found.cost.spent, found.cost.naive, found.cost.skipped], dtype=torch.float64)
            error = torch.tensor([] if found.error is None else [found.error], dtype=torch.float64)
            return {"values": found.values.cpu().numpy(), "cost": cost.numpy(), "error": error.numpy()}

        results: list[Mapping[str, NDArray[Any]]] = []
        self.sink(Event("start", "sweep", 0, len(whats)))
        for group, name in zip(groups, names, strict=True):
            results.append(blocks.get(name, lambda group=group, name=name: compute(group, name)))  # type: ignore[misc]
            self.sink(Event("advance", "sweep", group.stop, len(whats)))
        self.sink(Event("end", "sweep", len(whats), len(whats)))
        return results

    def _scores(self, results: Sequence[Mapping[str, NDArray[Any]]], mask: Tensor) -> Scores:
        values = torch.cat([torch.from_numpy(result["values"].copy()) for result in results])
        values = values.unflatten(0, (len(self.variants), -1))
        mask, each = mask.expand(len(values), -1, -1), self.asked.each
        costs = [result["cost"] for result in results]
        spent = sum((Cost(float(c[0]), float(c[1]), int(c[2])) for c in costs), NOTHING)
        plain = [base_values(run, self.pairs, self.metric, self.runs[0]) for run in self.runs]
        errors = [float(worst) for result in results for worst in result["error"]]
        return Scores(
            values=values if each else values[:, 0], base=plain[0], source=plain[1],
            mask=mask if each else mask[:, 0], cost=_bill(spent, mask[0], len(values)),
            sites=tuple(name_of(what) for what in self.variants), each=each, edit=self.edit, metric=self.metric.name,
            unit=self.metric.unit, prompts=self.prompts, error=max(errors, default=None), compute=self.under.compute,
        )  # fmt: skip


def _together(costs: Sequence[float]) -> list[range]:
    """Neighbouring sites that make one block: enough work to fill batches, little enough to lose when killed."""
    groups, first, held = [], 0, 0.0
    for number, cost in enumerate(costs):
        held += cost
        if held >= BLOCK or number == len(costs) - 1:
            groups.append(range(first, number + 1))
            first, held = number + 1, 0.0
    return groups


def _recorded(
    model: Model, pairs: Pairs, asked: Asked, edit: str, scale: float, base: str, given: Sequence[Intervention],
    under: Under, metric: Metric, budget: int, seed: int, sink: Sink,
) -> _Work:  # fmt: skip
    """The base run (with what is given) and the source run, and the variants."""
    if given and pairs.raw:
        raise InputError("given= takes edits of prompts; edits that all runs on images have in common are not built")
    held = held_of(given, pairs.tokens(base)) if given else ()
    written = _written([*asked.whats, *(one.what for one in held)])
    other = PROMPTS[1 - PROMPTS.index(base)]
    began = time.perf_counter()
    first = record(model, pairs.inputs(base), written, given)
    seconds = (time.perf_counter() - began) / len(pairs)
    runs = (first, record(model, pairs.inputs(other), written))
    _check_labels(runs[0], pairs)
    donor = donor_for(edit, *runs, asked.whats, seed, scale)
    if given:
        # The two runs differ from the first token on: only one of them has what is given.
        donor = replace(donor, first=torch.zeros_like(donor.first))
    variants = {what: variants_of(asked, what, first) for what in asked.rows}
    _check_counts(variants, asked.each)
    return _Work(
        asked, runs, donor, variants, pairs, metric, replace(under, held=held), budget, edit, seed, base, seconds, sink
    )  # fmt: skip


def _check_labels(run: Record, pairs: Pairs) -> None:
    size = run.logits.shape[-1] if run.logits is not None else run.model.architecture[1].vocab
    for name in ("answer", "distractor"):
        highest = int(getattr(pairs, name).max())
        if highest >= size:
            raise InputError(f"{name} {highest} is outside the {size} logits of {run.model.name}, numbered from 0")


def _check_counts(variants: Mapping[What, Sequence[Variant]], each: str | None) -> None:
    counts = {len(rows): name_of(what) for what, rows in variants.items()}
    if len(counts) > 1:
        told = ", ".join(f"{name} has {count}" for count, name in counts.items())
        raise InputError(f"the rows of a sweep count the same {each}s: {told}. Sweep them apart")


def _written(whats: Sequence[What]) -> list[Site]:
    """The sites to record."""
    return sorted({place_of(what)[0] for what in whats}, key=lambda site: site.order)


def _mask(variants: Sequence[Variant], base: Record) -> Bool[Tensor, "variant example"]:
    """True where the example has the variant's position, at the site that is edited."""
    return torch.stack([base.real_at(place_of(one.parts[0])[0]).sum(1) > (one.position or 0) for one in variants])


def _bill(cost: Cost, mask: Bool[Tensor, "variant example"], rows: int) -> Cost:
    """The cost with the base and source runs, and without the cells past an example's end, which nobody would run."""
    runs = 2.0 * mask.shape[-1]
    past = rows * int((~mask).sum())
    return Cost(cost.spent + runs, cost.naive - past + runs, cost.skipped - past)
