"""What an agent, or any network of rows, represents, and whether it uses it: one verdict in words for each label.

The direction of a label at a site is that of Fisher's linear discriminant, on discovery: where a goal and a hazard
tend to be on the same side, the plain difference of class means of one holds some of the other. That it carries the
label and that it is used are claims, tested on rows of their own, as in the study of a concept
(`vesalius.studies.probing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.describe import claim_about
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.inputs import Table
from vesalius.inputs.table import DISCOVERY, VALIDATION
from vesalius.model import Model
from vesalius.parts import Unit
from vesalius.protocol import Claim, Verdict
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import CARRIES, MOVES, Runs
from vesalius.site import Site
from vesalius.studies.probing import LEAST_AUROC, concluded
from vesalius.validate import check

RIDGE = 0.001
"""Of the mean variance, what is added to every variance: rows are few."""
LEAST_SHARE = 0.1
"""Of what exchanging everything does, what a direction has to do to be used. A direction is estimated, and holds a
little of what goes along with its label, so that less would be found for labels that nothing reads."""
Answers = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True, eq=False)
class Represented:
    """said: used; present, not used; not there; can't tell. direction: where it was looked for."""

    label: str
    value: str
    said: str
    direction: Direction
    carries: Verdict
    moves: Verdict


def represented(
    model: Model,
    table: Table,
    site: Site | str,
    labels: Mapping[str, str],
    ledger: Ledger,
    *,
    answers: Mapping[str, Answers] | None = None,
    study: str = "represented",
    seed: int = 0,
) -> dict[str, Represented]:
    """For each label of a table whether a network carries it at a site, and whether it uses it.

    labels: name -> the value that is told from the others, {"goal": "left"}. answers: of a label, the outputs that
    speak for the value and against it, such as actions; without, any change of the output counts. The claims are sealed
    together before the validation rows are opened. Raises InputError for a table without these splits, and for a site
    at which nothing changes the output.
    """
    seen = ledger.open(table, DISCOVERY)
    runs = Runs(model, seen, seed=seed)
    where, n = Site.parse(site), table.splits.count(VALIDATION)
    values = Unit(where).read(model.run(seen.values.float(), capture=where.whole)[where.whole])
    directions, claims = {}, []
    for label, value in labels.items():
        some = torch.tensor([one == value for one in seen.label(label)])
        if not bool(some.any()) or bool(some.all()):
            raise InputError(f"{int(some.sum())} of {len(some)} rows have {label} {value!r}; both kinds are needed")
        directions[label] = Direction(where, discriminant(values, some), label)
        claims += _claims(runs, directions[label], label, value, (answers or {}).get(label), n, study)
    family = ledger.register(claims, study=study)
    fresh = Runs(model, ledger.open(table, VALIDATION), seed=seed)
    for claim in family.claims:
        ledger.append(check(claim, runs=fresh))
    verdicts = ledger.verdicts(family)
    pairs = zip(labels.items(), verdicts[::2], verdicts[1::2], strict=True)
    return {
        label: Represented(label, value, concluded(carries, moves), directions[label], carries, moves)
        for (label, value), carries, moves in pairs
    }


def discriminant(values: Float[Tensor, "row width"], some: Bool[Tensor, " row"]) -> Float[Tensor, " width"]:
    """Fisher's linear discriminant: the difference of class means, by the covariance within the classes."""
    one, other = values[some].double(), values[~some].double()
    rows = torch.cat([one - one.mean(0), other - other.mean(0)])
    covariance = rows.T @ rows / len(rows)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    return torch.linalg.solve(covariance + ridge, one.mean(0) - other.mean(0)).to(values)


def _claims(
    runs: Runs, part: Direction, label: str, value: str, answers: Answers | None, n: int, study: str
) -> list[Claim]:
    given = {"label": label, "value": value}
    moved = given if answers is None else {**given, "answers": [list(side) for side in answers]}
    scale = abs(MOVES.scale_of(runs, part, moved) or 0.0)
    if not scale:
        raise InputError(f"exchanging everything at {part.site} changes nothing: nothing later reads it")
    return [
        claim_about(runs, part, CARRIES, given, size=LEAST_AUROC, n=n, study=study),
        claim_about(runs, part, MOVES, moved, size=LEAST_SHARE * scale, n=n, study=study),
    ]
