"""Encoding a batch for training: which latents take part, by the rule of the kind and at the precision asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import Kind, Vectors
from vesalius.dictionaries.training import choose
from vesalius.dictionaries.training.codes import DensePiece, Piece, SparsePiece
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.dictionaries.training.screen import Screen
from vesalius.jobs.workers import Workers
from vesalius.model.products import linear

DENSE_SHARE = 1 / 12
"""Share of latents taking part above which dense products are faster than sparse ones."""
_PROBED = 64
_ROOM = (1.5, 6.0)


@dataclass(frozen=True)
class Encoder:
    """The encoder of one block as it is at one step. weight: [latent, d]."""

    weight: Tensor
    bias: Tensor
    screen: Screen | None
    rounded: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, precision: str, workers: Workers) -> Encoder:
        """For one step at a precision."""
        screen = Screen.of(weight, bias, workers) if precision == "bf16-screen" else None
        return cls(weight, bias, screen, weight.bfloat16() if precision == "bf16" else None)

    def pre(self, x: Tensor) -> Tensor:
        """[rows, latent] pre-activations."""
        if self.rounded is not None:
            return linear(x.bfloat16(), self.rounded) + self.bias
        return linear(x, self.weight, self.bias)

    def top_of_rows(self, x: Tensor, k: int) -> SparsePiece:
        """The k largest of each row."""
        screened = None if self.screen is None else self.screen.top_of_rows(x, k)
        return choose.top_of_rows(self.pre(x), k) if screened is None else screened

    def above(self, x: Tensor, floor: Tensor) -> SparsePiece:
        """All at or above the floor, [latent] or []."""
        screened = None if self.screen is None else self.screen.above(x, floor)
        if screened is not None:
            return screened
        return choose.reaching(self.pre(x), floor)


def encode(
    encoder: Encoder, pieces: Sequence[Tensor], kind: Kind, vectors: Vectors, config: TrainConfig, workers: Workers,
    ranks: Ranks,
) -> tuple[list[Piece], Tensor | None]:  # fmt: skip
    """The entries of every piece of rows, and for kinds that choose over a batch the smallest that was chosen."""
    if kind.selection == "row":
        return list(workers.map(lambda x: encoder.top_of_rows(x, config.k), pieces)), None
    if kind.selection == "batch":
        return _of_batch(encoder, pieces, config, workers, ranks)
    floor = kind.floor(vectors, config)
    return _local(encoder, pieces, encoder.bias.new_zeros(()) if floor is None else floor, workers), None


def _local(encoder: Encoder, pieces: Sequence[Tensor], floor: Tensor, workers: Workers) -> list[Piece]:
    """Every latent above its floor; dense when that is many."""
    probe = encoder.pre(pieces[0][:_PROBED])
    if float((probe > floor).double().mean()) > DENSE_SHARE:
        return list(workers.map(lambda x: DensePiece(encoder.pre(x)), pieces))
    return list(workers.map(lambda x: encoder.above(x, floor), pieces))


def _of_batch(
    encoder: Encoder, pieces: Sequence[Tensor], config: TrainConfig, workers: Workers, ranks: Ranks
) -> tuple[list[Piece], Tensor]:
    """The k per row largest positive ones of the batch of all processes.

    Candidates are those above a level that is guessed from a few rows; too high a guess is noticed and lowered.
    """
    wanted = int(ranks.sum(torch.tensor(sum(map(len, pieces)) * config.k)))
    probe = encoder.pre(pieces[0][:: max(1, len(pieces[0]) // _PROBED)]).view(-1)
    for room in (*_ROOM, 0.0):
        count = min(len(probe), int(room * config.k * len(probe) / config.n_latents) + 16)
        level = (probe.topk(count).values[-1] if room else probe[0] * 0).clamp(min=0)
        found = workers.map(lambda x, level=level: encoder.above(x, level), pieces)  # type: ignore[misc]
        values = torch.cat([piece.pre for piece in found])
        least = ranks.kth_largest(values, wanted)
        enough = int(ranks.sum(torch.tensor(len(values)))) >= wanted and bool(least >= level)
        if not ranks.any(not enough and bool(level > 0)):
            break
    chosen = workers.map(lambda piece: choose.grouped(choose.kept(piece, piece.pre >= least), config.prefixes), found)
    return list(chosen), least.clamp(min=0)
