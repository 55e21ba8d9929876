"""How much of what a circuit does its descriptions say: every member is replaced by what is said of it.

A member without a description, or with one that gives no value, becomes its mean over the discovery prompts; so does
every member where its description is silent. What is said is put on top of that mean:

    attends from a place to another   the value vector there, less its mean, times the attention of discovery
    writes onto the logit difference  the direct effect of discovery, along answer minus distractor, through the norm

Everything else in the model is left alone. 100 % is the model, 0 % the model with all members at their means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.describe.description import Description, Prediction
from vesalius.errors import InputError
from vesalius.intervention import Intervention, Patch, Replace
from vesalius.parts import Part, Unit
from vesalius.quantities import ATTENDS, DIRECT_EFFECT, Runs
from vesalius.quantities.attends import FIRST_QUERY
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.direct_effect import frozen
from vesalius.quantities.places import positions, present
from vesalius.site import Site
from vesalius.stats import Measurement, measure

TOGETHER = 8
"""Prompts that are run together."""
Made = Callable[[Tensor], Intervention]
"""From the rows that are run to an edit of them."""


def described(
    discovery: Runs, fresh: Runs, members: Sequence[Part], fits: Mapping[str, Description | None]
) -> Measurement:
    """The share of the effect of ablating all members that is kept where each does what its description says.

    discovery: where descriptions, means and sizes come from; fresh: where the share is measured. members: heads and
    MLPs; the embeddings are left alone. fits: name -> description, see `Descriptions`. Diagnostics tell how many
    members had a value from their description.

    Raises InputError for other members, and where ablating all of them does not change the metric.
    """
    parts = [part for part in members if part != EMBED and isinstance(part, Unit)]
    wrong = [part for part in members if not isinstance(part, Unit)]
    if wrong:
        raise InputError(f"descriptions are put in the place of heads and MLPs; {wrong[0]} is neither")
    mean = [_constant(discovery, fresh, part) for part in parts]
    spoken = {str(part): _said(discovery, fresh, part, fits.get(str(part))) for part in parts}
    said = [edit for part in parts for edit in spoken[str(part)]]
    told = [name for name, edits in spoken.items() if edits]
    others = [edit for edit, part in zip(mean, parts, strict=True) if str(part) not in told]
    clean, none, kept = (_metric(fresh, edits) for edits in ([], mean, [*others, *said]))
    whole = fresh.mean(clean - none)
    if abs(whole) < 1e-9:
        raise InputError("putting all members to their means does not change the metric, so there is no share of it")
    return measure(
        "described",
        ((kept - none) / whole).numpy(),
        groups=fresh.groups,
        clusters=fresh.clusters,
        unit="share",
        diagnostics={"members": len(parts), "with_a_value": len(told), "effect_of_ablating_all": whole},
    )


def _constant(discovery: Runs, fresh: Runs, part: Unit) -> Made:
    table = _table(discovery, part, fresh)
    return lambda rows: Patch(part, source=table.expand(len(rows), *table.shape[1:]))


def _metric(runs: Runs, edits: Sequence[Made]) -> Float[Tensor, " example"]:
    """The metric with edits, a few prompts after the other."""
    found, tokens = [], runs.pairs.tokens("clean")
    runs.model.check_evaluating()
    for rows in torch.arange(runs.n).split(TOGETHER):
        with torch.no_grad():
            logits = runs.model.run(tokens.take(rows), interventions=[edit(rows) for edit in edits]).logits
        found.append(runs.contrast.metric(logits, runs.pairs.subset(rows.tolist())).double().cpu())
    return torch.cat(found)


def _values(runs: Runs, part: Part) -> Tensor:
    """A part's clean values [example, pos, ...]."""
    return part.value(runs.run("clean", [part]))[: runs.n]


def _table(discovery: Runs, part: Part, fresh: Runs) -> Tensor:
    """[1, pos, ...] the mean over discovery prompts: of the first position, and of all later ones."""
    values, real = _values(discovery, part), discovery.pairs.real.clone()
    first = values[:, 0].mean(0)
    real[:, 0] = False
    later = values[real.to(values.device)].mean(0)
    table = later.expand(fresh.pairs.clean.shape[1], *later.shape).clone()
    table[0] = first
    return table[None]


