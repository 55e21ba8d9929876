"""Path patching: what a part does to another one directly, with everything between them frozen.

For a sender and a set of receivers (Wang et al. 2023, section 3.1 and appendix B; Goldowsky-Dill et al. 2023):

1. base run and source run, without edits;
2. the base run with the sender's source value, and every other head (and MLP) frozen at the base run: the receivers'
   inputs feel the sender only through the residual stream;
3. the base run with the receivers' inputs of step 2, and everything after them free: the metric.

A receiver is what a part reads: queries, keys or values of heads, an MLP's input, or the logits (then step 2 is the
last, and with the final norm frozen the effect is the sender's direct effect).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import split_heads
from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.model.hooks import Tap, tapped
from vesalius.model.readout import norm_frozen
from vesalius.parts import Edge, Part, Together, Unit
from vesalius.patching.edits import Edits, Flat, Rows, Table
from vesalius.patching.evaluate import TOKENS_PER_BATCH
from vesalius.patching.examples import Examples
from vesalius.patching.path_plan import LOGITS, Named, Paths, plain_path, receiving, sending
from vesalius.patching.plain import allowance
from vesalius.patching.plan import Cost, announcement
from vesalius.patching.record import Recording, record
from vesalius.patching.replay import Replay
from vesalius.patching.scores import Scores
from vesalius.patching.scoring import at_reads, base_logits, base_values, final_norm, score, score_normed
from vesalius.patching.sources import Source, patch_source
from vesalius.patching.targets import PROMPTS, normal
from vesalius.site import Site


def path_patching(
    model: Model,
    pairs: Pairs,
    *,
    senders: Named | Sequence[Named],
    receivers: Named | Sequence[Named],
    each: str | None = None,
    freeze_mlps: bool = True,
    freeze_norm: bool = True,
    metric: Metric = logit_diff,
    base: str = "clean",
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    sink: Sink | None = None,
) -> Scores:
    """The metric when each sender, alone, has the other prompts' value for the receivers only.

    senders: embed, z (heads), attn_out or mlp_out sites, one row of the result each; each="head" takes every head of a
    z site by itself. receivers: q, k and v (with or without a head), mlp_in, or logits alone; all of them together are
    one set. freeze_mlps: False lets MLPs between sender and receiver respond (the definition of Wang et al. 2023).
    freeze_norm: with logits as receiver, hold the final norm's scale at the base run. base: the prompts that are run;
    the other prompts give the senders' values. check: run one random cell by three plain forwards too. sink: hears
    the cost first, then progress; None shows both on standard error.

    Returns Scores [sender, example]: `effects` are the path effects. A sender after all receivers has effect 0.

    Raises UnknownNameError or InputError for sites that cannot send or receive, SelfCheckError when a plain run
    disagrees, NotFiniteError for a metric that is not finite.
    """
    paths = Paths(receiving(model, receivers), freeze_mlps, freeze_norm)
    if paths.to_logits and freeze_norm and not model.architecture[0].direct:
        raise InputError(f"{model.name} has no direct effects with frozen norms; pass freeze_norm=False")
    names = sending(model, senders, each)
    if metric.needs.positions == "all":
        raise InputError(f"{metric.name} reads every position; path patching takes metrics of the read position")
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    work, seconds = _recorded(model, pairs, names, metric, paths, base)
    cost = work.estimate(names, budget) + Cost(2.0 * len(pairs), 2.0 * len(pairs))
    with shown(sink) as screen:
        screen(announcement("paths", cost, [work.base, work.other], seconds, budget))
        values = work.values(names, budget, screen)
    plain = [base_values(run, pairs, metric, work.base) for run in (work.base, work.other)]
    _refuse_nan(values, names)
    if check:
        work.check(names, values, seed)
    found = tuple(map(Unit, paths.receivers))
    target: Part = found[0] if len(found) == 1 else Together(found)
    return Scores(
        values=values,
        base=plain[0],
        source=plain[1],
        mask=torch.ones_like(values, dtype=torch.bool),
        cost=cost,
        items=tuple(Edge(Unit(sender), target) for sender in names),
        each=None,
        edit=f"path to {', '.join(map(str, paths.receivers))}",
        metric=metric.name,
        unit=metric.unit,
        prompts=base,
        rows=tuple(map(Unit, names)),
        examples=Examples.of(model, pairs, base),
    )


def _recorded(
    model: Model, pairs: Pairs, senders: Sequence[Site], metric: Metric, paths: Paths, base: str
) -> tuple[_Work, float]:
    """Base and source run, and the seconds that a forward pass of one example took."""
    n_layers = model.architecture[1].n_layers
    kept = [Site(kind, layer) for kind in ("z", "mlp_out") for layer in range(n_layers)]
    kept += [normal(site)[0] for site in senders if site.kind == "attn_out"]
    other = PROMPTS[1 - PROMPTS.index(base)]
    began = time.perf_counter()
    runs = record(model, pairs.tokens(base), kept), record(model, pairs.tokens(other), kept)
    seconds = (time.perf_counter() - began) / (2 * len(pairs))
    source = patch_source(*runs)
    if not runs[0].causal:
        source = replace(source, first=torch.zeros_like(source.first))
    return _Work(*runs, source, pairs, metric, paths), seconds


def _refuse_nan(values: Tensor, senders: Sequence[Site]) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        sender, example = bad.nonzero()[0].tolist()
        raise NotFiniteError(f"the metric is not finite for example {example} with {senders[sender]} as sender")


@dataclass(frozen=True, eq=False)
class _Work:
    base: Recording
    other: Recording
    source: Source
    pairs: Pairs
    metric: Metric
    paths: Paths

    def estimate(self, senders: Sequence[Site], budget: int) -> Cost:
        """What `values` costs; nothing is run."""
        live, steps = self._live(senders), 1 if self.paths.to_logits else 2
        cells = len(senders) * len(self.pairs)
        if self.base.reason:
            spent = 2.0 * len(self.pairs) * int(live.any(1).sum())
        else:
            spent = sum((self._cost(rows) for _, rows in self._batches(senders, live, budget)), 0.0)
        return Cost(spent, float(steps * cells), steps * (cells - int(live.sum())))

    def values(self, senders: Sequence[Site], budget: int, sink: Sink) -> Float[Tensor, "sender example"]:
        """Metric of every cell."""
        base = base_values(self.base, self.pairs, self.metric, self.base)
        values, live = base.repeat(len(senders), 1), self._live(senders)
        sink(Event("start", "paths", 0, len(senders)))
        if self.base.reason:
            sink(Event("note", "paths", message=f"no replay: {self.base.reason}; every sender is two whole forwards"))
            for number, sender in enumerate(senders):
                if bool(live[number].any()):
                    values[number] = self.plain(sender)
        else:
            for cell, rows in self._batches(senders, live, budget):
                sender_of = [senders[number] for number in cell.tolist()]
                values[cell, rows.example] = self._replayed(sender_of, rows)
                sink(Event("advance", "paths", int(cell.max()) + 1, len(senders)))
        sink(Event("end", "paths", len(senders), len(senders)))
        return values

    def _live(self, senders: Sequence[Site]) -> Tensor:
        reached = torch.tensor([bool(self.paths.reached(sender)) for sender in senders])
        return reached[:, None] & (self.source.first < self.pairs.ends)[None]

    def _batches(self, senders: Sequence[Site], live: Tensor, budget: int) -> Iterator[tuple[Tensor, Rows]]:
        """(sender number, rows), sorted by the sender's layer, of at most about `budget` tokens."""
        layer = torch.tensor([normal(sender)[0].layer or 0 for sender in senders])
        cells = live.nonzero()
        cells = cells[layer[cells[:, 0]].argsort(stable=True)]
        size = (self.pairs.ends - self.source.first)[cells[:, 1]]
        group = (size.cumsum(0) - 1) // budget
        for number in group.unique().tolist():
            sender, example = cells[group == number].T
            yield sender, Rows(example, layer[sender], self.source.first[example], self.pairs.at[example] + 1)

    def _cost(self, rows: Rows) -> float:
        n_layers = self.base.model.architecture[1].n_layers
        layers = n_layers - rows.layer
        if not self.paths.to_logits:
            layers = layers + n_layers - min(site.layer or 0 for site in self.paths.receivers)
        return float((rows.sizes * layers).sum() / (self.base.lengths.float().mean() * n_layers))

    def _replayed(self, senders: Sequence[Site], rows: Rows) -> Float[Tensor, " row"]:
        """Steps 2 and 3 of some rows."""
        inputs, hidden = self._received(senders, rows)
        example, end = rows.example, at_reads(self.base, self.pairs)
        if self.paths.to_logits and self.paths.freeze_norm:
            return self._frozen_score(hidden, example, end)
        if not self.paths.to_logits:
            first = min(site.layer for site in self.paths.receivers if site.layer is not None)
            started = Rows(example, torch.full_like(rows.layer, first), rows.start, rows.end)
            edits = self._responding(senders, started, inputs)
            hidden = Replay(self.base, started, edits, read=self.pairs.reads[example]).run()[0]
        return score(self.base, hidden, example, self.pairs, self.metric, end)

    def _received(self, senders: Sequence[Site], rows: Rows) -> tuple[dict[Site, Tensor], Tensor]:
        """Step 2: receivers' whole sites [row, pos, ...], and the last layer's output at the read positions."""
        model, flat = self.base.model, Flat(rows)
        adapter, examples = model.architecture
        wanted = list(dict.fromkeys(site.whole for site in self.paths.receivers if site != LOGITS))
        inputs: dict[Site, Tensor] = {}

        def keep(site: Site) -> Tap:
            access = adapter.sites[site.kind]
            assert site.layer is not None

            def visit(tensor: Tensor) -> None:
                seen = split_heads(tensor, access, examples)[0]
                inputs[site] = seen.new_zeros(len(rows), self.base.tokens.ids.shape[1], *seen.shape[1:])
                inputs[site][flat.row_of[: len(seen)], flat.pos_of[: len(seen)]] = seen

            return Tap(submodule(model.layer(site.layer), access.path), access.side, visit)

        edits, read = self._sending(senders, rows), self.pairs.reads[rows.example]
        with tapped([keep(site) for site in wanted]):
            hidden, _ = Replay(self.base, rows, edits, read=read, tapped_sites=wanted).run()
        return inputs, hidden

    def _sending(self, senders: Sequence[Site], rows: Rows) -> Edits:
        """The senders' source values, and everything else at the base run."""
        n_layers = self.base.model.architecture[1].n_layers
        own: dict[tuple[Site, int], list[int]] = {}
        frozen: dict[Site, list[int]] = {}
        for row, sender in enumerate(senders):
            own.setdefault(normal(sender), []).append(row)
            for site in self.paths.frozen(sender, n_layers):
                frozen.setdefault(site, []).append(row)
        kept = [_table(self.base[site], site, rows, torch.tensor(some), -1) for site, some in frozen.items()]
        sent = [_table(self.other[site], site, rows, torch.tensor(some), head) for (site, head), some in own.items()]
        return Edits([*kept, *sent])

    def _responding(self, senders: Sequence[Site], rows: Rows, inputs: Mapping[Site, Tensor]) -> Edits:
        """Step 3: the receivers' inputs as they were received."""
        tables = []
        for site in self.paths.receivers:
            some = torch.tensor([row for row, s in enumerate(senders) if site in self.paths.reached(s)]).long()
            index = torch.full_like(some, -1 if site.index is None else site.index)
            if len(some):
                values = (inputs[site.whole],)
                tables.append(Table(site.whole, values, some, index, some, rows.start[some], rows.end[some]))
        return Edits(tables)

    def _frozen_score(
        self, hidden: Float[Tensor, "row read d_model"], example: Int[Tensor, " row"], end: Tensor
    ) -> Float[Tensor, " row"]:
        """Metric with the final norm's scale held at the base run."""
        base = end[example]
        with torch.no_grad():
            normed = norm_frozen(self.base.model, base, hidden - base)
            return score_normed(self.base, normed, example, self.pairs, self.metric, final_norm(self.base, base))

    def plain(self, sender: Site) -> Float[Tensor, " example"]:
        """One sender on every example, by ordinary runs with hooks."""
        logits, last = plain_path(self.base, self.other, self.source, self.paths, sender)
        everyone = torch.arange(len(self.pairs))
        if self.paths.to_logits and self.paths.freeze_norm:
            read = last[everyone[:, None], self.pairs.reads]
            return self._frozen_score(read, everyone, at_reads(self.base, self.pairs))
        base = base_logits(self.base) if self.metric.needs.base else None
        return self.metric(logits, self.pairs, base).cpu()

    def check(self, senders: Sequence[Site], values: Tensor, seed: int) -> None:
        """Raise SelfCheckError when a random sender's values differ from those of plain runs."""
        reached = [number for number, sender in enumerate(senders) if self.paths.reached(sender)]
        if not reached:
            return
        number = reached[seed % len(reached)]
        allowed = allowance(self.base, self.pairs, values)
        worst, example = (self.plain(senders[number]) - values[number]).abs().max(0)
        if float(worst) > allowed:
            raise SelfCheckError(
                f"replay and plain runs differ by {float(worst):.6g} for example {int(example)} with {senders[number]} "
                "as sender; please report this model"
            )


def _table(values: Tensor, site: Site, rows: Rows, some: Int[Tensor, " edit"], index: int) -> Table:
    """A whole site (index -1) or one head of some rows, at all their live positions, at a run's values."""
    indices = torch.full_like(some, index)
    return Table(site, (values,), some, indices, rows.example[some], rows.start[some], rows.end[some])
