"""Mixtures of experts: what a router and its experts compute, from their own modules."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.adapters.base import parameter, weight_of


def routed_by(gate: nn.Module, hidden: Tensor, given: Float[Tensor, "token expert"]) -> Tensor:
    """A router's logits. Early releases of transformers 5 return probabilities, from which they cannot be had back."""
    sums = given.float().sum(-1)
    if bool((given < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return given
    weight = weight_of(gate)
    return nn.functional.linear(hidden.reshape(-1, weight.shape[1]), weight, parameter(gate, "bias"))


def rerouted(gate: nn.Module, logits: Float[Tensor, "token expert"]) -> tuple[Tensor, Tensor, Tensor]:
    """What a router returns for these logits: (logits, weights [token, k], experts [token, k]).

    Softmax, the k largest, and these divided by their sum where the router does that (Mixtral always does).
    """
    if parameter(gate, "bias") is not None:  # gpt-oss: the softmax of the k largest
        best, experts = torch.topk(logits, int(gate.top_k), dim=-1)  # type: ignore[arg-type]
        return logits, torch.softmax(best, dim=-1, dtype=best.dtype), experts
    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, experts = torch.topk(probabilities, int(gate.top_k), dim=-1)  # type: ignore[arg-type]
    if getattr(gate, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    # Mixtral keeps float32 weights; the others cast them back.
    return logits, weights.to(logits.dtype) if hasattr(gate, "norm_topk_prob") else weights, experts


def contributions(
    experts: nn.Module, hidden: Float[Tensor, "token d_model"], chosen: Int[Tensor, "token k"], weights: Tensor
) -> Float[Tensor, "token expert d_model"]:
    """What each expert adds, from the experts' own forward with the other experts' weights at zero."""
    count = int(experts.num_experts)  # type: ignore[arg-type]
    # forward, not a call: hooks on the experts must not see these passes.
    each = [experts.forward(hidden, chosen, weights * (chosen == expert)) for expert in range(count)]
    return torch.stack(each, 1)
