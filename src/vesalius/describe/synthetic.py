"""Synthetic texts: what a search for texts that make a part fire has found."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from vesalius.jobs.frames import data_frame
from vesalius.parts import Part
from vesalius.patching.plan import Cost

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Synthetic:
    """A text that was found. cross_entropy: mean of its tokens, in nats, after the token that texts begin with.

    survives: whether the tokenizer makes these tokens of the text, so that it can be typed; None without a tokenizer.
    """

    ids: tuple[int, ...]
    text: str
    value: float
    cross_entropy: float
    survives: bool | None


@dataclass(frozen=True, eq=False, repr=False)
class Synthesis:
    """front: the strongest first; no text is beaten in activation and in fluency by another that was run.

    corpus_max: the part's strongest activation on the corpus that it was compared with. history: the largest activation
    after each step.
    """

    part: Part
    front: tuple[Synthetic, ...]
    history: tuple[float, ...]
    corpus_max: float | None
    cost: Cost

    @property
    def best(self) -> Synthetic:
        """The strongest."""
        return self.front[0]

    @property
    def beats_corpus(self) -> bool | None:
        """Whether the strongest text is stronger than everything in the corpus; None where there was none."""
        return None if self.corpus_max is None else self.best.value > self.corpus_max

    @property
    def verdict(self) -> str:
        """What was reached, against the corpus."""
        if self.corpus_max is None:
            return f"reaches {self.best.value:.3g}; compared with no corpus"
        how = "beats" if self.beats_corpus else "does not beat"
        return f"reaches {self.best.value:.3g}, which {how} the corpus's maximum of {self.corpus_max:.3g}"

    def __repr__(self) -> str:
        return f"Synthesis({self.part}: {self.verdict}; {len(self.front)} texts)"

    def to_frame(self) -> pandas.DataFrame:
        """One row per text: text, value, cross_entropy, survives. Raises InputError where pandas is not installed."""
        names = ("text", "value", "cross_entropy", "survives")
        return data_frame([{name: getattr(one, name) for name in names} for one in self.front])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{one.value:.3g}</td><td>{one.cross_entropy:.2f}</td>"
            f"<td style='text-align:left'><code>{escape(one.text)}</code></td></tr>"
            for one in self.front
        )
        head = "<tr><th>activation</th><th>nats per token</th><th>text</th></tr>"
        return f"<h3>{escape(str(self.part))}</h3><p>{escape(self.verdict)}</p><table>{head}{rows}</table>"
