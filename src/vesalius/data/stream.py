"""Stream: train on activations as a model makes them, with no store on disk.

The shuffle buffer is filled with the rows of one group of contexts, which then come in random order. Groups are
decided by the text alone, so a run can begin at any batch: what comes before is tokenized, but no model is run on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vesalius.data.outliers import MAX_NORM
from vesalius.data.packing import Tally
from vesalius.data.reader import ActivationReader, Request
from vesalius.data.source import Rows, check_batches, check_sample, rebatched
from vesalius.errors import InputError
from vesalius.model import Model
from vesalius.protocol import content_hash
from vesalius.seeds import generator_for
from vesalius.site import Site

_NOTHING = "no activations: the texts give no rows"


class Stream:
    """Activations that a model makes as they are read. A Source; made by `stream`."""

    def __init__(self, reader: ActivationReader, dtype: torch.dtype) -> None:
        self._reader, self._dtype = reader, dtype

    @property
    def sites(self) -> tuple[Site, ...]:
        return self._reader.forward.sites

    @property
    def widths(self) -> tuple[int, ...]:
        return self._reader.forward.widths

    @property
    def n_rows(self) -> None:
        """Not known before the end of the texts."""
        return None

    @property
    def bos(self) -> Mapping[str, Any]:
        """token: what every context begins with, its text or "none". kept: whether its rows are among these."""
        return self._reader.packing.bos.to_json()

    @property
    def models(self) -> list[dict[str, Any]]:
        """tag, name and sha256 of the weights of each."""
        return list(self._reader.forward.to_json()["models"])

    @property
    def context(self) -> int:
        """Tokens run together, at most."""
        return self._reader.packing.context

    @cached_property
    def content_hash(self) -> str:
        """Of models, tokenizer, sites, texts and packing, the buffer among it.

        Of an iterable that is no list of texts, its type and its first group of tokens.
        """
        # Texts of an iterable have no hash of their own; the first group tells most others apart.
        first = next(self._reader.groups(Tally()), None)
        known = {**self._reader.to_json(), "first": "" if first is None else first.content_hash}
        return content_hash({**known, "dtype": str(self._dtype)})

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """As `Source.batches`. Raises InputError, when it is reached, for texts without a token to keep."""
        check_batches(batch_size, seed, start)
        return rebatched(self._pools(("stream", seed), start * batch_size), batch_size, self._dtype)

    def sample(self, n: int, *, seed: int) -> Rows:
        """n random rows out of the first ones, somewhat more than n: a stream cannot be searched to its end.

        Raises as `batches`.
        """
        check_sample(n, seed)
        parts: list[Rows] = []
        have = 0
        for group in self._reader.groups(Tally()):
            # No more contexts are run than are needed: a buffer can hold many times the sample.
            rows, bad = self._reader.rows(group.head(n - have), self._dtype)
            parts.append(tuple(tensor[~bad] for tensor in rows))
            have += len(parts[-1][0])
            if have >= n:
                break
        if not parts:
            raise InputError(_NOTHING)
        whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        index = torch.randperm(len(whole[0]), generator=generator_for("sample", seed))[:n]
        return tuple(tensor[index] for tensor in whole)

    def _pools(self, key: tuple[str, int], skip: int) -> Iterator[tuple[Rows, Tensor]]:
        """Groups of rows, and the order in which their rows come, less the first `skip` rows; endless."""
        epochs = count()
        for epoch in epochs:
            total = 0
            for number, group in enumerate(self._reader.groups(Tally())):
                total += group.rows
                if skip >= group.rows:
                    skip -= group.rows
                    continue
                rows, bad = self._reader.rows(group, self._dtype)
                yield rows, _order(bad, generator_for(*key, epoch, number))[skip:]
                skip = 0
            if total == 0:
                raise InputError(_NOTHING)
            for _ in range(skip // total):
                next(epochs)
            # A start past the end of the texts: whole epochs are skipped without tokenizing them again.
            skip %= total


def _order(bad: Bool[Tensor, " row"], generator: torch.Generator) -> Tensor:
    """All rows of a group in random order, where others, drawn at random, take the place of the outliers.

    So a group has the same number of rows whatever the model gives, and can be passed over without running it.
    """
    order = torch.randperm(len(bad), generator=generator)
    good = (~bad).nonzero()[:, 0]
    # Rows that are there anyway: no other row of the text is as near at hand.
    drawn = good[torch.randint(len(good), (int(bad.sum()),), generator=generator)]
    return order.masked_scatter(bad[order], drawn)


def stream(
    model: Model | Sequence[Model] | Mapping[str, Model],
    texts: Any,
    *,
    sites: Sequence[Site | str],
    buffer: int = 65_536,
    tokens: int | None = None,
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    bos: str = "auto",
    keep_bos: bool = False,
    max_norm: float | None = MAX_NORM,
    column: str = "text",
    batch_tokens: int = 2048,
) -> Stream:
    """A Source that runs a model as it is read, and keeps nothing on disk; for texts that can be read again and again.

    buffer: rows that are kept in memory and shuffled together, at most. Other arguments and errors as in `harvest`;
    dtype is that of the batches, and in the place of a norm outlier another row of the buffer comes a second time.
    After the last text the first comes again, in another order.

    Raises InputError also for an iterator, which can be read only once.
    """
    request = Request(sites, tokens, context, dtype, compute, bos, keep_bos, max_norm, column, batch_tokens)
    reader = request.reader(model, texts, group_rows=buffer)
    if not reader.texts.rereadable:
        raise InputError(
            f"a {type(texts).__name__} can be read only once, and a stream starts again after its last text; give a "
            "list, a path, or an object whose __iter__ starts again"
        )
    return Stream(reader, dtype)
