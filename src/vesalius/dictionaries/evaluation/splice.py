"""What the model loses when a reconstruction takes the place of its activations, beside mean and zero ablation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.packing import Context
from vesalius.dictionaries.evaluation.figures import Figure, Statistic, figure
from vesalius.dictionaries.evaluation.totals import Floats, Reconstructor
from vesalius.inputs import Tokens
from vesalius.intervention import Replace
from vesalius.jobs import Estimate, Event, Sink, track
from vesalius.jobs.progress import most_resident
from vesalius.metric import wide
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.site import Site
from vesalius.stats import clustered_t

MEAN, ZERO = "mean", "zero"
SHARE_OF = {
    "loss_recovered": "ce_increase_zero", "loss_recovered_mean": "ce_increase_mean", "kl_recovered": "kl_zero",
    "kl_recovered_mean": "kl_mean",
}  # fmt: skip
"""What each share is one of; it comes before in `Losses.figures`."""
Edit = Callable[..., Tensor]
"""From the tensors read at some sites to what is put in place at one."""


@dataclass(frozen=True, eq=False)
class Splice:
    """One edit of a run: the sites that are read, what is made of them, and the site where it is put in place."""

    reads: tuple[Site, ...]
    write: Site
    edit: Edit


@dataclass(frozen=True, eq=False)
class Losses:
    """names: what was put in place, with mean and zero ablation among them. totals: [group, column]: tokens, the clean
    cross-entropy, then cross-entropy and KL divergence of each, summed over the tokens.
    """

    names: tuple[str, ...]
    totals: Floats

    @property
    def n_tokens(self) -> int:
        """Tokens whose predictions were measured."""
        return round(float(self.totals[:, 0].sum()))

    def figures(self, name: str, seed: int = 0) -> dict[str, Figure]:
        """The figures of one of them, by the names of `WORDS`.

        Shares of an ablation's harm are left out where that harm may be none: its interval touches zero (with too few
        groups to resample, that of a t test over them). What remains are the differences themselves.
        """
        ce, kl = self._columns(name)
        mean_ce, mean_kl = self._columns(MEAN)
        zero_ce, zero_kl = self._columns(ZERO)
        statistics: dict[str, Statistic] = {
            "ce_clean": _per_token(1),
            "ce": _per_token(ce),
            "ce_increase": _per_token(ce, 1),
            "ce_increase_mean": _per_token(mean_ce, 1),
            "ce_increase_zero": _per_token(zero_ce, 1),
            "kl": _per_token(kl),
            "kl_mean": _per_token(mean_kl),
            "kl_zero": _per_token(zero_kl),
            "loss_recovered": _recovered(ce, zero_ce, 1),
            "loss_recovered_mean": _recovered(ce, mean_ce, 1),
            "kl_recovered": _recovered(kl, zero_kl),
            "kl_recovered_mean": _recovered(kl, mean_kl),
        }
        cost = {"tokens": self.n_tokens}
        found: dict[str, Figure] = {}
        for key, statistic in statistics.items():
            if key in SHARE_OF and not _harms(found.get(SHARE_OF[key])):
                continue
            one = figure(key, self.totals, statistic, seed, cost)
            if one is not None:
                found[key] = one
        return found

    def _columns(self, name: str) -> tuple[int, int]:
        at = 2 + 2 * self.names.index(name)
        return at, at + 1


def _harms(harm: Figure | None) -> bool:
    """Whether an ablation does harm, so that shares of it mean something."""
    if harm is None:
        return False
    if harm.low is not None:
        return harm.low > 0
    values = harm.measurement.values
    return len(values) > 1 and clustered_t(values).low > 0


def _per_token(column: int, less: int | None = None) -> Statistic:
    return lambda totals: (totals[..., column] - (0.0 if less is None else totals[..., less])) / totals[..., 0]


def _recovered(column: int, worst: int, clean: int | None = None) -> Statistic:
    """(worst - this) / (worst - clean), with a clean value of 0 by default."""

    def statistic(totals: Floats) -> Floats:
        best = 0.0 if clean is None else totals[..., clean]
        found: Floats = (totals[..., worst] - totals[..., column]) / (totals[..., worst] - best)
        return found

    return statistic


@torch.no_grad()
def losses_of(
    model: Model,
    reads: tuple[Site, ...],
    write: Site,
    contexts: Sequence[Context],
    groups: Sequence[int],
    reconstructors: Sequence[Reconstructor],
    mean: Float[Tensor, " width"],
    batch_tokens: int,
    sink: Sink,
) -> Losses:
    """Losses of every reconstructor, and of both ablations, over the contexts, at the tokens that have rows.

    Only there are activations replaced: at the others (the first position, special tokens, outliers) the dictionary was
    never trained. Only predictions made from there count. reads, write: sites that are read, and the one that is
    replaced. groups: one per context. mean: at the replaced site.
    """
    splices = {one.name: Splice(reads, write, _reconstruction(one)) for one in reconstructors}
    constants = {MEAN: mean, ZERO: torch.zeros_like(mean)}
    splices |= {name: Splice((write,), write, _constant(vector)) for name, vector in constants.items()}
    totals = np.zeros((max(groups) + 1, 2 + 2 * len(splices)))
    batches = list(_batches(contexts, batch_tokens))
    with computing():
        began = time.monotonic()
        for number, rows in enumerate(track(batches, "splice", sink=sink)):
            found = _batch(model, [contexts[row] for row in rows], list(splices.values()))
            np.add.at(totals, [groups[row] for row in rows], found)
            if number == 0:
                sink(Event("note", "splice", message=_cost(len(batches), len(splices), time.monotonic() - began)))
    return Losses(tuple(splices), totals)


def _cost(batches: int, splices: int, seconds: float) -> str:
    """What the batches take, from the first of them: one clean pass and one per splice each."""
    cost = Estimate(seconds * batches, forwards=batches * (1 + splices), memory_bytes=most_resident())
    return f"in the model: {cost.describe()}"


def _batches(contexts: Sequence[Context], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of contexts that are run together: those of similar length, so that little is padding."""
    # Short ones first, so that a batch is padded to the longest of its own.
    order = sorted(range(len(contexts)), key=lambda row: len(contexts[row].ids))
    starts, longest = [0], 0
    for number, row in enumerate(order):
        longest = max(longest, len(contexts[row].ids))
        if number > starts[-1] and longest * (number - starts[-1] + 1) > batch_tokens:
            starts.append(number)
            longest = len(contexts[row].ids)
    return (order[first:last] for first, last in pairwise([*starts, len(order)]))


