"""Which tokens of an input make a part fire, or a metric what it is: by gradients, and by changing the tokens.

gradient_x_input      (embedding - baseline) times the gradient there: one forward and one backward
integrated_gradients  the same with the gradient averaged on the way from the baseline, by midpoints (Sundararajan et
                      al. 2017, section 3), so that the tokens' shares add up to f(input) - f(baseline)
ablate, resample      what replacing one token changes: by the baseline, or by tokens of other texts
window                what replacing neighbouring tokens together changes

A gradient is an estimate of what the changes of the second kind do, and is compared with them token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.describe.embedded import (
    EMBED,
    MetricRead,
    PartRead,
    Read,
    baseline_of,
    check_embedded,
    embeddings_of,
    read_of,
    tokens_of,
)
from vesalius.describe.token_shares import Attribution
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import speller
from vesalius.intervention import Patch, off_distribution
from vesalius.jobs import Estimate, Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric
from vesalius.model import Model
from vesalius.parts import Part, Unit
from vesalius.patching.evaluate import evaluate
from vesalius.patching.plan import Cost
from vesalius.patching.record import record
from vesalius.patching.sources import patch_source
from vesalius.patching.targets import Variant, to_record
from vesalius.seeds import generator_for

GRADIENTS = ("gradient_x_input", "integrated_gradients")
METHODS = (*GRADIENTS, "ablate", "resample", "window")
LARGE_GAP = 0.05
"""Share of what is to be explained above which a gap is pointed out."""
TASK = "attribution"
# A backward pass costs about two forwards.
_BACKWARD = 2.0
Function = Callable[[Float[Tensor, "row ..."]], Float[Tensor, " row"]]


def integrated_gradients(
    fn: Function, x: Float[Tensor, "row ..."], baseline: Float[Tensor, "row ..."], steps: int = 50, together: int = 1
) -> tuple[Float[Tensor, "row ..."], Float[Tensor, " row"]]:
    """Integrated gradients of a function along the straight line from a baseline to x, by midpoints, and the gap.

    fn: each row's number from that row alone. together: points of the line that one call of fn is given, [together *
    row, ...], one point's rows after the other's. Of the values of a row it holds that their sum is fn(x) -
    fn(baseline) but for the gap [row], which more steps make smaller. Raises InputError for no steps.
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1; got {steps}")
    x, baseline = x.detach(), baseline.detach().expand_as(x)
    total = torch.zeros_like(x, dtype=torch.float64)
    for some in ((torch.arange(steps) + 0.5) / steps).split(together):
        way = some.to(x).view(-1, *[1] * x.ndim)
        points = (baseline + way * (x - baseline)).flatten(0, 1).requires_grad_()
        total += _gradient(fn(points), points).unflatten(0, (len(some), -1)).double().sum(0)
    values = total / steps * (x - baseline).double()
    with torch.no_grad():
        change = fn(x).double() - fn(baseline).double()
    return values, change - values.flatten(1).sum(1)


