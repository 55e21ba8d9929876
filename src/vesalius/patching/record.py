"""A recorded run, kept so that later runs can start in its middle.

It holds every layer's input, keys and values (after rotation), the keywords each layer was called with, and the sites a
sweep takes values from. Prompts are right-padded; where attention is causal, nothing before a position depends on it.

A model that cannot be replayed is recorded too, with the `reason`: sweeps of it are ordinary runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vesalius.adapters.base import spread
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Inputs, Raw, Tokens
from vesalius.intervention import Intervention
from vesalius.model import Model
from vesalius.model.attention import attending, grouped, weighted
from vesalius.model.hooks import CallTap, tapped
from vesalius.model.products import computing
from vesalius.model.taps import Recorder, version_of
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Recording:
    """A base run. Tensors are [example, pos, ...]; `resid[l]` is layer l's input, `resid[n_layers]` the last output."""

    model: Model
    inputs: Inputs
    resid: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    calls: tuple[Mapping[str, Any], ...]
    """Each layer's arguments by name, without its hidden states."""
    scaling: tuple[float, ...]
    sites: Mapping[Site, Tensor]
    windows: tuple[int | None, ...] = ()
    """How many positions each layer's attention looks back, itself included; None is all."""
    caps: tuple[float | None, ...] = ()
    """Bound of each layer's attention scores: cap * tanh(scores / cap); None is none."""
    sinks: tuple[Tensor | None, ...] = ()
    """Each layer's attention sinks [head], a score that takes part in the softmax and attends to nothing."""
    reason: str = ""
    """Why layers cannot be replayed; empty when they can. Then queries, keys, values and calls are there."""
    logits: Tensor | None = None
    """[example, pos, vocab], or a classifier's [example, class], when layers cannot be replayed."""

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> Tokens:
        """The prompts. Raises InputError for inputs that are none."""
        if isinstance(self.inputs, Raw):
            raise InputError(f"{self.model.name} was run on {self.inputs!r}; this takes prompts")
        return self.inputs

    def real_at(self, site: Site) -> Bool[Tensor, "example pos"]:
        """True on the real positions that a site counts; without tokens they are the second axis of its tensor."""
        if isinstance(self.inputs, Tokens):
            return self.inputs.real_at(site)
        return torch.ones(self[site].shape[:2], dtype=torch.bool)

    @property
    def causal(self) -> bool:
        """No position reads a later one."""
        return self.model.adapter is not None and self.model.adapter.causal

    @property
    def lengths(self) -> Int[Tensor, " example"]:
        return self.inputs.lengths

    @property
    def weight(self) -> int:
        """Tokens that each example counts as, where what runs together is bounded."""
        return self.inputs.weight if isinstance(self.inputs, Raw) else self.inputs.ids.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        logits = [] if self.logits is None else [self.logits]
        kept = [*self.resid, *self.queries, *self.keys, *self.values, *self.sites.values(), *logits]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def __getitem__(self, site: Site) -> Tensor:
        """The run's whole tensor at a whole site. Raises UnknownNameError for one that was not recorded."""
        if site.stack and site in self.sites:
            return self.sites[site]
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

    understands = ("s_aux",)

    def __init__(self, lengths: Int[Tensor, " example"]) -> None:
        self._lengths = lengths
        self.q: dict[int, Tensor] = {}
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.scaling: dict[int, float] = {}
        self.windows: dict[int, int | None] = {}
        self.caps: dict[int, float | None] = {}
        self.sinks: dict[int, Tensor | None] = {}
        self._masks: list[tuple[Tensor, int | None]] = []
        self.strange = ""
        """What is not causal attention, perhaps windowed."""

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
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.q[layer], self.k[layer], self.v[layer], self.scaling[layer] = q.transpose(1, 2), k, v, scaling
        self.caps[layer], sinks = options.get("softcap"), options.get("s_aux")
        self.sinks[layer] = None if sinks is None else sinks.detach()
        if mask is not None:
            mask = mask[..., : k.shape[2]]
        self._look(layer, mask)
        heads = q.shape[1]
        sink = None if sinks is None else sinks[:, None, None]
        out = weighted(q, grouped(k, heads), grouped(v, heads), mask, scaling, self.caps[layer], sink)
        return out.transpose(1, 2).contiguous()

    def _look(self, layer: int, mask: Tensor | None) -> None:
        """The window of a causal mask; anything else is strange. The mask is read, never replayed."""
        if mask is None:
            self.strange = self.strange or f"layer {layer} was given no attention mask"
            return
        if not any(mask.data_ptr() == seen.data_ptr() for seen, _ in self._masks):
            self._masks.append((mask, window_of(mask, self._lengths)))
        window = next(window for seen, window in self._masks if mask.data_ptr() == seen.data_ptr())
        if window == 0:
            self.strange = self.strange or f"layer {layer}'s attention mask is neither causal nor a sliding window"
        self.windows[layer] = window


