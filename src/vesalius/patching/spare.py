"""What a replay need not compute, because nothing reads it.

An MLP whose output an edit overwrites at every live position of a row, and the queries, keys and values of a row whose
heads are all overwritten, are computed for the other rows only; in the last layer an MLP is computed for the positions
that are read. Both map tokens one by one: the tokens that matter are gathered at a module's input and spread again at
its output, with zeros between them, which the edit overwrites or nobody reads. The layer's own code runs as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.model import Model
from vesalius.model.hooks import Tap
from vesalius.patching.edits import Edits
from vesalius.patching.flat import Flat
from vesalius.site import Site

_INSIDE_MLP = ("mlp_in", "mlp_post", "router", "expert_out")
_INSIDE_ATTENTION = ("q", "k", "v", "pattern")


class Spared:
    """Tokens that each layer's MLP and attention have to compute, in one batch of rows."""

    def __init__(self, model: Model, flat: Flat, edits: Edits, watch: Iterable[Site]) -> None:
        adapter, self._layout = model.architecture
        self._model, self._flat = model, flat
        seen = {*watch, *edits.sites}
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
        """Gathering at inputs, spreading at outputs; to be installed before the edits' own taps."""
        adapter = self._model.architecture[0]
        taps: list[Tap] = []
        for layer in sorted({*self._mlp, *([] if self._last is None else [self._last])}):
            block = self._model.layer(layer)
            start, end = adapter.sites["mlp_in"], adapter.sites["mlp_out"]
            taps += self._pair(
                Tap(submodule(block, start.path), start.side, _unchanged),
                Tap(submodule(block, end.path), end.side, _unchanged), layer, "mlp",
            )  # fmt: skip
        for layer in sorted(self._heads):
            block = self._model.layer(layer)
            for path in dict.fromkeys(adapter.sites[kind].path for kind in ("q", "k", "v")):
                module = submodule(block, path)
                taps += self._pair(Tap(module, "in", _unchanged), Tap(module, "out", _unchanged), layer, "heads")
        return taps

    def _pair(self, before: Tap, after: Tap, layer: int, what: str) -> list[Tap]:
        def gather(tensor: Tensor) -> Tensor:
            return tensor.index_select(tensor.ndim - 2, self._kept(layer, what, tensor.shape[-2]))

        def spread(tensor: Tensor) -> Tensor:
            tokens = self._flat.active(layer)[1]
            full = tensor.new_zeros(*tensor.shape[:-2], tokens, tensor.shape[-1])
            return full.index_copy_(full.ndim - 2, self._kept(layer, what, tokens), tensor)

        return [Tap(before.module, before.side, gather), Tap(after.module, after.side, spread)]

    def _kept(self, layer: int, what: str, tokens: int) -> Int[Tensor, " kept"]:
        """Tokens of a layer's batch that are computed."""
        row = self._flat.row_of[:tokens]
        keep = torch.ones(tokens, dtype=torch.bool)
        rows = (self._mlp if what == "mlp" else self._heads).get(layer)
        if rows is not None:
            keep &= ~rows[row]
        if what == "mlp" and layer == self._last:
            read = torch.zeros(tokens, dtype=torch.bool)
            read[self._flat.last[self._flat.last < tokens]] = True
            keep &= read
        return keep.nonzero()[:, 0]


def _any(seen: set[Site], layer: int, kinds: Sequence[str]) -> bool:
    return any(site.layer == layer and site.kind in kinds for site in seen)


def _unchanged(_: Tensor) -> None:
    return None
