"""The peers of concepts.py: concept-erasure's LEACE, and pyvene's distributed alignment search."""

from __future__ import annotations

from collections.abc import Sequence

import concept_erasure
import pyvene
import torch
from torch import Tensor


def peers_leace(blocks: Sequence[tuple[Tensor, Tensor]], sample: Tensor) -> Tensor:
    """What their eraser makes of a sample, after all blocks; labels as columns, without shrinkage, as ours."""
    width, classes = blocks[0][0].shape[1], blocks[0][1].shape[1]
    fitter = concept_erasure.LeaceFitter(width, classes, dtype=torch.float64, shrinkage=False, svd_tol=1e-6)
    for x, z in blocks:
        fitter.update(x.double(), z.double())
    return fitter.eraser(sample.double())


class PyveneSearch:
    """A low-rank rotation of one layer's output at the last token, trained as pyvene's tutorials do."""

    def __init__(self, module: torch.nn.Module, layer: int, rank: int, lr: float) -> None:
        place = {"layer": layer, "component": "block_output", "low_rank_dimension": rank,
                 "intervention_type": pyvene.LowRankRotatedSpaceIntervention}  # fmt: skip
        self.model = pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), module)
        self.model.disable_model_gradients()
        (self.rotation,) = [one[0] if isinstance(one, tuple) else one for one in self.model.interventions.values()]
        self.optimiser = torch.optim.Adam(self.rotation.parameters(), lr=lr)

    def logits(self, base: Tensor, source: Tensor) -> Tensor:
        """Of the last token, with the source's coordinates."""
        last = base.shape[1] - 1
        _, found = self.model({"input_ids": base}, [{"input_ids": source}], {"sources->base": last})
        return found.logits[:, -1]

    def step(self, base: Tensor, source: Tensor, expected: Tensor) -> float:
        """One step of training."""
        loss = torch.nn.functional.cross_entropy(self.logits(base, source), expected)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return float(loss)

    @property
    def basis(self) -> Tensor:
        """Rows of the subspace."""
        return self.rotation.rotate_layer.weight.detach().T
