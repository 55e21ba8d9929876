"""A tiny Llama and a tiny GPT-2 by hand, with an edit of every tensor where it is made, and every edit by hand.

Nothing here uses hooks, adapters or the package's edits: the reference that lists of interventions are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

Edit = Callable[[str, Tensor], Tensor]
"""(site name, tensor) -> what goes on from there."""


@dataclass(frozen=True)
class Plan:
    """One edit, as data. positions: bool [batch, pos]."""

    kind: str
    site: str
    positions: Tensor
    a: Tensor
    """A tensor of the site's shape: a source, or (first row) a vector."""
    index: int | None = None


def by_hand(plan: Plan, tensor: Tensor) -> Tensor:
    """The site's tensor after one edit."""
    attention = plan.site.endswith(("scores", "pattern"))
    here = plan.positions[:, None, :, None] if attention else plan.positions[(...,) + (None,) * (tensor.ndim - 2)]
    new = KINDS[plan.kind](tensor, plan.a)
    edited = torch.where(here, new, tensor)
    if plan.index is None:
        return edited
    axis = 1 if attention else 2
    chosen = torch.zeros(tensor.shape[axis], dtype=torch.bool)
    chosen[plan.index] = True
    return torch.where(chosen.view([-1 if n == axis else 1 for n in range(tensor.ndim)]), edited, tensor)


def vector_of(a: Tensor) -> Tensor:
    return a.reshape(-1, a.shape[-1])[0]


def _project(x: Tensor, a: Tensor) -> Tensor:
    unit = vector_of(a) / vector_of(a).norm()
    return x - (x * unit).sum(-1, keepdim=True) * unit


def _keep(x: Tensor, a: Tensor) -> Tensor:
    return x - _project(x, a)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "patch": lambda x, a: a,
    "zero": lambda x, a: torch.zeros_like(x),
    "steer": lambda x, a: x + 0.5 * vector_of(a),
    "project": _project,
    "keep": _keep,
    "interchange": lambda x, a: a.flip(0),
    "replace": lambda x, a: torch.tanh(x) + 0.1,
    "noise": lambda x, a: x + 0.7 * _noise(x.shape),
}


def _noise(shape: torch.Size) -> Tensor:
    """As documented: a generator per example, drawn token after token. For [batch, pos, ...] only."""
    rows = []
    for row in range(shape[0]):
        generator = torch.Generator().manual_seed(11 * 1_000_003 + row)
        rows.append(torch.stack([torch.randn(shape[2:], generator=generator) for _ in range(shape[1])]))
    return torch.stack(rows)


def _attend(q: Tensor, k: Tensor, v: Tensor, at: str, edit: Edit) -> Tensor:
    """q, k, v: [batch, head, pos, d_head] -> z [batch, pos, head, d_head]."""
    width = q.shape[2]
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    allowed = torch.ones(width, width, dtype=torch.bool).tril()
    scores = edit(f"{at}.scores", torch.where(allowed, scores, scores + torch.finfo(scores.dtype).min))
    pattern = edit(f"{at}.pattern", scores.softmax(-1))
    return edit(f"{at}.z", (pattern @ v).transpose(1, 2))


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary positions, halves paired. x: [batch, head, pos, d_head]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] / base ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def llama(net: Any, ids: Tensor, edit: Edit) -> Tensor:
    """Logits [batch, pos, vocab]."""
    config = net.config
    heads, kv, depth = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def rms(x: Tensor, norm: Any) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm.weight

    x = edit("embed", net.model.embed_tokens.weight[ids])
    for number, layer in enumerate(net.model.layers):
        at, attention, mlp = f"layers.{number}", layer.self_attn, layer.mlp
        x = edit(f"{at}.resid_pre", x)
        normed = rms(x, layer.input_layernorm)
        q = edit(f"{at}.q", (normed @ attention.q_proj.weight.T).unflatten(-1, (heads, depth)))
        k = edit(f"{at}.k", (normed @ attention.k_proj.weight.T).unflatten(-1, (kv, depth)))
        v = edit(f"{at}.v", (normed @ attention.v_proj.weight.T).unflatten(-1, (kv, depth))).transpose(1, 2)
        q, k = (_rotate(t.transpose(1, 2), config.rope_parameters["rope_theta"]) for t in (q, k))
        spread = [t[:, [head * kv // heads for head in range(heads)]] for t in (k, v)]
        z = _attend(q, *spread, at, edit)
        x = edit(f"{at}.resid_mid", x + edit(f"{at}.attn_out", z.flatten(2) @ attention.o_proj.weight.T))
        into = edit(f"{at}.mlp_in", rms(x, layer.post_attention_layernorm))
        post = edit(f"{at}.mlp_post", silu(into @ mlp.gate_proj.weight.T) * (into @ mlp.up_proj.weight.T))
        x = edit(f"{at}.resid_post", x + edit(f"{at}.mlp_out", post @ mlp.down_proj.weight.T))
    return edit("logits", edit("final_norm", rms(x, net.model.norm)) @ net.lm_head.weight.T)


def gpt2(net: Any, ids: Tensor, edit: Edit) -> Tensor:
    """Logits [batch, pos, vocab]."""
    config, body = net.config, net.transformer
    width, heads = config.n_embd, config.n_head

    def norm(x: Tensor, module: Any) -> Tensor:
        return layer_norm(x, (width,), module.weight, module.bias, config.layer_norm_epsilon)

    positions = body.wpe.weight[: ids.shape[1]].expand(len(ids), -1, -1)
    x = edit("embed", body.wte.weight[ids]) + edit("pos_embed", positions)
    for number, layer in enumerate(body.h):
        at = f"layers.{number}"
        x = edit(f"{at}.resid_pre", x)
        fused = norm(x, layer.ln_1) @ layer.attn.c_attn.weight + layer.attn.c_attn.bias
        split = [t.unflatten(-1, (heads, -1)) for t in fused.split(width, -1)]
        q, k, v = (edit(f"{at}.{name}", t).transpose(1, 2) for name, t in zip("qkv", split, strict=True))
        z = _attend(q, k, v, at, edit)
        written = z.flatten(2) @ layer.attn.c_proj.weight + layer.attn.c_proj.bias
        x = edit(f"{at}.resid_mid", x + edit(f"{at}.attn_out", written))
        into = edit(f"{at}.mlp_in", norm(x, layer.ln_2))
        post = edit(f"{at}.mlp_post", gelu(into @ layer.mlp.c_fc.weight + layer.mlp.c_fc.bias, approximate="tanh"))
        out = edit(f"{at}.mlp_out", post @ layer.mlp.c_proj.weight + layer.mlp.c_proj.bias)
        x = edit(f"{at}.resid_post", x + out)
    return edit("logits", edit("final_norm", norm(x, body.ln_f)) @ net.lm_head.weight.T)


FORWARDS = {"llama": llama, "gpt2": gpt2}
