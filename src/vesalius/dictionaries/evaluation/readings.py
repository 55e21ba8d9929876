"""A dictionary read in other ways than it was: the misreadings that are known to happen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.figures import row_figures
from vesalius.dictionaries.evaluation.sample import Sample
from vesalius.dictionaries.evaluation.totals import CoderReconstructor, Reconstructed, Reconstructor, totals_of

BETTER, NEARER = 0.5, 0.8
"""A misreading that leaves less than this share of the error is taken for the truth; so is a neighbouring site that
leaves less than the second: neighbours of the right site are never that much easier."""
_CLAIM = re.compile(r"(?:average_)?l0_(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Reading:
    """The dictionary read in one way: fraction of variance unexplained, and latents active per row. enough: the share
    of the error at which it counts as the truth.
    """

    words: str
    fvu: float
    l0: float
    enough: float = BETTER


def claimed_l0(coder: SparseCoder) -> float | None:
    """Active latents per row that the file of a dictionary speaks of; None when it does not."""
    if getattr(coder, "activation", "") == "topk":
        return float(cast(Any, coder).k)
    found = claim(coder, ("l0", "average_l0", "k"))
    in_path = _CLAIM.search(str(metadata_of(coder).get("folder") or ""))
    return float(in_path[1]) if found is None and in_path else found


def claim(coder: SparseCoder, names: Sequence[str]) -> float | None:
    """The first positive number under one of these names, in all that a file says of training."""
    known = metadata_of(coder)
    get = lambda where, name: where.get(name) if isinstance(where, Mapping) else None  # noqa: E731
    saelens = get(known.get("cfg"), "metadata")
    details = get(saelens, "training_architecture_details")
    for where in (known.get("summary"), saelens, details, known.get("cfg"), known.get("trainer"), known.get("config")):
        for name in names:
            value = get(where, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return float(value)
    return None


def metadata_of(coder: SparseCoder) -> Mapping[str, Any]:
    return getattr(coder, "metadata", {})


def reading(words: str, reconstructor: Reconstructor, sample: Sample) -> Reading:
    totals = totals_of(reconstructor, sample)
    return Reading(words, row_figures(totals)["fvu"].value, totals.l0)


def other_readings(coder: SparseCoder, sample: Sample) -> Iterator[tuple[str, Reconstructor]]:
    """Inputs in other units, another activation function, the decoder's bias subtracted from inputs or not."""
    # Rows that are normalised anyway have no units that could be misread.
    if len(coder.in_sites) == 1 and getattr(coder, "row_norm", "none") == "none":
        size = float(sample.inputs[0].double().norm(dim=1).mean()) / sample.inputs[0].shape[1] ** 0.5
        yield f"inputs divided by {size:.4g} (mean norm sqrt(width))", _Scaled(coder, 1 / size)
        yield f"inputs multiplied by {size:.4g}", _Scaled(coder, size)
    if not isinstance(coder, Dictionary):
        return
    if coder.activation in ("topk", "batchtopk", "jumprelu"):
        yield (
            "ReLU as its activation function",
            CoderReconstructor(replace(coder, activation="relu", k=None, extras={})),
        )
    claimed = claimed_l0(coder)
    if coder.activation in ("relu", "jumprelu", "batchtopk") and claimed is not None and claimed >= 1:
        k = min(round(claimed), coder.n_latents)
        yield f"TopK with k = {k}", CoderReconstructor(replace(coder, activation="topk", k=k, extras={}))
    if coder.in_sites == coder.out_sites:
        other = replace(coder, apply_b_dec_to_input=not coder.apply_b_dec_to_input)
        words = "b_dec subtracted from inputs" if other.apply_b_dec_to_input else "b_dec not subtracted from inputs"
        yield words, CoderReconstructor(other)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A dictionary of activations in other units."""

    coder: SparseCoder
    factor: float
    name: str = "scaled"

    def reconstruct(self, inputs: Sequence[Tensor]) -> Reconstructed:
        """As `Reconstructor.reconstruct`."""
        found = CoderReconstructor(self.coder).reconstruct([rows * self.factor for rows in inputs])
        return Reconstructed([rows / self.factor for rows in found.outputs], found.active, found.latents)
