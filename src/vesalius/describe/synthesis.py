"""Synthesis: texts that make a part fire as strongly as possible, and as fluent as possible.

Evolutionary prompt optimisation (Thompson et al. 2024, "Fluent dreaming for language models", section 3): a population
of texts, each with its own weight of fluency. In every step a gradient at the embeddings proposes tokens to swap (Zou
et al. 2023, "Greedy coordinate gradient"), the candidates are run, and each member keeps the one that is best by
activation - weight * cross-entropy; where nothing gets better, it begins again at a random text. What is found is a
front: no text of it is beaten in both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.data.packing import bos_for, special_ids
from vesalius.describe.embedded import EMBED, check_embedded, depth_of, vocabulary
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.synthetic import Synthesis, Synthetic
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.jobs import Estimate, Event, Sink
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.parts import Part, places
from vesalius.patching.plan import Cost
from vesalius.quantities.values import check_one_number
from vesalius.seeds import generator_for

PLACES = ("last", "max", "sum")
TASK = "synthesis"
_RANDOM_STARTS = 64
_FLUENT_STARTS = 4
# Candidates of a member without fluency for each one of the others: they are run only up to the part.
_CHEAP = 4
PATIENCE = 3
"""Steps in which nothing got better, after which a member begins again."""
# A backward pass costs about two forwards.
_BACKWARD = 2.0


def synthesise(
    model: Model,
    part: Part,
    *,
    length: int = 8,
    at: str = "last",
    weights: Sequence[float] = (0.0, 0.1, 0.5),
    steps: int = 20,
    candidates: int = 16,
    proposals: int = 64,
    bos: str = "auto",
    examples: ActivatingExamples | None = None,
    seed: int = 0,
    batch_tokens: int = 1024,
    sink: Sink | None = None,
) -> Synthesis:
    """Texts of `length` tokens that make a part fire, as a front of activation against cross-entropy.

    part: of one number at each position. at: where it is read: at the "last" token, the "max" or "sum" over the text.
    weights: of cross-entropy, one for each member of the population, in standard deviations of the part on random texts
    per nat; 0 asks for activation alone, and such candidates are run only up to the part. candidates: texts that are
    run in each step for each member, four times as many for one without fluency. proposals: tokens that the gradient
    names at each position, from which they are drawn, the best of all always among them. bos: what texts begin with, as
    in `collect_examples`. examples: of this part on a corpus, to be compared with: `Synthesis.verdict` says whether the
    optimiser did better.

    Raises InputError for a part of several numbers, a model that is not causal, and numbers under 1.
    """
    counts = {"length": length, "steps": steps, "candidates": candidates, "proposals": proposals}
    counts |= {"batch_tokens": batch_tokens, "weights": len(weights)}
    if min(counts.values()) < 1 or min(weights, default=0) < 0:
        raise InputError(f"{', '.join(counts)} must be at least 1, and weights not negative; got {counts}, {weights}")
    if at not in PLACES:
        raise UnknownNameError("place", at, PLACES)
    check_embedded(model)
    if not model.architecture[0].causal:
        raise InputError(f"{model.name} predicts no next token, so there is no fluency to weigh")
    corpus_max = _strongest(examples, model, part)
    with shown(sink) as screen:
        search = _Search(model, part, length, at, _prefix(model, bos), batch_tokens, screen)
        return search.run(list(weights), steps, candidates, proposals, corpus_max, seed)


def _strongest(examples: ActivatingExamples | None, model: Model, part: Part) -> float | None:
    if examples is None:
        return None
    if examples.model_hash != model.content_hash:
        raise InputError("the examples are of another model")
    top = examples[part].top
    if not top:
        raise InputError(f"{part} never fired on the {examples.tokens:,} tokens of the examples; read more text")
    return float(top[0].value)


def _prefix(model: Model, bos: str) -> list[int]:
    if model.tokenizer is None and bos == "auto":
        return []
    found = bos_for(model.tokenizer, bos, False)
    return [] if found.id is None else [found.id]


@dataclass(eq=False)
class _Found:
    """Texts that were run. entropy: NaN where only the part was run."""

    ids: Int[Tensor, "text pos"]
    value: Float[Tensor, " text"]
    entropy: Float[Tensor, " text"]

    def take(self, rows: Tensor) -> _Found:
        return _Found(self.ids[rows], self.value[rows], self.entropy[rows])

    def and_(self, other: _Found) -> _Found:
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("ids", "value", "entropy")]
        return _Found(*(torch.cat(both) for both in pairs))

    def same(self, other: _Found) -> bool:
        return torch.equal(self.ids, other.ids)

    def best(self, weight: float) -> Tensor:
        """The number of the text that is best by value - weight * entropy."""
        score = self.value if weight == 0 else self.value - weight * self.entropy
        return score.nan_to_num(-torch.inf).argmax()

    def front(self) -> _Found:
        """Those that no other beats in both, the strongest first."""
        known = self.take((~self.entropy.isnan()).nonzero()[:, 0])
        # Of equal values the more fluent one comes first.
        order = known.entropy.argsort(stable=True)
        order = order[known.value[order].argsort(descending=True, stable=True)]
        least, kept = float("inf"), []
        for row in order.tolist():
            if float(known.entropy[row]) < least:
                least = float(known.entropy[row])
                kept.append(row)
        return known.take(torch.tensor(kept, dtype=torch.long))


@dataclass(eq=False)
class _Search:
    model: Model
    part: Part
    length: int
    at: str
    prefix: list[int]
    batch_tokens: int
    sink: Sink
    spent: float = field(default=0.0)
    naive: float = field(default=0.0)

    def run(
        self, weights: list[float], steps: int, candidates: int, proposals: int, corpus_max: float | None, seed: int
    ) -> Synthesis:
        draw = generator_for(TASK, seed)
        self.table = torch.cat(list(vocabulary(self.model)))
        self.allowed = torch.ones(len(self.table), dtype=torch.bool)
        self.allowed[[token for token in special_ids(self.model.tokenizer) if token < len(self.table)]] = False
        self.listed = self.allowed.nonzero()[:, 0]
        starts = self.ran(self._random((max(_RANDOM_STARTS, len(weights)), self.length), draw), fluent=False)
        scale = float(starts.value.std()) or 1.0
        known = self.ran(starts.ids[starts.value.topk(max(_FLUENT_STARTS, len(weights))).indices], fluent=True)
        scaled = [weight * scale for weight in weights]
        members = [known.take(known.best(weight)[None]) for weight in scaled]
        best, front, stale, history = known, known.front(), [0] * len(scaled), []
        self._announce(scaled, steps, candidates)
        self.sink(Event("start", TASK, 0, steps))
        for step in range(steps):
            for number, weight in enumerate(scaled):
                if stale[number] >= PATIENCE:
                    again = self.ran(self._random((candidates, self.length), draw), fluent=weight > 0)
                    members[number] = again.take(again.best(weight)[None])
                member, gains = members[number], self._gains(members[number].ids[0], weight)
                count = candidates if weight else _CHEAP * candidates
                swapped = self._swapped(member.ids[0], gains, count, proposals, draw)
                found = member.and_(self.ran(swapped, fluent=weight > 0))
                members[number] = found.take(found.best(weight)[None])
                stale[number] = (
                    0 if stale[number] >= PATIENCE or not members[number].same(member) else stale[number] + 1
                )
                best, front = best.and_(found), front.and_(found).front()
                best = best.take(best.best(0.0)[None])
            history.append(float(best.value[0]))
            self.sink(Event("advance", TASK, step + 1, steps, f"{history[-1]:.3g}"))
        self.sink(Event("end", TASK, steps, steps))
        front = front.and_(self.ran(best.ids, fluent=True)).front()
        made = tuple(self._synthetic(front, row) for row in range(len(front.ids)))
        return Synthesis(self.part, made, tuple(history), corpus_max, Cost(self.spent, self.naive))

    def ran(self, ids: Int[Tensor, "text pos"], fluent: bool) -> _Found:
        """Texts, with their activation; fluent: and their cross-entropy, from whole forwards."""
        ids = ids.unique(dim=0)
        rows = max(1, self.batch_tokens // (self.length + len(self.prefix)))
        pieces = []
        with torch.no_grad():
            for some in ids.split(rows):
                if fluent:
                    run = self.model.run(self._tokens(some), capture=places([self.part]))
                    value, entropy = self._value(run), self._entropies(run.logits, some).mean(1)
                else:
                    value = self._value(captured(self.model, self._tokens(some), places([self.part])))
                    entropy = torch.full_like(value, torch.nan)
                pieces.append(_Found(some, value.double().cpu(), entropy.double().cpu()))
        self._count(len(ids), fluent)
        return pieces[0] if len(pieces) == 1 else _Found(
            *(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("ids", "value", "entropy"))
        )  # fmt: skip

    def _tokens(self, ids: Int[Tensor, "text pos"]) -> Tokens:
        return Tokens(torch.cat([torch.tensor(self.prefix, dtype=torch.long).expand(len(ids), -1), ids], 1))

    def _value(self, run: Any) -> Float[Tensor, " text"]:
        value = self.part.value(run)
        check_one_number(self.part, value)
        own = value[:, len(self.prefix) :]
        return own[:, -1] if self.at == "last" else own.amax(1) if self.at == "max" else own.sum(1)

    def _logprobs(self, logits: Float[Tensor, "text pos vocab"]) -> Float[Tensor, "text predicted vocab"]:
        """Of every token of the text that something stands before."""
        first = max(len(self.prefix) - 1, 0)
        return logits[:, first:-1].float().log_softmax(-1)

    def _entropies(self, logits: Tensor, ids: Tensor) -> Float[Tensor, "text predicted"]:
        logprobs = self._logprobs(logits)
        predicted = ids[:, self.length - logprobs.shape[1] :].to(logits.device)
        found = -logprobs.gather(-1, predicted[..., None])[..., 0]
        # A text of one token that nothing stands before is neither fluent nor not.
        return found if found.shape[1] else found.new_zeros(len(ids), 1)

    def _gains(self, ids: Int[Tensor, " pos"], weight: float) -> Float[Tensor, "pos vocab"]:
        """What swapping each token for each other one would change, to first order."""
        tokens, sites = self._tokens(ids[None]), [EMBED, *places([self.part])]
        with torch.enable_grad():
            if weight:
                run: Any = self.model.run(tokens, capture=sites, grad=True)
                goal = self._value(run).sum() - weight * self._entropies(run.logits, ids[None]).mean()
            else:
                run = captured(self.model, tokens, sites, grad=True)
                goal = self._value(run).sum()
            (gradient,) = torch.autograd.grad(goal, run[EMBED], allow_unused=True)
        self._count(1 + _BACKWARD, weight > 0)
        slope = torch.zeros_like(run[EMBED]) if gradient is None else gradient
        gains = (slope[0, len(self.prefix) :] @ self.table.T.to(slope)).detach().cpu()
        gains = gains - gains.gather(1, ids[:, None])
        if weight:
            # A token also is what the ones before it predict.
            logprobs = self._logprobs(run.logits.detach())[0].cpu()
            late = self.length - len(logprobs)
            gains[late:] += weight / max(len(logprobs), 1) * (logprobs - logprobs.gather(1, ids[late:, None]))
        return gains.masked_fill(~self.allowed, -torch.inf)

    def _swapped(
        self, ids: Int[Tensor, " pos"], gains: Tensor, candidates: int, proposals: int, draw: torch.Generator
    ) -> Int[Tensor, "text pos"]:
        """Texts with one token swapped: the most promising swap of all, and draws from each position's best."""
        best = gains.topk(min(proposals, len(self.listed)), dim=1).indices
        position = torch.randint(self.length, (candidates,), generator=draw)
        token = best[position, torch.randint(best.shape[1], (candidates,), generator=draw)]
        top = int(gains.argmax())
        position[0], token[0] = top // gains.shape[1], top % gains.shape[1]
        swapped = ids.repeat(candidates, 1)
        swapped[torch.arange(candidates), position] = token
        return swapped

    def _random(self, shape: tuple[int, int], draw: torch.Generator) -> Int[Tensor, "text pos"]:
        return self.listed[torch.randint(len(self.listed), shape, generator=draw)]

    def _synthetic(self, found: _Found, row: int) -> Synthetic:
        ids, tokenizer = tuple(found.ids[row].tolist()), self.model.tokenizer
        text = " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))
        survives = None if tokenizer is None else tuple(tokenizer.encode(text, add_special_tokens=False)) == ids
        return Synthetic(ids, text, float(found.value[row]), float(found.entropy[row]), survives)

    def _count(self, passes: float, whole: bool) -> None:
        self.spent += passes * (1.0 if whole else depth_of(self.model, self.part))
        self.naive += passes

    def _announce(self, weights: list[float], steps: int, candidates: int) -> None:
        """The cost, before the search. A step of each member is measured as one forward of its candidates."""
        spent, naive = self.spent, self.naive
        some = self._random((min(candidates, 8), self.length), generator_for(TASK, "trial"))
        seconds = forwards = 0.0
        for fluent in {weight > 0 for weight in weights}:
            began = time.perf_counter()
            self.ran(some, fluent)
            count = sum((weight > 0) == fluent for weight in weights)
            passes = count * ((1 if fluent else _CHEAP) * candidates + 1 + _BACKWARD) * steps
            seconds += (time.perf_counter() - began) / len(some) * passes
            forwards += passes * (1.0 if fluent else depth_of(self.model, self.part))
        self.spent, self.naive = spent, naive
        self.sink(Event("note", TASK, message=f"{TASK}: {Estimate(seconds, forwards).describe()}"))
