"""From a module's tensor to a site's and back: parts of fused projections, heads."""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.adapters.base import Access, Layout


def split_heads(tensor: Tensor, access: Access, layout: Layout, batch: int = 1) -> Tensor:
    """A module's tensor as the site names it: its part of the last axis, with a head axis when there is one.

    batch: examples in the run; for modules that see [batch * pos, ...].
    """
    if access.flat:
        tensor = tensor.unflatten(0, (batch, -1))
    if access.part:
        tensor = _pieces(tensor, access, layout)["qkv".index(access.part)]
    if not access.heads:
        return tensor
    heads = layout.n_heads if access.heads == "head" else layout.n_kv_heads
    return tensor.unflatten(-1, (heads, -1))


def join_heads(whole: Tensor, site_tensor: Tensor, access: Access, layout: Layout) -> Tensor:
    """Inverse of `split_heads`: the module's tensor with the site's new value in its place."""
    value = site_tensor.flatten(-2) if access.heads else site_tensor
    if access.part:
        pieces = _pieces(whole.unflatten(0, (len(value), -1)) if access.flat else whole, access, layout)
        pieces["qkv".index(access.part)] = value
        value = _fused(pieces, access, layout)
    return value.flatten(0, 1) if access.flat else value


def _pieces(tensor: Tensor, access: Access, layout: Layout) -> list[Tensor]:
    """Queries, keys and values of a fused projection, heads joined."""
    depth, keys = layout.d_head, layout.n_kv_heads
    if access.fused == "blocks":
        return list(tensor.split([layout.n_heads * depth, keys * depth, keys * depth], -1))
    groups = tensor.unflatten(-1, (keys, -1, depth))
    return [groups[..., :-2, :].flatten(-3), groups[..., -2, :].flatten(-2), groups[..., -1, :].flatten(-2)]


def _fused(pieces: list[Tensor], access: Access, layout: Layout) -> Tensor:
    """Inverse of `_pieces`."""
    if access.fused == "blocks":
        return torch.cat(pieces, -1)
    groups = [piece.unflatten(-1, (layout.n_kv_heads, -1, layout.d_head)) for piece in pieces]
    return torch.cat(groups, -2).flatten(-3)
