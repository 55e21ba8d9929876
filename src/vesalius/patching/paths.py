"""Path patching: what a part says to another one directly, with everything between them held still.

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
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain, parameter, split_heads, weight_of
from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.model.attention import capped
from vesalius.model.hooks import Tap, tapped
from vesalius.patching.checking import allowance
from vesalius.patching.cost import Cost
from vesalius.patching.donors import Donor, patch_donor
from vesalius.patching.edits import Edits, Table, sources
from vesalius.patching.evaluate import TOKENS_PER_BATCH
from vesalius.patching.flat import Flat, Rows
from vesalius.patching.memory import announcement
from vesalius.patching.path_plan import LOGITS, Paths, plain_path, receiving, sending
from vesalius.patching.plain import base_logits
from vesalius.patching.record import Record, record
from vesalius.patching.replay import Replay
from vesalius.patching.scores import PROMPTS, Scores
from vesalius.patching.scoring import base_values, score
from vesalius.patching.what import normal
from vesalius.site import Site


def path_patching(
    model: Model,
    pairs: Pairs,
    *,
    senders: str | Site | Sequence[str | Site],
    receivers: str | Site | Sequence[str | Site],
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
    if metric.needs.positions != "read":
        raise InputError(f"{metric.name} reads every position; path patching takes metrics of the read position")
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    n_layers = model.architecture[1].n_layers
    kept = [Site(kind, layer) for kind in ("z", "mlp_out") for layer in range(n_layers)]
    kept += [normal(site)[0] for site in names if site.kind == "attn_out"]
    other = PROMPTS[1 - PROMPTS.index(base)]
    began = time.perf_counter()
    runs = record(model, pairs.tokens(base), kept), record(model, pairs.tokens(other), kept)
    seconds = (time.perf_counter() - began) / (2 * len(pairs))
    donor = patch_donor(*runs)
    if not runs[0].causal:
        donor = replace(donor, first=torch.zeros_like(donor.first))
    work = _Work(*runs, donor, pairs, metric, paths)
    plan = work.quote(names, budget) + Cost(2.0 * len(pairs), 2.0 * len(pairs), 0)
    with shown(sink) as told:
        told(announcement("paths", plan, runs, seconds, budget))
        values = work.values(names, budget, told)
    plain = [base_values(run, pairs, metric, runs[0]) for run in runs]
    _refuse_nan(values, names)
    if check:
        work.check(names, values, seed)
    to = ", ".join(map(str, paths.receivers))
    return Scores(
        values=values, base=plain[0], source=plain[1], mask=torch.ones_like(values, dtype=torch.bool),
        cost=plan, sites=tuple(map(str, names)), each=None,
        edit=f"path to {to}", metric=metric.name, unit=metric.unit, prompts=base,
    )  # fmt: skip


def _refuse_nan(values: Tensor, senders: Sequence[Site]) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        sender, example = bad.nonzero()[0].tolist()
        raise NotFiniteError(f"the metric is not finite for example {example} with {senders[sender]} as sender")


@dataclass(frozen=True, eq=False)
class _Work:
    base: Record
    other: Record
    donor: Donor
    pairs: Pairs
    metric: Metric
    paths: Paths

    def quote(self, senders: Sequence[Site], budget: int) -> Cost:
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

    @property
    def _at_end(self) -> Float[Tensor, "example d_model"]:
        """The base run's last layer at the read position."""
        return self.base.resid[-1][torch.arange(len(self.base)), self.pairs.at]

    def _live(self, senders: Sequence[Site]) -> Tensor:
        reached = torch.tensor([bool(self.paths.reached(sender)) for sender in senders])
        return reached[:, None] & (self.donor.first < self.pairs.at + 1)[None]

    def _batches(self, senders: Sequence[Site], live: Tensor, budget: int) -> Iterator[tuple[Tensor, Rows]]:
        """(sender number, rows), sorted by the sender's layer, of at most about `budget` tokens."""
        layer = torch.tensor([normal(sender)[0].layer or 0 for sender in senders])
        cells = live.nonzero()
        cells = cells[layer[cells[:, 0]].argsort(stable=True)]
        size = (self.pairs.at + 1 - self.donor.first)[cells[:, 1]]
        group = (size.cumsum(0) - 1) // budget
        for number in group.unique().tolist():
            sender, example = cells[group == number].T
            yield sender, Rows(example, layer[sender], self.donor.first[example], self.pairs.at[example] + 1)

    def _cost(self, rows: Rows) -> float:
        n_layers = self.base.model.architecture[1].n_layers
        layers = n_layers - rows.layer
        if not self.paths.to_logits:
            layers = layers + n_layers - min(site.layer or 0 for site in self.paths.receivers)
        return float((rows.sizes * layers).sum() / (self.base.lengths.float().mean() * n_layers))

    def _replayed(self, senders: Sequence[Site], rows: Rows) -> Float[Tensor, " row"]:
        """Steps 2 and 3 of some rows."""
        heard, hidden = self._listen(senders, rows)
        example, at_end = rows.example, self._at_end
        if self.paths.to_logits and self.paths.freeze_norm:
            return self._frozen_score(hidden, example, at_end)
        if not self.paths.to_logits:
            first = min(site.layer for site in self.paths.receivers if site.layer is not None)
            started = Rows(example, torch.full_like(rows.layer, first), rows.start, rows.end)
            hidden = Replay(self.base, started, self._spoken(senders, started, heard)).run()[0]
        return score(self.base, hidden, example, self.pairs, self.metric, at_end)

    def _listen(self, senders: Sequence[Site], rows: Rows) -> tuple[dict[Site, Tensor], Tensor]:
        """Step 2: receivers' whole sites [row, pos, ...], and the last layer's output at the read position."""
        model, flat = self.base.model, Flat(rows)
        adapter, layout = model.architecture
        wanted = dict.fromkeys(site.whole for site in self.paths.receivers if site != LOGITS)
        heard: dict[Site, Tensor] = {}

        def keep(site: Site) -> Tap:
            access = adapter.sites[site.kind]
            assert site.layer is not None

            def visit(tensor: Tensor) -> None:
                seen = split_heads(tensor, access, layout)[0]
                heard[site] = seen.new_zeros(len(rows), self.base.tokens.ids.shape[1], *seen.shape[1:])
                heard[site][flat.row_of[: len(seen)], flat.pos_of[: len(seen)]] = seen

            return Tap(submodule(model.layer(site.layer), access.path), access.side, visit)

        with tapped([keep(site) for site in wanted]):
            hidden, _ = Replay(self.base, rows, self._muted(senders, rows), heard=list(wanted)).run()
        return heard, hidden

    def _muted(self, senders: Sequence[Site], rows: Rows) -> Edits:
        """The senders' source values, and everything else at the base run."""
        n_layers = self.base.model.architecture[1].n_layers
        own: dict[tuple[Site, int], list[int]] = {}
        held: dict[Site, list[int]] = {}
        for row, sender in enumerate(senders):
            own.setdefault(normal(sender), []).append(row)
            for site in self.paths.frozen(sender, n_layers):
                held.setdefault(site, []).append(row)
        frozen = [_table(self.base, site, rows, torch.tensor(some), -1) for site, some in held.items()]
        spoken = [_table(self.other, site, rows, torch.tensor(some), head) for (site, head), some in own.items()]
        return Edits([*frozen, *spoken])

    def _spoken(self, senders: Sequence[Site], rows: Rows, heard: Mapping[Site, Tensor]) -> Edits:
        """Step 3: the receivers' inputs as they were heard."""
        tables = []
        for site in self.paths.receivers:
            some = torch.tensor([row for row, s in enumerate(senders) if site in self.paths.reached(s)]).long()
            index = torch.full_like(some, -1 if site.index is None else site.index)
            if len(some):
                table = Table(site.whole, sources(heard), some, index, some, rows.start[some], rows.end[some])
                tables.append(table)
        return Edits(tables)

    def _frozen_score(
        self, hidden: Float[Tensor, "row d_model"], example: Int[Tensor, " row"], at_end: Tensor
    ) -> Float[Tensor, " row"]:
        """Metric with the final norm's scale held at the base run."""
        adapter, _ = self.base.model.architecture
        norm = submodule(self.base.model.module, adapter.final_norm)
        change = hidden - at_end[example]
        if adapter.norm == "layer":
            change = change - change.mean(-1, keepdim=True)
        scale = frozen_scale(adapter.norm, norm, at_end[example]) * gain(adapter.norm, norm).to(hidden)
        with torch.no_grad():
            before = norm(at_end[example])
            found = [self._chosen_logits(normed, example) for normed in (before + change * scale, before)]
            return self.metric.of(found[0], found[1] if self.metric.needs.base else None, self._labels(example))

    def _labels(self, example: Tensor) -> Pairs:
        return self.pairs.subset(example.tolist())

    def _chosen_logits(self, normed: Tensor, example: Tensor) -> Tensor:
        """Logits of the tokens the metric reads [row, token]."""
        model = self.base.model
        adapter, _ = model.architecture
        unembed, tokens = submodule(model.module, adapter.unembed), self.metric.tokens(self.pairs)
        logits = unembed(normed) if tokens is None else _some_logits(unembed, normed, tokens[example])
        return capped(logits, getattr(model.module.config, adapter.cap) if adapter.cap else None)

    def plain(self, sender: Site) -> Float[Tensor, " example"]:
        """One sender on every example, by ordinary runs with hooks."""
        logits, last = plain_path(self.base, self.other, self.donor, self.paths, sender)
        everyone = torch.arange(len(self.pairs))
        if self.paths.to_logits and self.paths.freeze_norm:
            return self._frozen_score(last[everyone, self.pairs.at], everyone, self._at_end)
        base = base_logits(self.base) if self.metric.needs.base else None
        return self.metric(logits, self.pairs, base)

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


def _table(source: Record, site: Site, rows: Rows, some: Int[Tensor, " edit"], index: int) -> Table:
    """A whole site (index -1) or one head of some rows, at all their live positions, at a run's values."""
    indices = torch.full_like(some, index)
    return Table(site, source, some, indices, rows.example[some], rows.start[some], rows.end[some])


def _some_logits(unembed: nn.Module, normed: Float[Tensor, "row d_model"], tokens: Int[Tensor, "row k"]) -> Tensor:
    weight, bias = weight_of(unembed), parameter(unembed, "bias")
    logits = torch.einsum("rd,rkd->rk", normed, weight[tokens])
    return logits if bias is None else logits + bias[tokens]
