"""Record: one base run, kept so that later runs can start in its middle.

It holds every layer's input, keys and values (after rotation), the keywords each layer was called with, and the sites a
sweep takes values from. Prompts are right-padded and attention is causal, so nothing before a position depends on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vesalius.attention import attending, grouped
from vesalius.errors import InputError, UnknownNameError
from vesalius.hooks import CallTap, tapped
from vesalius.inputs import Tokens
from vesalius.model import Model
from vesalius.site import Site
from vesalius.taps import Recorder


@dataclass(frozen=True, eq=False)
class Record:
    """A base run. Tensors are [example, pos, ...]; `resid[l]` is layer l's input, `resid[n_layers]` the last output."""

    model: Model
    tokens: Tokens
    resid: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    calls: tuple[Mapping[str, Any], ...]
    """Each layer's arguments by name, without its hidden states."""
    scaling: tuple[float, ...]
    sites: Mapping[Site, Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int[Tensor, " example"]:
        return self.tokens.lengths

    def at(self, site: Site) -> Tensor:
        """The base run's value of a whole site."""
        if site.kind == "resid_pre" and site.layer is not None:
            return self.resid[site.layer]
        if site.kind == "resid_post" and site.layer is not None:
            return self.resid[site.layer + 1]
        if site.kind == "embed" and Site("embed") not in self.sites:
            return self.resid[0]
        if site not in self.sites:
            raise UnknownNameError("recorded site", str(site), map(str, self.sites), "Add it to record(..., sites=).")
        return self.sites[site]


class _Keeper:
    """Attention with the model's own arithmetic that keeps queries, keys and values per layer."""

    def __init__(self) -> None:
        self.q: dict[int, Tensor] = {}
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.scaling: dict[int, float] = {}

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
        if options.get("softcap") is not None or options.get("sliding_window") is not None:
            raise InputError("sweeps do not cover attention with soft caps or sliding windows yet; use Model.run")
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.q[layer], self.k[layer], self.v[layer], self.scaling[layer] = q.transpose(1, 2), k, v, scaling
        heads = q.shape[1]
        if mask is not None:
            mask = mask[..., : k.shape[2]]
        out = nn.functional.scaled_dot_product_attention(q, grouped(k, heads), grouped(v, heads), mask, scale=scaling)
        return out.transpose(1, 2).contiguous()


def record(model: Model, tokens: Tokens, sites: Sequence[Site] = ()) -> Record:
    """Run the model once and keep what replays need. Raises InputError for left-padded tokens."""
    adapter, layout = model.described
    if not adapter.attention or not adapter.replay:
        raise InputError(f"the {adapter.family} adapter does not say how to replay a layer; use Model.run")
    if not bool(tokens.real[:, 0].all()):
        raise InputError("sweeps take right-padded prompts; build them with Tokens.from_rows or Pairs")
    calls: dict[int, dict[str, Any]] = {}
    inputs: dict[int, Tensor] = {}
    keeper = _Keeper()
    taps = Recorder(
        model, [s.whole for s in sites if s.kind not in ("resid_pre", "resid_post")], [], tokens, grad=False
    )
    layers = [model.layer(number) for number in range(layout.n_layers)]
    call_taps = [CallTap(layer, _call_keeper(layer, number, calls, inputs)) for number, layer in enumerate(layers)]
    last = Recorder(model, [Site("resid_post", layout.n_layers - 1)], [], tokens, grad=False)
    with torch.no_grad(), tapped([*taps.taps, *last.taps], call_taps), attending(model.module, keeper):
        model.module(**model.token_call(tokens), logits_to_keep=1)
    taps.check_fired()
    order = range(layout.n_layers)
    return Record(
        model, tokens,
        resid=(*(inputs[n] for n in order), last.captured()[Site("resid_post", layout.n_layers - 1)]),
        queries=tuple(keeper.q[n] for n in order), keys=tuple(keeper.k[n] for n in order),
        values=tuple(keeper.v[n] for n in order), calls=tuple(calls[n] for n in order),
        scaling=tuple(keeper.scaling[n] for n in order), sites=taps.captured(),
    )  # fmt: skip


def _call_keeper(layer: nn.Module, number: int, calls: dict[int, dict[str, Any]], inputs: dict[int, Tensor]) -> Any:
    signature = inspect.signature(layer.forward)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        named = dict(bound.arguments)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        named.update(named.pop(extra, {}) if extra else {})
        first = next(iter(named))
        inputs[number] = named.pop(first)
        calls[number] = named

    return visit
