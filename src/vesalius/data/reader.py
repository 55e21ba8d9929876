"""ActivationReader: texts cut into contexts and run through models; what `harvest` and `stream` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.data.forward import Forward, Trial, forward_for
from vesalius.data.manifest import DTYPES
from vesalius.data.outliers import MAX_NORM, check_max_norm, outliers
from vesalius.data.packing import Group, Packing, Tally, bos_for, groups, special_ids, tokenized
from vesalius.data.source import Rows
from vesalius.data.texts import Texts, texts_from
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Estimate
from vesalius.jobs.progress import resident
from vesalius.model import Model
from vesalius.site import Site

# Per stored row: token, context, position.
_ORIGIN_BYTES = 12
# Rows of a block, which are read together and share a checksum: large enough to be read at full speed.
_BLOCK_BYTES, _BLOCK_LEAST, _BLOCK_MOST = 2**18, 16, 4096


@dataclass(frozen=True, eq=False)
class ActivationReader:
    """Groups of contexts of some texts, and the activations of some models there."""

    forward: Forward
    texts: Texts
    packing: Packing
    max_norm: float | None

    def groups(self, tally: Tally) -> Iterator[Group]:
        """All groups, from the first text on."""
        return groups(tokenized(self.texts.read(), self.forward.tokenizer, tally), self.packing)

    def rows(
        self, group: Group, dtype: torch.dtype, done: Callable[[int], None] = lambda _: None
    ) -> tuple[Rows, Bool[Tensor, " row"]]:
        """As `Forward.rows`, and which of the rows are norm outliers."""
        rows = self.forward.rows(group, dtype, done)
        return rows, outliers(rows, torch.from_numpy(group.first), self.max_norm)

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the rows."""
        packing = self.packing
        return {
            **self.forward.to_json(),
            "text": dict(self.texts.description),
            "context": packing.context,
            "bos": packing.bos.to_json(),
            "special": list(packing.special),
            "tokens": packing.limit,
            "max_norm": self.max_norm,
            "shard_rows": packing.group_rows,
        }


@dataclass(frozen=True)
class Request:
    """How activations are to be read; `harvest` says what the fields mean."""

    sites: Sequence[Site | str]
    tokens: int | None = None
    context: int = 256
    dtype: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    bos: str = "auto"
    keep_bos: bool = False
    max_norm: float | None = MAX_NORM
    column: str = "text"
    batch_tokens: int = 2048

    def reader(
        self, models: Any, texts: Any, *, group_rows: int | None = None, group_bytes: int = 1
    ) -> ActivationReader:
        """A reader, after everything is checked that can be before a model is run on text.

        A group has group_rows rows, or group_bytes bytes of activations, at most.
        """
        dtype_name(self.dtype)
        check_max_norm(self.max_norm)
        forward = forward_for(models, self.sites, self.compute, self.batch_tokens)
        for model in forward.models.values():
            _check_context(model, self.context)
        # Decided by sizes and not by free memory, so that every machine makes the same shards.
        rows = max(1, group_bytes // self._row_bytes(forward)) if group_rows is None else group_rows
        bos = bos_for(forward.tokenizer, self.bos, self.keep_bos)
        packing = Packing(self.context, bos, special_ids(forward.tokenizer), rows, self.tokens)
        return ActivationReader(forward, texts_from(texts, self.column), packing, self.max_norm)

    def block_rows(self, reader: ActivationReader) -> int:
        """Rows of a store that share a checksum and are read together."""
        return min(max(_BLOCK_BYTES // self._row_bytes(reader.forward), _BLOCK_LEAST), _BLOCK_MOST)

    def _row_bytes(self, forward: Forward) -> int:
        return sum(forward.widths) * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype that rows can be stored in. Raises UnknownNameError for another."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UnknownNameError("dtype of stored activations", str(dtype), DTYPES)


def _check_context(model: Model, context: int) -> None:
    most = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        raise InputError(f"context {context} is longer than the {most} positions of {model.name}; give {most} or less")


def times_first(reader: ActivationReader, first: Group, tally: Tally) -> float | None:
    """About how many times the rows of the first group there will be in all; None when that cannot be known."""
    limit, size = reader.packing.limit, reader.texts.size
    # Characters read so far against all of them: an estimate, since texts differ in tokens per character.
    by_size = None if size is None else max(1.0, size / max(1, tally.characters))
    by_limit = None if limit is None else limit / first.rows
    known = [times for times in (by_size, by_limit) if times is not None]
    return min(known) if known else None


def expected_cost(reader: ActivationReader, first: Group, trial: Trial, times: float, dtype: torch.dtype) -> Estimate:
    """Cost of `times` the first group; a forward pass is one context."""
    tokens = sum(len(context.ids) for context in first.contexts)
    bytes_of_row = sum(reader.forward.widths) * dtype.itemsize + _ORIGIN_BYTES
    return Estimate(
        seconds=tokens * times / trial.tokens_per_second,
        forwards=math.ceil(len(first.contexts) * times * len(reader.forward.models)),
        # The models are there by now, and the rows of a group come twice or three times.
        memory_bytes=resident() + 3 * first.rows * bytes_of_row,
        disk_bytes=int(first.rows * times * bytes_of_row),
    )
