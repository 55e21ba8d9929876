"""What a steering experiment found: effects, random directions, price and text, by scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs.frames import data_frame
from vesalius.parts import Part
from vesalius.stats import Measurement, measure, rank_p
from vesalius.stats.arrays import Floats

if TYPE_CHECKING:
    import pandas

LIKELIEST = 8
"""Promoted and suppressed tokens that are kept."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """Effects by scale.

    effects: [scale, example], change of the metric; random: [random, scale, example], of random directions of the same
    norm. loss: [text], unsteered, nats per token; cost: [scale, text], what steering adds to it; random_cost: [random,
    scale, text]. promoted, suppressed: by scale, the tokens whose log-probability rises and falls most, in the mean
    over prompts. texts: by scale, what is written after each prompt. diagnostics: by scale, of the runs of prompts and
    of plain texts, how unnatural the steered values are.
    """

    part: Part
    scales: tuple[float, ...]
    metric: str
    unit: str
    base: Floats
    effects: Floats
    random: Floats
    loss: Floats
    cost: Floats
    random_cost: Floats
    promoted: tuple[tuple[str, ...], ...]
    suppressed: tuple[tuple[str, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    unsteered: tuple[str, ...]
    diagnostics: tuple[list[list[dict[str, float]]], ...]
    groups: Mapping[str, tuple[str, ...]]
    clusters: tuple[str, ...]
    instead: str = ""
    """What was put before each prompt to compare with. instead_effects: [example], what that changes, unsteered."""
    instead_effects: Floats | None = None
    instead_texts: tuple[str, ...] = ()

    @property
    def prompting(self) -> Measurement | None:
        """What asking does: change of the metric by `instead`; None where nothing was put there."""
        if self.instead_effects is None:
            return None
        name = f"effect of {self.instead!r} before the prompt on {self.metric}"
        return measure(name, self.instead_effects, groups=self.groups, clusters=self.clusters, unit=self.unit)

    def number(self, scale: float) -> int:
        """Where a scale is among `scales`. Raises UnknownNameError."""
        if scale not in self.scales:
            raise UnknownNameError("scale", str(scale), [f"{one:g}" for one in self.scales])
        return self.scales.index(scale)

    def effect(self, scale: float) -> Measurement:
        """Change of the metric: mean over examples with interval."""
        return self._measure(f"effect of {self.part} x {scale:g} on {self.metric}", self.effects, scale)

    def over_random(self, scale: float) -> Measurement:
        """Change of the metric less its mean over the random directions, example by example."""
        name = f"effect of {self.part} x {scale:g} beside random directions"
        return self._measure(name, self.effects - self.random.mean(0), scale)

    def _measure(self, name: str, values: Floats, scale: float) -> Measurement:
        number = self.number(scale)
        off = {"off_distribution": self.diagnostics[number][0]}
        return measure(
            name, values[number], groups=self.groups, clusters=self.clusters, unit=self.unit, diagnostics=off
        )

    def p_value(self, scale: float) -> float:
        """Rank of the mean effect's size among those of the random directions."""
        number = self.number(scale)
        return rank_p(abs(self.effects[number].mean()), np.abs(self.random[:, number].mean(-1)))

    def price(self, scale: float) -> Measurement:
        """What steering adds to the loss on plain text, nats per token: mean over texts with interval.

        Raises InputError when no plain texts were given.
        """
        if not len(self.loss):
            raise InputError("the price of steering needs plain texts: steer(..., plain=texts)")
        number = self.number(scale)
        off = {"off_distribution": self.diagnostics[number][1]}
        name = f"loss on plain text added by {self.part} x {scale:g}"
        return measure(name, self.cost[number], unit="nats per token", diagnostics=off)

    def perplexity_ratio(self, scale: float) -> float:
        """By what factor steering raises the perplexity on plain text. Raises as `price`."""
        return float(np.exp(self.price(scale).estimate))

    def to_frame(self) -> pandas.DataFrame:
        """One row per direction (`part`, `random 0` ...), scale and example: the effect.

        Raises InputError where pandas is not installed.
        """
        whole = np.concatenate([self.effects[None], self.random])
        return data_frame([
            {"direction": "part" if who == 0 else f"random {who - 1}", "scale": self.scales[scale], "example": example,
             "effect": float(whole[who, scale, example])}
            for who, scale, example in np.ndindex(*whole.shape)
        ])  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data: per scale the measurements with their values, and random directions' means."""
        return {
            "part": self.part.ref,
            "metric": self.metric,
            "unit": self.unit,
            "base": self.base.tolist(),
            "unsteered": list(self.unsteered),
            "plain_loss": self.loss.tolist(),
            "instead": self._instead_json(),
            "scales": [self._scale_json(number) for number in range(len(self.scales))],
        }

    def _instead_json(self) -> dict[str, Any] | None:
        asked = self.prompting
        return (
            None if asked is None else {"text": self.instead, "effect": asked.to_json(), "texts": [*self.instead_texts]}
        )

    def _scale_json(self, number: int) -> dict[str, Any]:
        scale, priced = self.scales[number], bool(len(self.loss))
        return {
            "scale": scale,
            "effect": self.effect(scale).to_json(),
            "over_random": self.over_random(scale).to_json(),
            "random_means": self.random[:, number].mean(-1).tolist(),
            "p_value": self.p_value(scale),
            "price": self.price(scale).to_json() if priced else None,
            "perplexity_ratio": self.perplexity_ratio(scale) if priced else None,
            "random_prices": self.random_cost[:, number].mean(-1).tolist() if priced else None,
            "promoted": list(self.promoted[number]),
            "suppressed": list(self.suppressed[number]),
            "texts": list(self.texts[number]),
            "off_distribution": self.diagnostics[number],
        }

    def __repr__(self) -> str:
        found = ", ".join(f"x {s:g}: {self.effects[n].mean():+.3g} (p {self.p_value(s):.2g})"
                          for n, s in enumerate(self.scales))  # fmt: skip
        return f"Steering({self.part}, {self.metric} in {self.unit}: {found})"

    def _repr_html_(self) -> str:
        """A table with a line per scale."""
        heads = ("scale", f"{self.metric} ({self.unit})", "random directions", "p", "perplexity on plain text",
                 "of random directions", "norm of what is edited", "rises", "falls")  # fmt: skip
        lines = "".join(self._line(number) for number in range(len(self.scales)))
        head = "".join(f"<th>{escape(name)}</th>" for name in heads)
        title = f"<caption>Steering by {escape(str(self.part))}: change of the metric</caption>"
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>{self._samples()}"

    def _line(self, number: int) -> str:
        scale, found = self.scales[number], self.effect(self.scales[number])
        means, priced = self.random[:, number].mean(-1), bool(len(self.loss))
        interval = "" if found.low is None else f" [{found.low:.3g}, {found.high:.3g}]"
        ratio = f"x {self.perplexity_ratio(scale):.2f}" if priced else "not measured"
        others = np.exp(self.random_cost[:, number].mean(-1)) if priced else np.zeros(1)
        norm = max(one["norm_ratio"] for one in self.diagnostics[number][0])
        cells = (
            f"{scale:g}", f"{found.estimate:.3g}{interval}", f"{means.min():.3g} to {means.max():.3g}",
            f"{self.p_value(scale):.2g}", ratio, f"x {others.min():.2f} to {others.max():.2f}" if priced else "",
            f"x {norm:.2f}", " ".join(map(repr, self.promoted[number])), " ".join(map(repr, self.suppressed[number])),
        )  # fmt: skip
        return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"

    def _samples(self) -> str:
        if not self.unsteered:
            return ""
        named = [
            ("unsteered", self.unsteered),
            *((f"x {s:g}", t) for s, t in zip(self.scales, self.texts, strict=True)),
        ]
        lines = "".join(
            f"<tr><th>{escape(name)}</th><td>{'<br>'.join(escape(text) for text in texts[:3])}</td></tr>"
            for name, texts in named
        )
        return f"<table><caption>What is written after the first prompts</caption><tbody>{lines}</tbody></table>"
