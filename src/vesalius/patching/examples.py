"""What the examples of scores are: tokens, named positions, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Int
from torch import Tensor

from vesalius.inputs import Pairs
from vesalius.inputs.beginning import speller
from vesalius.model import Model

# Prompts of one shape are equally long, are read at one position, name the same positions, and share these groups.
_ALIKE = ("template",)


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of scores: their tokens as text, named positions, groups, and which of them share a shape.

    texts: one tuple of tokens per example; () where there is no tokenizer. shape: [example] number of its shape.
    """

    texts: tuple[tuple[str, ...], ...] = ()
    named_positions: Mapping[str, Int[Tensor, " example"]] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clusters: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Model, pairs: Pairs, which: str) -> Examples:
        """Of the clean or corrupted prompts of pairs; images have no tokens, and all of them one shape."""
        if pairs.raw:
            return cls(groups=pairs.groups, clusters=pairs.clusters, shape=(0,) * len(pairs))
        named = {name: at for name, at in pairs.named_positions.items() if at.ndim == 1}
        alike = [pairs.size.tolist(), pairs.at.tolist(), *(at.tolist() for at in named.values())]
        keys = list(zip(*alike, *(pairs.groups[kind] for kind in _ALIKE if kind in pairs.groups), strict=True))
        number = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        texts: tuple[tuple[str, ...], ...] = ()
        if model.tokenizer is not None:
            ids = getattr(pairs, which)
            rows, spell = zip(ids.tolist(), pairs.size.tolist(), strict=True), speller(model.tokenizer)
            texts = tuple(tuple(map(spell, row[:size])) for row, size in rows)
        return cls(texts, named, pairs.groups, pairs.clusters, tuple(number[key] for key in keys))

    def take(self, rows: Sequence[int]) -> Examples:
        """Of some of the examples."""
        pick = lambda labels: tuple(labels[row] for row in rows) if labels else ()  # noqa: E731
        return replace(
            self,
            texts=pick(self.texts),
            shape=pick(self.shape),
            named_positions={name: at[list(rows)] for name, at in self.named_positions.items()},
            groups={kind: pick(labels) for kind, labels in self.groups.items()},
        )
