"""Patching by hand: one forward with one plain hook per edited component. What every fast path must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vesalius as vs
from vesalius.parts import as_part
from vesalius.patching.targets import Variant

Values = dict[vs.Site, Tensor]


def modules(module: Any) -> tuple[list[nn.Module], list[nn.Module], nn.Module]:
    """Output projections (their inputs are the heads' values), MLPs, and the first layer (its input: embeddings)."""
    if hasattr(module, "transformer"):
        layers = list(module.transformer.h)
        return [layer.attn.c_proj for layer in layers], [layer.mlp for layer in layers], layers[0]
    layers = list(module.model.layers)
    return [layer.self_attn.o_proj for layer in layers], [layer.mlp for layer in layers], layers[0]


def forward(model: vs.Model, tokens: vs.Tokens, edits: Values | None = None, seen: Values | None = None) -> Tensor:
    """Logits [example, pos, vocab] with whole components replaced; fills `seen` with every component's value."""
    projections, mlps, first = modules(model.module)
    handles = [first.register_forward_pre_hook(_input(vs.Site("embed"), None, edits, seen), with_kwargs=True)]
    heads = model.architecture[1].n_heads
    for number, projection in enumerate(projections):
        hook = _input(vs.Site("z", number), heads, edits, seen)
        handles.append(projection.register_forward_pre_hook(hook, with_kwargs=True))
    for number, mlp in enumerate(mlps):
        handles.append(mlp.register_forward_hook(_output(vs.Site("mlp_out", number), edits, seen)))
    with torch.no_grad():
        logits = model.module(tokens.ids, attention_mask=tokens.real.long()).logits
    for handle in handles:
        handle.remove()
    return logits


def _input(site: vs.Site, heads: int | None, edits: Values | None, seen: Values | None) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        split = given if heads is None else given.unflatten(-1, (heads, -1))
        _keep(site, split, heads, seen)
        changed = split.clone()
        for part, value in (edits or {}).items():
            if part == site:
                changed = value
            elif part.whole == site:
                changed[:, :, part.index] = value
        changed = changed if heads is None else changed.flatten(-2)
        return ((changed, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": changed})

    return hook


def _keep(site: vs.Site, split: Tensor, heads: int | None, seen: Values | None) -> None:
    if seen is not None:
        seen |= {site: split.clone()} if heads is None else {site[h]: split[:, :, h].clone() for h in range(heads)}


def _output(site: vs.Site, edits: Values | None, seen: Values | None) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if seen is not None:
            seen[site] = output.clone()
        return (edits or {}).get(site, output)

    return hook


def values(model: vs.Model, tokens: vs.Tokens) -> Values:
    """Every component's value in a plain run."""
    seen: Values = {}
    forward(model, tokens, seen=seen)
    return seen


def difference(logits: Tensor, pairs: vs.Pairs) -> Tensor:
    """Answer minus distractor at the read position [example], from full logits."""
    last = logits[torch.arange(len(pairs)), pairs.at]
    rows = torch.arange(len(pairs))
    return last[rows, pairs.answer] - last[rows, pairs.distractor]


def patched(model: vs.Model, pairs: vs.Pairs, parts: Sequence[vs.Site], base: str) -> Tensor:
    """Metric [example] of the base prompts' run with these components' values from the other prompts."""
    other = values(model, pairs.tokens("corrupted" if base == "clean" else "clean"))
    return difference(forward(model, pairs.tokens(base), {part: other[part] for part in parts}), pairs)


def edited(parts: Sequence[vs.Part | vs.Site], position: int | None = None) -> Variant:
    """An edited run of parts, or of sites."""
    return Variant(tuple(map(as_part, parts)), position)
