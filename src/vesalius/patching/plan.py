"""The plan of a sweep: which edited runs are needed, as rows that start where their edits first matter, in batches.

A cell (variant, example) whose edit provably changes nothing gets no row: its value is the base run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.errors import InputError
from vesalius.jobs import Estimate, Event
from vesalius.model import Model
from vesalius.model.hooks import Tap
from vesalius.parts import Part, Unit
from vesalius.patching.edits import Edits, Fixed, Flat, Rows, fixed_tables, read_again, tables_of
from vesalius.patching.record import Recording
from vesalius.patching.sources import Source
from vesalius.patching.targets import Variant, normal, writes_at
from vesalius.site import Site

KEYS_PER_TOKEN = 16
# Rows of one variant that are packed as one piece; a piece is never cut.
_ROWS_TOGETHER = 64
# Edits of these are not understood by a replay: they are run as whole forwards.
_WHOLE_RUNS = ("router", "expert_out", "module")
_INSIDE_MLP = ("mlp_in", "mlp_post", "router", "expert_out")
_INSIDE_ATTENTION = ("q", "k", "v", "pattern")


@dataclass(frozen=True)
class Cost:
    """In forward passes of one example: what was spent, and what one whole forward per edited run would take."""

    spent: float = 0.0
    naive: float = 0.0
    skipped: int = 0
    """Edited runs that provably change nothing."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.spent + other.spent, self.naive + other.naive, self.skipped + other.skipped)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.spent - other.spent, self.naive - other.naive, self.skipped - other.skipped)

    def describe(self) -> str:
        return f"{self.spent:.0f} forward equivalents (plain: {self.naive:.0f}; {self.skipped} provably without effect)"


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one replay, with the (variant, example) cell each fills."""

    rows: Rows
    edits: Edits
    cell: Int[Tensor, "row 2"]


class Plan:
    """Which cells of some variants need a run. ends: [example] position after the last one that is read."""

    def __init__(
        self, base: Recording, variants: Sequence[Variant], source: Source, ends: Int[Tensor, " example"]
    ) -> None:
        self.base, self.variants, self.source, self.ends = base, tuple(variants), source, ends
        self._differs: dict[Site, Tensor] = {}

    @property
    def why_plain(self) -> str:
        """Why these variants need whole forwards; empty when a replay covers them."""
        kinds = {site.kind for one in self.variants for part in one.parts for site in writes_at(part)}
        strange = sorted(kinds & set(_WHOLE_RUNS))
        return self.base.reason or (f"{' and '.join(strange)} edits are not replayed" if strange else "")

    def estimate(self) -> Cost:
        """What the runs would cost; nothing is run."""
        cells = len(self.variants) * len(self.base)
        if self.why_plain:
            live = int(self.live().sum())
            return Cost(float(live), float(cells), cells - live)
        found = [rows for variant in self.variants for rows in self.rows_of(variant)]
        spent = sum((self.work(rows) for rows in found), 0.0)
        return Cost(spent, float(cells), cells - sum(len(rows) for rows in found))

    def work(self, rows: Rows) -> float:
        """Layers and positions that rows go through, in whole forwards of a prompt of mean length."""
        n_layers = self.base.model.architecture[1].n_layers
        return float((rows.sizes * (n_layers - rows.layer)).sum() / (self.base.lengths.float().mean() * n_layers))

    def live(self) -> Bool[Tensor, "variant example"]:
        """Cells whose edit can change something at a position that is read."""
        if not self.base.causal:
            return torch.stack([self._changes_any(variant) for variant in self.variants])
        live = torch.zeros(len(self.variants), len(self.base), dtype=torch.bool)
        for number, variant in enumerate(self.variants):
            for rows in self.rows_of(variant):
                live[number, rows.example] = True
        return live

    def rows_of(self, variant: Variant) -> list[Rows]:
        """The rows a variant needs: one per example in which it can change something at a position that is read."""
        if variant.position is None:
            start = self._first(variant.parts)
            live = start < self.ends
        else:
            start = torch.full_like(self.ends, variant.position)
            live = self._changes_any(variant) & (self.ends > variant.position)
        example = live.nonzero()[:, 0]
        layer = torch.full_like(example, first_layer(variant))
        return [Rows(e, layer[: len(e)], start[e], self.ends[e]) for e in example.split(_ROWS_TOGETHER) if len(e)]

    def batches(self, budget: int, fixed: Sequence[Fixed] = ()) -> Iterator[Batch]:
        """All rows, packed into batches of at most `budget` live tokens, early layers first.

        Rows also carry the keys of their whole prompt, so those are bounded too (16 times the budget).
        """
        # Rows that start late are short work and wait for no others: packed by layer, few layers run half empty.
        order = sorted(range(len(self.variants)), key=lambda number: first_layer(self.variants[number]))
        pieces = [(number, rows) for number in order for rows in self.rows_of(self.variants[number])]
        together: list[tuple[int, Rows]] = []
        size, reach = 0, 0
        for number, row in pieces:
            tokens, keys = int(row.sizes.sum()), int(row.end.sum())
            if together and (size + tokens > budget or reach + keys > KEYS_PER_TOKEN * budget):
                yield self._batch(together, fixed)
                together, size, reach = [], 0, 0
            together.append((number, row))
            size, reach = size + tokens, reach + keys
        if together:
            yield self._batch(together, fixed)

    def _batch(self, together: Sequence[tuple[int, Rows]], fixed: Sequence[Fixed]) -> Batch:
        """Pieces come sorted by layer, so rows are too."""
        parts = ("example", "layer", "start", "end")
        rows = Rows(*(torch.cat([getattr(r, name) for _, r in together]) for name in parts))
        number = torch.cat([torch.full((len(r),), n) for n, r in together])
        tables = tables_of(self.base, self.variants, self.source, rows, number)
        return Batch(
            rows, Edits([*fixed_tables(self.base, fixed, rows), *tables]), torch.stack([number, rows.example], 1)
        )

    def _first(self, parts: Sequence[Part]) -> Int[Tensor, " example"]:
        """First position where any of them changes something; past the end where none does."""
        width = self.base.tokens.ids.shape[1]
        found = torch.full((len(self.base),), width)
        for part in parts:
            changed = self._changes(part)
            found = torch.minimum(found, torch.where(changed.any(1), changed.long().argmax(1), width))
        return found

    def _changes_any(self, variant: Variant) -> Bool[Tensor, " example"]:
        """Whether any of a variant's parts changes something, at its position or anywhere."""
        found = torch.zeros(len(self.base), dtype=torch.bool)
        for part in variant.parts:
            changed = self._changes(part)
            if variant.position is None:
                found |= changed.any(1)
            elif variant.position < changed.shape[1]:
                found |= changed[:, variant.position]
        return found

    def _changes(self, part: Part) -> Bool[Tensor, "example pos"]:
        """Real positions, from the source's first on, at which its value differs from the base run's, bit for bit."""
        real = self.base.real_at(writes_at(part)[0])
        reach = real & (torch.arange(real.shape[1]) >= self.source.first[:, None])
        # What is added is not compared with what is there.
        if self.source.adds:
            return reach
        if not isinstance(part, Unit):
            return reach & self._unequal(part.value(self.base), self.source.of(part), real, 2)
        site, index = normal(part.site)
        if site not in self._differs:
            self._differs[site] = self._unequal(self.base[site], self.source.of(part), real, 3)
        differs = self._differs[site]
        if differs.ndim == 3:
            differs = differs.any(-1) if index < 0 else differs[:, :, index]
        return reach & differs

    def _unequal(self, base: Tensor, values: Tensor, real: Tensor, axes: int) -> Tensor:
        """True where any number behind the first `axes` axes differs; everywhere, when these are not the tokens'."""
        # What has no token axis, such as a mean over examples, can't be compared by position: assume it differs.
        if base.shape[:2] != real.shape or values.ndim != base.ndim:
            return torch.ones_like(real)
        differs = base != (values[self.source.example] if values.shape[0] > 1 else values)
        return (differs if differs.ndim <= axes else differs.flatten(axes).any(-1)).cpu()


