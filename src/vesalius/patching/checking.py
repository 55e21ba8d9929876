"""The self-check of a sweep: a few random cells again, as ordinary forwards with hooks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.errors import SelfCheckError
from vesalius.inputs import Pairs
from vesalius.metric import Metric
from vesalius.patching.donors import Donor
from vesalius.patching.held import PLAINLY, Under
from vesalius.patching.plain import plain_value
from vesalius.patching.record import Record
from vesalius.patching.scoring import logit_range
from vesalius.patching.variants import Variant
from vesalius.patching.what import name_of

TOLERANCE, ROUNDING, EPSILONS = 1e-4, 1e-5, 8
CELLS, CELLS_ROUNDED = 2, 8
"""Cells that are run again; more where the error is to be told and not only bounded."""


def self_check(
    record: Record,
    variants: Sequence[Variant],
    donor: Donor,
    pairs: Pairs,
    metric: Metric,
    values: Tensor,
    seed: int,
    ran: Bool[Tensor, "variant example"] | None = None,
    under: Under = PLAINLY,
) -> float:
    """Re-run random cells as plain forwards with hooks; the largest difference. Raises SelfCheckError.

    ran: cells to choose from; default all. Tolerance: 1e-4 of the metric's range, and not under 1e-5 of the logits'
    range, which is what rounding alone gives; in half precision it gives more: 8 units in the last place of that
    range (bfloat16: 6 %, float16: 0.8 %).
    """
    generator = torch.Generator().manual_seed(seed)
    cells = (torch.ones_like(values, dtype=torch.bool) if ran is None or not bool(ran.any()) else ran).nonzero()
    allowed = allowance(record, pairs, values, under.compute)
    worst, count = 0.0, CELLS if under.compute == "float32" else CELLS_ROUNDED
    for pick in torch.randint(len(cells), (count,), generator=generator):
        number, example = (int(i) for i in cells[pick])
        plain = plain_value(record, variants[number], donor, pairs, metric, example, under)
        fast = float(values[number, example])
        worst = max(worst, abs(plain - fast))
        if worst > allowed:
            parts = variants[number].parts
            raise SelfCheckError(
                f"replay gave {fast:.6g} and a plain run {plain:.6g} for example {example} with {len(parts)} parts "
                f"edited ({name_of(parts[0])}, ...); please report this model"
            )
    return worst


def allowance(record: Record, pairs: Pairs, values: Tensor, compute: str = "float32") -> float:
    """By how much a value may differ from a plain run's: see `self_check`."""
    spread = float(values.max() - values.min())
    return max(TOLERANCE * spread, rounding(record, compute) * logit_range(record, pairs))


def rounding(record: Record, compute: str = "float32") -> float:
    """What rounding alone may change, in units of the range of the logits."""
    kind, first = record.model.device.type, next(record.model.module.parameters(), None)
    dtype = torch.float32 if first is None else first.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if compute == "bfloat16":
        dtype = torch.bfloat16
    return max(ROUNDING, EPSILONS * torch.finfo(dtype).eps)