def _gradient(values: Float[Tensor, " row"], points: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """Of each row's number; zero where it does not depend on the points."""
    if not values.requires_grad:
        return torch.zeros_like(points)
    (found,) = torch.autograd.grad(values.sum(), points, allow_unused=True)
    return torch.zeros_like(points) if found is None else found


def attribute(
    model: Model,
    inputs: Any,
    target: Part | Metric,
    *,
    method: str = "integrated_gradients",
    at: str | int | Int[Tensor, " example"] = "max",
    baseline: str | int = "mean",
    keep_first: bool = True,
    steps: int = 64,
    window: int = 3,
    draws: int = 8,
    others: Any = None,
    check: bool = True,
    seed: int = 0,
    batch_tokens: int = 1024,
    sink: Sink | None = None,
) -> Attribution:
    """How much each token of each input contributes to a part's activation, or to a metric.

    inputs: texts, token ids [example, pos] or Tokens; Pairs for a metric, of which the clean prompts are looked at.
    target: a Part with one number at each position (a neuron, direction, latent), or a Metric. at: the position of a
    part that is read: "max" (where it is largest, but at a first token that is kept), "last", one number or one for
    each example; "sum" over all.
    method: "integrated_gradients" in `steps`, "gradient_x_input"; "ablate" (a token's embedding becomes the baseline),
    "resample" (it becomes that of a token of other texts, the mean over `draws`), "window" (the baseline for `window`
    neighbours; a token gets the mean of all windows that hold it). A positive share speaks for a higher value.
    baseline: what stands for no token: "mean" embedding of the vocabulary, "zero", "pad", or the id of a token.
    keep_first: the first token is never replaced and has no share. Most language models attend there when there is
    nothing else to attend to, whatever the token (attention sinks); replacing it upsets everything at once. others:
    texts or Tokens that resampled tokens come from; default the other inputs. check: gradients are compared with
    ablation of every token, which `Attribution.agreement` tells. Values do not depend on batch_tokens but for rounding.

    A metric is perturbed by the engine of `vs.sweep`. Raises InputError for a part of several numbers, an input without
    tokens and a model with several stacks; UnknownNameError for a method, baseline or place.
    """
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    check_embedded(model)
    counts = {"steps": steps, "window": window, "draws": draws, "batch_tokens": batch_tokens}
    if min(counts.values()) < 1:
        raise InputError(f"{', '.join(counts)} must be at least 1; got {counts}")
    with shown(sink) as screen, torch.no_grad():
        read = read_of(model, inputs, target, at, keep_first)
        own = embeddings_of(model, read.tokens)
        absent = baseline_of(model, baseline).to(own).expand_as(own)
        task = _Task(model, read, own, _kept(own, absent, keep_first), keep_first, batch_tokens, seed, screen)
        pool = None if method != "resample" else _pool(model, read.tokens, others)
        named = f"{baseline}{', first token kept' if keep_first else ''}"
        found = _attributed(task, method, target, named, counts, pool)
        if check and method in GRADIENTS:
            measured = _attributed(task, "ablate", target, named, counts, None)
            found = replace(found, agreement=found.against(measured), cost=found.cost + measured.cost)
    return found


def _pool(model: Model, tokens: Tokens, others: Any) -> tuple[Tensor, Tensor]:
    """Tokens to draw from, and the example that each is of; -1 where they are of none."""
    source = tokens if others is None else tokens_of(model, others)
    example = torch.arange(len(source)) if others is None else torch.full((len(source),), -1)
    if others is None and len(tokens) < 2:
        raise InputError("one input has no other texts to resample tokens from; give others=")
    return source.ids[source.real], example[:, None].expand_as(source.ids)[source.real]


def _kept(own: Tensor, instead: Tensor, keep_first: bool) -> Float[Tensor, "example pos d_model"]:
    """What replaces the embeddings: of the first token, if it is kept, itself."""
    return torch.cat([own[:, :1], instead[:, 1:]], 1) if keep_first else instead


@dataclass(frozen=True, eq=False)
class _Task:
    """Inputs whose tokens are looked at. own, absent: [example, pos, d_model] embeddings, and what replaces them."""

    model: Model
    read: Read
    own: Float[Tensor, "example pos d_model"]
    absent: Float[Tensor, "example pos d_model"]
    keep_first: bool
    batch_tokens: int
    seed: int
    sink: Sink

    @property
    def real(self) -> Bool[Tensor, "example pos"]:
        return self.read.tokens.real

    @property
    def width(self) -> int:
        return self.own.shape[1]

    def cells(self) -> Int[Tensor, "cell 2"]:
        """(example, position) of every token that can matter."""
        position = torch.arange(self.width)
        reached = (position < self.read.ends[:, None]) & (position >= int(self.keep_first))
        return (self.real & reached).nonzero()

    def batches(self, rows: int) -> Iterator[Tensor]:
        """Numbers of rows that are run together."""
        yield from torch.arange(rows).split(max(1, self.batch_tokens // self.width)) if rows else ()

    @cached_property
    def value(self) -> Float[Tensor, " example"]:
        """Of the inputs as they are."""
        return self._values(self.own)

    @cached_property
    def at_baseline(self) -> Float[Tensor, " example"]:
        """With all tokens replaced."""
        return self._values(self.absent)

    def _values(self, given: Tensor) -> Float[Tensor, " example"]:
        return torch.cat([self.read(rows, given[rows]) for rows in self.batches(len(self.own))]).double().cpu()

    def track(self, task: str, rows: int) -> Iterator[Tensor]:
        self.sink(Event("start", task, 0, rows))
        for some in self.batches(rows):
            yield some
            self.sink(Event("advance", task, int(some[-1]) + 1, rows))
        self.sink(Event("end", task, rows, rows))

    def announce(self, task: str, passes: float) -> None:
        """The cost, before the work."""
        rows, began = next(self.batches(len(self.own))), time.perf_counter()
        self.read(rows, self.own[rows])
        seconds = (time.perf_counter() - began) * passes / len(rows)
        self.sink(Event("note", task, message=f"{task}: {Estimate(seconds, passes * self.read.depth).describe()}"))


def _attributed(
    task: _Task, method: str, target: Any, baseline: str, options: dict[str, int], pool: tuple[Tensor, Tensor] | None
) -> Attribution:
    if method in GRADIENTS:
        values, cost = _by_gradient(task, 1 if method == "gradient_x_input" else options["steps"], method)
    else:
        values, cost = _by_change(task, method, options, pool)
    read, name = task.read, target.name if isinstance(target, Metric) else str(target)
    model, ids = task.model, read.tokens
    spell = speller(model.tokenizer)
    lengths = ids.lengths.tolist()
    found = Attribution(
        values=values,
        tokens=tuple(tuple(map(spell, row[:n])) for row, n in zip(ids.ids.tolist(), lengths, strict=True)),
        target=name,
        unit=target.unit if isinstance(target, Metric) else "activation",
        method=method,
        baseline=baseline,
        at=read.at if isinstance(read, PartRead) else None,
        ends=torch.minimum(read.ends, ids.lengths),
        value=task.value,
        at_baseline=task.at_baseline,
        cost=cost + Cost(2 * len(ids) * read.depth, 2.0 * len(ids)),
        off_distribution=off_distribution(task.own, task.absent, task.real, EMBED),
    )
    if method == "integrated_gradients" and bool((found.relative_gap > LARGE_GAP).any()):
        worst = int(found.relative_gap.argmax())
        task.sink(Event("note", TASK, message=(
            f"integrated gradients of example {worst} leave {float(found.relative_gap[worst]):.0%} of the change "
            f"unexplained; give more steps than {options['steps']}, a token's id as baseline, or keep_first"
        )))  # fmt: skip
    return found


def _by_gradient(task: _Task, steps: int, method: str) -> tuple[Float[Tensor, "example pos"], Cost]:
    passes = len(task.own) * steps * (1 + _BACKWARD)
    task.announce(method, passes)
    found = []
    for rows in task.track(method, len(task.own)):
        fn = lambda points, rows=rows: task.read(rows.repeat(len(points) // len(rows)), points, grad=True)  # noqa: E731
        own, absent = task.own[rows], task.absent[rows]
        with torch.enable_grad():
            if method == "gradient_x_input":
                point = own.clone().requires_grad_()
                shares = _gradient(fn(point), point) * (own - absent)
            else:
                together = max(1, task.batch_tokens // (len(rows) * task.width))
                shares, _ = integrated_gradients(fn, own, absent, steps, together)
        found.append(shares.double().sum(-1).cpu())
    return torch.cat(found).masked_fill(~task.real, 0.0), Cost(passes * task.read.depth, passes)


def _by_change(
    task: _Task, method: str, options: dict[str, int], pool: tuple[Tensor, Tensor] | None
) -> tuple[Float[Tensor, "example pos"], Cost]:
    replayed = isinstance(task.read, MetricRead) and task.read.metric.needs.positions != "all" and method != "window"
    effects = _replayed if replayed else _run
    repeats = options["draws"] if method == "resample" else 1
    size = options["window"] if method == "window" else 1
    task.announce(method, float(len(task.cells()) * repeats))
    total, cost = torch.zeros(task.own.shape[:2], dtype=torch.float64), Cost()
    for number in range(repeats):
        instead = task.absent if pool is None else _drawn(task, pool, number)
        found, spent = effects(task, instead, size, method)
        total, cost = total + found, cost + spent
    return total / repeats, cost


def _drawn(task: _Task, pool: tuple[Tensor, Tensor], number: int) -> Float[Tensor, "example pos d_model"]:
    """Embeddings of tokens of other texts at every position."""
    ids, example = pool
    draw = generator_for("resampled tokens", task.seed, number)
    drawn = torch.empty_like(task.read.tokens.ids)
    for row in range(len(drawn)):
        allowed = ids[example != row]
        drawn[row] = allowed[torch.randint(len(allowed), (task.width,), generator=draw)]
    return _kept(task.own, embeddings_of(task.model, Tokens(drawn)).to(task.own), task.keep_first)


def _run(task: _Task, instead: Tensor, size: int, method: str) -> tuple[Float[Tensor, "example pos"], Cost]:
    """What replacing windows of tokens changes, by passes up to where the target is read."""
    cells, width, first = task.cells(), task.width, int(task.keep_first)
    # A window starts at its first token and lies inside the text; a text that is shorter has one.
    inside = torch.minimum(task.read.tokens.lengths, task.read.ends)[cells[:, 0]]
    starts = cells[(cells[:, 1] + size <= inside) | ((cells[:, 1] == first) & (inside - first < size))]
    plain, changed = task.value, []
    for rows in task.track(method, len(starts)):
        example, begins = starts[rows].T
        back = torch.arange(width) - begins[:, None]
        mask = ((back >= 0) & (back < size))[..., None].to(task.own.device)
        changed.append(task.read(example, torch.where(mask, instead[example], task.own[example])))
    # An input of the one token that is kept has nothing to replace.
    effect = plain[starts[:, 0]] - torch.cat([plain.new_zeros(0), *(some.double().cpu() for some in changed)])
    total, count = torch.zeros(2, *task.own.shape[:2], dtype=torch.float64)
    for step in range(size):
        example, at = starts[:, 0], starts[:, 1] + step
        held = (at < width) & (at < torch.minimum(task.read.tokens.lengths, task.read.ends)[example])
        total.index_put_((example[held], at[held]), effect[held], accumulate=True)
        count.index_put_((example[held], at[held]), torch.ones_like(effect[held]), accumulate=True)
    values = (total / count.clamp_min(1)).masked_fill(~task.real, 0.0)
    return values, Cost(len(starts) * task.read.depth, float(len(starts)))


def _replayed(task: _Task, instead: Tensor, _size: int, method: str) -> tuple[Float[Tensor, "example pos"], Cost]:
    """What replacing each token changes in a metric, by the engine of sweeps."""
    assert isinstance(task.read, MetricRead)
    part, pairs = Unit(EMBED), task.read.pairs
    sites = to_record([part])
    base = record(task.model, task.read.tokens, sites)
    other = record(task.model, task.read.tokens, sites, [Patch(EMBED, source=instead)])
    source = patch_source(base, other)
    # The ids are the same; what differs is what was made of them.
    source = replace(source, first=torch.zeros_like(source.first))
    variants = [Variant((part,), position) for position in range(task.width)]
    found = evaluate(
        base, variants, source, pairs, task.read.metric, budget=task.batch_tokens, seed=task.seed, task=method,
        sink=task.sink,
    )  # fmt: skip
    effects = (found.base - found.values).T.double()
    return effects.masked_fill(~task.real, 0.0), found.cost + Cost(2.0 * len(pairs), 2.0 * len(pairs))
