"""Example: a token in its surroundings; and the examples of one part, as they are read and drawn."""

from __future__ import annotations

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
        top = max((value for value in self.values if value == value), default=0.0)
        cells = "".join(_tinted(token, value, top) for token, value in zip(self.tokens, self.values, strict=True))
        return f"<p><b>{self.value:.3g}</b> {cells}</p>"


def _tinted(token: str, value: float, top: float) -> str:
    share = max(value, 0.0) / top if top > 0 and value == value else 0.0
    return f"<span style='background:rgba(255,140,0,{0.7 * share:.2f})' title='{value:.3g}'>{escape(token)}</span>"


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
        bands = [("strongest", self.top[:8]), *((f"{q}th percentile", self._around(q / 100)) for q in (90, 50, 10))]
        shown = "".join(f"<h4>{name}</h4>{''.join(e._repr_html_() for e in some)}" for name, some in bands)
        near = "".join(example._repr_html_() for example in self.near[:4])
        return (
            f"<h3>{escape(str(self.part))}</h3><p>fires on {self.density:.2%} of tokens</p>{shown}"
            f"<h4>the same tokens, where it does not fire</h4>{near}"
        )

    def _around(self, quantile: float) -> tuple[Example, ...]:
        at = round((1 - quantile) * len(self.sample))
        return self.sample[max(at - 2, 0) : at + 2]
