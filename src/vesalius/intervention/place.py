"""Where an edit acts: positions as masks, and which tokens the tensor in hand holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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

    real: [batch, pos], True on real tokens. index: [batch, pos], the number each token has in its own sequence,
    padding past all; None where it is the column. While a model generates, later columns are later tokens. chosen:
    [batch, pos], the columns that are edited; None is all. named_positions: name -> [batch] or [batch, n] numbers of
    tokens in each prompt's own sequence, -1 for none. keys: [batch, key], the number of every token that attention may
    see, where it is not the column; a number past all is padding. ends: [batch], the number of each prompt's last
    token, while a model generates. last: [batch, pos], the prompts' last tokens where they are edited as such. All on
    the CPU, as prompts are.
    """

    real: Bool[Tensor, "batch pos"]
    index: Int[Tensor, "batch pos"] | None = None
    chosen: Bool[Tensor, "batch pos"] | None = None
    named_positions: NamedPositions = field(default_factory=dict)
    keys: Int[Tensor, "batch key"] | None = None
    ends: Int[Tensor, " batch"] | None = None
    last: Bool[Tensor, "batch pos"] | None = None

    @property
    def numbers(self) -> Int[Tensor, "batch pos"]:
        """The number of every column's token in its own sequence."""
        return torch.arange(self.real.shape[1]).expand(self.real.shape) if self.index is None else self.index

    @property
    def edited(self) -> Bool[Tensor, "batch pos"]:
        """The real tokens that are edited."""
        return self.real if self.chosen is None else self.chosen & self.real

    def choosing(self, positions: Positions) -> Place:
        """The same place, with the columns of these positions as the ones that are edited."""
        chosen = self.chosen
        if chosen is None:
            chosen = mask_of(positions, self.real, self.named_positions)
        if chosen is None or "last" in self.named_positions or "last" not in _names(positions):
            return replace(self, chosen=chosen)
        ends = self.real.sum(1) - 1 if self.ends is None else self.ends
        return replace(self, chosen=chosen, last=self.edited & (self.numbers == ends[:, None]))

    def here(
        self,
        values: Tensor,
        site: Site,
        present: Tensor,
        tokens: Tokens | None = None,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> Tensor:
        """Values given for whole sequences, at these tokens; values without a token axis are the same everywhere.

        A token gets the value of the token with the same number; the last one, edited as "last", that of its source's
        last. site: where the part is written. present: its value in this run. tokens: those that the values are of; a
        bare tensor goes by columns, and by token numbers while a model writes. rows: the example that gives each its
        values; default the one with the same number.

        Raises InterventionError when a token that is edited has none in its source.
        """
        axis, real = token_axis(site), None if tokens is None else tokens.real_at(site)
        missing = present.ndim - values.ndim
        if present.ndim <= axis:
            # One number an example, such as a coordinate of a row of a table: there are no tokens.
            return values if rows is None else values[rows.to(values.device)]
        if real is not None and (missing or (values.shape[0], values.shape[axis]) != tuple(real.shape)):
            real = None  # it does not count the tokens
        everywhere = missing > axis or (real is None and values.shape[axis - missing] == 1)
        columns = real is None and self.ends is None
        if everywhere or columns or present.shape[axis] != self.real.shape[1]:
            return values if rows is None else values[rows.to(values.device)]
        values = values[(None,) * missing]
        if real is None:
            real = torch.ones(values.shape[0], values.shape[axis], dtype=torch.bool)
        donor = self._donor_rows(rows, len(real))
        self._check_count(donor, len(real), site)
        number = self.numbers if self.last is None else self._own_last(real[donor].sum(1))
        self._check_donors(number, donor, real, site)
        same = self.index is None and rows is None and self.last is None and len(real) == len(self.real)
        if same and torch.equal(real, self.real):
            return values
        return self._gathered(values, site, present, real, donor, number)

    def _donor_rows(self, rows: Tensor | None, known: int) -> Int[Tensor, " batch"]:
        if rows is not None:
            return rows.cpu()
        return torch.arange(len(self.real)) if known > 1 else torch.zeros(len(self.real), dtype=torch.long)

    def _own_last(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
        """Numbers of the source's tokens: of the prompts' last ones, the source's last."""
        assert self.last is not None
        return torch.where(self.last, lengths[:, None] - 1, self.numbers)

    def _check_count(self, donor: Tensor, known: int, site: Site) -> None:
        if len(donor) != len(self.real) or int(donor.max()) >= known:
            raise InterventionError(f"{site}: values of {known} examples are given, and this run has {len(self.real)}")

    def _check_donors(self, number: Tensor, donor: Tensor, real: Tensor, site: Site) -> None:
        lengths = real[donor].sum(1)
        lacking = self.edited & (number >= lengths[:, None])
        if bool(lacking.any()):
            row, column = (int(at) for at in lacking.nonzero()[0])
            raise InterventionError(
                f"{site}: token {int(number[row, column])} of prompt {row} is to be edited, but its source, prompt "
                f"{int(donor[row])} there, has {int(lengths[row])} tokens, numbered from 0. Give positions= that both "
                '("last" is each prompt\'s own last token), or values of prompts that are long enough'
            )

    def _gathered(
        self, values: Tensor, site: Site, present: Tensor, real: Tensor, donor: Tensor, number: Tensor
    ) -> Tensor:
        axis = token_axis(site)
        # Of every example, the columns of its first, second ... real token; then those of padding.
        column = (~real).long().argsort(dim=1, stable=True)[donor]
        at = column.gather(1, number.clamp_max(real.shape[1] - 1)).to(values.device)
        found = values.movedim(axis, 1)[donor.to(values.device)[:, None], at].movedim(1, axis)
        return self._at_keys(found, present, site, real[donor], column) if site.kind in ATTENTION else found

    def _at_keys(self, found: Tensor, present: Tensor, site: Site, real: Tensor, column: Tensor) -> Tensor:
        """Values by key's number, at the keys there are; a key that the source does not have is not seen."""
        keys, width = self.keys, found.shape[-1]
        if keys is None:
            keys = torch.arange(present.shape[-1]).expand(len(present), -1) if site.cross else self.numbers
        # A cache with a window holds the last keys only.
        keys = keys[:, -present.shape[-1] :].cpu()
        if site.cross or width != real.shape[1]:
            real = torch.ones(len(keys), width, dtype=torch.bool)
            column = torch.arange(width).expand(len(keys), -1)
        at, given = column.gather(1, keys.clamp_max(width - 1)), keys < real.sum(1, keepdim=True)
        shape = (len(keys), *[1] * (found.ndim - 2), -1)
        at, given = (t.to(found.device).view(shape) for t in (at, given))
        # While a model writes, keys that are not given are new ones; in a run, those that the source did not have.
        hidden = 0.0 if site.kind.endswith("pattern") else torch.finfo(present.dtype).min
        other = present.to(found) if self.ends is not None else torch.full_like(present, hidden).to(found)
        return torch.where(given, found.gather(-1, at.expand(*found.shape[:-1], -1)), other)


def place_of(tokens: Tokens | None, site: Site, tensor: Tensor) -> Place:
    """All tokens of a pass, at the site whose tensor this is; named positions are the prompts', not a decoder's."""
    if tokens is None:
        shape = tensor.shape[:2] if tensor.ndim > 1 else (tensor.shape[0], 1)
        return Place(torch.ones(shape, dtype=torch.bool))
    inside = tokens.decoder is None or site.of_encoder
    real = tokens.real_at(site)
    index, keys = _numbers(real), _numbers(tokens.real if site.cross else real)
    if index is None and keys is not None:
        index = torch.arange(real.shape[1]).expand(real.shape)
    return Place(real, index, None, tokens.named_positions if inside else {}, keys)


def _numbers(real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"] | None:
    """Every token's number in its own sequence, padding past all; None where it is the column, padding on the right."""
    width = real.shape[1]
    number = torch.where(real, real.long().cumsum(1) - 1, width)
    return None if bool((number[real] == torch.arange(width).expand(real.shape)[real]).all()) else number


def _names(positions: Positions) -> list[str]:
    if positions is None or isinstance(positions, int | Tensor):
        return []
    return [one for one in ([positions] if isinstance(positions, str) else positions) if isinstance(one, str)]


def token_axis(site: Site) -> int:
    """Axis of a part's value that counts tokens: the query positions of attention, else the second axis."""
    return 2 if site.kind in ATTENTION and site.index is None else 1


def mask_of(
    positions: Positions, real: Bool[Tensor, "batch pos"], named_positions: NamedPositions | None = None
) -> Bool[Tensor, "batch pos"] | None:
    """Positions as a mask: None all, int or list the same everywhere, [batch] one each, bool [batch, pos] a mask.

    A number is a token's in each prompt's own sequence, whatever the padding; a negative one counts from the end of the
    batch. A name, or names in the list, stand for named positions of the prompts; "first" and "last" real token are
    always there. A mask never chooses padding. Raises InputError for a position that some prompt does not have,
    UnknownNameError for a name the prompts do not have.
    """
    if positions is None:
        return None
    batch = len(real)
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.shape != real.shape:
            raise InputError(f"a position mask must be {tuple(real.shape)}; got {tuple(positions.shape)}")
        return positions.to(real.device) & real
    chosen = torch.zeros_like(real)
    if isinstance(positions, Tensor):
        if positions.shape != (batch,):
            raise InputError(f"per-example positions must be [{batch}]; got {tuple(positions.shape)}")
        return _numbered(positions.to(real.device), real)
    for position in [positions] if isinstance(positions, int | str) else list(positions):
        if isinstance(position, str):
            chosen |= named_mask(position, real, named_positions or {})
        else:
            chosen |= _numbered(torch.full((batch,), position, device=real.device), real)
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


def _numbered(positions: Int[Tensor, " batch"], real: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """One token of each prompt, by number; a negative one counts from the end of the batch."""
    width, column = real.shape[1], torch.arange(real.shape[1], device=real.device)
    outside = (positions < -width) | (positions >= width)
    if bool(outside.any()):
        raise InputError(f"position {int(positions[outside][0])} is outside the prompts' {width} tokens")
    number = torch.where((positions < 0)[:, None], column - width, real.long().cumsum(1) - 1)
    found = real & (number == positions[:, None])
    if not bool(found.any(1).all()):
        row = int((~found.any(1)).nonzero()[0])
        position, length = int(positions[row]), int(real[row].sum())
        counted = " counts from the padded end, which" if position < 0 else ""
        raise InputError(
            f"position {position}{counted} is padding in some prompts (prompt {row} has {length} tokens); give one "
            'position per example, a tensor [batch] such as tokens.lengths - 1, or a name: "last"'
        )
    return found


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
