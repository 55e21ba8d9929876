"""From a residual vector to logits: the model's own final norm, unembedding, scale and cap."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain
from vesalius.metric import wide
from vesalius.model.attention import capped
from vesalius.model.model import Model


def unembedded(model: Model, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
    """The logits that the model would give if this were its last layer's output; float32 or wider."""
    return logits_after(model, submodule(model.module, model.architecture[0].final_norm)(residual))


def logits_after(model: Model, normed: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
    """Logits of vectors after the final norm."""
    return finished(model, submodule(model.module, model.architecture[0].unembed)(normed))


def finished(model: Model, unembedding_output: Tensor) -> Tensor:
    """Logits [..., token] from what the unembedding gave: times the model's scale, capped."""
    adapter, layout = model.architecture
    bound = getattr(adapter.config_of(model.module), adapter.cap) if adapter.cap else None
    return wide(capped(unembedding_output * layout.logit_scale, bound))


def norm_frozen(
    model: Model, base: Float[Tensor, "*any d_model"], change: Float[Tensor, "*any d_model"]
) -> Float[Tensor, "*any d_model"]:
    """The final norm of base + change, with its scale held at base."""
    adapter = model.architecture[0]
    norm = submodule(model.module, adapter.final_norm)
    if adapter.norm == "layer":
        change = change - change.mean(-1, keepdim=True)
    normed: Tensor = norm(base)
    return normed + change * frozen_scale(adapter.norm, norm, base) * gain(adapter.norm, norm).to(base)
