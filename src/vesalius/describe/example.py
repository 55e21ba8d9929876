"""Example: a token in its surroundings; and the examples of one part, as they are read and drawn."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.describe.collecting import BINS, LOWEST, PER_OCTAVE
from vesalius.parts import Part


@dataclass(frozen=True, eq=False)
class Example:
    """A token, with its surroundings. at: its place among `tokens`; values: the part's, NaN where it has none."""

    value: float
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    values: tuple[float, ...]
    at: int
    document: int
    offset: int
    """Number of the token in its document."""

    @property
    def token(self) -> str:
        return self.tokens[self.at]

    def _repr_html_(self) -> str:
        return self.html(max((value for value in self.values if value == value), default=0.0))

    def html(self, top: float) -> str:
        """Its tokens, the stronger the darker; top: the value that is darkest."""
        values = self.values or (math.nan,) * len(self.tokens)
        cells = "".join(
            _tinted(token, value, top, number == self.at)
            for number, (token, value) in enumerate(zip(self.tokens, values, strict=True))
        )
        where = f"document {self.document}, token {self.offset}"
        return f"<p title='{where}'><b>{self.value:.3g}</b> {cells}</p>"


def _tinted(token: str, value: float, top: float, here: bool) -> str:
    share = min(max(value, 0.0) / top, 1.0) if top > 0 and value == value else 0.0
    title = f" title='{value:.3g}'" if value == value else ""
    line = ";text-decoration:underline" if here else ""
    drawn = escape(token).replace("\n", "⏎")
    return f"<span style='background:rgba(255,140,0,{0.7 * share:.2f}){line}'{title}>{drawn}</span>"


@dataclass(frozen=True, eq=False)
class PartExamples:
    """What one part was seen to do on some texts.

    density: share of tokens that it fires on. threshold: what it fires above. mean: of its values where it fires. top:
    the strongest, one of each context. sample: random ones among all that it fires on, strongest first. near: tokens
    that it has fired on elsewhere, where it does not fire; the most like its strongest examples first. background:
    random tokens, whether it fires there or not.
    """

    part: Part
    density: float
    threshold: float
    mean: float
    top: tuple[Example, ...]
    sample: tuple[Example, ...]
    near: tuple[Example, ...]
    background: tuple[Example, ...]
    histogram: Int[Tensor, " bin"]

    def band(self, low: float, high: float) -> tuple[Example, ...]:
        """Of the random sample, those between two quantiles, such as `band(.25, .5)`."""
        last = len(self.sample)
        return self.sample[round((1 - high) * last) : round((1 - low) * last)]

    @property
    def tokens(self) -> tuple[tuple[str, float], ...]:
        """Tokens that it fires on, each with its share of the random sample, the commonest first."""
        counts = Counter(example.token for example in self.sample)
        return tuple((token, count / len(self.sample)) for token, count in counts.most_common())

    @property
    def edges(self) -> Float[Tensor, " edge"]:
        """Of the histogram's bins; its first and its last also hold what lies beyond them."""
        return 2.0 ** (LOWEST + torch.arange(BINS + 1) / PER_OCTAVE)

    def _repr_html_(self) -> str:
        if not self.top:
            return f"<h3>{escape(str(self.part))}</h3><p>never fires on these texts</p>"
        top = self.top[0].value
        bands = [("strongest", self.top[:8]), *((f"{q}th percentile", self._around(q / 100)) for q in (90, 50, 10))]
        shown = "".join(f"<h4>{name}</h4>{''.join(e.html(top) for e in some)}" for name, some in bands)
        near = "".join(example.html(top) for example in self.near[:4])
        missed = f"<h4>the same tokens, where it does not fire</h4>{near}" if near else ""
        return (
            f"<h3>{escape(str(self.part))}</h3><p>fires on {self.density:.2%} of tokens, above {self.threshold:.3g}</p>"
            f"{self._drawn()}{shown}{missed}"
        )

    def _drawn(self) -> str:
        """Its activations, by size (in powers of two, four bins each), as a picture."""
        used = self.histogram.nonzero()[:, 0].tolist()
        if not used:
            return ""
        first, counts = used[0], self.histogram[used[0] : used[-1] + 1].tolist()
        step, most, edges = 480 / max(len(counts), 12), max(counts), self.edges.tolist()
        bars = "".join(
            f"<rect x='{number * step:.1f}' y='{100 - 96 * count / most:.1f}' width='{step - 1:.1f}' "
            f"height='{96 * count / most:.1f}' fill='#1560a8' opacity='.75'><title>{count:,} tokens from "
            f"{edges[first + number]:.3g} to {edges[first + number + 1]:.3g}</title></rect>"
            for number, count in enumerate(counts)
        )
        at = sorted({0, len(counts) // 2, len(counts)})
        ticks = "".join(
            f"<text x='{number * step:.1f}' y='116' font-size='11'>{edges[first + number]:.3g}</text>" for number in at
        )
        return (
            "<svg viewBox='0 0 520 122' width='520' style='max-width:100%;fill:currentColor' role='img' "
            f"aria-label='histogram of its activations'>{bars}<line x1='0' x2='480' y1='100' y2='100' "
            f"stroke='currentColor'/>{ticks}</svg>"
        )

    def _around(self, quantile: float) -> tuple[Example, ...]:
        at = round((1 - quantile) * len(self.sample))
        return self.sample[max(at - 2, 0) : at + 2]