def first_layer(variant: Variant) -> int:
    """The layer at which a variant's runs start: the first that it writes, or has to read again. Raises InputError."""
    layers = [site.layer for part in variant.parts for site in (*writes_at(part), *read_again(part))]
    if not layers:
        raise InputError("a variant without parts edits nothing")
    # A module's place is not known; its edits are run whole.
    return min(layer or 0 for layer in layers)


class Needed:
    """Which tokens of a batch each layer's MLP and attention have to compute; nothing reads the others.

    An MLP whose output an edit overwrites at every live position of a row, and the queries, keys and values of a row
    whose heads are all overwritten, are computed for the other rows only; in the last layer an MLP is computed for the
    positions that are read. Both map tokens one by one: the tokens that matter are gathered at a module's input and
    scattered again at its output, with zeros between them, which the edit overwrites or nobody reads. The layer's own
    code runs as it is.
    """

    def __init__(self, model: Model, flat: Flat, edits: Edits, looked_at: Iterable[Site], read: Tensor) -> None:
        """looked_at: sites whose values are used. read: tokens of the batch that are read at the end."""
        adapter, self._layout = model.architecture
        self._model, self._flat, self._read = model, flat, read
        seen = {*looked_at, *edits.sites}
        # A mixture's router counts its tokens, and some cannot count none.
        whole = bool(adapter.gate) or "mlp_in" not in adapter.sites
        self._mlp = {} if whole else self._overwritten(edits, seen, "mlp_out", 1, _INSIDE_MLP)
        self._heads = self._overwritten(edits, seen, "z", self._layout.n_heads, _INSIDE_ATTENTION)
        last = self._layout.n_layers - 1
        self._last = None if whole or _any(seen, last, (*_INSIDE_MLP, "mlp_out")) else last

    def _overwritten(
        self, edits: Edits, seen: set[Site], kind: str, units: int, inside: Sequence[str]
    ) -> dict[int, Bool[Tensor, " row"]]:
        """By layer, the rows whose tensor an edit overwrites; layers that are looked into are left out."""
        layers = {site.layer for site in edits.sites if site.kind == kind and site.layer is not None}
        found = {
            layer: edits.overwritten(Site(kind, layer), self._flat.rows, units)
            for layer in layers
            if not _any(seen, layer, inside)
        }
        return {layer: rows for layer, rows in found.items() if bool(rows.any())}

    def attending(self, layer: int, count: int) -> Bool[Tensor, " row"] | None:
        """Rows (of the first `count`) whose attention is needed; None is all."""
        return ~self._heads[layer][:count] if layer in self._heads else None

    def taps(self) -> list[Tap]:
        """Gathering at inputs, scattering at outputs; to be installed before the edits' own taps."""
        adapter = self._model.architecture[0]
        taps: list[Tap] = []
        for layer in sorted({*self._mlp, *([] if self._last is None else [self._last])}):
            block = self._model.layer(layer)
            start, end = adapter.sites["mlp_in"], adapter.sites["mlp_out"]
            ends = (submodule(block, start.path), start.side), (submodule(block, end.path), end.side)
            taps += self._pair(*ends, layer, "mlp")
        for layer in sorted(self._heads):
            block = self._model.layer(layer)
            # Where keys and values have no modules of their own (latent attention), they are computed for every head.
            for path in dict.fromkeys(adapter.sites[kind].path for kind in ("q", "k", "v") if kind in adapter.sites):
                module = submodule(block, path)
                taps += self._pair((module, "in"), (module, "out"), layer, "heads")
        return taps

    def _pair(self, before: tuple[nn.Module, str], after: tuple[nn.Module, str], layer: int, what: str) -> list[Tap]:
        def gather(tensor: Tensor) -> Tensor:
            return tensor.index_select(tensor.ndim - 2, self._kept(layer, what, tensor.shape[-2]))

        def scatter(tensor: Tensor) -> Tensor:
            tokens = self._flat.active(layer)[1]
            full = tensor.new_zeros(*tensor.shape[:-2], tokens, tensor.shape[-1])
            return full.index_copy_(full.ndim - 2, self._kept(layer, what, tokens), tensor)

        return [Tap(*before, gather), Tap(*after, scatter)]

    def _kept(self, layer: int, what: str, tokens: int) -> Int[Tensor, " kept"]:
        """Tokens of a layer's batch that are computed."""
        row = self._flat.row_of[:tokens]
        keep = torch.ones(tokens, dtype=torch.bool)
        rows = (self._mlp if what == "mlp" else self._heads).get(layer)
        if rows is not None:
            keep &= ~rows[row]
        if what == "mlp" and layer == self._last:
            read = torch.zeros(tokens, dtype=torch.bool)
            read[self._read[self._read < tokens]] = True
            keep &= read
        return keep.nonzero()[:, 0].to(self._model.device)


