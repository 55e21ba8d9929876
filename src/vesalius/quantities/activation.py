"""Activation: the value of a part on texts, or on the clean prompts of a contrast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.errors import UnknownNameError
from vesalius.inputs import Corpus, Tokens
from vesalius.jobs import track
from vesalius.model.products import computing
from vesalius.parts import Part
from vesalius.quantities.base import DEVIATION, Parameters, PerExample, Quantity, control_parts
from vesalius.quantities.places import positions
from vesalius.quantities.runs import Runs
from vesalius.quantities.values import PartValues

POOLED = ("max", "mean")
# Texts run together.
_TOGETHER = 16
Kept = dict[tuple[Part, str], PerExample]


class Activation(Quantity):
    """A part's value on each text or clean prompt: `at` "max" or "mean" over its tokens, or a named place.

    Of a corpus each text's first token is left out (see `counted`). Parts of several numbers (whole sites, subspaces,
    groups) have none. Raises PairsError where a prompt lacks the place.
    """

    name = "activation"
    kind = "predictive"
    scale = DEVIATION

    def unit(self, runs: Runs) -> str:
        return "activation"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return _measured(runs, [part], str(parameters.get("at", "max")))[part, str(parameters.get("at", "max"))]

    def prepare(self, runs: Runs, wanted: Sequence[tuple[Part, Parameters]]) -> None:
        """All parts in one pass over the texts."""
        by_place: dict[str, list[Part]] = {}
        for part, parameters in wanted:
            here = by_place.setdefault(str(parameters.get("at", "max")), [])
            here += [part, *control_parts(parameters.get("control", {}), part)]
        for at, parts in by_place.items():
            _measured(runs, parts, at)

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """Standard deviation over examples."""
        return float(self.measure(runs, part, parameters).std())


def _measured(runs: Runs, parts: Sequence[Part], at: str) -> Kept:
    kept: Kept = runs.once("activation", dict)
    missing = [part for part in dict.fromkeys(parts) if (part, at) not in kept]
    if missing:
        kept |= {(part, at): values for part, values in zip(missing, _values(runs, missing, at), strict=True)}
    return kept


def tokens_of(runs: Runs) -> Tokens:
    """The texts, or the clean prompts."""
    return runs.data.tokens if isinstance(runs.data, Corpus) else runs.tokens("clean")


def token_values(runs: Runs, parts: Sequence[Part]) -> list[Float[Tensor, "example pos"]]:
    """Every part's value at every token, 0 on padding, on the CPU, kept with the runs until `forget_values`."""
    kept: dict[Part, Tensor] = runs.once("token values", dict)
    missing = [part for part in dict.fromkeys(parts) if part not in kept]
    if missing:
        whole = torch.zeros(len(missing), *tokens_of(runs).ids.shape)
        for rows, values in _read(runs, missing):
            whole[:, rows, : values.shape[1]] = values.permute(2, 0, 1).cpu()
        kept |= dict(zip(missing, whole, strict=True))
    return [kept[part] for part in parts]


def forget_values(runs: Runs) -> None:
    """Drop what `token_values` keeps; it is read again when needed."""
    runs.once("token values", dict).clear()


def counted(runs: Runs) -> Bool[Tensor, "example pos"]:
    """Tokens that count: all but padding and, of a corpus, each text's first, unless it is the only one: in most models
    it is an outlier in norm, which `data.harvest` leaves out as well."""
    real = tokens_of(runs).real
    if not isinstance(runs.data, Corpus):
        return real
    later = real & (torch.arange(real.shape[1]) > 0)
    return later | (real & ~later.any(1, keepdim=True))


def _read(runs: Runs, parts: Sequence[Part]) -> Iterator[tuple[Int[Tensor, " example"], Tensor]]:
    """A few texts after the other, those of like length together, and every part's value [example, pos, part] there.

    One pass up to the last of the sites. Raises InputError for a part of several numbers.
    """
    tokens, values = tokens_of(runs), PartValues(tuple(parts))
    sites = sorted({site.whole for site in values.sites}, key=lambda site: site.order)
    chunks = tokens.lengths.argsort(descending=True, stable=True).split(_TOGETHER)
    for rows in track(chunks, f"read {len(parts)} parts", sink=runs.sink):
        some = tokens.take(rows, int(tokens.lengths[rows].max()))
        with computing():
            at = captured(runs.model, some, sites)
        with torch.no_grad():
            yield rows, values.at(at)


def _values(runs: Runs, parts: Sequence[Part], at: str) -> list[PerExample]:
    if at not in POOLED and isinstance(runs.data, Corpus):
        raise UnknownNameError("place to read an activation at", at, POOLED, "Texts have no named places.")
    where, real = None if at in POOLED else positions(runs, at), counted(runs)
    found = torch.zeros(len(parts), len(tokens_of(runs)))
    for rows, values in _read(runs, parts):
        if where is None:
            some = _pooled(values, real[rows, : values.shape[1]].to(values.device), at)
        else:
            some = values[torch.arange(len(rows)), where[rows]]
        found[:, rows] = some.T.cpu()
    return list(found)


def _pooled(
    values: Float[Tensor, "example pos part"], real: Bool[Tensor, "example pos"], at: str
) -> Float[Tensor, "example part"]:
    if at == "max":
        return values.masked_fill(~real[..., None], float("-inf")).amax(1)
    return (values * real[..., None]).sum(1) / real.sum(1, keepdim=True)


ACTIVATION = Activation()
