"""Causal tracing: drown the subject in noise, then give one state back at a time (Meng et al. 2022, section 2).

Clean run, noised run (Gaussian noise on the subject tokens' embeddings), and for every layer and position a noised run
in which that one state has its clean value: what it brings back of the metric is its indirect effect, averaged over
draws of the noise. Zhang & Nanda (2024) find that noise and token replacement can disagree: replacement is
`sweep(model, pairs, sites="layers.*.resid_post", each="position")` with pairs that differ in the subject only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.intervention import Intervention, Noise, Patch, Positions, mask_of
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.metric import Metric, answer_logprob
from vesalius.model import Model
from vesalius.parts import Part, Unit
from vesalius.patching.evaluate import TOKENS_PER_BATCH, evaluate
from vesalius.patching.examples import Examples
from vesalius.patching.plain import allowance
from vesalius.patching.plan import Cost, Plan, announcement
from vesalius.patching.record import Recording, record
from vesalius.patching.scores import Scores
from vesalius.patching.scoring import base_values
from vesalius.patching.sources import Source
from vesalius.patching.targets import Variant
from vesalius.site import Site

KINDS = ("resid_post", "mlp_out", "attn_out")


@dataclass(frozen=True, eq=False, repr=False)
class Tracing:
    """What each restored state brings back."""

    scores: Mapping[str, Scores]
    """By kind of site: values [layer, position, example], means over draws. base: the noised run; source: the clean."""
    draws: Mapping[str, Float[Tensor, "draw layer position example"]]
    """The same before averaging."""
    noised: Float[Tensor, "draw example"]
    """The metric of the noised runs."""
    clean: Float[Tensor, " example"]
    std: float
    """Standard deviation of the subject tokens' embeddings; the noise is a multiple of it."""

    def __repr__(self) -> str:
        most = {kind: float(found.effects.mean(-1).max()) for kind, found in self.scores.items()}
        restored = ", ".join(f"{kind} up to {value:.2f}" for kind, value in most.items())
        return f"Tracing({len(self.noised)} draws take {float(self.total.mean()):.2f}; restored: {restored})"

    def __getitem__(self, kind: str) -> Scores:
        if kind not in self.scores:
            raise UnknownNameError("kind of site", kind, self.scores)
        return self.scores[kind]

    @property
    def total(self) -> Float[Tensor, " example"]:
        """What the noise took away, on average over draws: clean minus noised."""
        return self.clean - self.noised.mean(0)


def causal_tracing(
    model: Model,
    pairs: Pairs,
    subject: Positions,
    *,
    kinds: Sequence[str] = KINDS,
    window: int = 1,
    draws: int = 10,
    scale: float = 3.0,
    metric: Metric = answer_logprob,
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    sink: Sink | None = None,
) -> Tracing:
    """Noise on the subject of the clean prompts, and every state given back alone.

    pairs: clean prompts with answers; the corrupted ones are not used. subject: positions of the subject tokens, as in
    interventions (a mask [example, pos] for subjects at different places). kinds: resid_post, mlp_out, attn_out.
    window: layers restored together around each one, for mlp_out and attn_out (Meng et al. take 10; more of them
    inflate the effect). draws: noise draws per example, averaged; fewer than 10 are noisy. scale: in standard
    deviations of the subject tokens' embeddings. check: run one random restoration plainly too. sink: hears the
    cost first, then progress; None shows both.

    Raises InputError for prompts without subject tokens or no draws, UnknownNameError for another kind, SelfCheckError
    when the plain run disagrees, NotFiniteError for a metric that is not finite.
    """
    if draws < 1 or window < 1:
        raise InputError(f"causal tracing needs at least one draw and a window of at least 1; got {draws} and {window}")
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind of site", kind, KINDS)
    tokens = pairs.tokens("clean")
    mask = _subject(subject, tokens)
    kept = [site for kind in kinds if kind != "resid_post" for site in model.sites(f"layers.*.{kind}")]
    began = time.perf_counter()
    clean = record(model, tokens, kept)
    seconds = (time.perf_counter() - began) / len(pairs)
    found = model.run(tokens, capture=["embed"], last_logits=True)["embed"]
    std = float(found[mask.to(found.device)].float().std())
    noises = [Noise("embed", scale=scale, std=std, seed=seed * 1_009 + draw, positions=mask) for draw in range(draws)]
    windows = {kind: _windows(model, kind, window) for kind in kinds}
    work = _Work(model, clean, pairs, metric, mask, windows, budget, seconds)
    with shown(sink) as screen:
        return work.trace(noises, std, check, seed, screen)


