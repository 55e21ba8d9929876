"""Codes: the latents that take part in a step, with their products. Sparse where few are active, dense otherwise.

A batch is cut into pieces of rows. A *bag* is one row's share of one group of latents; without groups (all kinds but
matryoshka) bags are rows. Tables that latents are compared with are [bags, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from vesalius.dictionaries.training.products import by_column, dots, weighted_sums
from vesalius.model.products import linear


class Piece(Protocol):
    """Some rows of a batch. A value per entry has the shape of `pre`."""

    pre: Tensor
    """Pre-activations of the entries."""

    def at(self, per_latent: Tensor) -> Tensor:
        """A vector [latent] spread over the entries."""
        ...

    def decode(self, weights: Tensor, decoder: Tensor) -> Tensor:
        """[bags, d]: sums of weight times decoder row."""
        ...

    def dots(self, table: Tensor, decoder: Tensor) -> Tensor:
        """Per entry, its bag's row of the table [bags, d] times its latent's row of the decoder."""
        ...

    def sums(self, per_entry: Tensor) -> Tensor:
        """[latent] float64: sums over the entries."""
        ...

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        """Store what `Codes.outer` will need: the entries' values and the gradients of their pre-activations."""
        ...


class Codes(Protocol):
    """All pieces of a batch, after `keep`."""

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        """[latents, d]: for latents start to stop, sums over entries of `values` or `dpre` times the table's row.

        table: [bags, d] for values, [rows, d] for dpre.
        """
        ...


class SparsePiece:
    """Entries bag by bag. offsets: [bags + 1], where each bag begins."""

    def __init__(self, columns: Tensor, offsets: Tensor, pre: Tensor, n_latents: int) -> None:
        self.columns, self.offsets, self.pre, self.n_latents = columns, offsets, pre, n_latents
        self.values = self.dpre = pre

    def at(self, per_latent: Tensor) -> Tensor:
        return per_latent[self.columns]

    def decode(self, weights: Tensor, decoder: Tensor) -> Tensor:
        return weighted_sums(decoder, self.columns, self.offsets[:-1], weights)

    def dots(self, table: Tensor, decoder: Tensor) -> Tensor:
        return dots(table, decoder, self.columns, self.offsets[:-1], self.bags)

    @property
    def bags(self) -> Tensor:
        """[entries] number of each entry's bag."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    def sums(self, per_entry: Tensor) -> Tensor:
        return torch.bincount(self.columns, weights=per_entry.double(), minlength=self.n_latents)

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        self.values, self.dpre = values, dpre


class SparseCodes:
    """The entries of all pieces, sorted by latent."""

    def __init__(self, pieces: Sequence[SparsePiece], n_groups: int) -> None:
        columns = torch.cat([piece.columns for piece in pieces])
        counts = torch.cat([piece.offsets.diff() for piece in pieces])
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        order, bags, self._begins = by_column(columns, offsets, pieces[0].n_latents)
        rows = bags if n_groups == 1 else bags.div(n_groups, rounding_mode="floor")
        self._of = {
            "values": (torch.cat([piece.values for piece in pieces])[order], bags),
            "dpre": (torch.cat([piece.dpre for piece in pieces])[order], rows),
        }

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        weights, rows = self._of[which]
        first, last = int(self._begins[start]), int(self._begins[stop])
        return weighted_sums(table, rows[first:last], self._begins[start:stop] - first, weights[first:last])


class DensePiece:
    """Every latent of every row is an entry. pre: [rows, latent]."""

    def __init__(self, pre: Tensor) -> None:
        self.pre = pre
        self.values = self.dpre = pre

    def at(self, per_latent: Tensor) -> Tensor:
        return per_latent

    def decode(self, weights: Tensor, decoder: Tensor) -> Tensor:
        return linear(weights, decoder.T)

    def dots(self, table: Tensor, decoder: Tensor) -> Tensor:
        return linear(table, decoder)

    def sums(self, per_entry: Tensor) -> Tensor:
        return per_entry.sum(0, dtype=torch.float64)

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        # The pre-activations are not needed any more; their memory is.
        self.values, self.dpre = values, self.pre.copy_(dpre)


class DenseCodes:
    """All pieces of a batch in which every latent of every row is an entry."""

    def __init__(self, pieces: Sequence[DensePiece]) -> None:
        self._pieces = pieces

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, table.shape[1], dtype=table.dtype, device=table.device)
        at = 0
        for piece in self._pieces:
            weights = piece.values if which == "values" else piece.dpre
            rows = table[at : at + len(weights)]
            total += linear(weights[:, start:stop].T.contiguous(), rows.T)
            at += len(weights)
        return total


def codes_of(pieces: Sequence[Piece], n_groups: int) -> Codes:
    """The pieces as one: dense when every piece is dense; sparse ones and dense ones do not mix."""
    dense = [piece for piece in pieces if isinstance(piece, DensePiece)]
    if dense:
        return DenseCodes(dense)
    return SparseCodes([piece for piece in pieces if isinstance(piece, SparsePiece)], n_groups)
