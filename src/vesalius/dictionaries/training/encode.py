"""Encoding a batch for training: which latents take part, by the rule of the kind and at the precision asked for.

A batch is cut into chunks of rows, each encoded in one thread. Codes are sparse where few latents are active
(`sparse`), and dense otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import Kind, Vectors
from vesalius.dictionaries.training.run import Processes
from vesalius.dictionaries.training.screen import Screen
from vesalius.dictionaries.training.sparse import SparseChunk, SparseCodes, entries_from, top_of_rows
from vesalius.jobs.workers import Workers
from vesalius.model.products import linear

DENSE_SHARE = 1 / 12
"""Share of latents taking part above which dense products are faster than sparse ones."""
_PROBED = 64
"""Rows from which is guessed what all rows are like."""
_ROOM = (1.5, 6.0)
"""Times the entries wanted of a batch: for how many the level is guessed, first and at the second try."""


class Chunk(Protocol):
    """The codes of some rows of a batch. A value per entry has the shape of `pre`."""

    pre: Tensor
    """Pre-activations of the entries."""

    def per_entry(self, per_latent: Tensor) -> Tensor:
        """A vector [latent] spread over the entries."""
        ...

    def decode(self, weights: Tensor, decoder: Float[Tensor, "latent d"]) -> Float[Tensor, "bag d"]:
        """Sums of weight times decoder row."""
        ...

    def dots(self, table: Tensor, decoder: Tensor) -> Tensor:
        """Per entry, its bag's row of the table [bag, d] times its latent's row of the decoder."""
        ...

    def sum_per_latent(self, per_entry: Tensor) -> Float[Tensor, " latent"]:
        """Sums over the entries of each latent, float64."""
        ...

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        """Store what `Codes.outer` will need: the entries' values and the gradients of their pre-activations."""
        ...


class Codes(Protocol):
    """All chunks of a batch, after `keep`."""

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        """[latent, d]: for latents start to stop, sums over entries of `values` or `dpre` times the table's row.

        table: [bag, d] for values, [row, d] for dpre.
        """
        ...


class DenseChunk:
    """Every latent of every row is an entry. pre: [row, latent]."""

    def __init__(self, pre: Float[Tensor, "row latent"]) -> None:
        self.pre = pre
        self.values = self.dpre = pre

    def per_entry(self, per_latent: Tensor) -> Tensor:
        """As `Chunk.per_entry`: it broadcasts over the rows as it is."""
        return per_latent

    def decode(self, weights: Tensor, decoder: Tensor) -> Tensor:
        """As `Chunk.decode`."""
        return linear(weights, decoder.T)

    def dots(self, table: Tensor, decoder: Tensor) -> Tensor:
        """As `Chunk.dots`."""
        return linear(table, decoder)

    def sum_per_latent(self, per_entry: Tensor) -> Tensor:
        """As `Chunk.sum_per_latent`."""
        return per_entry.sum(0, dtype=torch.float64)

    def keep(self, values: Tensor, dpre: Tensor) -> None:
        """As `Chunk.keep`."""
        # The pre-activations are not needed any more; their memory is.
        self.values, self.dpre = values, self.pre.copy_(dpre)


class DenseCodes:
    """All chunks of a batch in which every latent of every row is an entry."""

    def __init__(self, chunks: Sequence[DenseChunk]) -> None:
        self._chunks = chunks

    def outer(self, which: str, table: Tensor, start: int, stop: int) -> Tensor:
        """As `Codes.outer`."""
        total = torch.zeros(stop - start, table.shape[1], dtype=table.dtype, device=table.device)
        at = 0
        for chunk in self._chunks:
            weights = chunk.values if which == "values" else chunk.dpre
            rows = table[at : at + len(weights)]
            total += linear(weights[:, start:stop].T.contiguous(), rows.T)
            at += len(weights)
        return total


def codes_of(chunks: Sequence[Chunk], n_groups: int) -> Codes:
    """The chunks as one: dense when every chunk is dense; sparse ones and dense ones do not mix."""
    dense = [chunk for chunk in chunks if isinstance(chunk, DenseChunk)]
    if dense:
        return DenseCodes(dense)
    return SparseCodes([chunk for chunk in chunks if isinstance(chunk, SparseChunk)], n_groups)


