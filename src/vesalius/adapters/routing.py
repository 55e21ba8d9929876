"""Routers and experts of a mixture: what an edited router chooses, and what each expert adds."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def rerouted(gate: nn.Module, logits: Float[Tensor, "token expert"]) -> tuple[Tensor, Tensor, Tensor]:
    """What a router returns for these logits: (logits, weights [token, k], experts [token, k]).

    Softmax, the k largest, and their share of one where the router normalises (Mixtral always does).
    """
    chances = torch.softmax(logits.float(), dim=-1)
    weights, experts = torch.topk(chances, int(gate.top_k), dim=-1)  # type: ignore[arg-type]
    if getattr(gate, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    # Mixtral keeps float32 weights; the others cast them back.
    return logits, weights.to(logits.dtype) if hasattr(gate, "norm_topk_prob") else weights, experts


def contributions(
    experts: nn.Module, hidden: Float[Tensor, "token d_model"], chosen: Int[Tensor, "token k"], weights: Tensor
) -> Float[Tensor, "token expert d_model"]:
    """What each expert adds, from the experts' own forward with the other experts' weights at zero."""
    count = int(experts.num_experts)  # type: ignore[arg-type]
    # forward, not a call: hooks on the experts must not see these.
    each = [experts.forward(hidden, chosen, weights * (chosen == expert)) for expert in range(count)]
    return torch.stack(each, 1)
