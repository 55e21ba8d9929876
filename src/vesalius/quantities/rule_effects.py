"""What a rule says about effects on texts: that it can stand in for the part, and which next tokens the part promotes.

Both run the model on the texts again, with an edit of one part, for the part, its controls and the nulls: about ten
passes for a claim, where scores of a rule share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vesalius.intervention import Patch
from vesalius.metric import next_token_loss_of
from vesalius.parts import Part
from vesalius.protocol import canonical_json
from vesalius.quantities.activation import counted, token_values, tokens_of
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity, control_parts
from vesalius.quantities.fires_where import moved, picked, without_tokenizer
from vesalius.quantities.matching import Matched, matched_controls
from vesalius.quantities.rules import in_words
from vesalius.quantities.runs import Runs
from vesalius.seeds import generator_for

CONTROLS = 3
"""Matched parts that are compared with, of those that are nearest."""
_LOGITS = 1 << 26
"""Texts are run together while they have fewer logits than this (256 MB)."""
MEAN_ABLATION = "what ablation to the mean costs"
Values = Float[Tensor, "example pos"]
Picked = Bool[Tensor, "example pos"]


class StandsIn(Quantity):
    """Loss (nats a token) that the rule gives back where it stands in for a part that is otherwise ablated to its mean.

    Text by text: the next-token loss with the part at its mean everywhere, less that with the part at one value on the
    tokens that the rule picks and at another elsewhere. Parameters: `rule`, and these values, `on`, `off` and `mean`,
    from discovery; for a control the means on these texts, which favours it. Null `shuffled`: as many tokens of each
    text picked at random.
    """

    name = "stands_in"
    scale = MEAN_ABLATION

    def unit(self, runs: Runs) -> str:
        return "nats per token"

    def phrase(self, parameters: Parameters) -> str:
        return f"does in the model what a part would do that fires {in_words(parameters['rule'])}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return without_tokenizer(runs)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._gained(runs, part, parameters, picked(runs, parameters["rule"]))

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        return {"shuffled": self._gained(runs, part, parameters, moved(runs, parameters["rule"]))}

    def scale_values(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample | None:
        """What ablation to the mean costs."""
        mean = _constant(runs, self._levels(runs, part, parameters)[2])
        return loss(runs, part, mean) - loss(runs, part, None)

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        return _few(matched_controls(runs, part, members))

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        own = {key: value for key, value in parameters.items() if key not in ("on", "off", "mean")}
        return super().control(runs, part, own, control)

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """What the two edits cost, and how far the rule's values lie from the part's own, in standard deviations."""
        values, real = token_values(runs, [part])[0], counted(runs)
        on, off, mean = self._levels(runs, part, parameters)
        rule = torch.where(picked(runs, parameters["rule"]), on, off)
        spread = values[real].std().clamp_min(1e-12)
        return {
            "loss": runs.mean(loss(runs, part, None)),
            "loss_with_mean": runs.mean(loss(runs, part, _constant(runs, mean))),
            "loss_with_rule": runs.mean(loss(runs, part, rule)),
            "off_distribution": {"z_rms": float(((rule - values)[real] / spread).square().mean().sqrt())},
        }

    def _gained(self, runs: Runs, part: Part, parameters: Parameters, some: Picked) -> PerExample:
        on, off, mean = self._levels(runs, part, parameters)
        return loss(runs, part, _constant(runs, mean)) - loss(runs, part, torch.where(some, on, off))

    def _levels(self, runs: Runs, part: Part, parameters: Parameters) -> tuple[float, float, float]:
        """The part's value where the rule picks, elsewhere, and on average."""
        if "on" in parameters:
            return float(parameters["on"]), float(parameters["off"]), float(parameters["mean"])
        return levels(runs, part, picked(runs, parameters["rule"]))


