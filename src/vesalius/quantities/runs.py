"""Runs: the recorded runs of one model on a contrast or a corpus, with everything that is measured on them kept once.

Descriptions (on discovery) and checks (on validation) take the same quantities from Runs, so that what is predicted and
what is tested are computed by the same code on different data. With blocks to keep them in, finished pieces survive a
killed run, and so does what they cost: a resumed study says the same as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.positions import named_positions
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Corpus, Pairs, Table, Tokens
from vesalius.intervention import derangement
from vesalius.jobs import Blocks, Sink, silent
from vesalius.model import Model
from vesalius.model.attention import capped, softmaxed
from vesalius.parts import Part, Unit, as_part
from vesalius.patching.evaluate import Outcome, evaluate
from vesalius.patching.plan import Cost
from vesalius.patching.record import Recording, record
from vesalius.patching.scoring import base_values
from vesalius.patching.sources import Source, patch_source
from vesalius.patching.targets import Variant, to_record
from vesalius.quantities.contrast import Contrast, heads_and_mlps
from vesalius.site import Site
from vesalius.stats import group_mean

T = TypeVar("T")
DIRECTIONS = ("noising", "denoising")
_COST = "cost of this block"
_SHUFFLES = 200
CHECKED = 4
"""Of so many sweeps, the first runs some of its cells again as plain forwards."""
BLOCK = 43
"""Parts measured together, and kept together: a killed run loses at most one block."""


class Runs:
    """The runs of one model on a contrast (or pairs), a corpus, or a table of rows.

    components: the parts that a circuit may be made of; default the embeddings, every head and every MLP; names, Sites
    and any Parts. blocks: where finished pieces are kept (default nowhere). name: what they are filed under; runs that
    share blocks need different names.
    """

    def __init__(
        self,
        model: Model,
        data: Contrast | Pairs | Mapping[str, Pairs] | Corpus | Table,
        *,
        components: Sequence[Part | Site | str] | None = None,
        seed: int = 0,
        check: bool = True,
        sink: Sink = silent,
        blocks: Blocks | None = None,
        name: str = "",
    ) -> None:
        self.model, self.seed, self.check, self.sink, self.name = model, seed, check, sink, name
        self.data = data if isinstance(data, Corpus | Table) else Contrast.of(data)
        self.blocks = Blocks(None, "") if blocks is None else blocks
        self.cost = Cost()
        self._components = components
        self._recorded: dict[str, Recording] = {}
        self._sites: dict[Site, None] = {}
        self._effects: dict[tuple[str, str, Part], tuple[Tensor, Tensor]] = {}
        self._evaluated = 0
        self._kept: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        return f"Runs({self.model.name} on {self.data!r})"

    @property
    def contrast(self) -> Contrast:
        """The contrast. Raises InputError for runs on a corpus."""
        if not isinstance(self.data, Contrast):
            raise InputError(f"this is measured on pairs of prompts, clean and corrupted; got {self.data!r}")
        return self.data

    @property
    def corruptions(self) -> Mapping[str, Pairs]:
        return self.contrast.corruptions

    @property
    def main(self) -> str:
        """The main corruption."""
        return self.contrast.main

    @property
    def pairs(self) -> Pairs:
        return self.contrast.pairs

    @property
    def _examples(self) -> Pairs | Corpus | Table:
        return self.pairs if isinstance(self.data, Contrast) else self.data

    @property
    def example_hashes(self) -> tuple[str, ...]:
        """One hash per example; of pairs that of the clean prompt."""
        return self._examples.example_hashes

    @property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """Kind of group -> one label per example."""
        return self._examples.groups

    @property
    def clusters(self) -> tuple[str, ...]:
        """Kinds of group that intervals respect."""
        return self._examples.clusters

    def mean(self, values: Tensor) -> float:
        """Mean of values `[example]` over groups, each counting once: what intervals and verdicts are about."""
        labels = self.groups[self.clusters[0]] if self.clusters else None
        return group_mean(values.detach().double().cpu().numpy(), labels)

    @property
    def source_hash(self) -> str:
        """Content hash of the data, of the main corruption, as they were before rows were chosen from them."""
        return self._examples.source_hash

    @property
    def n(self) -> int:
        return len(self._examples)

    @property
    def components(self) -> tuple[Part, ...]:
        """The parts that a circuit may be made of, in forward order."""
        given = self._components
        return self.once(
            "components", lambda: heads_and_mlps(self.model) if given is None else tuple(map(as_part, given))
        )

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What `compute` gives, computed once for a key. Each quantity keeps what only it reads, under its own name."""
        if key not in self._kept:
            self._kept[key] = compute()
        found: T = self._kept[key]
        return found

    def few(self, rows: Sequence[int]) -> Runs:
        """Runs on some of the prompts, that keep nothing on disk."""
        return Runs(self.model, self.contrast.subset(rows), components=self._components, seed=self.seed, check=False)

    def run(self, which: str, parts: Sequence[Part] = ()) -> Recording:
        """The recorded run of the clean prompts ("clean") or of a corruption's, with the sites of these parts."""
        if which != "clean" and which not in self.corruptions:
            raise UnknownNameError("corruption", which, ["clean", *self.corruptions])
        wanted = to_record([*parts, *([] if self._sites else self.components)])
        if any(site not in self._sites for site in wanted):
            self._sites |= dict.fromkeys(wanted)
            self._recorded.clear()
        if which not in self._recorded:
            pairs = self._rows if which == "clean" else self.corruptions[which]
            side = pairs if which == "clean" or not pairs.several else pairs.teacher_forced()
            tokens = side.tokens("clean" if which == "clean" else "corrupted")
            self._recorded[which] = record(self.model, tokens, list(self._sites))
        return self._recorded[which]

    @property
    def _rows(self) -> Pairs:
        """What is run: the pairs, or, for answers of several tokens, two teacher-forced rows for each of them.

        The first rows are then the prompts with their answers, so that a pair's own prompt is read in the row of its
        number.
        """
        return self.once("rows", lambda: self.contrast.metric.rows_of(self.pairs)[0])

    def tokens(self, which: str) -> Tokens:
        """The clean prompts, or a corruption's."""
        pairs = self.pairs if which == "clean" else self.corruptions[which]
        return pairs.tokens("clean" if which == "clean" else "corrupted")

    @property
    def named_positions(self) -> Mapping[str, Int[Tensor, " example"]]:
        """Named positions of the clean prompts (see `data.named_positions`); -1 is absent."""
        return self.once("named positions", lambda: named_positions(self.pairs, self.model.tokenizer))

    @property
    def shuffled(self) -> Pairs:
        """The same prompts with other prompts' answers and distractors: labels that carry no information.

        Of the derangements tried, the one in which fewest prompts get a token of their own pair.
        """

        def order() -> Tensor:
            tried = [derangement(self.n, 1000 * self.seed + attempt) for attempt in range(_SHUFFLES)]
            return min(tried, key=self._own_labels)

        found = self.once("shuffled", order)
        return replace(self.pairs, answer=self.pairs.answer[found], distractor=self.pairs.distractor[found])

    def _own_labels(self, order: Tensor) -> int:
        """How many prompts would get their own answer or distractor back, as either; of several tokens, the first."""
        labels = (self.pairs.answer, self.pairs.distractor)
        own = torch.stack([label[:, 0] if self.pairs.several else label for label in labels], 1)
        return int((own[:, :, None] == own[order][:, None, :]).flatten(1).any(1).sum())

    def metric(self, which: str, labels: Pairs | None = None) -> Float[Tensor, " example"]:
        """The metric of the clean run or of a corruption's run, per example. Outlives `forget`."""

        def of(pairs: Pairs) -> Tensor:
            rows, metric, fold = self.contrast.metric.rows_of(pairs)
            return fold(base_values(self.run(which), rows, metric, self.run("clean")))

        return of(labels) if labels is not None else self.once(("metric", which), lambda: of(self.pairs))

    def total(self, corruption: str) -> Float[Tensor, " example"]:
        """Total effect per example: the metric of the clean run minus the corrupted one's."""
        return self.metric("clean") - self.metric(corruption)

    def pattern(self, part: Part, which: str = "clean") -> Float[Tensor, "example query_pos key_pos"]:
        """Attention pattern of a head, from recorded queries and keys; exact at real query positions."""
        site, base = part.writes[0], self.run(which)
        assert site.layer is not None and site.index is not None
        if base.reason:
            raise InputError(f"the attention of {self.model.name} is not recorded: {base.reason}")
        keys = base.keys[site.layer]
        group = base.queries[site.layer].shape[2] // keys.shape[1]
        query = base.queries[site.layer][:, :, site.index]
        scores = query @ keys[:, site.index // group].transpose(1, 2) * base.scaling[site.layer]
        scores = capped(scores, base.caps[site.layer])
        position = torch.arange(scores.shape[-1], device=scores.device)
        back = position[:, None] - position[None]
        window = base.windows[site.layer]
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        sinks = base.sinks[site.layer]
        pattern = softmaxed(scores.masked_fill(hidden, float("-inf")), None if sinks is None else sinks[site.index])
        return pattern[: self.n].cpu()

    def source(self, corruption: str, direction: str, parts: Sequence[Part] = ()) -> tuple[Recording, Source]:
        """Base run and values: noising puts corrupted values into the clean run, denoising the other way round."""
        if direction not in DIRECTIONS:
            raise UnknownNameError("direction", direction, DIRECTIONS)
        _ = self.run("clean", parts)
        clean, corrupted = self.run("clean"), self.run(corruption)
        base, other = (clean, corrupted) if direction == "noising" else (corrupted, clean)
        return base, patch_source(base, other)

    def evaluate(
        self, variants: Sequence[Variant], base: Recording, source: Source, task: str, watch: Sequence[Site] = ()
    ) -> Outcome:
        """Variants on these prompts, scored with the true labels and, of one token, with shuffled ones."""
        checked = self.check and self._evaluated % CHECKED == 0
        rows, metric, fold = self.contrast.metric.rows_of(self.pairs)
        # Answers of several tokens are part of what is run: others would be other runs.
        others = () if self.pairs.several else (self.shuffled,)
        outcome = evaluate(
            base,
            variants,
            source,
            rows,
            metric,
            others=others,
            watch=watch,
            check=checked,
            seed=self.seed + self._evaluated,
            task=task,
            sink=self.sink,
        )
        self.cost, self._evaluated = self.cost + outcome.cost, self._evaluated + 1
        watched = {site: seen[:, : self.n] for site, seen in outcome.watched.items()}
        return replace(outcome, values=fold(outcome.values), base=fold(outcome.base), watched=watched)

    def effects(self, parts: Sequence[Part], corruption: str, direction: str) -> Float[Tensor, "part example"]:
        """Effect of patching each part alone, positive when the clean value helps the answer.

        noising: clean run minus the run with the part's corrupted value. denoising: run with the part's clean value
        minus the corrupted run. Both are oriented alike, so that signs compare.
        """
        self._measure(parts, corruption, direction)
        return torch.stack([self._effects[corruption, direction, part][0] for part in parts])

    def shuffled_effects(self, parts: Sequence[Part], corruption: str, direction: str) -> Float[Tensor, "part example"]:
        """The same effects on other prompts' labels: what the edit does to names that are not in the prompt."""
        self._measure(parts, corruption, direction)
        return torch.stack([self._effects[corruption, direction, part][1] for part in parts])

    def _measure(self, parts: Sequence[Part], corruption: str, direction: str) -> None:
        missing = [part for part in dict.fromkeys(parts) if (corruption, direction, part) not in self._effects]
        for first in range(0, len(missing), BLOCK):
            some = missing[first : first + BLOCK]
            key = f"effects {corruption} {direction} {' '.join(map(name_of, some))}"
            found = self.stored(key, lambda some=some: self._patched(some, corruption, direction))  # type: ignore[misc]
            for number, part in enumerate(some):
                both = (torch.from_numpy(found["true"][number]), torch.from_numpy(found["shuffled"][number]))
                self._effects[corruption, direction, part] = both

    def _patched(self, parts: Sequence[Part], corruption: str, direction: str) -> dict[str, Any]:
        """Oriented effects [part, example] of each part alone, with true and with shuffled labels."""
        base, source = self.source(corruption, direction, parts)
        variants = [Variant((part,)) for part in parts]
        outcome = self.evaluate(variants, base, source, f"patch {len(parts)} parts, {corruption}, {direction}")
        sign = 1.0 if direction == "noising" else -1.0
        true = sign * (outcome.base - outcome.values)
        if not outcome.others:
            return {"true": true.numpy(), "shuffled": self._of_shuffled(parts, corruption, direction).numpy()}
        return {"true": true.numpy(), "shuffled": (sign * (outcome.others_base[0] - outcome.others[0])).numpy()}

    def _of_shuffled(self, parts: Sequence[Part], corruption: str, direction: str) -> Float[Tensor, "part example"]:
        """Effects on shuffled labels by runs of their own."""

        def made() -> Runs:
            answer, distractor = self.shuffled.answer, self.shuffled.distractor
            pairs = {
                name: replace(pairs, answer=answer, distractor=distractor) for name, pairs in self.corruptions.items()
            }
            contrast = replace(self.contrast, corruptions=pairs)
            return Runs(self.model, contrast, components=self._components, seed=self.seed, check=False, sink=self.sink)

        runs = self.once("shuffled runs", made)
        before = runs.cost
        base, source = runs.source(corruption, direction, parts)
        outcome = runs.evaluate([Variant((part,)) for part in parts], base, source, "shuffled labels")
        self.cost = self.cost + (runs.cost - before)
        return (outcome.base - outcome.values) * (1.0 if direction == "noising" else -1.0)

    def stored(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A piece of results (arrays by name), computed or read back from the blocks.

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
        self._recorded.clear()


def name_of(part: Part) -> str:
    """What tells it from every other part: its name, or its reference where that says more."""
    return str(part) if isinstance(part, Unit) else str(part.ref)
