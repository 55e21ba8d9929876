"""Scores: what a sweep measured, per example, for every part or edge.

Prompts of one shape have the same length, the same template and the same named positions: only there is position 7 the
same thing in all of them, and only there are positions averaged over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs.frames import data_frame
from vesalius.parts import Edge, Part
from vesalius.patching.agreement import Agreement, agreement
from vesalius.patching.examples import Examples
from vesalius.patching.heatmap import heatmap
from vesalius.patching.plan import Cost
from vesalius.stats import Measurement, measure

if TYPE_CHECKING:
    import pandas

SHAPES_SHOWN = 3


@dataclass(frozen=True, repr=False)
class Ranked:
    """One of the largest effects. position: None where items were edited at all positions; token: its text."""

    item: Part | Edge
    position: int | None
    token: str
    effect: Measurement

    def __str__(self) -> str:
        where = "" if self.position is None else f" at {self.position} {self.token!r}"
        return f"{self.item}{where}: {self.effect.estimate:+.3f}"

    def __repr__(self) -> str:
        return f"Ranked({self})"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """What a sweep measured; nothing is averaged."""

    values: Float[Tensor, "site *each example"]
    """The metric of each edited run: [site, position|head|neuron|latent, example], or [site, example] (each=None)."""
    base: Float[Tensor, " example"]
    """The metric without an edit, on the prompts that were edited."""
    source: Float[Tensor, " example"]
    """The metric of the other prompts, where patched values come from."""
    mask: Bool[Tensor, "site *each example"]
    """False on cells past an example's length, and on cells that were not selected; `values` holds `base` there."""
    cost: Cost
    items: tuple[Part | Edge, ...]
    """What was edited: one per row, or with each="head" and the like one per row and column, row by row."""
    each: str | None
    edit: str
    metric: str
    unit: str
    prompts: str
    """The prompts that were edited: `corrupted` or `clean`."""
    error: float | None = None
    """Largest difference from plain float32 runs among the cells that were run again; None when none was."""
    compute: str = "float32"
    rows: tuple[Part | Edge, ...] = ()
    """What the first axis counts; default the items."""
    examples: Examples = field(default_factory=Examples)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.rows or self.items)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(map(str, self.rows))

    @property
    def effects(self) -> Float[Tensor, "site *each example"]:
        """Change of the metric by the edit."""
        return self.values - self.base

    @property
    def per_item(self) -> Float[Tensor, "item *position example"]:
        """Effects by item: [item, example], or with each="position" [item, position, example]."""
        return self.effects if self.each in (None, "position") else self.effects.flatten(0, 1)

    @property
    def mean(self) -> Float[Tensor, site * each]:
        """Mean effect over the examples that reach the cell; NaN where none does.

        Raises InputError for positions of prompts of different shape: see `at` and `by_shape`.
        """
        if self.each == "position" and len(set(self.examples.shape)) > 1:
            named = ", ".join(self.examples.named_positions)
            raise InputError(
                f"these {len(self.base)} prompts have {len(set(self.examples.shape))} shapes, so a position is not the "
                "same thing in all of them: take the mean of one shape (scores.by_shape()), or of a named position "
                f"(scores.at(name){f', one of {named}' if named else ''})"
            )
        return self._mean

    @property
    def _mean(self) -> Float[Tensor, site * each]:
        return (self.effects * self.mask).sum(-1) / self.mask.sum(-1)

    def by_shape(self) -> tuple[Scores, ...]:
        """The scores of the prompts of each shape."""
        shape = self.examples.shape
        return tuple(self.of([row for row, own in enumerate(shape) if own == one]) for one in sorted(set(shape)))

    def of(self, examples: Sequence[int]) -> Scores:
        """The scores of some examples."""
        rows = list(examples)
        return replace(
            self,
            values=self.values[..., rows],
            base=self.base[rows],
            source=self.source[rows],
            mask=self.mask[..., rows],
            examples=self.examples.take(rows),
        )

    def at(self, name: str) -> Scores:
        """The scores at a named position of every prompt, [site, example]; cells without it are masked.

        Raises UnknownNameError for a position that the prompts do not name, InputError without positions.
        """
        if self.each != "position":
            raise InputError(f"these scores are of each {self.each or 'site'}, at all positions; sweep each position")
        if name not in self.examples.named_positions:
            raise UnknownNameError("position", name, self.examples.named_positions)
        at = self.examples.named_positions[name]
        index = at.clamp_min(0).expand(len(self.values), 1, -1)
        values, mask = (tensor.gather(1, index)[:, 0] for tensor in (self.values, self.mask))
        return replace(self, values=values, mask=mask & (at >= 0), each=None)

    def select(
        self,
        site: str | None = None,
        *,
        layer: int | None = None,
        head: int | None = None,
        position: int | None = None,
        token: str | None = None,
    ) -> Scores:
        """The same scores with everything else masked, or left out where a whole row is: see `mask`.

        site: a row's name, or part of one, such as "mlp_out". head: one head or other unit. token: the text of the
        token at the position, example by example. Raises InputError for what these scores do not have.
        """
        keep = [row for row, item in enumerate(self.rows) if _fits(item, site, layer)]
        if not keep:
            raise InputError(f"no row of these scores is of site={site}, layer={layer}; rows: {_few(self.sites)}")
        mask = self.mask[keep] & self._columns(head, position) & self._tokens(token)
        rows, per_row = tuple(self.rows[row] for row in keep), len(self.items) // len(self.rows)
        items = tuple(self.items[row * per_row + one] for row in keep for one in range(per_row))
        return replace(self, values=self.values[keep], mask=mask, rows=rows, items=items)

    def _columns(self, head: int | None, position: int | None) -> Tensor:
        if head is None and position is None:
            return torch.ones((), dtype=torch.bool)
        asked = position if position is not None else head
        counted = "position" if position is not None else "head"
        if self.each is None or (self.each == "position") != (counted == "position"):
            raise InputError(f"these scores are of each {self.each or 'site'}, so there is no {counted} to select")
        return torch.arange(self.values.shape[1]).eq(asked if asked is not None else -1)[:, None]

    def _tokens(self, token: str | None) -> Tensor:
        if token is None:
            return torch.ones((), dtype=torch.bool)
        if self.each != "position" or not self.examples.texts:
            raise InputError('tokens are selected from scores with each="position", of a model with a tokenizer')
        found = torch.zeros(self.values.shape[1], len(self.base), dtype=torch.bool)
        for example, texts in enumerate(self.examples.texts):
            for position, text in enumerate(texts):
                found[position, example] = text == token
        if not bool(found.any()):
            raise InputError(f"no prompt has the token {token!r}; tokens of the first: {_few(self.examples.texts[0])}")
        return found

    def top(self, n: int = 10) -> tuple[Ranked, ...]:
        """The items (and positions) with the largest mean effect, either sign, among the cells of `mask`.

        Positions are ranked within prompts of one shape.
        """
        if self.each == "position" and len(set(self.examples.shape)) > 1:
            found = [one for scores in self.by_shape() for one in scores.top(n)]
            return tuple(sorted(found, key=lambda one: -abs(one.effect.estimate))[:n])
        mean = self._mean if self.each in (None, "position") else self._mean.flatten()
        order = mean.nan_to_num().abs().flatten().argsort(descending=True, stable=True)
        cells = [int(cell) for cell in order if not bool(mean.flatten()[cell].isnan())][:n]
        width = self.values.shape[1] if self.each == "position" else 1
        return tuple(self._ranked(cell // width, cell % width) for cell in cells)

    def _ranked(self, item: int, position: int) -> Ranked:
        effects, mask = self.per_item[item], self._item_mask[item]
        if self.each != "position":
            return Ranked(self.items[item], None, "", self._measured(item, effects, mask))
        effects, mask = effects[position], mask[position]
        return Ranked(self.items[item], position, self.token(position), self._measured(item, effects, mask))

    @property
    def _item_mask(self) -> Bool[Tensor, "item *position example"]:
        return self.mask if self.each in (None, "position") else self.mask.flatten(0, 1)

    def _measured(self, item: int, effects: Tensor, mask: Tensor) -> Measurement:
        rows = mask.nonzero()[:, 0].tolist()
        groups = {kind: tuple(labels[row] for row in rows) for kind, labels in self.examples.groups.items()}
        clusters = [kind for kind in self.examples.clusters if len(set(groups[kind])) > 1]
        values, name, unit = effects[rows].double().tolist(), str(self.items[item]), f"{self.metric}, {self.unit}"
        if len(rows) > 1:
            return measure(name, values, groups=groups, clusters=clusters, unit=unit)
        return Measurement(
            name=name,
            values=tuple(values),
            estimate=values[0],
            low=None,
            high=None,
            n=1,
            n_groups=1,
            unit=unit,
            groups=groups,
        )

    def token(self, position: int) -> str:
        """The token at a position, as text: the first prompt's, with an ellipsis where others have another one."""
        found = list(dict.fromkeys(texts[position] for texts in self.examples.texts if position < len(texts)))
        return "" if not found else found[0] + ("…" if len(found) > 1 else "")

    def to_frame(self) -> pandas.DataFrame:
        """One row per item, position and example of `mask`: item, layer, position, token, example, value, effect.

        Raises InputError where pandas is not installed.
        """
        cells = self._item_mask.nonzero()
        item, example = cells[:, 0].tolist(), cells[:, -1].tolist()
        effect = self.per_item[tuple(cells.T)]
        columns: dict[str, Any] = {
            "item": [str(self.items[one]) for one in item],
            "layer": [_layer(self.items[one]) for one in item],
        }
        if self.each == "position":
            position, texts = cells[:, 1].tolist(), self.examples.texts
            columns["position"] = position
            columns["token"] = [texts[e][p] if texts else "" for e, p in zip(example, position, strict=True)]
        value = (effect + self.base[cells[:, -1]]).tolist()
        return data_frame({**columns, "example": example, "value": value, "effect": effect.tolist()})

    def against(self, measured: Scores) -> Agreement:
        """How these effects (estimates, or rounded ones) agree with measured ones.

        Raises InputError for scores of other cells or examples.
        """
        if self.values.shape != measured.values.shape or (self.sites, self.each) != (measured.sites, measured.each):
            raise InputError(
                f"scores of {self.values.shape[0]} sites, each {self.each}, {tuple(self.values.shape)} cannot be "
                f"compared with {measured.values.shape[0]} sites, each {measured.each}, {tuple(measured.values.shape)}"
            )
        keep = (self.mask & measured.mask).flatten(0, -2)
        effects = [scores.effects.flatten(0, -2).double() for scores in (self, measured)]
        by_position = self.each == "position" and self.examples.shape
        return agreement(effects[0], effects[1], keep, self.examples.shape if by_position else (0,) * len(self.base))

    def __repr__(self) -> str:
        axes = ("site", *([self.each] if self.each else []), "example")
        shape = ", ".join(f"{name} {size}" for name, size in zip(axes, self.values.shape, strict=True))
        rounded = self.error and self.compute != "float32"
        error = f"; {self.compute}, error {self.error:.2g} {self.unit}" if rounded else ""
        return f"Scores({self.edit} on {self.prompts} prompts, {self.metric}: {shape}; {self.cost.describe()}{error})"

    def _repr_html_(self) -> str:
        """Heat tables of mean effects: sites down, positions (with their tokens), heads or other units across.

        Prompts of several shapes: one table by named position, where there are any, and one for each of the first
        shapes.
        """
        what = f"{self.edit} on {self.prompts} prompts, each {self.each or 'site'}"
        title, cost = f"Mean change of {self.metric} ({self.unit}): {what}", f"<p>{escape(self.cost.describe())}</p>"
        if self.each != "position":
            table = self._mean if self.each else self._mean[:, None]
            heads = [str(column) for column in range(table.shape[1])] if self.each else ["effect"]
            return heatmap(title, self.sites, heads, table) + cost
        shapes = self.by_shape() if self.examples.shape else (self,)
        named = self.examples.named_positions if len(shapes) > 1 else {}
        found = []
        if named:
            found.append(heatmap(title, self.sites, list(named), torch.stack([self.at(n)._mean for n in named], 1)))
        for scores in shapes[:SHAPES_SHOWN]:
            heads = [f"{position} {scores.token(position)}" for position in range(int(scores._reach.sum()))]
            table = scores._mean[:, : len(heads)]
            found.append(heatmap(f"{title} ({len(scores.base)} of one shape)", self.sites, heads, table))
        more = len(shapes) - SHAPES_SHOWN
        return "".join(found) + (f"<p>{more} more shapes: scores.by_shape()</p>" if more > 0 else "") + cost

    @property
    def _reach(self) -> Bool[Tensor, " position"]:
        """Positions that any example reaches."""
        return self.mask.any(-1).any(0)


def _fits(item: Part | Edge, site: str | None, layer: int | None) -> bool:
    return (site is None or site in str(item)) and (layer is None or _layer(item) == layer)


def _layer(item: Part | Edge) -> int | None:
    part = item.source if isinstance(item, Edge) else item
    return part.writes[0].layer


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
