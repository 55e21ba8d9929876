"""Every site of the tiny models by plain hooks and plain arithmetic: what `Model.run` captures must equal this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vesalius as vs

Seen = dict[str, Tensor]


def capture_by_hand(module: Any, tokens: vs.Tokens) -> Seen:
    """Sites by name, from raw hooks on the model's own modules."""
    seen: Seen = {}
    gpt2 = hasattr(module, "transformer")
    layers = module.transformer.h if gpt2 else module.model.layers
    handles = _outside(module, seen, gpt2)
    for number, layer in enumerate(layers):
        handles += (_gpt2_layer if gpt2 else _llama_layer)(layer, f"layers.{number}.", seen)
    with torch.no_grad():
        module(tokens.ids, attention_mask=tokens.real.long())
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        _attention(module, layer, f"layers.{number}.", seen, gpt2, tokens)
    if gpt2:
        seen["pos_embed"] = seen["pos_embed"].expand(len(tokens), -1, -1)
    return seen


def _out(module: nn.Module, name: str, seen: Seen) -> Any:
    return module.register_forward_hook(
        lambda _m, _i, out: seen.__setitem__(name, (out if isinstance(out, Tensor) else out[0]).clone())
    )


def _in(module: nn.Module, name: str, seen: Seen) -> Any:
    return module.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.__setitem__(name, (args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )


def _outside(module: Any, seen: Seen, gpt2: bool) -> list[Any]:
    handles = [_out(module.lm_head, "logits", seen)]
    if gpt2:
        body = module.transformer
        return [
            *handles,
            _out(body.wte, "embed", seen),
            _out(body.wpe, "pos_embed", seen),
            _out(body.ln_f, "final_norm", seen),
        ]
    return [*handles, _out(module.model.embed_tokens, "embed", seen), _out(module.model.norm, "final_norm", seen)]


def _llama_layer(layer: Any, at: str, seen: Seen) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        _in(layer, at + "resid_pre", seen), _out(layer, at + "resid_post", seen),
        _out(attention.q_proj, at + "q", seen), _out(attention.k_proj, at + "k", seen),
        _out(attention.v_proj, at + "v", seen),
        _in(attention.o_proj, at + "z", seen), _out(attention, at + "attn_out", seen),
        _in(layer.post_attention_layernorm, at + "resid_mid", seen),
        _in(mlp, at + "mlp_in", seen), _in(mlp.down_proj, at + "mlp_post", seen), _out(mlp, at + "mlp_out", seen),
    ]  # fmt: skip


def _gpt2_layer(layer: Any, at: str, seen: Seen) -> list[Any]:
    return [
        _in(layer, at + "resid_pre", seen), _out(layer, at + "resid_post", seen),
        _out(layer.attn.c_attn, at + "qkv", seen), _in(layer.attn.c_proj, at + "z", seen),
        _out(layer.attn, at + "attn_out", seen), _in(layer.ln_2, at + "resid_mid", seen),
        _in(layer.mlp, at + "mlp_in", seen), _in(layer.mlp.c_proj, at + "mlp_post", seen),
        _out(layer.mlp, at + "mlp_out", seen),
    ]  # fmt: skip


def _attention(module: Any, layer: Any, at: str, seen: Seen, gpt2: bool, tokens: vs.Tokens) -> None:
    """Split heads, and scores, pattern and results from them by hand."""
    heads = 4 if gpt2 else 6
    if gpt2:
        seen[at + "q"], seen[at + "k"], seen[at + "v"] = seen.pop(at + "qkv").split(48, dim=2)
    for kind in ("q", "k", "v", "z"):
        width = 12 if gpt2 else 8
        seen[at + kind] = seen[at + kind].reshape(*seen[at + kind].shape[:2], -1, width)
    q, k = seen[at + "q"].transpose(1, 2), seen[at + "k"].transpose(1, 2)
    if not gpt2:
        positions = torch.arange(q.shape[2])[None]
        q, k = apply_rotary_pos_emb(q, k, *module.model.rotary_emb(q, positions))
        k = torch.stack([k[:, head // 3] for head in range(heads)], 1)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() & tokens.real[:, None, None, :]
    # The lowest number stands for minus infinity; adding a score to it changes nothing.
    seen[at + "scores"] = torch.where(allowed, scores, scores + torch.finfo(scores.dtype).min)
    seen[at + "pattern"] = seen[at + "scores"].softmax(-1)
    weight = layer.attn.c_proj.weight if gpt2 else layer.self_attn.o_proj.weight.T
    by_head = weight.detach().reshape(heads, -1, 48)
    z = seen[at + "z"]
    seen[at + "result"] = torch.stack([z[:, :, head] @ by_head[head] for head in range(heads)], 2)
