"""From a steering experiment to one HTML page: effect over scale beside random directions, its price, and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius import __version__
from vesalius.jobs import write_atomic
from vesalius.report.html import environment
from vesalius.report.scales import around
from vesalius.report.words import number

HTML_NAME, JSON_NAME = "steering.html", "steering.json"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 640.0, 300.0, 60.0, 20.0, 16.0, 250.0


@dataclass(frozen=True)
class Chart:
    """Pixels: line and whiskers of the part, dots of random directions; ticks as (pixel, label)."""

    line: str
    points: tuple[tuple[float, float, float | None, float | None, str], ...]
    dots: tuple[tuple[float, float], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    zero: float
    asked: float | None = None
    width: float = WIDTH
    height: float = HEIGHT
    start: float = LEFT
    end: float = WIDTH - RIGHT
    base: float = BASE


def render_steering(found: Mapping[str, Any], about: Mapping[str, str], command: str = "") -> str:
    """One self-contained HTML page. about: name -> what was steered, where, in words.

    found: `Steering.to_json()`; with `multiple` beside a `scale`, that is what is shown (a multiple of a vector); with
    `prompts`, they stand before what was written after them.
    """
    drawn = chart(found["scales"], found.get("instead"))
    view = {"s": found, "about": about, "answer": steering_answer(found), "chart": drawn, "command": command,
            "version": __version__}  # fmt: skip
    return environment().get_template("steering.html.j2").render(view)


def write_steering(found: Mapping[str, Any], about: Mapping[str, str], folder: str | Path, command: str = "") -> Path:
    """Writes steering.html and steering.json into the folder, each atomically; returns the path of the page."""
    page, target = render_steering(found, about, command), Path(folder)
    whole = {"about": dict(about), "version": __version__, **found}
    write_atomic(target / JSON_NAME, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


def steering_answer(found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences: one for each scale, and what asking does."""
    return [*(_sentence(one, found["metric"], found["unit"]) for one in found["scales"]), *_asking(found)]


def _asking(found: Mapping[str, Any]) -> list[str]:
    asked = found.get("instead")
    if asked is None:
        return []
    effect = asked["effect"]
    interval = "" if effect["low"] is None else f" [{number(effect['low'])}, {number(effect['high'])}]"
    words, change = asked["text"].strip(), number(effect["estimate"])
    return [f"Asked instead, “{words}” before the prompts: {change}{interval} {found['unit']}."]


def _sentence(one: Mapping[str, Any], metric: str, unit: str) -> str:
    effect = one["effect"]
    interval = "" if effect["low"] is None else f" [{number(effect['low'])}, {number(effect['high'])}]"
    beside = f"random directions {number(min(one['random_means']))} to {number(max(one['random_means']))}"
    price = "" if one["perplexity_ratio"] is None else f"; perplexity on plain text x {one['perplexity_ratio']:.2f}"
    said = f"{metric} {number(effect['estimate'])}{interval} {unit}, {beside}, p {one['p_value']:.2g}{price}"
    return f"x {_shown(one):g}: {said}."


def _shown(one: Mapping[str, Any]) -> float:
    found: float = one.get("multiple", one["scale"])
    return found


def chart(scales: Sequence[Mapping[str, Any]], instead: Mapping[str, Any] | None = None) -> Chart:
    """Mean effects over scale, with intervals and the random directions' means; and what asking does instead."""
    ordered = sorted(scales, key=_shown)
    x = around([_shown(one) for one in ordered], LEFT, WIDTH - RIGHT)
    effects = [one["effect"] for one in ordered]
    ends = [effect[name] for effect in effects for name in ("estimate", "low", "high")]
    asked = [] if instead is None else [instead["effect"]["estimate"]]
    y = around([*ends, *asked, *(value for one in ordered for value in one["random_means"])], BASE, TOP)
    place = lambda value: None if value is None else y(value)  # noqa: E731
    points = tuple(
        (x(_shown(one)), y(effect["estimate"]), place(effect["low"]), place(effect["high"]),
         f"x {_shown(one):g}: {number(effect['estimate'])}") for one, effect in zip(ordered, effects, strict=True)
    )  # fmt: skip
    return Chart(
        line="M" + " L".join(f"{px} {py}" for px, py, *_ in points),
        points=points,
        dots=tuple((x(_shown(one)), y(value)) for one in ordered for value in one["random_means"]),
        x_ticks=tuple((pixel, f"{value:g}") for pixel, value in x.ticks(6)),
        y_ticks=tuple((pixel, f"{value:.3g}".replace("-", "−")) for pixel, value in y.ticks(5)),
        zero=y(0.0),
        asked=y(asked[0]) if asked else None,
    )
