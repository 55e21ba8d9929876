"""Where an edit acts: positions as masks, and which tokens the tensor in hand holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError, InterventionError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.site import ATTENTION, Site

Positions = int | str | Sequence[int | str] | Tensor | None
NamedPositions = Mapping[str, Tensor]
ALWAYS = ("first", "last")
"""Positions that every prompt has: its first and its last real token."""


@dataclass(frozen=True, eq=False)
class Place:
    """Which tokens a tensor holds, and which of them are edited.

    real: [batch, pos], True on real tokens. index: [batch, pos], the number each token has in its own sequence; None in
    an ordinary run, where it is the column. While a model generates, later columns are later tokens. chosen:
    [batch, pos], the columns that are edited; None is all. named_positions: name -> [batch] or [batch, n] numbers of
    tokens in each prompt's own sequence, -1 for none. keys: [batch, key], the number of every token that attention may
    see while a model generates; a number past all is padding.
    """

    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"] | None = None
    chosen: Bool[Tensor, "batch pos"] | None = None
    named_positions: NamedPositions = field(default_factory=dict)
    keys: Int[Tensor, "batch key"] | None = None

    def here(self, values: Tensor, site: Site, present: Tensor) -> Tensor:
        """Values given for a whole sequence, at these tokens; values without a token axis are the same everywhere.

        site: where the part is written. present: its value in this run. Raises InterventionError when a token that is
        edited is past the end of the values.
        """
        if self.index is None:
            return values
        axis = token_axis(site)
        missing = present.ndim - values.ndim
        if missing > axis or values.shape[axis - missing] == 1:
            return values
        values = values[(None,) * missing]
        self._check_reach(values.shape[axis], site)
        index = self.index.to(values.device).clamp_max(values.shape[axis] - 1)
        row = torch.arange(len(index), device=values.device) if values.shape[0] > 1 else torch.zeros_like(index[:, 0])
        found = values.movedim(axis, 1)[row[:, None], index].movedim(1, axis)
        return self._at_keys(found, present) if site.kind in ATTENTION else found

    def _at_keys(self, found: Tensor, present: Tensor) -> Tensor:
        """Values by key's number, at the keys there are; what is not given (padding too) keeps its present value."""
        assert self.keys is not None
        # A cache with a window holds the last keys only.
        cached = self.keys[:, -present.shape[-1] :].to(found.device)
        cached = cached.view(len(cached), *[1] * (found.ndim - 2), -1)
        at = cached.clamp_max(found.shape[-1] - 1).expand(*found.shape[:-1], -1)
        return torch.where(cached < found.shape[-1], found.gather(-1, at), present.to(found))

    def _check_reach(self, width: int, site: Site) -> None:
        assert self.index is not None
        edited = self.index if self.chosen is None else self.index[self.chosen]
        if edited.numel() and int(edited.max()) >= width:
            raise InterventionError(
                f"{site}: the values given hold {width} tokens, and token {int(edited.max())} is to be edited; "
                "give positions= inside them"
            )


def place_of(tokens: Tokens | None, site: Site, tensor: Tensor) -> Place:
    """All tokens of a pass, at the site whose tensor this is; named positions are the prompts', not a decoder's."""
    if tokens is None:
        shape = tensor.shape[:2] if tensor.ndim > 1 else (tensor.shape[0], 1)
        return Place(torch.ones(shape, dtype=torch.bool, device=tensor.device))
    inside = tokens.decoder is None or site.of_encoder
    real = tokens.real_at(site).to(tensor.device)
    return Place(real, named_positions=tokens.named_positions if inside else {})


def token_axis(site: Site) -> int:
    """Axis of a part's value that counts tokens: the query positions of attention, else the second axis."""
    return 2 if site.kind in ATTENTION and site.index is None else 1


def mask_of(
    positions: Positions, real: Bool[Tensor, "batch pos"], named_positions: NamedPositions | None = None
) -> Bool[Tensor, "batch pos"] | None:
    """Positions as a mask: None all, int or list the same everywhere, [batch] one each, bool [batch, pos] a mask.

    A name, or names in the list, stand for named positions of the prompts; "first" and "last" real token are
    always there. Raises InputError for a position outside the prompts, and for a negative one that is padding in some
    prompt, UnknownNameError for a name the prompts do not have.
    """
    if positions is None:
        return None
    batch, width = real.shape
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape != real.shape:
            raise InputError(f"a position mask must be {tuple(real.shape)}; got {tuple(positions.shape)}")
        return positions.to(real.device)
    chosen = torch.zeros(batch, width, dtype=torch.bool, device=real.device)
    if isinstance(positions, Tensor):
        if positions.shape != (batch,):
            raise InputError(f"per-example positions must be [{batch}]; got {tuple(positions.shape)}")
        _check_positions(positions.tolist(), real)
        chosen[torch.arange(batch, device=real.device), positions.to(real.device)] = True
        return chosen
    listed = [positions] if isinstance(positions, int | str) else list(positions)
    numbers = [position for position in listed if not isinstance(position, str)]
    _check_positions(numbers, real)
    chosen[:, numbers] = True
    for name in listed:
        if isinstance(name, str):
            chosen |= named_mask(name, real, named_positions or {})
    return chosen


def named_mask(
    name: str, real: Bool[Tensor, "batch pos"], named_positions: NamedPositions
) -> Bool[Tensor, "batch pos"]:
    """Where a named position lies, prompt by prompt; a prompt without it has no True. Raises UnknownNameError."""
    number = real.long().cumsum(1) - 1  # of each token in its own sequence
    if name not in named_positions and name in ALWAYS:
        return real & (number == (0 if name == "first" else real.sum(1, keepdim=True) - 1))
    if name not in named_positions:
        raise UnknownNameError(
            "position",
            name,
            [*named_positions, *ALWAYS],
            "Name your own: Tokens(ids, named_positions={name: numbers}).",
        )
    wanted = named_positions[name].to(real.device).view(len(real), 1, -1)
    return real & (number[:, :, None] == wanted).any(2)


def _check_positions(positions: Sequence[int], real: Bool[Tensor, "batch pos"]) -> None:
    width = real.shape[1]
    for position in positions:
        if not -width <= position < width:
            raise InputError(f"position {position} is outside the prompts' {width} tokens")
        if position < 0 and not bool(real[:, position].all()):
            raise InputError(
                f"position {position} counts from the padded end, which is padding in some prompts; "
                "give one position per example: a tensor [batch], such as tokens.lengths - 1"
            )


def spread(chosen: Bool[Tensor, "batch pos"], whole: Tensor, site: Site) -> Tensor:
    """The mask broadcast to a whole tensor: positions are axis 1, or the query positions (axis 2) of attention.

    Raises InterventionError when the tensor's token axis does not have the mask's positions.
    """
    axis = token_axis(site.whole)
    if whole.ndim <= axis or (whole.shape[0], whole.shape[axis]) != tuple(chosen.shape):
        raise InterventionError(
            f"{site} is {tuple(whole.shape)} here, so positions of {tuple(chosen.shape)} (batch, pos) do not fit it; "
            "leave positions= out, or run without last_logits"
        )
    if axis == 2:
        return chosen[:, None, :, None]
    return chosen.view(*chosen.shape, *[1] * (whole.ndim - 2))
