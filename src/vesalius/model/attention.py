"""Our attention function for `transformers` models: reads and edits scores and patterns, and runs replays.

A `transformers` model looks its attention function up by name at every call (AttentionInterface). `attending` puts ours
in place for the length of a `with` block and then restores the config, which is shared and would otherwise stay
changed. `Plain` computes what the eager path does: softmax, in float32 or wider, of q k^T * scaling + mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vesalius.errors import InterventionError

NAME = "vesalius"
# Arguments that change the result and that are not reproduced here: refused when a model gives them.
_REFUSED = ("position_bias", "s_aux", "head_mask", "relative_position_bias")


@runtime_checkable
class Attend(Protocol):
    """One attention call. q: [batch, head, query_pos, d_head]; k, v: [batch, kv_head, key_pos, d_head]."""

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        options: dict[str, Any],
        /,
    ) -> Tensor:
        """Weighted values [batch, query_pos, head, d_head]."""
        ...


_current: ContextVar[Attend | None] = ContextVar("vesalius_attend", default=None)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    attend = _current.get()
    if attend is None:
        raise InterventionError("the 'vesalius' attention function was called outside a run; restore the model's own")
    understood = getattr(attend, "understands", ())
    refused = [name for name in _REFUSED if options.get(name) is not None and name not in understood]
    if dropout:
        raise InterventionError("attention with dropout is not supported; call model.module.eval()")
    if refused:
        raise InterventionError(
            f"attention of a {type(module).__name__} with {', '.join(refused)} is not reproduced here: its scores and "
            "patterns cannot be read or edited, and its layers not replayed; other sites can be run and captured"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(module, query, key, value, attention_mask, scale, options), None


@contextmanager
def attending(root: nn.Module, attend: Attend) -> Iterator[None]:
    """Route every attention call of `root` through `attend`; restores the model's own function in any case."""
    # Late and at this one edge: transformers is heavy, and importing vesalius must stay light.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    # By identity: configs cannot be hashed, and many modules share one.
    configs: dict[int, Any] = {id(m.config): m.config for m in root.modules() if hasattr(m, "config")}
    routed = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
    before = [(config, config._attn_implementation_internal) for config in routed]
    token = _current.set(attend)
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        _current.reset(token)


def grouped(kv: Tensor, n_heads: int) -> Tensor:
    """Keys or values repeated for every query head: [batch, kv_head, pos, d_head] -> [batch, head, pos, d_head]."""
    return kv if kv.shape[1] == n_heads else kv.repeat_interleave(n_heads // kv.shape[1], dim=1)


def weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention's weighted values [batch, head, query_pos, d_head]; q, k, v: [batch, head, pos, d_head].

    mask: True or zero where attention is allowed. cap: bound of the scores (Gemma 2), cap * tanh(scores / cap). sinks:
    see `softmaxed`.
    """
    if cap is None and sinks is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    scores = capped(q @ k.transpose(2, 3) * scaling, cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return softmaxed(scores, sinks) @ v


def softmaxed(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The pattern of scores [..., key_pos], in float32 or wider and back.

    sinks [..., 1]: a learned score that takes part in the softmax and attends to nothing (gpt-oss), so that a row of
    the pattern sums to less than one.
    """
    kind, width = torch.promote_types(scores.dtype, torch.float32), scores.shape[-1]
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, dim=-1, dtype=kind).to(scores.dtype)[..., :width]


def capped(scores: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


class Plain:
    """Eager attention whose scores and pattern can be read and replaced: visit(kind, module, tensor) -> tensor or None.
    A position bias (T5) is added to the scores, as the mask is; sinks (gpt-oss) are no part of scores or pattern.
    """

    understands = ("position_bias", "s_aux")

    def __init__(self, visit: Callable[[str, nn.Module, Tensor], Tensor | None]) -> None:
        self._visit = visit

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        options: dict[str, Any],
    ) -> Tensor:
        scores = capped(q @ grouped(k, q.shape[1]).transpose(2, 3) * scaling, options.get("softcap"))
        if options.get("position_bias") is not None:
            scores = scores + options["position_bias"]
        if mask is not None:
            # As the eager path does: a mask for a cache of fixed size is longer than the keys so far.
            scores = scores + mask[..., : scores.shape[-1]]
        scores = self._seen("scores", module, scores)
        sinks = options.get("s_aux")
        pattern = softmaxed(scores, None if sinks is None else sinks[:, None, None])
        pattern = self._seen("pattern", module, pattern)
        return (pattern @ grouped(v, q.shape[1])).transpose(1, 2).contiguous()

    def _seen(self, kind: str, module: nn.Module, tensor: Tensor) -> Tensor:
        changed = self._visit(kind, module, tensor)
        return tensor if changed is None else changed
