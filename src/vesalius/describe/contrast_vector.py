"""A contrastive vector, to steer by: the difference of the means of two sets of prompts.

Contrastive activation addition: Rimsky et al. 2024, section 3. Difference in means: Marks and Tegmark 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.intervention import mask_of
from vesalius.model import Model
from vesalius.site import Site


@dataclass(frozen=True)
class ContrastVector:
    """The difference of two means. size: its norm, so that `direction` times size is the difference itself."""

    direction: Direction
    size: float

    def scales(self, multiples: Sequence[float]) -> tuple[float, ...]:
        """Scales for `steer` that add these multiples of the difference."""
        return tuple(self.size * multiple for multiple in multiples)


def contrast_vector(
    model: Model,
    site: Site | str,
    positive: Any,
    negative: Any,
    *,
    position: int | str = "last",
    label: str = "",
) -> ContrastVector:
    """Mean activation at a position of the positive prompts less that of the negative ones.

    position: a number or a name, as for interventions. Raises InputError for means that are equal.
    """
    where, means = Site.parse(site), []
    for prompts in (positive, negative):
        tokens = model.called_with(prompts)[2]
        if tokens is None:
            raise InputError("contrastive prompts are texts or token ids")
        with torch.no_grad():
            seen = model.run(tokens, where, last_logits=True)[where]
        chosen = mask_of(position, tokens.real, tokens.named_positions)
        assert chosen is not None
        means.append(seen[chosen.to(seen.device)].float().mean(0))
    difference = means[0] - means[1]
    if difference.ndim != 1:
        raise InputError(f"{where} has {list(difference.shape)} values per token; name one head of it")
    if float(difference.norm()) == 0.0:
        raise InputError(f"both sets of prompts have the same mean at {where}: there is nothing to steer by")
    return ContrastVector(Direction(where, difference, label), float(difference.norm()))
