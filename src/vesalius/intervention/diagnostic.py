"""How far an edit took a tensor from the values it naturally has."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.parts import Unit
from vesalius.site import ATTENTION, Site


def off_distribution(before: Tensor, after: Tensor, real: Bool[Tensor, "batch pos"], site: Site) -> dict[str, float]:
    """How unnatural an edit is, against the same tensor's natural values in the same run.

    norm_ratio: mean norm of the edited vectors over the mean norm of the natural ones. z_rms: root mean square of the
    edited values' per-dimension z-scores (1 for natural values; large means low density). Empty for attention, which is
    no vector per token.
    """
    if site.kind in ATTENTION or before.shape[:2] != real.shape:
        return {}
    unit = Unit(site)
    natural, edited = (_rows(unit.read(tensor).detach()[real]) for tensor in (before, after))
    changed = (natural != edited).any(1)
    if not bool(changed.any()):
        return {"norm_ratio": 1.0, "z_rms": 1.0}
    spread = natural.std(0).clamp_min(1e-6) if len(natural) > 1 else torch.ones_like(natural[0])
    z = (edited[changed] - natural.mean(0)) / spread
    ratio = edited[changed].norm(dim=1).mean() / natural.norm(dim=1).mean().clamp_min(1e-12)
    return {"norm_ratio": float(ratio), "z_rms": float(z.pow(2).mean().sqrt())}


def _rows(values: Tensor) -> Tensor:
    """[token, width], in float32 or wider."""
    return values.reshape(len(values), -1).to(torch.promote_types(values.dtype, torch.float32))
