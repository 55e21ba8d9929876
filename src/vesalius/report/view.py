"""What the templates of a study's page draw: the summary, and geometry made from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vesalius.report import words
from vesalius.report.attention_picture import SHORT, Picture, opening, picture
from vesalius.report.circuit_drawing import Drawing, draw, role_colours
from vesalius.report.claim_schema import VERDICTS
from vesalius.report.distributions import against_random, drawable, main_claims, spread
from vesalius.report.forest import Forest, forest, forests, shared_scale
from vesalius.report.heatmap import heatmaps
from vesalius.report.words import NO_ROLE

EFFECT_UNIT = "share of the total effect"
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class ClaimRow:
    """A claim in its table. number: its place in the page's addresses (#claim-3, #prompts-3).

    part: number of the circuit's part that it is about, if it is about one. drawn: whether its prompts are drawn.
    """

    claim: Fields
    number: int
    forest: Forest
    part: int | None
    drawn: bool


@dataclass(frozen=True)
class MemberRow:
    """A part of the circuit in its table, largest effect first. number: its place in the page's addresses (#part-3)."""

    member: Fields
    number: int
    forest: Forest
    claims: tuple[ClaimRow, ...]
    colour: int | None
    drawn: bool


def view(summary: Fields) -> dict[str, Any]:
    """Everything the templates draw: the summary `s`, and geometry made from it."""
    effects, circuit = summary["effects"], summary["circuit"]
    numbers = part_numbers(circuit)
    claims = _claim_rows(summary["claims"], numbers)
    return {
        "s": summary,
        "verdicts": words.VERDICTS,
        "counts": {name: sum(row.claim["verdict"] == name for row in claims) for name in VERDICTS},
        "prompts": _prompts(summary["question"]),
        "templates": _numbered(summary["gate"]["templates"]),
        "claims": claims,
        "on_control": _claim_rows(summary["trained_claims_on_control"] or (), {}),
        "parts": numbers,
        "effect_unit": EFFECT_UNIT if effects is None else effects["unit"],
        **_effects_view(summary),
        **_circuit_view(summary, numbers, claims),
        **_attention_view(summary["attention"]),
        "random_best": _random_best(circuit),
        **_spreads(summary, claims),
    }


def part_numbers(circuit: Fields | None) -> dict[str, int]:
    """The number of every part of the circuit, by size of effect."""
    members = [] if circuit is None else circuit["members"]
    # Numbers and not names in the addresses: a name may hold any text, and two may differ in case only.
    ordered = sorted(members, key=lambda member: -abs(member["effect"]["estimate"] or 0.0))
    return {member["component"]: number for number, member in enumerate(ordered, start=1)}


def _claim_rows(claims: Sequence[Fields], numbers: Mapping[str, int]) -> list[ClaimRow]:
    ordered = sorted(claims, key=lambda claim: VERDICTS.index(claim["verdict"]))
    drawn = {claim["id"] for claim in drawable(ordered)}
    return [
        ClaimRow(claim, number, shape, numbers.get(claim["component"] or ""), claim["id"] in drawn)
        for number, (claim, shape) in enumerate(zip(ordered, forests(ordered), strict=True), start=1)
    ]


def _prompts(question: Fields) -> list[tuple[str, list[tuple[str, bool]]]]:
    prompts = question["prompts"]
    return [
        (name, words.words_changed(prompts["clean"], prompts[name])) for name in ("clean", *question["corruptions"])
    ]


def _numbered(templates: Sequence[Fields]) -> list[tuple[int, Fields]]:
    return list(enumerate(templates, start=1))


def _effects_view(summary: Fields) -> dict[str, Any]:
    effects = summary["effects"]
    if effects is None or not effects["components"]:
        return {"maps": [], "ranked": []}
    circuit = summary["circuit"]
    members = [] if circuit is None else [member["component"] for member in circuit["members"]]
    maps = heatmaps(effects, members)
    # One scale over all conditions, so that switching between them moves the points and not the axis.
    scale = shared_scale([row.effect for found in maps for row in found.ranking])
    ranked = [[(row, forest(row.effect, scale)) for row in found.ranking] for found in maps]
    roles = {} if circuit is None else {member["component"]: member["role"] for member in circuit["members"]}
    return {"maps": maps, "ranked": ranked, "roles": roles}


def _circuit_view(summary: Fields, numbers: Mapping[str, int], claims: Sequence[ClaimRow]) -> dict[str, Any]:
    circuit, effects = summary["circuit"], summary["effects"]
    if circuit is None or not circuit["members"]:
        return {"drawing": None, "with_role": [], "without_role": [], "against": []}
    by_id = {row.claim["id"]: row for row in claims}
    members = sorted(circuit["members"], key=lambda member: numbers[member["component"]])
    scale = shared_scale([member["effect"] for member in members])
    drawing = _drawing(circuit, effects, numbers)
    colours, drawn = role_colours(members), {node.number for node in drawing.nodes}
    rows = [
        MemberRow(
            member,
            number,
            forest(member["effect"], scale),
            tuple(by_id[name] for name in member["claims"]),
            colours[member["role"]],
            number in drawn,
        )
        for number, member in enumerate(members, start=1)
    ]
    return {
        "drawing": drawing,
        "with_role": [row for row in rows if row.member["role"] != NO_ROLE],
        "without_role": [row for row in rows if row.member["role"] == NO_ROLE],
        "against": against_random(circuit),
    }


def _drawing(circuit: Fields, effects: Fields | None, numbers: Mapping[str, int]) -> Drawing:
    """In the heatmap's colours, so that a part looks alike in both."""
    sizes = [abs(member["effect"]["estimate"] or 0.0) for member in circuit["members"]]
    if effects is not None:
        sizes += [abs(value) for found in effects["conditions"] for value in found["mean"] if value is not None]
    return draw(circuit, numbers, EFFECT_UNIT if effects is None else effects["unit"], max(sizes) or 1.0)


def _attention_view(heads: Sequence[Fields]) -> dict[str, Any]:
    """Pictures by prompt, so that one prompt's can be shown without the others'."""
    prompts: Sequence[Fields] = heads[0]["prompts"] if heads else ()
    pictures: list[list[Picture]] = [
        [picture(head, head["prompts"][index]) for head in heads] for index in range(len(prompts))
    ]
    openings = [opening(prompt["tokens"]) for prompt in prompts]
    return {
        "pictures": list(zip(openings, pictures, strict=True)),
        "short_pictures": all(len(prompt["tokens"]) <= SHORT for prompt in prompts),
    }


def _random_best(circuit: Fields | None) -> float | None:
    """The largest median of random sets over the ablations: the fairest single number to read the circuit against."""
    drawn = [entry["random"] for entry in circuit["faithfulness"] if entry["random"]] if circuit else []
    return max((found["median"] for found in drawn if found["median"] is not None), default=None)


def _spreads(summary: Fields, claims: Sequence[ClaimRow]) -> dict[str, Any]:
    """Every claim's examples: those of the main claims, and the rest, which the page folds."""
    numbers = {entry["template"]: i for i, entry in enumerate(summary["gate"]["templates"], start=1)}
    order = [claim["id"] for claim in main_claims(summary["claims"])]
    rows = {row.claim["id"]: row for row in claims if row.drawn}
    main = [(rows[name], spread(rows[name].claim, numbers)) for name in order]
    rest = [(row, spread(row.claim, numbers)) for name, row in rows.items() if name not in order]
    return {"spreads": main, "other_spreads": rest}
