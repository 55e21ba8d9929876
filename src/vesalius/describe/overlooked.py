"""What you did not look for: parts that matter to the model and that nothing said about them explains.

Descriptions start from what is easy to describe. So parts are also ranked by what the model loses without them: for all
of them at once by one gradient of the next-token loss, and for the strongest exactly, by ablating each in a run of its
own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Corpus
from vesalius.metric import next_token_loss_of
from vesalius.parts import Part, places
from vesalius.quantities import Runs
from vesalius.quantities.activation import token_values
from vesalius.quantities.rule_effects import loss
from vesalius.quantities.values import PartValues
from vesalius.site import Site
from vesalius.stats import Measurement, measure

TEXTS_TOGETHER = 4


@dataclass(frozen=True, eq=False)
class Overlooked:
    """Parts without an explanation, the one that costs most first.

    estimates: [part] of all parts that were given, mean loss (nats a token) that ablation costs by the gradient. parts
    and costs: the strongest without an explanation, measured; negative where the model does better without the part. An
    estimate is a straight line, and where the loss bends it may even have the other sign: only costs are results.
    agreement: correlation of estimate and measurement over these.
    """

    given: tuple[Part, ...]
    estimates: Float[Tensor, " part"]
    parts: tuple[Part, ...]
    costs: tuple[Measurement, ...]

    @property
    def agreement(self) -> float:
        """Correlation of the estimates with what was measured; NaN for fewer than three parts."""
        if len(self.parts) < 3:
            return float("nan")
        number = {part: row for row, part in enumerate(self.given)}
        pairs = torch.stack([
            torch.tensor([float(self.estimates[number[part]]) for part in self.parts]),
            torch.tensor([cost.estimate for cost in self.costs]),
        ])  # fmt: skip
        return float(torch.corrcoef(pairs)[0, 1])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(str(part))}</td><td>{cost.estimate:+.2g}</td><td>{_interval(cost)}</td></tr>"
            for part, cost in zip(self.parts, self.costs, strict=True)
        )
        heads = "<tr><th>part</th><th>loss without it, nats a token</th><th>95 % interval</th></tr>"
        return f"<table><caption>Without an explanation</caption>{heads}{rows}</table>"


def _interval(cost: Measurement) -> str:
    return "" if cost.low is None or cost.high is None else f"{cost.low:+.2g} to {cost.high:+.2g}"


def overlooked(runs: Runs, parts: Sequence[Part], explained: Collection[Part] = (), *, most: int = 10) -> Overlooked:
    """The parts that cost most next-token loss when they are put to rest, of those that are not explained.

    Rest is 0 for latents, which are silent then, and the part's mean on these texts for all others. most: how many are
    measured, each by a pass over the texts. Parts that write several sites are estimated by all of them. Raises
    InputError for runs that are not on texts and for a part that has no one number at each position.
    """
    if not isinstance(runs.data, Corpus):
        raise InputError("what is overlooked is looked for on texts; give vs.Runs(model, vs.Corpus(...))")
    chosen = PartValues(tuple(parts))
    rests = [0.0 if sparse else _mean(runs, part) for part, sparse in zip(chosen.parts, chosen.sparse, strict=True)]
    estimates = _estimated(runs, chosen.parts, rests)
    bare = [number for number, part in enumerate(chosen.parts) if part not in explained]
    strongest = sorted(bare, key=lambda number: -abs(float(estimates[number])))[:most]
    measured = [(number, _cost(runs, chosen.parts[number], rests[number])) for number in strongest]
    measured.sort(key=lambda one: -one[1].estimate)
    return Overlooked(
        chosen.parts,
        estimates,
        tuple(chosen.parts[number] for number, _ in measured),
        tuple(cost for _, cost in measured),
    )


def _mean(runs: Runs, part: Part) -> float:
    assert isinstance(runs.data, Corpus)
    return float(token_values(runs, [part])[0][runs.data.tokens.real].double().mean())


def _cost(runs: Runs, part: Part, rest: float) -> Measurement:
    assert isinstance(runs.data, Corpus)
    still = loss(runs, part, torch.full(runs.data.tokens.ids.shape, rest))
    return measure(
        str(part),
        (still - loss(runs, part, None)).numpy(),
        groups=runs.groups,
        clusters=runs.clusters,
        unit="nats per token",
    )


def _estimated(runs: Runs, parts: Sequence[Part], rests: Sequence[float]) -> Float[Tensor, " part"]:
    """First order: the gradient of each text's loss at what a part writes, times what putting it to rest changes."""
    assert isinstance(runs.data, Corpus)
    tokens, model = runs.data.tokens, runs.model
    model.check_evaluating()
    written = list(dict.fromkeys(site.whole for part in parts for site in part.writes))
    per_text = []
    for rows in torch.arange(len(tokens)).split(TEXTS_TOGETHER):
        some = tokens.take(rows)
        run = model.run(some, capture=list(places(parts)), grad=True)
        found = torch.autograd.grad(
            next_token_loss_of(run.logits, some).sum(), [run[site] for site in written], allow_unused=True
        )
        slopes = dict(zip(written, found, strict=True))
        at = {site: value.detach() for site, value in run.activations.items()}
        real = some.real.to(run.logits.device)
        with torch.no_grad():
            moved = [_moved(part, rest, at, slopes, real) for part, rest in zip(parts, rests, strict=True)]
        per_text.append(torch.stack(moved, 1))
    groups = torch.cat(per_text).double()
    return torch.tensor([runs.mean(column) for column in groups.T])


def _moved(
    part: Part, rest: float, at: Mapping[Site, Tensor], slopes: Mapping[Site, Tensor | None], real: Tensor
) -> Float[Tensor, " text"]:
    """What each text's loss changes by, to first order, when the part is put to rest."""
    value = torch.full_like(part.value(at), rest)
    total = torch.zeros(len(real))
    for site, changed in part.written(at, value).items():
        slope = slopes[site]
        if slope is not None:
            change = ((changed - at[site]) * slope).flatten(2).sum(2)
            total += (change * real).sum(1).float().cpu()
    return total