def window_of(mask: Tensor, lengths: Int[Tensor, " example"]) -> int | None:
    """How many positions a mask [example or 1, 1, pos, pos] lets a position look back; None all, 0 not causal."""
    allowed = (mask[:, 0] >= 0 if mask.is_floating_point() else mask[:, 0]).expand(len(lengths), -1, -1)
    pos = torch.arange(allowed.shape[-1], device=allowed.device)
    real = pos < lengths[:, None].to(pos.device)
    back, reach = pos[:, None] - pos, int((allowed & real[:, :, None]).sum(-1).max())
    expected = (back >= 0) & (back < reach) & real[:, None, :]
    if mask.shape[1] > 1 or not torch.equal(allowed & real[:, :, None], expected & real[:, :, None]):
        return 0
    return None if reach >= int(lengths.max()) else reach


def record(model: Model, inputs: Inputs, sites: Sequence[Site] = (), given: Sequence[Intervention] = ()) -> Recording:
    """Run the model once, with the interventions given, and keep what replays need.

    Raises InputError for left-padded tokens, and for a model in training mode.
    """
    model.check_evaluating()
    if isinstance(inputs, Raw):
        return _plain(model, inputs, sites, _never_replayed(model) or "the inputs are no tokens", given)
    tokens = model.begun(inputs)
    if not bool(tokens.real[:, 0].all()):
        raise InputError("sweeps take right-padded prompts; build them with Tokens.from_rows or Pairs")
    reason = _never_replayed(model)
    if reason:
        return _plain(model, tokens, sites, reason, given)
    adapter, layout = model.architecture
    calls: dict[int, dict[str, Any]] = {}
    entered: dict[int, Tensor] = {}
    counted: dict[int, int] = {}
    keeper = _Keeper(tokens.lengths)
    kept = [site.whole for site in sites if site.kind not in ("resid_pre", "resid_post")]
    taps = Recorder(model, kept, list(given), tokens, grad=False)
    layers = [model.layer(number) for number in range(layout.n_layers)]
    call_taps = [
        CallTap(layer, _call_keeper(layer, number, calls, entered, counted)) for number, layer in enumerate(layers)
    ]
    last = Recorder(model, [Site("resid_post", layout.n_layers - 1)], [], tokens, grad=False)
    with torch.no_grad(), tapped([*taps.taps, *last.taps], call_taps), attending(model.module, keeper), computing():
        model.module(**model.token_call(tokens), logits_to_keep=1)
    taps.check_fired()
    order = range(layout.n_layers)
    reason = keeper.strange or _without_rule(calls, adapter.replay)
    if taps.overwritten() or last.overwritten() or any(version_of(entered[n]) != counted[n] for n in order):
        reason = "it changes its tensors in place"
    if reason:
        return _plain(model, tokens, sites, reason, given)
    return Recording(
        model,
        tokens,
        resid=(*(entered[n] for n in order), last.captured()[Site("resid_post", layout.n_layers - 1)]),
        queries=tuple(keeper.q[n] for n in order),
        keys=tuple(keeper.k[n] for n in order),
        values=tuple(keeper.v[n] for n in order),
        calls=tuple(calls[n] for n in order),
        scaling=tuple(keeper.scaling[n] for n in order),
        sites=taps.captured(),
        windows=tuple(keeper.windows[n] for n in order),
        caps=tuple(keeper.caps[n] for n in order),
        sinks=tuple(keeper.sinks[n] for n in order),
    )


def _never_replayed(model: Model) -> str:
    """Why this model's layers cannot be replayed, whatever the prompts; empty when they perhaps can."""
    adapter = model.adapter
    if adapter is None:
        return f"{model.name} has no adapter"
    if not adapter.causal:
        return f"attention of the {adapter.family} family reads later positions too"
    if spread(model.module):
        return "its weights lie on several devices"
    if not adapter.attention or not adapter.replay:
        return f"the {adapter.family} adapter does not say how to replay a layer"
    return ""


