"""Texts, images or table rows as groups of positions, and the values of parts there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data.packing import Context, Group, Tally
from vesalius.data.reader import ActivationReader, Request, expected_cost, times_first
from vesalius.errors import InputError
from vesalius.inputs import Raw
from vesalius.jobs import Event, Sink
from vesalius.model import Model
from vesalius.protocol import content_hash
from vesalius.quantities.values import PartValues

# Values of a group, and rows at most.
_VALUES, _MOST_ROWS = 2**25, 8192
_INPUTS_AT_ONCE = 32
INPUTS = "inputs"


class Reading(Protocol):
    """What a collector reads. plan: everything that decides it. described: what was read, for the result.

    head: tokens that were put before each piece, 0 or 1. total: rows in all, where that is known.
    """

    @property
    def plan(self) -> Mapping[str, Any]: ...
    @property
    def described(self) -> Mapping[str, Any]: ...
    @property
    def head(self) -> int: ...
    @property
    def total(self) -> int | None: ...

    def groups(self, tally: Tally) -> Iterator[Group]: ...
    def values(self, group: Group) -> Float[Tensor, "row part"]: ...
    def announce(self, first: Group, tally: Tally, sink: Sink) -> None: ...


@dataclass(frozen=True, eq=False)
class TextReading:
    """Texts, a token a row."""

    reader: ActivationReader
    parts: PartValues

    @classmethod
    def of(cls, model: Model, texts: Any, parts: PartValues, **request: Any) -> TextReading:
        """request: fields of `Request`."""
        asked = Request(parts.sites, max_norm=None, **request)
        rows = max(rows_of(parts), asked.context)
        return cls(asked.reader(model, texts, group_rows=rows), parts)

    @property
    def plan(self) -> Mapping[str, Any]:
        return self.reader.to_json()

    @property
    def described(self) -> Mapping[str, Any]:
        return dict(self.reader.texts.description)

    @property
    def head(self) -> int:
        return 0 if self.reader.packing.bos.id is None else 1

    @property
    def total(self) -> int | None:
        return self.reader.packing.limit

    def groups(self, tally: Tally) -> Iterator[Group]:
        return self.reader.groups(tally)

    def values(self, group: Group) -> Float[Tensor, "row part"]:
        rows, _ = self.reader.rows(group, torch.float32)
        with torch.no_grad():
            return self.parts(dict(zip(self.reader.forward.sites, rows, strict=True)))

    def announce(self, first: Group, tally: Tally, sink: Sink) -> None:
        times = times_first(self.reader, first, tally)
        cost = expected_cost(self.reader, first, self.reader.forward.trial(first), times or 1.0, torch.float32)
        what = "expected cost" if times is not None else f"expected cost of every {first.rows:,} tokens"
        # Rows are looked at and let go: nothing of them is written.
        sink(Event("note", "cost", message=f"{what}: {replace(cost, disk_bytes=0).describe()}"))


@dataclass(frozen=True, eq=False)
class InputReading:
    """Images, table rows and other floats: a row for each position of a site (a patch), or one for each input.

    An input stands where a text's tokens have their ids: the token of all its positions is its number.
    """

    model: Model
    inputs: Raw
    parts: PartValues
    positions: int

    @classmethod
    def of(cls, model: Model, inputs: Raw, parts: PartValues) -> InputReading:
        """Raises InputError for sites that do not have the same positions."""
        model.check_evaluating()
        first = _rows(model, inputs.take(torch.tensor([0])), parts)
        counts = {str(site): len(rows) for site, rows in first.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{site} has {count}" for site, count in counts.items())
            raise InputError(f"parts that are read together are read at the same positions: {listed}")
        return cls(model, inputs, parts, next(iter(counts.values())))

    @property
    def plan(self) -> Mapping[str, Any]:
        sites = list(map(str, self.parts.sites))
        return {"model": self.model.content_hash, INPUTS: content_hash(list(self.inputs.hashes)), "sites": sites}

    @property
    def described(self) -> Mapping[str, Any]:
        return {INPUTS: list(self.inputs.values.shape), "sha256": content_hash(list(self.inputs.hashes))}

    @property
    def head(self) -> int:
        return 0

    @property
    def total(self) -> int | None:
        return len(self.inputs) * self.positions

    def groups(self, tally: Tally) -> Iterator[Group]:  # noqa: ARG002
        for numbers in torch.arange(len(self.inputs)).split(max(1, rows_of(self.parts) // self.positions)):
            ids = [np.full(self.positions, number, np.int64) for number in numbers.tolist()]
            yield Group(tuple(Context(int(one[0]), 0, one, np.ones(self.positions, np.bool_)) for one in ids))

    def values(self, group: Group) -> Float[Tensor, "row part"]:
        numbers, pieces = torch.tensor([context.document for context in group.contexts]), []
        for some in numbers.split(_INPUTS_AT_ONCE):
            pieces.append(self.parts(_rows(self.model, self.inputs.take(some), self.parts)).cpu())
        return torch.cat(pieces)

    def announce(self, first: Group, tally: Tally, sink: Sink) -> None:  # noqa: ARG002
        passes = len(self.inputs)
        sink(Event("note", "cost", message=f"{passes:,} inputs of {self.positions} positions, a forward pass each"))


def rows_of(parts: PartValues) -> int:
    """Rows of a group."""
    return min(_VALUES // len(parts.parts), _MOST_ROWS)


def _rows(model: Model, inputs: Raw, parts: PartValues) -> dict[Any, Float[Tensor, "row width"]]:
    run, found = model.run(inputs.values, capture=parts.sites), {}
    for site in parts.sites:
        whole = run[site]
        heads = whole.ndim == 4 and site.kind != "module"
        if whole.shape[0] != len(inputs) or not (whole.ndim in (2, 3) or heads):
            raise InputError(
                f"{site} is {list(whole.shape)} for {len(inputs)} inputs; parts of images and rows are read from "
                "[input, width] or [input, position, width]"
            )
        found[site] = whole.reshape(-1, whole.shape[-1] if not heads else whole.shape[-2] * whole.shape[-1]).float()
    return found


class Numbered:
    """Spells the number of an input."""

    def decode(self, ids: Any) -> str:
        return f"[input {int(ids[0])}]"


def tokenizer_for(model: Model, described: Mapping[str, Any]) -> Any:
    """What spells the tokens of a reading: the tokenizer, or the numbers of inputs that are no text."""
    return Numbered() if INPUTS in described else model.tokenizer