@dataclass(frozen=True)
class Encoder:
    """The encoder of one block as it is at one step."""

    weight: Float[Tensor, "latent d"]
    bias: Float[Tensor, " latent"]
    screen: Screen | None
    rounded: Tensor | None
    """The weight in bfloat16, with `precision="bf16"`."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, precision: str, workers: Workers) -> Encoder:
        """For one step at a precision."""
        screen = Screen.of(weight, bias, workers) if precision == "bf16-screen" else None
        return cls(weight, bias, screen, weight.bfloat16() if precision == "bf16" else None)

    def pre(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row latent"]:
        """Pre-activations."""
        if self.rounded is not None:
            return linear(x.bfloat16(), self.rounded) + self.bias
        return linear(x, self.weight, self.bias)

    def top_of_rows(self, x: Tensor, k: int) -> SparseChunk:
        """The k largest of each row."""
        screened = None if self.screen is None else self.screen.top_of_rows(x, k)
        return top_of_rows(self.pre(x), k) if screened is None else screened

    def above(self, x: Tensor, floor: Tensor) -> SparseChunk:
        """All at or above the floor, [latent] or []."""
        screened = None if self.screen is None else self.screen.above(x, floor)
        return entries_from(self.pre(x), floor) if screened is None else screened


def encode(
    encoder: Encoder,
    chunks: Sequence[Tensor],
    kind: Kind,
    vectors: Vectors,
    config: TrainConfig,
    workers: Workers,
    processes: Processes,
) -> tuple[list[Chunk], Tensor | None]:
    """The codes of every chunk of rows [row, d], and for kinds that choose over a batch the smallest pre-activation
    that was chosen.
    """
    # Rows don't see each other, so that chunks can be encoded one by one.
    if kind.selection == "row":
        return list(workers.map(lambda x: encoder.top_of_rows(x, config.k), chunks)), None
    if kind.selection == "batch":
        return _top_of_batch(encoder, chunks, config, workers, processes)
    floor = kind.floor(vectors, config)
    return _above_floor(encoder, chunks, encoder.bias.new_zeros(()) if floor is None else floor, workers), None


def _above_floor(encoder: Encoder, chunks: Sequence[Tensor], floor: Tensor, workers: Workers) -> list[Chunk]:
    """Every latent above its floor; dense when that is many."""
    # A guess from a few rows is enough: a wrong one costs time and changes no number beyond rounding.
    probe = encoder.pre(chunks[0][:_PROBED])
    if float((probe > floor).double().mean()) > DENSE_SHARE:
        return list(workers.map(lambda x: DenseChunk(encoder.pre(x)), chunks))
    return list(workers.map(lambda x: encoder.above(x, floor), chunks))


def _top_of_batch(
    encoder: Encoder, chunks: Sequence[Tensor], config: TrainConfig, workers: Workers, processes: Processes
) -> tuple[list[Chunk], Tensor]:
    """The k per row largest positive ones of the batch of all processes.

    Candidates are those above a level that is guessed from a few rows; too high a guess is noticed and lowered.
    """
    wanted = int(processes.sum(torch.tensor(sum(map(len, chunks)) * config.k)))
    probe = encoder.pre(chunks[0][:: max(1, len(chunks[0]) // _PROBED)]).view(-1)
    for room in (*_ROOM, 0.0):
        # Somewhat more than are wanted, since the few rows may have larger values than the others.
        count = min(len(probe), int(room * config.k * len(probe) / config.n_latents) + 16)
        level = (probe.topk(count).values[-1] if room else probe[0] * 0).clamp(min=0)
        found = workers.map(lambda x, level=level: encoder.above(x, level), chunks)  # type: ignore[misc]
        values = torch.cat([chunk.pre for chunk in found])
        smallest = processes.kth_largest(values, wanted)
        enough = int(processes.sum(torch.tensor(len(values)))) >= wanted and bool(smallest >= level)
        # Zero is the lowest level there is: what is not above it has no part anyway.
        if not processes.any(not enough and bool(level > 0)):
            break
    chosen = workers.map(lambda chunk: chunk.where(chunk.pre >= smallest).grouped(config.prefixes), found)
    return list(chosen), smallest.clamp(min=0)
