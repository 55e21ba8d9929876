"""Metrics: one number per example, never reduced, that declare what they need of a run.

Because a logit difference declares two tokens at one position, a sweep never makes full-vocabulary logits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.errors import InputError
from vesalius.inputs import Pairs, Tokens

TokenChoice = Literal["answer_distractor", "answer", "vocab"]


@dataclass(frozen=True)
class Needs:
    """What a metric reads: which positions ("targets": those of teacher-forced answers), which tokens, and whether it
    compares with the base run."""

    positions: Literal["read", "targets", "all"] = "read"
    tokens: TokenChoice = "vocab"
    base: bool = False


@dataclass(frozen=True, repr=False)
class Metric:
    """A named per-example number. Call it with a run's logits, or let a sweep hand it just the logits it needs."""

    name: str
    unit: str
    needs: Needs
    of: Callable[[Tensor, Tensor | None, Pairs], Tensor]
    """(logits [example, token] chosen by `needs`, the base run's, pairs) -> [example]."""
    of_sequences: Callable[[Tensor, Tensor], Tensor] | None = None
    """For answers of several tokens: (log-probability of each answer, of each distractor) -> [example], in nats."""

    def __repr__(self) -> str:
        return f"Metric({self.name}, {self.unit})"

    def rows_of(self, pairs: Pairs) -> tuple[Pairs, Metric, Callable[[Tensor], Tensor]]:
        """What is run and scored: rows, a row's metric, and the way from values [..., row] to [..., example].

        The pairs themselves, or for answers of several tokens their teacher-forced rows. Raises InputError for a metric
        that is not one of log-probabilities then.
        """
        if not pairs.several:
            return pairs, self, lambda values: values
        return pairs.teacher_forced(), *self._by_sequence()

    def tokens(self, pairs: Pairs) -> Int[Tensor, "example k"] | None:
        """Token ids whose logits it reads, or None for the whole vocabulary."""
        if self.needs.tokens == "answer_distractor":
            return torch.stack([pairs.answer, pairs.distractor], 1)
        return pairs.answer[:, None] if self.needs.tokens == "answer" else None

    def __call__(
        self,
        logits: Float[Tensor, "example *pos vocab"],
        pairs: Pairs,
        base: Float[Tensor, "example *pos vocab"] | None = None,
    ) -> Float[Tensor, " example"]:
        """Per-example value from full logits, or a classifier's [example, class].

        Raises InputError when base logits are needed and missing.
        """
        self.check_one_token(pairs)
        if self.needs.base and base is None:
            raise InputError(f"{self.name} compares with a base run: pass its logits as base=")
        return self.of(self._select(logits, pairs), None if base is None else self._select(base, pairs), pairs)

    def check_one_token(self, pairs: Pairs) -> None:
        """Raises InputError for answers of several tokens, which take runs of their own."""
        if pairs.several:
            raise InputError(
                f"{self.name} of answers of several tokens cannot be read off one run; vs.sweep and vs.Runs score them "
                "as sequences"
            )

    def _by_sequence(self) -> tuple[Metric, Callable[[Tensor], Tensor]]:
        combine = self.of_sequences
        if combine is None:
            raise InputError(f"{self.name} takes answers of one token; logit_diff and answer_logprob take several")
        return replace(sequence_logprob, name=self.name), lambda values: combine(*values.chunk(2, -1))

    def _select(self, logits: Tensor, pairs: Pairs) -> Tensor:
        logits = wide(logits)
        if self.needs.positions == "all":
            return logits
        rows = torch.arange(len(pairs), device=logits.device)
        if self.needs.positions == "targets":
            return logits[rows[:, None], pairs.reads.to(logits.device)]
        read = logits if logits.ndim == 2 else logits[rows, pairs.read_at().to(logits.device)]
        tokens = self.tokens(pairs)
        return read if tokens is None else read.gather(1, tokens.to(logits.device))


def wide(logits: Tensor) -> Tensor:
    """In float32 or wider: logits of a half-precision model are exact numbers, and metrics do not round them again."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logit_diff(logits: Tensor, _base: Tensor | None, _pairs: Pairs) -> Tensor:
    return logits[:, 0] - logits[:, 1]


def _answer_logprob(logits: Tensor, _base: Tensor | None, pairs: Pairs) -> Tensor:
    return logits.log_softmax(-1).gather(1, pairs.answer[:, None].to(logits.device))[:, 0]


def _sequence_logprob(logits: Tensor, _base: Tensor | None, pairs: Pairs) -> Tensor:
    assert pairs.targets is not None
    targets = pairs.targets.to(logits.device)
    each = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return (each * (targets >= 0)).sum(1)


def _kl(logits: Tensor, base: Tensor | None, _pairs: Pairs) -> Tensor:
    assert base is not None
    reference = base.log_softmax(-1)
    return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)


def _next_token_loss(logits: Tensor, _base: Tensor | None, pairs: Pairs) -> Tensor:
    return next_token_loss_of(logits, pairs.tokens("clean"))


def next_token_loss_of(logits: Float[Tensor, "batch pos vocab"], tokens: Tokens) -> Float[Tensor, " batch"]:
    """Mean cross-entropy (nats) of each next real token, per example."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), tokens.ids[:, 1:].to(logits.device), reduction="none"
    )
    keep = (tokens.real[:, 1:] & tokens.real[:, :-1]).to(losses.device)
    return (losses * keep).sum(1) / keep.sum(1)


logit_diff = Metric("logit_diff", "logits", Needs(tokens="answer_distractor"), _logit_diff, lambda a, d: a - d)
"""Logit of the answer minus logit of the distractor at the read position.

Of answers of several tokens: log-probability of the answer minus that of the distractor, which for one token is the
same number.
"""
answer_logprob = Metric("answer_logprob", "nats", Needs(tokens="vocab"), _answer_logprob, lambda a, _: a)
"""Log-probability of the answer at the read position; of several tokens, of all of them in order."""
sequence_logprob = Metric("sequence_logprob", "nats", Needs(positions="targets", tokens="vocab"), _sequence_logprob)
"""Log-probability of a teacher-forced row's targets."""
kl_divergence = Metric("kl_divergence", "nats", Needs(tokens="vocab", base=True), _kl)
"""KL(base || edited) of the next-token distribution at the read position, summed over the vocabulary."""
next_token_loss = Metric("next_token_loss", "nats", Needs(positions="all"), _next_token_loss)
"""Mean next-token cross-entropy over the clean prompt's real tokens."""