def _subject(subject: Positions, tokens: Tokens) -> Bool[Tensor, "example pos"]:
    mask = mask_of(subject, tokens.real, tokens.named_positions)
    mask = tokens.real if mask is None else mask & tokens.real
    if not bool(mask.any(1).all()):
        raise InputError(
            f"prompt {int((~mask.any(1)).nonzero()[0])} has no subject tokens; give subject= for each prompt"
        )
    return mask


def _windows(model: Model, kind: str, window: int) -> list[tuple[Part, ...]]:
    """The sites restored together, for each layer."""
    n_layers, width = model.architecture[1].n_layers, 1 if kind == "resid_post" else window
    ranges = [range(max(0, n - width // 2), min(n_layers, n - width // 2 + width)) for n in range(n_layers)]
    return [tuple(Unit(Site(kind, layer)) for layer in layers) for layers in ranges]


@dataclass(frozen=True, eq=False)
class _Work:
    model: Model
    clean: Recording
    pairs: Pairs
    metric: Metric
    mask: Bool[Tensor, "example pos"]
    windows: Mapping[str, list[tuple[Part, ...]]]
    budget: int
    seconds: float
    """Of one forward pass of one example, as it took to record the clean run."""

    @property
    def variants(self) -> list[Variant]:
        width = self.mask.shape[1]
        parts = [parts for rows in self.windows.values() for parts in rows]
        return [Variant(some, position) for some in parts for position in range(width)]

    @property
    def source(self) -> Source:
        """Clean values; where attention is causal nothing differs before the first subject token."""
        first = self.mask.long().argmax(1) * int(self.clean.causal)
        clean = self.clean
        return Source("patch", clean.__getitem__, lambda part: part.value(clean), torch.arange(len(self.pairs)), first)

    def trace(self, noises: Sequence[Noise], std: float, check: bool, seed: int, sink: Sink) -> Tracing:
        """All draws, averaged."""
        variants, drawn, bases, cost = self.variants, [], [], Cost(2.0 * len(self.pairs), 2.0 * len(self.pairs))
        if self.clean.reason:
            sink(Event("note", "tracing", message=f"no replay: {self.clean.reason}; every state is one whole forward"))
        sink(announcement("tracing", self._estimate(noises, variants), [self.clean], self.seconds, self.budget))
        sink(Event("start", "tracing", 0, len(noises)))
        for number, noise in enumerate(noises):
            values, base, spent = self._draw(noise, variants)
            drawn.append(values)
            bases.append(base)
            cost = cost + spent
            sink(Event("advance", "tracing", number + 1, len(noises)))
        sink(Event("end", "tracing", len(noises), len(noises)))
        values = torch.stack(drawn)
        if not bool(torch.isfinite(values).all()):
            raise NotFiniteError(
                f"{self.metric.name} is not finite for example {int((~torch.isfinite(values)).nonzero()[0, 2])}"
            )
        if check:
            self._check(noises, variants, values, seed)
        return self._tracing(values, torch.stack(bases), std, cost)

    def _estimate(self, noises: Sequence[Noise], variants: Sequence[Variant]) -> Cost:
        """What all draws cost: those of the first one, as often as there are."""
        n, draws = float(len(self.pairs)), len(noises)
        if self.clean.reason:
            one = Cost(len(variants) * n, len(variants) * n, 0)
        else:
            noised = record(self.model, self.clean.tokens, list(self.clean.sites), [noises[0]])
            one = Plan(noised, variants, self.source, self.pairs.ends).estimate()
        return Cost((one.spent + n) * draws + 2 * n, (one.naive + n) * draws + 2 * n, one.skipped * draws)

    def _draw(self, noise: Noise, variants: Sequence[Variant]) -> tuple[Tensor, Tensor, Cost]:
        """One draw: values [variant, example], the noised run's [example], and the cost."""
        n = len(self.pairs)
        if self.clean.reason:
            values = torch.stack([self._plain(noise, variant) for variant in variants])
            return values, self._plain(noise, None), Cost(float(values.numel() + n), float(values.numel() + n), 0)
        noised = record(self.model, self.clean.tokens, list(self.clean.sites), [noise])
        out = evaluate(noised, variants, self.source, self.pairs, self.metric, budget=self.budget, check=False)
        return out.values, out.base, out.cost + Cost(float(n), float(n), 0)

    def _plain(self, noise: Noise, variant: Variant | None) -> Float[Tensor, " example"]:
        """One restoration on every example by an ordinary run with hooks."""
        edits: list[Intervention] = [noise]
        if variant is not None:
            position = torch.arange(self.mask.shape[1])
            live = (position == variant.position) & self.clean.tokens.real & (position >= self.source.first[:, None])
            edits += [Patch(part, source=part.value(self.clean), positions=live) for part in variant.parts]
        logits = self.model.run(self.clean.tokens, interventions=edits).logits
        base = self.model.run(self.clean.tokens, interventions=[noise]).logits if self.metric.needs.base else None
        return self.metric(logits, self.pairs, base).cpu()

    def _check(self, noises: Sequence[Noise], variants: Sequence[Variant], values: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = int(torch.randint(len(noises), (), generator=generator))
        number = int(torch.randint(len(variants), (), generator=generator))
        fast, plain = values[draw, number], self._plain(noises[draw], variants[number])
        allowed = allowance(self.clean, self.pairs, values)
        if float((fast - plain).abs().max()) > allowed:
            raise SelfCheckError(
                f"replay and a plain run differ by {float((fast - plain).abs().max()):.6g} with "
                f"{variants[number].parts[0]} restored; please report this model"
            )

    def _tracing(self, values: Tensor, noised: Tensor, std: float, cost: Cost) -> Tracing:
        width, clean = self.mask.shape[1], base_values(self.clean, self.pairs, self.metric, self.clean)
        live = torch.arange(width)[:, None] < self.pairs.size
        pieces = values.unflatten(1, (-1, width)).split([len(rows) for rows in self.windows.values()], 1)
        draws = dict(zip(self.windows, pieces, strict=True))
        share = len(self.windows)
        part = Cost(cost.spent / share, cost.naive / share, cost.skipped // share)
        examples = Examples.of(self.model, self.pairs, "clean")
        scores = {
            kind: Scores(
                values=_average(found, noised),
                base=noised.mean(0),
                source=clean,
                mask=live.expand(found.shape[1], -1, -1),
                cost=part,
                items=tuple(Unit(Site(kind, layer)) for layer in range(found.shape[1])),
                each="position",
                edit="restore",
                metric=self.metric.name,
                unit=self.metric.unit,
                prompts="noised",
                examples=examples,
            )
            for kind, found in draws.items()
        }
        return Tracing(scores, draws, noised, clean, std)


def _average(values: Float[Tensor, "draw layer position example"], noised: Float[Tensor, "draw example"]) -> Tensor:
    """Mean over draws, so that a state without effect has exactly the noised run's mean."""
    return noised.mean(0) + (values - noised[:, None, None]).mean(0)