def _any(seen: set[Site], layer: int, kinds: Sequence[str]) -> bool:
    return any(site.layer == layer and site.kind in kinds for site in seen)


# Copies of the residual stream and of an MLP's inner width that are alive at once in a layer.
_STREAMS, _INNER = 8, 3


def bytes_per_token(model: Model) -> int:
    """Bytes that one live token of a batch takes at the peak, float32: one layer's tensors, and its share of the keys
    and values that are copied for its row."""
    layout = model.architecture[1]
    widths = [module.out_features for module in model.layer(0).modules() if isinstance(module, nn.Linear)]
    inner = max(widths, default=4 * layout.d_model)
    keys = 2 * KEYS_PER_TOKEN * layout.n_kv_heads * layout.d_head
    return 4 * (_STREAMS * layout.d_model + _INNER * inner + keys)


def tokens_in(model: Model, memory: int) -> int:
    """Live tokens of a batch that fit into `memory` bytes. Raises InputError when not even a prompt's would."""
    if model.adapter is None or model.adapter.stack_names != ("",):
        raise InputError("memory= needs a model of one stack of layers; give budget= (tokens run together)")
    tokens = memory // bytes_per_token(model)
    if tokens < 1:
        raise InputError(f"memory={memory} bytes hold no token of this model, of {bytes_per_token(model)} bytes each")
    return int(tokens)


def memory_of(runs: Sequence[Recording], budget: int) -> int:
    """Bytes: the weights, the recorded runs, and one batch of a replay."""
    model = runs[0].model
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    recorded = sum(run.nbytes for run in runs)
    return weights + recorded + (0 if runs[0].reason else budget * bytes_per_token(model))


def announcement(task: str, cost: Cost, runs: Sequence[Recording], seconds: float, budget: int) -> Event:
    """A note of what is to come, before the first edited run. seconds: of one forward pass of one example."""
    needs = Estimate(cost.spent * seconds, memory_bytes=memory_of(runs, budget))
    return Event("note", task, message=f"{task}: {cost.describe()}; {needs.describe()}")
