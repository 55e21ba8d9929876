"""Tokens: one batch of text.

Sequences are padded on the right: with causal attention nothing before the padding can see it, so an example's numbers
do not depend on its neighbours' lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.protocol import content_hash
from vesalius.site import Site

ENCODING = ("input_ids", "attention_mask", "decoder_input_ids")
"""Entries of a tokenizer's output that are held here."""


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """Token ids with the mask of real tokens.

    ids: [batch, pos], int64. mask: [batch, pos], True on real tokens; default all real. decoder: [batch, pos], input of
    an encoder-decoder's decoder; default its start token. named_positions: name -> [batch] or [batch, n] token numbers
    in each prompt's own sequence, -1 for none: positions that interventions can name.

    Raises InputError for shapes that do not fit and for a named position outside the prompts.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None
    decoder: Int[Tensor, "batch decoder_pos"] | None = None
    named_positions: Mapping[str, Int[Tensor, batch * n]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_ids("ids", self.ids)
        bring_to_cpu(self, "ids", "mask", "decoder", "named_positions")
        if self.mask is not None and self.mask.shape != self.ids.shape:
            raise InputError(
                f"mask has shape {tuple(self.mask.shape)}, ids {tuple(self.ids.shape)}; they must be equal"
            )
        check_decoder(self.decoder, len(self.ids))
        check_named_positions(self.named_positions, self.lengths)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __repr__(self) -> str:
        # Not the width of the batch, which may be padded further than its longest prompt.
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        span = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
        decoder = "" if self.decoder is None else f", decoder {list(self.decoder.shape)}"
        positions = f", named_positions {', '.join(self.named_positions)}" if self.named_positions else ""
        return f"Tokens({len(self)} prompts of {span} tokens{decoder}{positions})"

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """True on real tokens."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        return self.real.sum(1)

    def real_at(self, site: Site) -> Bool[Tensor, "batch pos"]:
        """True on the real tokens at a site: the decoder's, or the prompts'."""
        if self.decoder is None or site.of_encoder:
            return self.real
        return torch.ones_like(self.decoder, dtype=torch.bool)

    def take(self, rows: Int[Tensor, " row"], width: int | None = None) -> Tokens:
        """Some of the prompts, perhaps cut to a width that is enough for them."""
        return Tokens(
            self.ids[rows, :width],
            None if self.mask is None else self.mask[rows, :width],
            None if self.decoder is None else self.decoder[rows],
            {name: at[rows] for name, at in self.named_positions.items()},
        )

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], pad: int = 0) -> Tokens:
        """Right-padded batch from lists of token ids. Raises InputError for no rows or an empty one."""
        ids, lengths = pad_rows(rows, pad)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        return cls(ids, None if bool(mask.all()) else mask)

    @classmethod
    def from_encoding(cls, encoding: Mapping[str, Any]) -> Tokens:
        """From what a transformers tokenizer returns, as tensors, arrays or lists, of one text or several.

        Raises InputError for entries that are not held here, such as position_ids, and for no input_ids.
        """
        unknown = [name for name, value in encoding.items() if name not in ENCODING and not _is_default(name, value)]
        if unknown or encoding.get("input_ids") is None:
            raise InputError(
                f"a tokenizer's output must hold input_ids and may hold {', '.join(ENCODING[1:])}; got "
                f"{', '.join(map(str, encoding)) or 'nothing'}"
            )
        given = {name: _as_rows(encoding[name]) for name in ENCODING if encoding.get(name) is not None}
        if isinstance(given["input_ids"], list):  # texts of several lengths, unpadded
            return cls.from_rows(given["input_ids"])
        mask = given.get("attention_mask")
        return cls(given["input_ids"], None if mask is None else mask.bool(), given.get("decoder_input_ids"))

    @cached_property
    def content_hash(self) -> str:
        rows = [[int(i) for i in row[keep]] for row, keep in zip(self.ids, self.real, strict=True)]
        return content_hash(rows if self.decoder is None else [rows, self.decoder.tolist()])


def _is_default(name: str, value: Any) -> bool:
    """BERT's tokenizer says that all tokens belong to the first segment, which is what the model assumes anyway."""
    return name == "token_type_ids" and not any(map(any, _as_rows(value)))


def _as_rows(value: Any) -> Any:
    """An entry of an encoding as a tensor [batch, pos]; as lists where the texts differ in length."""
    if isinstance(value, Tensor):
        return value
    rows = value.tolist() if hasattr(value, "tolist") else list(value)
    rows = rows if rows and isinstance(rows[0], list | tuple) else [rows]
    return torch.tensor(rows) if len(set(map(len, rows))) == 1 else rows


def check_decoder(ids: Tensor | None, batch: int) -> None:
    if ids is None:
        return
    check_ids("decoder", ids)
    if len(ids) != batch:
        raise InputError(f"decoder has {len(ids)} rows for {batch} prompts")


def check_named_positions(named_positions: Mapping[str, Tensor], lengths: Int[Tensor, " batch"]) -> None:
    """Raises InputError for a named position that is not int64 [batch] or [batch, n], or lies outside a prompt."""
    for name, at in named_positions.items():
        if at.dtype != torch.long or at.ndim not in (1, 2) or len(at) != len(lengths):
            raise InputError(
                f"named position {name!r} must be int64 [{len(lengths)}] or [{len(lengths)}, n]; got {at.dtype} "
                f"{tuple(at.shape)}"
            )
        outside = (at < -1) | (at >= lengths.to(at.device).view(-1, *[1] * (at.ndim - 1)))
        if bool(outside.any()):
            row = int(outside.nonzero()[0, 0])
            raise InputError(
                f"named position {name!r} of prompt {row} is {at[row].tolist()}, but the prompt has "
                f"{int(lengths[row])} tokens, numbered from 0 (-1: none)"
            )


def pad_rows(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, " batch"]]:
    """Right-padded ids [batch, pos] and lengths [batch]."""
    if not rows or any(len(row) == 0 for row in rows):
        raise InputError("no tokens: give at least one prompt, and none of them empty")
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)
    return ids, torch.tensor([len(row) for row in rows])


def bring_to_cpu(inputs: Any, *names: str) -> None:
    """Prompts are planned with on the CPU, and a model takes them to its own device: so they lie there."""
    for name in names:
        value = getattr(inputs, name)
        if isinstance(value, Mapping):
            if any(one.device.type != "cpu" for one in value.values()):
                object.__setattr__(inputs, name, {key: one.cpu() for key, one in value.items()})
        elif value is not None and value.device.type != "cpu":
            object.__setattr__(inputs, name, value.cpu())


def check_tensor(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        hint = "; Tokens.from_encoding reads a tokenizer's output" if isinstance(ids, Mapping) else ""
        raise InputError(f"{name} must be an int64 tensor of token ids [batch, pos]; got {type(ids).__name__}{hint}")


def check_ids(name: str, ids: Tensor) -> None:
    check_tensor(name, ids)
    if ids.ndim != 2 or ids.dtype != torch.long:
        raise InputError(f"{name} must be int64 token ids [batch, pos]; got {ids.dtype} {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise InputError(f"{name} is empty: shape {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise InputError(f"{name} holds a negative token id ({int(ids.min())})")