def _said(discovery: Runs, fresh: Runs, part: Part, fit: Description | None) -> list[Made]:
    """What a description says a part's value is, given the rows that are run; [] where it says nothing of it."""
    if fit is None or not isinstance(part, Unit):
        return []
    looks = next((one for one in fit.predictions if one.quantity == ATTENDS.name), None)
    writes = next((one for one in fit.predictions if one.quantity == DIRECT_EFFECT.name), None)
    if looks is not None and _speaks(discovery, fresh, looks):
        return [_attending(discovery, fresh, part, looks)]
    if writes is not None and writes.size is not None:
        return [_writing(discovery, fresh, part, writes)]
    return []


def _speaks(discovery: Runs, fresh: Runs, looks: Prediction) -> bool:
    """Whether a head's value follows from where it looks, on these prompts."""
    query, key = str(looks.parameters["query"]), str(looks.parameters["key"])
    if query == "every":
        return key == "previous"
    # A rest on the first position moves nothing that differs between prompts.
    return key not in ("others", "first") and all(present(runs, query, key) for runs in (discovery, fresh))


def _attending(discovery: Runs, fresh: Runs, part: Unit, looks: Prediction) -> Made:
    """The head's mean, and on top what it reads where it is said to look."""
    site, layout = part.site, discovery.model.architecture[1]
    assert site.layer is not None and site.index is not None
    value = Unit(Site("v", site.layer, site.index * layout.n_kv_heads // layout.n_heads))
    query, key = str(looks.parameters["query"]), str(looks.parameters["key"])
    table, seen, own = _table(discovery, part, fresh)[0], _values(discovery, value), _values(discovery, part)
    if query == "every":
        real = discovery.pairs.real.clone()
        real[:, 0] = False
        usual = seen[real.to(seen.device)].mean(0)

        def everywhere(read: Tensor) -> Tensor:
            moved = looks.mean * (read.roll(1, 1) - usual)
            moved[:, :FIRST_QUERY] = 0.0
            return table.to(read) + moved

        return lambda _rows: Replace(value, part, everywhere, f"described {part}")
    rows = torch.arange(discovery.n)
    usual = seen[rows, positions(discovery, key)].mean(0)
    there = own[rows, positions(discovery, query)].mean(0)
    at, looked = positions(fresh, query), positions(fresh, key)

    def of(some: Tensor) -> Intervention:
        def at_the_place(read: Tensor) -> Tensor:
            numbers = torch.arange(len(read))
            made = table.to(read).expand(len(read), *table.shape).clone()
            made[numbers, at[some]] = there.to(read) + looks.mean * (read[numbers, looked[some]] - usual.to(read))
            return made[:, : read.shape[1]]

        return Replace(value, part, at_the_place, f"described {part}")

    return of


def _writing(discovery: Runs, fresh: Runs, part: Unit, writes: Prediction) -> Made:
    """The part's mean, and at the end what it takes to write the effect of discovery onto the logit difference."""
    rows = torch.arange(discovery.n)
    there = _values(discovery, part)[rows, discovery.pairs.at].mean(0)
    towards = _towards(fresh, part)
    size = writes.mean / towards.square().sum(-1, keepdim=True).clamp_min(1e-12)
    table = _table(discovery, part, fresh)[0]
    made = table.expand(fresh.n, *table.shape).clone()
    made[torch.arange(fresh.n), fresh.pairs.at] = there + size * towards
    return lambda some: Patch(part, source=made[some])


def _towards(runs: Runs, part: Unit) -> Float[Tensor, "example d"]:
    """How the logit difference grows with a part's value at the read position, the final norm frozen."""
    slope = frozen(runs, "clean").direction
    if part.site.kind != "z":
        return slope
    assert part.site.layer is not None and part.site.index is not None
    return slope @ runs.model.W_O(part.site.layer)[part.site.index].to(slope).T
