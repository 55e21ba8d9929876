"""The rows a dictionary is evaluated on: held out where the store can tell, of whole contexts, with their documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesalius.coder import Coder
from vesalius.data import ActivationStore, Source, TensorSource
from vesalius.data.packing import Context
from vesalius.dictionaries.held_out import EvaluationRows
from vesalius.dictionaries.unknown_sites import known_site
from vesalius.errors import InputError
from vesalius.seeds import generator_for

BLOCKS = 100
"""Into how many groups rows are put that come one by one, each row independent of the others."""
Rows = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of inputs and outputs, one tensor [row, width] per site; row i of each is the same token.

    groups: [row] number of the document (or whatever `unit` says) that a row belongs to, from 0. contexts: those whose
    rows these are, in order and none left out; empty for rows that come one by one.
    """

    inputs: Rows
    outputs: Rows
    groups: NDArray[np.intp]
    unit: str
    contexts: tuple[Context, ...] = ()

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return int(self.groups.max()) + 1

    def __len__(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, eq=False)
class Drawn:
    """test: rows to measure on. fit: other rows, inputs and outputs, which baselines are fitted to."""

    test: Sample
    fit: tuple[Rows, Rows]


def draw(coder: Coder, rows: EvaluationRows, whole: Source, n: int, seed: int) -> Drawn:
    """About n rows to measure on, and as many others for the baselines: the trained ones where these are known.

    rows: those that may be measured on. whole: the source that they are a part of, or all of.

    Raises InputError when the source lacks a site of the dictionary, or has too few rows.
    """
    numbers = _site_numbers(coder, rows.source)
    if isinstance(rows.source, ActivationStore):
        held_out = isinstance(whole, ActivationStore) and rows.trained_on is False
        test, rest = _of_store(rows.source, numbers, n, seed, all_of_it=held_out)
        if held_out and isinstance(whole, ActivationStore):
            last = whole.trace(rows.source.rows.start - 1).document
            # Baselines may be fitted to what the dictionary was trained on; only the rows measured on must be new.
            rest = whole.documents(0, last + 1).sample(n, seed=seed)
        return Drawn(test, _in_and_out(rest, numbers))
    drawn = rows.source.sample(2 * n, seed=seed)
    if len(drawn[0]) < 4:
        raise InputError(f"{len(drawn[0])} rows are too few to measure a dictionary on; at least 4 are needed")
    half = len(drawn[0]) // 2
    groups = np.arange(half) * min(BLOCKS, half) // half
    return Drawn(
        Sample(*_in_and_out(tuple(t[:half] for t in drawn), numbers), groups, "groups of rows"),
        _in_and_out(tuple(t[half:] for t in drawn), numbers),
    )


SiteNumbers = tuple[list[int], list[int]]
"""Of the tensors of a batch, those that a dictionary reads, and those that it reconstructs."""


def _in_and_out(rows: Rows, numbers: SiteNumbers) -> tuple[Rows, Rows]:
    # On the CPU, where totals are kept; a dictionary takes them to its own device chunk by chunk.
    return tuple(rows[number].cpu() for number in numbers[0]), tuple(rows[number].cpu() for number in numbers[1])


def _site_numbers(coder: Coder, source: Source) -> SiteNumbers:
    """Tensors without names stand for the dictionary's sites in order."""
    known = list(source.sites)
    sites = [*coder.in_sites, *(() if coder.in_sites == coder.out_sites else coder.out_sites)]
    if isinstance(source, TensorSource) and len(known) == len(sites) and known[0].module == "tensor0":
        known = sites
    missing = [str(known_site(site)) for site in sites if site not in known]
    if missing:
        raise InputError(
            f"the activations have no {', '.join(missing)}, which the dictionary reads or reconstructs; they have "
            f"{', '.join(map(str, known))}"
        )
    return [known.index(site) for site in coder.in_sites], [known.index(site) for site in coder.out_sites]


def _of_store(store: ActivationStore, numbers: SiteNumbers, n: int, seed: int, all_of_it: bool) -> tuple[Sample, Rows]:
    """Contexts at random until there are n rows, and rows of further ones; of few half each, if not all may be used."""
    known = list(store.contexts())
    # Whole contexts: the model is run on them too, and rows of one context are not independent.
    order = torch.randperm(len(known), generator=generator_for("quality", seed)).tolist()
    ends = np.cumsum([known[number][1].rows for number in order])
    cut = min(int(np.searchsorted(ends, min(n, ends[-1] if all_of_it else ends[-1] // 2))) + 1, len(order))
    stop = int(np.searchsorted(ends, ends[cut - 1] + n)) + 1
    chosen, others = order[:cut], order[cut:stop]
    if not others and not all_of_it:
        raise InputError("all rows are of one context, too few to measure a dictionary on; harvest more text")
    test = [known[number] for number in sorted(chosen)]
    contexts = tuple(context for _, context in test)
    groups, unit = groups_of(contexts)
    rest = _rows(store, [known[number] for number in sorted(others)]) if others else ()
    return Sample(*_in_and_out(_rows(store, test), numbers), groups, unit, contexts), rest


def _rows(store: ActivationStore, known: Sequence[tuple[int, Context]]) -> Rows:
    parts = [store.at(range(first, first + context.rows)) for first, context in known]
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def groups_of(contexts: Sequence[Context]) -> tuple[NDArray[np.intp], str]:
    """The document of each row; the context when all are of one document, runs of rows when all are of one context."""
    sizes = [context.rows for context in contexts]
    owners = np.unique([context.document for context in contexts], return_inverse=True)[1]
    if owners.max() > 0:
        return np.repeat(owners, sizes), "documents"
    if len(contexts) > 1:
        return np.repeat(np.arange(len(contexts)), sizes), "contexts"
    return np.arange(sizes[0]) * min(BLOCKS, sizes[0]) // sizes[0], "runs of rows"
