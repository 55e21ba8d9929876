"""Steering: what adding a direction, latent or neuron does, over a sweep of scales, and what it costs.

Every figure stands beside that of random directions of the same norm at the same place: a large enough push changes any
model, and its text, whatever its direction. The price is the loss on plain text, and how far the edited values lie from
natural ones is kept with each scale.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.activations import Activations
from vesalius.describe.steered import LIKELIEST, Steering
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.inputs import Pairs, Tokens
from vesalius.inputs.beginning import speller
from vesalius.intervention import Intervention, Positions, Steer
from vesalius.jobs import Blocks, Event, Sink
from vesalius.jobs.blocks import Arrays
from vesalius.jobs.progress import Estimate, shown
from vesalius.metric import Metric, logit_diff, next_token_loss_of, wide
from vesalius.model import Model
from vesalius.parts import Part, places
from vesalius.protocol import content_hash
from vesalius.seeds import generator_for
from vesalius.site import Site

TASK = "steering"
RANDOM = 19
"""Random directions, with which p can be .05."""
BATCH = 1024
"""Tokens of plain text run together."""


@dataclass(frozen=True, eq=False)
class _Prompts:
    """What is measured on. of: (logits [example, vocab], the base run's) -> [example]."""

    tokens: Tokens
    at: Int[Tensor, " example"]
    name: str
    unit: str
    of: Callable[[Tensor, Tensor], Tensor]
    groups: dict[str, tuple[str, ...]]
    clusters: tuple[str, ...]

    def logits(self, whole: Tensor) -> Float[Tensor, "example vocab"]:
        return wide(whole[torch.arange(len(self.at)), self.at.to(whole.device)])


def steer(
    model: Model,
    part: Part,
    prompts: Pairs | Any,
    *,
    scales: Sequence[float],
    metric: Metric | None = None,
    towards: Sequence[str | int] = (),
    plain: Any = (),
    random: int = RANDOM,
    seed: int = 0,
    positions: Positions = None,
    new_tokens: int = 0,
    instead: str = "",
    out: str | Path | None = None,
    sink: Sink | None = None,
) -> Steering:
    """Add `scale` to a part's value, for every scale, and measure what changes.

    part: a Direction (`scale` times its unit vector is added), a latent or a neuron. prompts: `Pairs`, whose clean
    prompts are measured by `metric` (default: logit difference); or texts or tokens, measured at their last token by
    the log-probability of the tokens `towards` together, or without any by KL(unsteered || steered). plain: texts, of
    which the loss is measured, steered at every token. random: directions of the same norm to compare with; p is at
    least 1 / (random + 1). positions: of the prompts, default all. new_tokens: write as many after each prompt, too.
    instead: what is put before each text to compare with, unsteered: asking a model often does more than steering it
    (AxBench, Wu et al. 2025). Of texts only.
    out: folder that keeps finished runs, so that an interrupted sweep goes on. sink: hears the cost, then progress.

    Raises InputError for prompts, parts or metrics that do not fit, and for fewer than 2 prompts.
    """
    if not scales or not all(math.isfinite(scale) for scale in scales) or len(set(scales)) < len(scales):
        raise InputError(f"scales are different finite numbers, at least one; got {list(scales)}")
    if random < 1:
        raise InputError(f"random is the number of directions to compare with, at least 1; got {random}")
    measured, texts = _measured(model, prompts, metric, towards), _texts(model, plain)
    asked = _asked(model, prompts, instead, metric, towards)
    controls = _controls(model, part, measured.tokens, random, seed)
    plan = content_hash({
        "model": model.content_hash, "part": part.ref, "prompts": measured.tokens.content_hash, "metric": measured.name,
        "at": measured.at.tolist(), "plain": None if texts is None else texts.content_hash, "seed": seed,
        "positions": positions.tolist() if isinstance(positions, Tensor) else positions, "new_tokens": new_tokens,
        **({"instead": instead} if instead else {}),
    }) if out is not None else ""  # fmt: skip
    with shown(sink) as screen:
        work = _Work(model, measured, texts, positions, new_tokens, Blocks(out, plan, screen), screen)
        found = work.steering(part, tuple(map(float, scales)), controls)
        return found if asked is None else replace(found, instead=instead, **work.instead(asked))


def _asked(model: Model, prompts: Any, instead: str, metric: Metric | None, towards: Sequence[str | int]) -> Any:
    """The prompts with something before each; None without."""
    if not instead:
        return None
    if isinstance(prompts, str | Pairs) or not all(isinstance(text, str) for text in prompts):
        raise InputError("instead= is put before texts; these prompts are none (give a list of strings)")
    return _measured(model, [instead + text for text in prompts], metric, towards)


def _measured(model: Model, prompts: Any, metric: Metric | None, towards: Sequence[str | int]) -> _Prompts:
    if isinstance(prompts, Pairs):
        chosen = metric or logit_diff
        chosen.check_one_token(prompts)
        if chosen.needs.positions != "read" or towards:
            raise InputError(f"pairs are measured by a metric of the position that is read; got {chosen.name}")
        groups = dict(prompts.groups)
        return _Prompts(prompts.tokens("clean"), prompts.at, chosen.name, chosen.unit,
                        lambda logits, base: chosen(logits, prompts, base), groups, prompts.clusters)  # fmt: skip
    tokens = model.called_with(prompts)[2]
    if tokens is None or len(tokens) < 2:
        raise InputError("steering is measured on vs.Pairs, or on texts or token ids, at least 2 of them")
    if metric is not None:
        raise InputError(f"{metric.name} needs vs.Pairs; for texts name the tokens to steer towards")
    wanted = torch.tensor([_one_token(model, token) for token in towards], dtype=torch.long)
    name = f"log-probability of {', '.join(repr(t) for t in towards)}" if len(wanted) else "KL(unsteered || steered)"
    of = (lambda logits, _base: logits.log_softmax(-1)[:, wanted].logsumexp(-1)) if len(wanted) else _divergence
    return _Prompts(tokens, tokens.lengths - 1, name, "nats", of, {}, ())


def _divergence(logits: Tensor, base: Tensor) -> Tensor:
    before = base.log_softmax(-1)
    return (before.exp() * (before - logits.log_softmax(-1))).sum(-1)


def _one_token(model: Model, token: str | int) -> int:
    if isinstance(token, int):
        return token
    ids = model.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(
            f"{token!r} is {len(ids)} tokens; name single tokens to steer towards (most begin with a space)"
        )
    return int(ids[0])


def _texts(model: Model, plain: Any) -> Tokens | None:
    if not isinstance(plain, str | Tensor | Tokens) and not len(plain):
        return None
    tokens = model.called_with(plain)[2]
    if tokens is None or len(tokens) < 2 or int(tokens.lengths.min()) < 2:
        raise InputError("the price of steering is measured on at least 2 plain texts of at least 2 tokens")
    return tokens


def _controls(
    model: Model, part: Part, tokens: Tokens, random: int, seed: int
) -> list[Callable[[float, Positions], list[Intervention]]]:
    """The part itself and random directions that change what is written by as much."""
    sites = [site if isinstance(part, Direction) else site.whole for site in dict.fromkeys(part.writes)]
    with torch.no_grad():
        few = tokens.take(torch.arange(1))
        seen = model.run(few, places([part])).activations
        sizes = [1.0] if isinstance(part, Direction) else _sizes(part, seen, sites)

    def of_part(scale: float, positions: Positions) -> list[Intervention]:
        return [Steer(part, scale=scale, positions=positions)]

    def drawn(number: int) -> Callable[[float, Positions], list[Intervention]]:
        made = []
        for site, size in zip(sites, sizes, strict=True):
            width = part.vector.shape[0] if isinstance(part, Direction) else seen[site].shape[-1]
            vector = torch.randn(width, generator=generator_for(TASK, seed, number, str(site)))
            made.append((Direction(site, vector, f"random {number}"), size))
        return lambda scale, positions: [Steer(d, scale=scale * size, positions=positions) for d, size in made]

    return [of_part, *map(drawn, range(random))]


def _sizes(part: Part, seen: Activations, sites: Sequence[Site]) -> list[float]:
    """Norm of what is written at each site when the part's value rises by one."""
    raised = part.written(seen, part.value(seen) + 1.0)
    return [float((raised[site] - seen[site])[0, -1].float().norm()) for site in sites]


@dataclass(frozen=True, eq=False)
class _Work:
    model: Model
    prompts: _Prompts
    texts: Tokens | None
    positions: Positions
    new_tokens: int
    blocks: Blocks
    sink: Sink

    def steering(
        self,
        part: Part,
        scales: tuple[float, ...],
        directions: Sequence[Callable[[float, Positions], list[Intervention]]],
    ) -> Steering:
        """Every direction at every scale."""
        began = time.perf_counter()
        base = self.base
        measured = time.perf_counter()
        unsteered = self._written([]) if self.new_tokens else []
        written = time.perf_counter() - measured
        cells = [(who, scale) for who in range(len(directions)) for scale in scales]
        seconds = (measured - began) * len(cells) + written * len(scales)
        cost = Estimate(seconds, forwards=len(cells) * self._examples)
        self.sink(Event("note", TASK, message=f"expected cost: {cost.describe()}"))
        self.sink(Event("start", TASK, 0, len(cells)))
        found: dict[tuple[int, float], Arrays] = {}
        for done, (who, scale) in enumerate(cells, 1):
            edits, name = directions[who], "part" if who == 0 else f"random {who - 1}"
            compute = self._cell(edits, scale, base, own=who == 0)
            found[who, scale] = self.blocks.get(f"{name} {scale!r}", compute)
            self.sink(Event("advance", TASK, done, len(cells)))
        self.sink(Event("end", TASK, len(cells), len(cells)))
        return self._result(part, scales, len(directions), unsteered, found)

    def instead(self, asked: _Prompts) -> dict[str, Any]:
        """What other prompts change without steering: `instead_effects` [example], and what is written after them."""

        def compute() -> Arrays:
            with torch.no_grad():
                logits = asked.logits(self.model.run(asked.tokens).logits)
            change = self.prompts.of(logits, self.base["logits"]).cpu() - self.base["value"]
            made = self.model.generate(asked.tokens, self.new_tokens).written if self.new_tokens else []
            return {"effects": change.double().numpy(), "texts": np.array(list(made), dtype=str)}

        kept = self.blocks.get("instead", compute)
        return {"instead_effects": kept["effects"], "instead_texts": tuple(map(str, kept["texts"]))}

    @property
    def _examples(self) -> int:
        return len(self.prompts.tokens) + (0 if self.texts is None else len(self.texts))

    @cached_property
    def base(self) -> dict[str, Any]:
        """Without steering."""
        with torch.no_grad():
            logits = self.prompts.logits(self.model.run(self.prompts.tokens).logits)
        return {
            "logits": logits,
            "value": self.prompts.of(logits, logits).cpu(),
            "loss": self._loss([])[0],
        }

    def _cell(
        self, edits: Callable[[float, Positions], list[Intervention]], scale: float, base: dict[str, Any], own: bool
    ) -> Callable[[], Arrays]:
        def compute() -> Arrays:
            with torch.no_grad():
                run = self.model.run(self.prompts.tokens, interventions=edits(scale, self.positions))
                logits = self.prompts.logits(run.logits)
                loss, diagnostics = self._loss(edits(scale, None))
                kept = {
                    "effect": (self.prompts.of(logits, base["logits"]).cpu() - base["value"]).double().numpy(),
                    "loss": loss.numpy(),
                    "diagnostics": np.array(json.dumps([_figures(run.diagnostics), _figures(diagnostics)])),
                }
                if own:
                    change = (logits.log_softmax(-1) - base["logits"].log_softmax(-1)).mean(0)
                    order = change.argsort(descending=True).cpu()
                    kept["promoted"], kept["suppressed"] = order[:LIKELIEST].numpy(), order.flip(0)[:LIKELIEST].numpy()
                    kept["texts"] = np.array(self._written(edits(scale, self.positions)) if self.new_tokens else [""])
                return kept

        return compute

    def _loss(self, edits: Sequence[Intervention]) -> tuple[Float[Tensor, " text"], Iterable[Any]]:
        """Mean next-token loss of each plain text, and of each edit the batch in which it is least natural."""
        if self.texts is None:
            return torch.zeros(0, dtype=torch.float64), ()
        size, losses = max(1, BATCH // self.texts.ids.shape[1]), []
        seen: list[Sequence[Any]] = []
        for rows in torch.arange(len(self.texts)).split(size):
            some = self.texts.take(rows)
            with torch.no_grad():
                run = self.model.run(some, interventions=edits)
            losses.append(next_token_loss_of(run.logits, some).double().cpu())
            seen.append(run.diagnostics)
        worst = [max(edit, key=lambda one: float(one["z_rms"])) for edit in zip(*seen, strict=True)]
        return torch.cat(losses), worst

    def _written(self, edits: Sequence[Intervention]) -> list[str]:
        return list(self.model.generate(self.prompts.tokens, self.new_tokens, interventions=edits).written)

    def _result(
        self,
        part: Part,
        scales: tuple[float, ...],
        n: int,
        unsteered: Sequence[str],
        found: dict[tuple[int, float], Arrays],
    ) -> Steering:
        stacked = lambda name: np.stack([[found[who, s][name] for s in scales] for who in range(n)])  # noqa: E731
        effect, loss = stacked("effect"), stacked("loss")
        own = [found[0, scale] for scale in scales]
        word = speller(self.model.tokenizer)
        return Steering(
            part=part,
            scales=scales,
            metric=self.prompts.name,
            unit=self.prompts.unit,
            base=self.base["value"].double().numpy(),
            effects=effect[0],
            random=effect[1:],
            loss=self.base["loss"].numpy(),
            cost=loss[0] - self.base["loss"].numpy(),
            random_cost=loss[1:] - self.base["loss"].numpy(),
            promoted=tuple(tuple(map(word, one["promoted"].tolist())) for one in own),
            suppressed=tuple(tuple(map(word, one["suppressed"].tolist())) for one in own),
            texts=tuple(tuple(map(str, one["texts"])) if self.new_tokens else () for one in own),
            unsteered=tuple(unsteered),
            diagnostics=tuple(json.loads(str(one["diagnostics"])) for one in own),
            groups=self.prompts.groups,
            clusters=self.prompts.clusters,
        )


def _figures(diagnostics: Iterable[Any]) -> list[dict[str, float]]:
    return [{name: float(one[name]) for name in ("norm_ratio", "z_rms")} for one in diagnostics]