class Promotes(Quantity):
    """How much more likely the next token is one of the parameter `tokens` because of what the part does.

    Text by text, over the tokens that the `rule` picks: log-probability that the next token is among them, less the
    same with the part at the value `rest` (0 for a latent, its mean for other parts). Texts without a picked token
    count as 0. Null `shuffled`: as many tokens of the vocabulary at random.
    """

    name = "promotes"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "nats"

    def phrase(self, parameters: Parameters) -> str:
        said = parameters.get("words") or [f"token {token}" for token in parameters["tokens"]]
        listed = ", ".join(f'"{word}"' for word in said[:6])
        return f"makes {listed} likelier as the next token {in_words(parameters['rule'])}"

    def refuses(self, runs: Runs, part: Part) -> str:
        return without_tokenizer(runs)

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        return self._change(runs, part, parameters, [int(token) for token in parameters["tokens"]])

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        drawn = torch.randperm(runs.model.architecture[1].vocab, generator=generator_for("promotes", runs.seed))
        return {"shuffled": self._change(runs, part, parameters, drawn[: len(parameters["tokens"])].tolist())}

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """1 nat."""
        return 1.0

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        return _few(matched_controls(runs, part, members))

    def control(self, runs: Runs, part: Part, parameters: Parameters, control: Mapping[str, Any]) -> PerExample | None:
        """Controls are put to their own means."""
        others = control_parts(control, part)
        means = [levels(runs, other, picked(runs, parameters["rule"]))[2] for other in others]
        each = [
            self.measure(runs, other, {**parameters, "rest": mean}) for other, mean in zip(others, means, strict=True)
        ]
        return torch.stack(each).mean(0) if each else None

    def diagnostics(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, Any]:
        """How far the value put in lies from the part's own on picked tokens, in standard deviations."""
        values, real = token_values(runs, [part])[0], counted(runs)
        some = picked(runs, parameters["rule"])
        gap = (float(parameters["rest"]) - values[some]) / values[real].std().clamp_min(1e-12)
        return {"off_distribution": {"z_rms": float(gap.square().mean().sqrt()) if len(gap) else 0.0}}

    def _change(self, runs: Runs, part: Part, parameters: Parameters, tokens: list[int]) -> PerExample:
        some, rest = picked(runs, parameters["rule"]), _constant(runs, float(parameters["rest"]))

        def likelihood(logits: Tensor, rows: Tensor) -> Tensor:
            chosen = logits.float().log_softmax(-1)[..., tokens].logsumexp(-1).cpu()
            return (chosen * some[rows]).sum(1) / some[rows].sum(1).clamp_min(1)

        key = ("promotes", canonical_json(parameters["rule"]), tuple(tokens))
        clean = runs.once((*key, None), lambda: _over_texts(runs, part, None, likelihood))
        return clean - runs.once((*key, part, rest[0, 0].item()), lambda: _over_texts(runs, part, rest, likelihood))


def levels(runs: Runs, part: Part, some: Picked) -> tuple[float, float, float]:
    """A part's mean value on some tokens, on the others, and on all; that on all where there are none."""
    values, real = token_values(runs, [part])[0].double(), counted(runs)
    mean = float(values[real].mean())
    both = [values[real & chosen] for chosen in (some, ~some)]
    on, off = (float(found.mean()) if len(found) else mean for found in both)
    return on, off, mean


def loss(runs: Runs, part: Part, values: Values | None) -> PerExample:
    """Next-token loss of each text with the part at these values; None: as it is."""
    key = None if values is None else (part, hash(values.numpy().tobytes()))
    kept = runs.once("losses", dict)
    if key not in kept:
        tokens = tokens_of(runs)
        kept[key] = _over_texts(
            runs, part, values, lambda logits, rows: next_token_loss_of(logits, tokens.take(rows)).cpu()
        )
    found: PerExample = kept[key]
    return found


def _over_texts(runs: Runs, part: Part, values: Values | None, read: Any) -> PerExample:
    """read(logits, rows) of a few texts after the other, run with the part at these values."""
    found = []
    tokens = tokens_of(runs)
    runs.model.check_evaluating()
    together = max(1, _LOGITS // (tokens.ids.shape[1] * runs.model.architecture[1].vocab))
    for rows in torch.arange(runs.n).split(together):
        some = tokens.take(rows)
        edits = [] if values is None else [Patch(part, source=values[rows])]
        found.append(read(runs.model.run(some, interventions=edits).logits, rows).double())
    return torch.cat(found)


def _constant(runs: Runs, value: float) -> Values:
    return torch.full(tokens_of(runs).ids.shape, value)


def _few(found: Matched) -> Matched:
    """The nearest of them: each takes a run of its own."""
    if found.made:
        return replace(found, rule=f"{CONTROLS} random directions", made={name: CONTROLS for name in found.made})
    return Matched(f"the nearest {min(CONTROLS, len(found.parts))} of {found.rule}", found.parts[:CONTROLS])
