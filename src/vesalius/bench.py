"""Bench: one split of a task on one model, with everything that is measured on it kept once.

Roles (on discovery) and checks (on validation) take the same figures from a Bench, so that what a description predicts
and what is tested are computed by the same code on different data. With blocks to keep them in, finished pieces survive
a killed run, and so does what they cost: a resumed study says the same as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.positions import named_positions
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.intervention import derangement
from vesalius.jobs import Blocks, Sink, silent
from vesalius.metric import logit_diff
from vesalius.model import Model
from vesalius.model.attention import capped
from vesalius.model.direct import Frozen, frozen_norm
from vesalius.patching.cost import Cost
from vesalius.patching.donors import Donor, patch_donor
from vesalius.patching.evaluate import Outcome, evaluate
from vesalius.patching.record import Record, record
from vesalius.patching.scoring import base_values
from vesalius.patching.variants import Variant
from vesalius.site import Site

EMBED = Site("embed")
DIRECTIONS = ("noising", "denoising")
_COST = "cost of this block"
_SHUFFLES = 200
CHECKED = 4
"""Of so many sweeps of a bench, the first runs some of its cells again as plain forwards."""
BLOCK = 43
"""Parts measured together, and kept together: a killed run loses at most one block."""


def components(model: Model) -> list[Site]:
    """The embeddings, every head and every MLP, in forward order."""
    _, layout = model.architecture
    found = [EMBED]
    for layer in range(layout.n_layers):
        found += [Site("z", layer, head) for head in range(layout.n_heads)]
        found.append(Site("mlp_out", layer))
    return found


@dataclass(eq=False)
class Bench:
    """One split of a task. corruptions: name -> Pairs; all share clean prompts, answers and read positions, row by row.

    blocks: where finished pieces are kept (default nowhere). name: what this bench's pieces are filed under; benches
    that share blocks need different names. Raises PairsError when there are no corruptions or they do not match.
    """

    model: Model
    corruptions: Mapping[str, Pairs]
    seed: int = 0
    check: bool = True
    sink: Sink = silent
    blocks: Blocks = field(default_factory=lambda: Blocks(None, ""), repr=False)
    name: str = ""
    _runs: dict[str, Record] = field(default_factory=dict, repr=False)
    _effects: dict[tuple[str, str, Site], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    cost: Cost = field(default_factory=lambda: Cost(0.0, 0.0, 0))
    _evaluated: int = field(default=0, repr=False)
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False)
    """Other figures measured on this bench, by a name and parameters (kept by the rooms that measure them)."""

    def __post_init__(self) -> None:
        if not self.corruptions:
            raise PairsError("a bench needs pairs of at least one corruption; got none")
        for name, pairs in self.corruptions.items():
            differs = _difference(self.pairs, pairs)
            if differs:
                raise PairsError(
                    f"corruption {name!r} has other {differs} than {self.main!r}: all corruptions of a task change the "
                    "same clean prompts, row by row, and are scored with the same answers"
                )

    @property
    def main(self) -> str:
        """The first corruption: the one claims are made under."""
        return next(iter(self.corruptions))

    @property
    def pairs(self) -> Pairs:
        return self.corruptions[self.main]

    @property
    def n(self) -> int:
        return len(self.pairs)

    def run(self, which: str) -> Record:
        """The recorded run of the clean prompts ("clean") or of a corruption's."""
        if which not in self._runs:
            if which != "clean" and which not in self.corruptions:
                raise UnknownNameError("corruption", which, ["clean", *self.corruptions])
            tokens = self.pairs.tokens("clean") if which == "clean" else self.corruptions[which].tokens("corrupted")
            sites = [*self.model.sites("layers.*.z"), *self.model.sites("layers.*.mlp_out")]
            self._runs[which] = record(self.model, tokens, sites)
        return self._runs[which]

    @property
    def named_positions(self) -> Mapping[str, Int[Tensor, " example"]]:
        """Named positions of the clean prompts (see `data.named_positions`); -1 is absent."""
        if ("named_positions",) not in self.memo:
            self.memo["named_positions",] = named_positions(self.pairs, self.model.tokenizer)
        return self.memo["named_positions",]

    @property
    def shuffled(self) -> Pairs:
        """The same prompts with other prompts' answers and distractors: labels that carry no information.

        Of the derangements tried, the one in which fewest prompts get a token of their own pair.
        """
        if ("shuffled",) not in self.memo:
            tried = [derangement(self.n, 1000 * self.seed + attempt) for attempt in range(_SHUFFLES)]
            self.memo["shuffled",] = min(tried, key=self._own_labels)
        order = self.memo["shuffled",]
        return replace(self.pairs, answer=self.pairs.answer[order], distractor=self.pairs.distractor[order])

    def _own_labels(self, order: Tensor) -> int:
        """How many prompts would get their own answer or distractor back, as either."""
        own = torch.stack([self.pairs.answer, self.pairs.distractor], 1)
        return int((own[:, :, None] == own[order][:, None, :]).flatten(1).any(1).sum())

    def metric(self, which: str, labels: Pairs | None = None) -> Float[Tensor, " example"]:
        """Logit difference of the clean run or of a corruption's run, per example. Outlives `forget`."""
        if labels is not None:
            return self._metric(which, labels)
        if ("metric", which) not in self.memo:
            self.memo["metric", which] = self._metric(which, self.pairs)
        return self.memo["metric", which]

    def _metric(self, which: str, labels: Pairs) -> Float[Tensor, " example"]:
        return base_values(self.run(which), labels, logit_diff, self.run(which))

    def total(self, corruption: str) -> Float[Tensor, " example"]:
        """Total effect per example: clean minus corrupted logit difference."""
        return self.metric("clean") - self.metric(corruption)

    def frozen(self, which: str, labels: Pairs | None = None) -> Frozen:
        """The final norm frozen at a run's read position, towards answer minus distractor."""
        labels = labels or self.pairs
        if self.run(which).reason:
            raise InputError(f"direct effects in {self.model.name} are not to be had: {self.run(which).reason}")
        final = self.run(which).resid[-1][torch.arange(self.n), self.pairs.at]
        return frozen_norm(self.model, final, labels.answer, labels.distractor)

    def write(self, part: Site, which: str = "clean") -> Float[Tensor, "example d_model"]:
        """What a head or MLP writes to the residual stream at the read position."""
        value = self.run(which).at(part.whole)[torch.arange(self.n), self.pairs.at]
        if part.kind != "z":
            return value
        assert part.layer is not None and part.index is not None
        return self.model.head_writes(part.layer, value)[:, part.index]

    def direct(self, part: Site, labels: Pairs | None = None) -> Float[Tensor, " example"]:
        """Direct contribution of a part to the clean run's logit difference, final norm frozen."""
        return self.frozen("clean", labels).of(self.write(part))

    def pattern(self, part: Site, which: str = "clean") -> Float[Tensor, "example query_pos key_pos"]:
        """Attention pattern of a head, from recorded queries and keys; exact at real query positions."""
        assert part.layer is not None and part.index is not None
        base = self.run(which)
        if base.reason:
            raise InputError(f"the attention of {self.model.name} is not recorded: {base.reason}")
        keys = base.keys[part.layer]
        group = base.queries[part.layer].shape[2] // keys.shape[1]
        query = base.queries[part.layer][:, :, part.index]
        scores = capped(
            query @ keys[:, part.index // group].transpose(1, 2) * base.scaling[part.layer], base.caps[part.layer]
        )
        position = torch.arange(scores.shape[-1], device=scores.device)
        back = position[:, None] - position[None]
        window = base.windows[part.layer]
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1)

    def donor(self, corruption: str, direction: str) -> tuple[Record, Donor]:
        """Base run and values: noising puts corrupted values into the clean run, denoising the other way round."""
        if direction not in DIRECTIONS:
            raise UnknownNameError("direction", direction, DIRECTIONS)
        clean, corrupted = self.run("clean"), self.run(corruption)
        base, other = (clean, corrupted) if direction == "noising" else (corrupted, clean)
        return base, patch_donor(base, other)

    def evaluate(
        self, variants: Sequence[Variant], base: Record, donor: Donor, task: str, watch: Sequence[Site] = ()
    ) -> Outcome:
        """Variants on this split's prompts, scored with the true labels and with shuffled ones."""
        checked = self.check and self._evaluated % CHECKED == 0
        outcome = evaluate(
            base, variants, donor, self.pairs, logit_diff, others=(self.shuffled,), watch=watch, check=checked,
            seed=self.seed + self._evaluated, task=task, sink=self.sink,
        )  # fmt: skip
        self.cost, self._evaluated = self.cost + outcome.cost, self._evaluated + 1
        return outcome

    def effects(self, parts: Sequence[Site], corruption: str, direction: str) -> Float[Tensor, "part example"]:
        """Effect of patching each part alone, positive when the clean value helps the answer.

        noising: clean run minus the run with the part's corrupted value. denoising: run with the part's clean value
        minus the corrupted run. Both are oriented alike, so that signs compare.
        """
        self._measure(parts, corruption, direction)
        return torch.stack([self._effects[corruption, direction, part][0] for part in parts])

    def shuffled_effects(self, parts: Sequence[Site], corruption: str, direction: str) -> Float[Tensor, "part example"]:
        """The same effects on other prompts' labels: what the edit does to names that are not in the prompt."""
        self._measure(parts, corruption, direction)
        return torch.stack([self._effects[corruption, direction, part][1] for part in parts])

    def _measure(self, parts: Sequence[Site], corruption: str, direction: str) -> None:
        missing = [part for part in dict.fromkeys(parts) if (corruption, direction, part) not in self._effects]
        for first in range(0, len(missing), BLOCK):
            some = missing[first : first + BLOCK]
            key = f"effects {corruption} {direction} {' '.join(map(str, some))}"
            found = self.stored(key, lambda some=some: self._patched(some, corruption, direction))  # type: ignore[misc]
            for number, part in enumerate(some):
                both = (torch.from_numpy(found["true"][number]), torch.from_numpy(found["shuffled"][number]))
                self._effects[corruption, direction, part] = both

    def _patched(self, parts: Sequence[Site], corruption: str, direction: str) -> dict[str, Any]:
        """Oriented effects [part, example] of each part alone, with true and with shuffled labels."""
        base, donor = self.donor(corruption, direction)
        variants = [Variant((part,)) for part in parts]
        outcome = self.evaluate(variants, base, donor, f"patch {len(parts)} parts, {corruption}, {direction}")
        sign = 1.0 if direction == "noising" else -1.0
        true = sign * (outcome.base - outcome.values)
        return {"true": true.numpy(), "shuffled": (sign * (outcome.others_base[0] - outcome.others[0])).numpy()}

    def stored(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A piece of results (arrays by name), computed or read back from the bench's blocks.

        What it cost is stored with it, so that a resumed study says the same.
        """
        before = self.cost

        def work() -> dict[str, Any]:
            arrays = dict(compute())
            spent = self.cost - before
            return {**arrays, _COST: np.array([spent.spent, spent.naive, spent.skipped])}

        found = dict(self.blocks.get(f"{self.name} {key}", work))
        spent, naive, skipped = found.pop(_COST).tolist()
        self.cost = before + Cost(spent, naive, int(skipped))
        return found

    def forget(self) -> None:
        """Drop recorded runs (hundreds of megabytes); they are made again when needed."""
        self._runs.clear()

    def recall(self, parts: Sequence[Site], corruption: str, direction: str) -> tuple[Tensor, Tensor]:
        """Effects and shuffled-label effects [part, example], measured when they are not yet known."""
        return self.effects(parts, corruption, direction), self.shuffled_effects(parts, corruption, direction)


def _difference(first: Pairs, other: Pairs) -> str:
    """What two corruptions must share but do not; empty when they fit."""
    if other.example_hashes != first.example_hashes:
        return "clean prompts"
    for name, what in (("answer", "answers"), ("distractor", "distractors"), ("at", "read positions")):
        if not torch.equal(getattr(other, name), getattr(first, name)):
            return what
    return ""
