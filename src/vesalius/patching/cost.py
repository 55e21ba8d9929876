"""Cost of edited runs, counted in whole forward passes of one example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from vesalius.patching.changes import Changes
from vesalius.patching.donors import Donor
from vesalius.patching.flat import Rows
from vesalius.patching.plain import live_cells, why_plain
from vesalius.patching.record import Record
from vesalius.patching.variants import Variant, rows_of


@dataclass(frozen=True)
class Cost:
    """In forward passes of one example: what was spent, and what one whole forward per edited run would take."""

    spent: float
    naive: float
    skipped: int
    """Edited runs that provably change nothing."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.spent + other.spent, self.naive + other.naive, self.skipped + other.skipped)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.spent - other.spent, self.naive - other.naive, self.skipped - other.skipped)

    def describe(self) -> str:
        return f"{self.spent:.0f} forward equivalents (plain: {self.naive:.0f}; {self.skipped} provably without effect)"


def estimate(record: Record, variants: Sequence[Variant], donor: Donor, ends: Int[Tensor, " example"]) -> Cost:
    """What `evaluate` would cost; nothing is run."""
    cells, changes = len(variants) * len(record), Changes(record, donor)
    if why_plain(record, variants):
        live = int(live_cells(variants, changes, ends).sum())
        return Cost(float(live), float(cells), cells - live)
    found = [rows for variant in variants for rows in rows_of(variant, changes, ends)]
    return Cost(
        sum((work(record, rows) for rows in found), 0.0), float(cells), cells - sum(len(rows) for rows in found)
    )


def work(record: Record, rows: Rows) -> float:
    """Layers and positions that rows go through, in whole forwards of a prompt of mean length."""
    n_layers = record.model.architecture[1].n_layers
    return float((rows.sizes * (n_layers - rows.layer)).sum() / (record.lengths.float().mean() * n_layers))
