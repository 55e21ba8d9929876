"""Quality: everything that was measured of a dictionary, as one value."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vesalius import __version__
from vesalius.concepts import ConceptScores
from vesalius.dictionaries.evaluation.figures import WORDS, Figure
from vesalius.dictionaries.evaluation.geometry import Geometry, Shared
from vesalius.dictionaries.evaluation.totals import Floats

SCHEMA = "vesalius/quality/1"
BINS = 40
_SHOWN = ("fvu", "l0", "dead", "dense_10pct", "l2_ratio", "ce_increase", "loss_recovered", "loss_recovered_mean")


@dataclass(frozen=True, eq=False)
class Compared:
    """A baseline, or the same dictionary trained from another seed. words: what it is."""

    name: str
    words: str
    figures: Mapping[str, Figure]

    def to_json(self) -> dict[str, Any]:
        """name, words and figures."""
        return {"name": self.name, "words": self.words, "figures": _plain(self.figures)}


@dataclass(frozen=True, eq=False)
class Seed:
    """Another dictionary of the same kind: its own figures, and what it shares with the first."""

    compared: Compared
    shared: Shared

    def to_json(self) -> dict[str, Any]:
        """Both in one."""
        return {**self.compared.to_json(), "shared": self.shared.to_json()}


@dataclass(frozen=True, eq=False)
class Quality:
    """What was measured of a dictionary; `figures` by the names in `WORDS`, each with its 95 % interval.

    dictionary: what was evaluated. data: the rows it was measured on, and whether it was trained on them. model: what
    it was spliced into, or None. sites: figures of each site it reconstructs, when there are several. density: [latent]
    share of the rows in which each is active. baselines: in the order of `baselines.WORDS`. seeds: one per other
    dictionary. concepts: scores on concepts, over all of them.
    """

    dictionary: Mapping[str, Any]
    data: Mapping[str, Any]
    model: Mapping[str, Any] | None
    figures: Mapping[str, Figure]
    sites: Mapping[str, Mapping[str, Figure]]
    density: Floats
    geometry: Geometry | None
    baselines: tuple[Compared, ...]
    seeds: tuple[Seed, ...]
    concepts: tuple[ConceptScores, ...] = ()

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained."""
        return self.figures["fvu"].value

    @property
    def l0(self) -> float:
        """Latents active per row."""
        return self.figures["l0"].value

    @property
    def dead(self) -> float:
        """Share of latents that fired in no row."""
        return self.figures["dead"].value

    @property
    def dense(self) -> float:
        """Share of latents active in more than a tenth of the rows."""
        return self.figures["dense_10pct"].value

    @property
    def loss_recovered(self) -> float | None:
        """Share of the harm of zero ablation that is undone; None without a model, or when zeros may do no harm."""
        return self._value("loss_recovered")

    @property
    def loss_recovered_mean(self) -> float | None:
        """Share of the harm of mean ablation that is undone; None without a model, or when the mean may do no harm."""
        return self._value("loss_recovered_mean")

    def _value(self, name: str) -> float | None:
        return self.figures[name].value if name in self.figures else None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, text and numbers, by the schema that the report is made from."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "dictionary": dict(self.dictionary),
            "data": dict(self.data),
            "model": None if self.model is None else dict(self.model),
            "figures": _plain(self.figures),
            "sites": {site: _plain(found) for site, found in self.sites.items()},
            "density": self._histogram(),
            "geometry": None if self.geometry is None else self.geometry.to_json(),
            "baselines": [baseline.to_json() for baseline in self.baselines],
            "seeds": [seed.to_json() for seed in self.seeds],
            "concepts": [scores.to_json() for scores in self.concepts],
        }

    def _histogram(self) -> dict[str, Any]:
        """Latents by the base-10 logarithm of their density, silent ones apart."""
        firing = self.density[self.density > 0]
        edges = np.linspace(min(-4.0, np.floor(-np.log10(self.data["rows"]))), 0.0, BINS + 1)
        counts = np.histogram(np.log10(firing), edges)[0] if len(firing) else np.zeros(BINS, dtype=int)
        return {"edges": edges.tolist(), "counts": counts.tolist(), "silent": int((self.density == 0).sum())}

    def __repr__(self) -> str:
        named = ", ".join(f"{name} {self.figures[name].value:.4g}" for name in _SHOWN if name in self.figures)
        return f"Quality({named}; {self.data['rows']:,} rows)"

    def _repr_html_(self) -> str:
        """The main figures beside the baselines', for a notebook."""
        names = [name for name in _SHOWN if name in self.figures]
        columns = [("dictionary", self.figures), *((b.name, b.figures) for b in self.baselines)]
        head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
        rows = "".join(
            f'<tr><th title="{html.escape(WORDS[name])}">{name}</th>'
            + "".join(f"<td>{found.get(name, '')}</td>" for _, found in columns)
            + "</tr>"
            for name in names
        )
        return f"<table><caption>{html.escape(str(self.data['words']))}</caption><tr><th></th>{head}</tr>{rows}</table>"


def _plain(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {name: found.to_json() for name, found in figures.items()}
