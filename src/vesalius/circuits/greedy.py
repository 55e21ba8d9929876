"""ACDC: go through the edges from the logits back, and drop each one that the metric does not need.

Conmy et al. 2023, algorithm 1, exactly: an edge is dropped, for good, when cutting it as well takes the metric no more
than a threshold further from the run without edits. That distance is the mean over examples of the absolute
difference, which for the divergence from that run is the divergence. Readers come last to first, and so do the writers
of each.

The order makes it sequential, but most edges are dropped. So the next few cuts are tried at once, each with those
before it, and the results up to the first edge that has to stay are used: the same answer, in larger batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.circuits.cutting import Ablation
from vesalius.circuits.exact import plan_hash
from vesalius.circuits.masked import with_cut
from vesalius.errors import InputError
from vesalius.jobs import Blocks, Event, Sink, silent
from vesalius.protocol.canonical import content_hash

TOGETHER = 16
"""Cuts that are tried at once."""


def acdc(
    cut: Ablation,
    threshold: float,
    *,
    candidates: Bool[Tensor, " edge"] | None = None,
    together: int = TOGETHER,
    out: str | Path | None = None,
    sink: Sink = silent,
) -> Bool[Tensor, " edge"]:
    """The edges that stay.

    threshold: in the metric's unit. candidates: edges that may stay; all others are cut from the beginning. together:
    cuts tried at once; the answer does not depend on it. out: a folder in which finished runs are kept, so that a
    killed search goes on.

    Raises InputError for a threshold that is not above zero.
    """
    if threshold <= 0:
        raise InputError(f"threshold must be above 0, in {cut.metric.unit}; got {threshold}")
    graph = cut.wired.graph
    may_stay = torch.ones(len(graph), dtype=torch.bool) if candidates is None else candidates
    order = _order(graph.starts.tolist(), graph.counts.tolist())
    order = order[may_stay[order]]
    most = len(order) * len(cut.pairs)
    sink(
        Event("note", "acdc", message=f"{len(order):,} edges, at most {most:,} forward passes of one example each way")
    )
    work = _Distances(cut, Blocks(out, plan_hash(cut, "acdc"), sink))
    removed = ~may_stay
    now, at, width = float(work.of(removed[None])[0]), 0, together
    sink(Event("start", "acdc", 0, len(order)))
    while at < len(order):
        trying = order[at : at + width]
        masks = removed.repeat(len(trying), 1)
        for number in range(len(trying)):
            masks[number, trying[: number + 1]] = True
        for number, distance in enumerate(work.of(masks).tolist()):
            at += 1
            if distance - now >= threshold:
                # What was tried after it assumed that it was gone.
                width = max(1, width // 2)
                break
            removed, now = masks[number], distance
        else:
            width = min(together, 2 * width)
        sink(Event("advance", "acdc", at, len(order), f"{int((~removed[order[:at]]).sum())} stay"))
    sink(Event("end", "acdc", len(order), len(order)))
    return ~removed


def _order(starts: list[int], counts: list[int]) -> Tensor:
    """Edges by reader and writer, last first."""
    found = [range(start + count - 1, start - 1, -1) for start, count in zip(starts, counts, strict=True)]
    return torch.tensor([number for edges in reversed(found) for number in edges])


class _Distances:
    """Mean absolute difference of the metric from that of the run without edits."""

    def __init__(self, cut: Ablation, blocks: Blocks) -> None:
        self._cut, self._blocks = cut, blocks
        self._base = cut.plain()[0]

    def of(self, masks: Bool[Tensor, "variant edge"]) -> Float[Tensor, " variant"]:
        key = content_hash([row.nonzero()[:, 0].tolist() for row in masks])[:24]

        def compute() -> Mapping[str, NDArray[Any]]:
            return {"values": with_cut(self._cut, masks).numpy()}

        values = torch.from_numpy(np.array(self._blocks.get(key, compute)["values"]))
        return (values - self._base).abs().mean(1)
