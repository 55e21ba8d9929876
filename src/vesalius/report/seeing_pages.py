"""Pages about networks that see, and about single inputs: explanations side by side, a channel, a search for curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vesalius import __version__
from vesalius.attribution import Explanation, Trials, agreement_between
from vesalius.images import Exciting, Foretold, Made, Scaling
from vesalius.images.pixels import data_address
from vesalius.jobs import write_atomic
from vesalius.report.html import HTML_NAME, JSON_NAME, environment
from vesalius.report.pixels import over, tuning_picture

INPUT_SCHEMA, CHANNEL_SCHEMA = "vesalius/explain-input/1", "vesalius/neuron/1"
SHOWN_CHANNELS, BARS = 24, 12


def summarise_input(
    explanations: Sequence[Explanation], trials: Sequence[Trials], *, model: str, command: str, seed: int
) -> dict[str, Any]:
    """Explanations of one question as plain data: shares, and how each stood its tests."""
    question = explanations[0].question
    return {
        "schema": INPUT_SCHEMA,
        "model": model,
        "kind": question.kind,
        "target": question.target,
        "value": question.value,
        "at_baseline": question.at_baseline,
        "baseline": question.baseline,
        "features": list(question.names),
        "explanations": [
            {**tried.to_json(), "signed": one.signed, "shares": one.shares.tolist()}
            for one, tried in zip(explanations, trials, strict=True)
        ],
        "agreement": agreement_between(explanations),
        "seed": seed,
        "command": command,
    }


def write_input(
    summary: Mapping[str, Any], explanations: Sequence[Explanation], folder: str | Path, scaling: Scaling | None = None
) -> Path:
    """Writes report.html and summary.json; scaling: how an image's values become pixels. Returns the page's path."""
    pictures = [_picture(one, scaling) for one in explanations]
    plain = None if scaling is None else data_address(scaling.bytes_of(explanations[0].question.x))
    bars = [_bars(one) for one in explanations]
    view = {"s": summary, "plain": plain, "pictures": pictures, "bars": bars, "version": __version__}
    return _write("input.html.j2", view, summary, folder)


def _picture(one: Explanation, scaling: Scaling | None) -> str | None:
    if scaling is None:
        return None
    shares = one.values.detach().double().cpu().sum(0).numpy()
    return data_address(over(scaling.bytes_of(one.question.x), shares))


def _bars(one: Explanation) -> list[dict[str, Any]]:
    """Of what is no image, the largest shares; of a text all, in its order."""
    if one.question.kind == "image":
        return []
    top = float(one.shares.abs().max()) or 1.0
    order = range(len(one)) if one.question.kind == "tokens" else one.shares.abs().argsort(descending=True)[:BARS]
    numbers = [int(number) for number in order]
    return [
        {"name": one.names[n], "share": float(one.shares[n]), "width": round(100 * abs(float(one.shares[n])) / top, 1)}
        for n in numbers
    ]


def summarise_channel(
    found: Exciting,
    *,
    sentence: str,
    rivals: Sequence[Mapping[str, Any]],
    made: Made | None,
    foretold: Foretold | None,
    effect: Mapping[str, Any] | None,
    model: str,
    command: str,
    seed: int,
) -> dict[str, Any]:
    """A channel as plain data. effect: what its ablation does, and the median of the map's other channels."""
    return {
        "schema": CHANNEL_SCHEMA,
        "model": model,
        "channel": str(found.channel),
        "ref": found.channel.ref,
        "images": len(found.pictures),
        "description": sentence,
        "rivals": [dict(one) for one in rivals],
        "made": None if made is None else {"sentence": made.sentence, "values": made.values.tolist(),
                                           "held_out": made.held_out.tolist(), "beats": made.beats},
        "foretold": None if foretold is None else vars(foretold),
        "effect": None if effect is None else dict(effect),
        "seen": [vars(one) for one in found.seen],
        "seed": seed,
        "command": command,
    }  # fmt: skip


def write_channel(
    summary: Mapping[str, Any], found: Exciting, made: Made | None, folder: str | Path, scaling: Scaling
) -> Path:
    """Writes report.html and summary.json of a channel; returns the path of the page."""
    rows = []
    for kind, words in (("top", "Most exciting"), ("quantile", "From quantiles"), ("near miss", "Near misses")):
        pictures = [
            {
                "src": data_address(scaling.bytes_of(found.pictures.values[one.number])),
                "crop": data_address(scaling.bytes_of(found.crop(one))),
                "name": one.name,
                "value": one.value,
            }
            for one in found.of(kind)
        ]
        rows.append({"words": words, "pictures": pictures})
    optima = [] if made is None else [data_address(scaling.bytes_of(image)) for image in made.images]
    view = {"s": summary, "rows": rows, "optima": optima, "version": __version__}
    return _write("channel.html.j2", view, summary, folder)


def write_curves(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Writes report.html and summary.json of a search for curve detectors; returns the path of the page."""
    shown = sorted(summary["channels"], key=lambda one: (one["verdict"] != "SUPPORTED", -one["score"]))
    cards = [
        {**one, "src": data_address(tuning_picture(np.array([*one["curves"], one["lines"]])))}
        for one in shown[:SHOWN_CHANNELS]
    ]
    view = {"s": summary, "cards": cards, "version": __version__}
    return _write("curves.html.j2", view, summary, folder)


def _write(template: str, view: Mapping[str, Any], summary: Mapping[str, Any], folder: str | Path) -> Path:
    page, target = environment().get_template(template).render(view), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)
