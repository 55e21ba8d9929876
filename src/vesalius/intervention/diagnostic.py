"""How far an edit took a tensor from the values it naturally has."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.intervention.place import token_axis
from vesalius.parts import Unit
from vesalius.site import ATTENTION, Site

# Scores of keys that may not be seen; the mask adds the lowest number there is.
_HIDDEN = -1e30
_SHARED = 0.01


def off_distribution(
    before: Tensor, after: Tensor, real: Bool[Tensor, "batch pos"] | None, site: Site
) -> dict[str, float]:
    """How unnatural an edit is, against the same tensor's natural values in the same run.

    norm_ratio: mean norm of the edited vectors over the mean norm of the natural ones. z_rms: root mean square of the
    edited values' per-dimension z-scores (1 for natural values; large means low density); a hundredth of the mean
    variance is added to every dimension's, so that one that hardly varies does not decide alone. There is one vector
    per real token; for attention the query's row of keys, all heads together; for a tensor that does not count tokens
    one per example. real: None in a run without tokens.
    """
    natural, edited = (_vectors(tensor.detach(), real, site) for tensor in (before, after))
    changed = (natural != edited).any(1)
    if not bool(changed.any()):
        return {"norm_ratio": 1.0, "z_rms": 1.0}
    variance = natural.var(0) if len(natural) > 1 else natural.var(unbiased=False).expand(natural.shape[1])
    spread = (variance + _SHARED * variance.mean()).sqrt().clamp_min(1e-12)
    z = (edited[changed] - natural.mean(0)) / spread
    ratio = edited[changed].norm(dim=1).mean() / natural.norm(dim=1).mean().clamp_min(1e-12)
    return {"norm_ratio": float(ratio), "z_rms": float(z.pow(2).mean().sqrt())}


def _vectors(whole: Tensor, real: Bool[Tensor, "batch pos"] | None, site: Site) -> Float[Tensor, "row width"]:
    """In float32 or wider."""
    value = Unit(site).read(whole)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if site.kind in ATTENTION:
        value = value.masked_fill(value < _HIDDEN, 0.0).movedim(token_axis(site), 1)
    if real is not None and value.shape[:2] == real.shape:
        value = value[real.to(value.device)]
    return value.reshape(len(value) if value.ndim else 1, -1)