def _plain(
    model: Model, inputs: Inputs, sites: Sequence[Site], reason: str, given: Sequence[Intervention]
) -> Recording:
    """A record of an ordinary run, for a model whose layers cannot be replayed."""
    one = model.adapter is not None and model.adapter.stack_names == ("",)
    n_layers = model.architecture[1].n_layers if one else 0
    stream = [*(Site("resid_pre", n) for n in range(n_layers)), *(Site("resid_post", n - 1) for n in [n_layers] if n)]
    kept_anyway = ("resid_pre", "resid_post") if one else ()
    asked = [*stream, *(site.whole for site in sites if site.kind not in kept_anyway)]
    groups = together(model, inputs, torch.arange(len(inputs)))
    if given and len(groups) > 1:
        raise InputError("edits that every run has in common need prompts of one length in a model without adapter")
    runs = [model.run(taken(model, inputs, rows), capture=asked, interventions=given) for rows in groups]
    logits = _merged(inputs, groups, [_checked_logits(model, run.logits) for run in runs], "its output")
    tensors = {site: _merged(inputs, groups, [run[site] for run in runs], str(site)) for site in runs[0].activations}
    _check_examples(tensors, len(inputs))
    resid = tuple(tensors[site] for site in stream)
    return Recording(model, inputs, resid, (), (), (), (), (), tensors, reason=reason, logits=logits)


def _check_examples(tensors: Mapping[Site, Tensor], count: int) -> None:
    for site, tensor in tensors.items():
        # A tensor made once for the whole batch, such as position embeddings, is the same in every run.
        once = tensor.shape[:1] == (1,) and "." not in site.side
        if site.kind == "module" and tensor.shape[:1] != (count,) and not once:
            raise InputError(
                f"{site} is {tuple(tensor.shape)} for {count} examples: a sweep needs them on the first axis "
                "(an LSTM: batch_first=True, and no hidden states). Use Model.run"
            )


def together(model: Model, inputs: Inputs, example: Int[Tensor, " row"]) -> list[Int[Tensor, " group"]]:
    """Examples that one run may hold: without an adapter nothing hides the padding, so those of one length."""
    if model.adapter is not None or isinstance(inputs, Raw):
        return [example] if len(example) else []
    lengths = inputs.lengths[example]
    return [example[lengths == size] for size in lengths.unique()]


def taken(model: Model, inputs: Inputs, example: Int[Tensor, " row"]) -> Inputs:
    """These examples' inputs; prompts of a model without adapter are cut to their one length."""
    if model.adapter is None and isinstance(inputs, Tokens):
        return Tokens(inputs.ids[example, : int(inputs.lengths[example].max())])
    return inputs.take(example)


def _checked_logits(model: Model, logits: Any) -> Tensor:
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        given = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"a sweep reads logits [example, pos, vocab] or [example, class]; {model.name} gives {given}")
    return logits


def _merged(inputs: Inputs, groups: Sequence[Tensor], pieces: Sequence[Tensor], name: str) -> Tensor:
    """One tensor [example, pos, ...] from runs of some examples each, zero past an example's end; or [example, ...]."""
    if len(pieces) == 1:
        return pieces[0]
    counted = any(
        piece.ndim < 3 or piece.shape[1] != int(inputs.lengths[rows[0]])
        for rows, piece in zip(groups, pieces, strict=True)
    )
    one = len({piece.shape[1:] for piece in pieces}) == 1 and all(
        piece.ndim == 2 and len(piece) == len(rows) for rows, piece in zip(groups, pieces, strict=True)
    )
    if not one and (len({piece.shape[2:] for piece in pieces}) > 1 or counted):
        raise InputError(f"{name} is not [example, pos, ...], so prompts of unequal lengths cannot share it")
    assert isinstance(inputs, Tokens)
    shape = pieces[0].shape[1:] if one else (inputs.ids.shape[1], *pieces[0].shape[2:])
    whole = pieces[0].new_zeros(len(inputs), *shape)
    for rows, piece in zip(groups, pieces, strict=True):
        if one:
            whole[rows] = piece
        else:
            whole[rows, : piece.shape[1]] = piece
    return whole


def _without_rule(calls: Mapping[int, Mapping[str, Any]], rules: Mapping[str, str]) -> str:
    """The first tensor argument of a layer that has no replay rule, in words; empty when there is none."""
    given = ((layer, name, value) for layer, call in calls.items() for name, value in call.items())
    found = (no_rule(layer, name) for layer, name, value in given if name not in rules and holds_tensor(value))
    return next(found, "")


def no_rule(layer: int, name: str) -> str:
    """Why a layer cannot be replayed."""
    return f"layer {layer} takes a tensor {name!r} that its adapter has no replay rule for"


def holds_tensor(value: Any) -> bool:
    return any(map(holds_tensor, value)) if isinstance(value, tuple | list) else isinstance(value, Tensor)


def _call_keeper(
    layer: nn.Module,
    number: int,
    calls: dict[int, dict[str, Any]],
    inputs: dict[int, Tensor],
    counted: dict[int, int],
) -> Any:
    signature = inspect.signature(layer.forward)

    def visit(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(*args, **kwargs)
        named = dict(bound.arguments)
        extra = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
        named.update(named.pop(extra, {}) if extra else {})
        inputs[number] = named.pop(next(iter(named)))
        counted[number] = version_of(inputs[number])
        calls[number] = named

    return visit