def _batch(model: Model, contexts: Sequence[Context], splices: Sequence[Splice]) -> Floats:
    """[context, column] of contexts run together."""
    tokens = Tokens.from_rows([context.ids.tolist() for context in contexts])
    kept = torch.zeros(tokens.ids.shape, dtype=torch.bool)
    for row, context in enumerate(contexts):
        kept[row, : len(context.ids)] = torch.from_numpy(context.kept)
    # The last token of a context predicts nothing that is known.
    counted = kept & torch.nn.functional.pad(tokens.real[:, 1:], (0, 1))
    owner, at = counted.nonzero(as_tuple=True)
    following = tokens.ids[owner, at + 1]
    # By the same code as the edited passes, so that the difference of an edit that changes nothing is 0.
    clean = _log_probs(model, tokens, counted, [])
    values = [torch.ones(len(owner), dtype=torch.float64), _cross_entropy(clean, following)]
    for splice in splices:
        replaced = Replace(list(splice.reads), splice.write, fn=splice.edit, ref="quality", positions=kept)
        found = _log_probs(model, tokens, counted, [replaced])
        values += [_cross_entropy(found, following), (clean.exp() * (clean - found)).sum(1).double().cpu()]
    totals = torch.zeros(len(contexts), len(values), dtype=torch.float64)
    totals.index_add_(0, owner, torch.stack(values, 1))
    return totals.numpy()


def _log_probs(model: Model, tokens: Tokens, counted: Tensor, edits: Sequence[Replace]) -> Float[Tensor, "token vocab"]:
    """Of the tokens that count."""
    logits = model.run(tokens, interventions=edits).logits
    return wide(logits[counted.to(logits.device)]).log_softmax(-1)


def _cross_entropy(
    log_probs: Float[Tensor, "token vocab"], following: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    return -log_probs.gather(1, following[:, None].to(log_probs.device))[:, 0].double().cpu()


def _reconstruction(reconstructor: Reconstructor) -> Edit:
    """From the values read at the sites, heads side by side, to their reconstruction."""

    def fn(*read: Tensor) -> Tensor:
        rows = [tensor.flatten(0, 1).flatten(1) for tensor in read]
        (out,) = reconstructor.reconstruct(rows).outputs
        return out.reshape(read[0].shape) if out.shape == rows[0].shape else out.reshape(*read[0].shape[:2], -1)

    return fn


def _constant(vector: Tensor) -> Edit:
    """The same vector at every token; read at the site that is written."""
    return lambda read: vector.to(read).expand(*read.shape[:2], -1).reshape(read.shape)
