"""Heads in any text: where a head looks, and whether it writes what it looks at. One pass over texts for all heads.

Named places of a prompt need a task; these places every text has. What is counted is attention from the fourth token
on, in each text, at those tokens that have such a place before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Corpus, Tokens
from vesalius.jobs import track
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.parts import Part, Unit
from vesalius.quantities.attends import FIRST_QUERY
from vesalius.quantities.base import PROBABILITY, Parameters, PerExample, Quantity, head, not_a_head
from vesalius.quantities.fires_where import text_of
from vesalius.quantities.matching import MOST, WINDOW, Matched
from vesalius.quantities.runs import Runs
from vesalius.site import Site

TARGETS: Mapping[str, str] = {
    "previous": "the token before",
    "two back": "the token two back",
    "itself": "the token itself",
    "repeated": "earlier occurrences of the same token",
    "after repeated": "the token after an earlier occurrence of the same token",
    "punctuation": "punctuation",
    "line break": "line breaks",
    "capitalised": "capitalised words",
    "digits": "digits",
    "first": "the first token",
}
"""Where a head can look in any text, in words."""
_BACK = {"itself": 0, "previous": 1, "two back": 2}
_CLASSES = ("punctuation", "line break", "capitalised", "digits")
# Numbers of attention patterns that are kept at once: half a gibibyte.
_AT_ONCE = 2**27


@dataclass(frozen=True, eq=False)
class Seen:
    """What a pass over texts showed of every head. numbers: head -> its row.

    mass: target -> attention to it; elsewhere: target -> what as many other places get; copied: logits that the tokens
    looked at gain; entropy: of attention, in nats.
    """

    numbers: Mapping[Part, int]
    mass: Mapping[str, Float[Tensor, "head example"]]
    elsewhere: Mapping[str, Float[Tensor, "head example"]]
    copied: Float[Tensor, "head example"] | None
    entropy: Float[Tensor, " head"]


class _InText(Quantity):
    """Of heads, on a corpus: with the heads of nearby layers that are most alike in entropy as controls."""

    kind = "predictive"

    def refuses(self, runs: Runs, part: Part) -> str:
        if not isinstance(runs.data, Corpus):
            return f"{self.name} is measured on texts, a vs.Corpus; these are {runs.data!r}"
        return not_a_head(part) or unreadable(runs.model)

    def matched(self, runs: Runs, part: Part, members: Sequence[Part], parameters: Parameters) -> Matched:
        site, seen = head(part), seen_in(runs)
        own, taken = float(seen.entropy[seen.numbers[part]]), {part, *members}
        layer = site.layer or 0
        pool = [one for one in seen.numbers if one not in taken and abs((head(one).layer or 0) - layer) <= WINDOW]
        nearest = sorted(pool, key=lambda one: abs(float(seen.entropy[seen.numbers[one]]) - own))[:MOST]
        chosen = tuple(sorted(nearest, key=lambda one: one.writes[0].order))
        return Matched(f"{len(chosen)} heads nearest in attention entropy, within {WINDOW} layers", chosen)


class LooksAt(_InText):
    """Attention mass of a head on the places `to` (one of `TARGETS`), per text.

    The mean over the tokens that have such a place before them; a text without any counts as 0. Null `elsewhere`: what
    as many other places get that the same token can see, without the first, at which heads rest.
    """

    name = "looks_at"
    scale = PROBABILITY

    def unit(self, runs: Runs) -> str:
        return "attention"

    def phrase(self, parameters: Parameters) -> str:
        return f"looks at {TARGETS[_target(parameters)]}"

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        seen = seen_in(runs)
        return seen.mass[_target(parameters)][seen.numbers[part]]

    def nulls(self, runs: Runs, part: Part, parameters: Parameters) -> Mapping[str, PerExample]:
        seen = seen_in(runs)
        return {"elsewhere": seen.elsewhere[_target(parameters)][seen.numbers[part]]}


class WritesWhatItSees(_InText):
    """Logits that a head adds to the tokens that it looks at, less what it adds to those that it could have looked at,
    per text: means, weighted by its attention, and without weights. The first token, where heads rest, is left out.

    A direct effect, with the final norm frozen (see `model.direct`): positive is copying, negative is suppression
    (McDougall et al. 2023). Not to be had of models whose logits are no sum of what their heads write.
    """

    name = "writes_what_it_sees"
    scale = "logits"

    def unit(self, runs: Runs) -> str:
        return "logits"

    def phrase(self, parameters: Parameters) -> str:
        return "writes onto the logits of the tokens that it looks at"

    def refuses(self, runs: Runs, part: Part) -> str:
        adapter = runs.model.adapter
        indirect = adapter is not None and (not adapter.direct or bool(adapter.stacks))
        return super().refuses(runs, part) or ("the logits are no sum of what heads write" if indirect else "")

    def scale_of(self, runs: Runs, part: Part, parameters: Parameters) -> float | None:
        """1: values are logits."""
        return 1.0

    def measure(self, runs: Runs, part: Part, parameters: Parameters) -> PerExample:
        seen = seen_in(runs)
        if seen.copied is None:
            raise InputError(f"{self.name} of {part} cannot be measured: {self.refuses(runs, part)}")
        return seen.copied[seen.numbers[part]]


def _target(parameters: Parameters) -> str:
    """Raises UnknownNameError for a place that is no target."""
    to = str(parameters["to"])
    if to not in TARGETS:
        raise UnknownNameError("place that a head can look at in a text", to, TARGETS)
    return to


def unreadable(model: Model) -> str:
    """Why attention cannot be read in texts; empty when it can."""
    if model.adapter is None or not model.adapter.causal or model.adapter.stacks:
        return f"{model.name} has no causal attention that is known here; give vs.Model(net, adapter=vs.Adapter(...))"
    if model.tokenizer is None:
        return f"{model.name} has no tokenizer, and where heads look is said of text"
    read = any(site.kind == "pattern" for site in model.sites())
    return "" if read else f"the attention of {model.name} goes through no interface where it can be read"


def seen_in(runs: Runs) -> Seen:
    """What every head does in the texts of these runs; one pass, kept with them. Raises InputError for pairs."""
    if not isinstance(runs.data, Corpus):
        raise InputError(f"where heads look in any text is measured on texts, a vs.Corpus; these are {runs.data!r}")
    return runs.once("heads in text", lambda: _seen(runs))


def _seen(runs: Runs) -> Seen:
    """A few texts at a time, those of like length together; what each shows is kept with the runs' blocks."""
    assert isinstance(runs.data, Corpus)
    tokens, (layers, heads) = runs.data.tokens, _layout(runs.model)
    at_once = max(1, _AT_ONCE // (layers * heads * int(tokens.lengths.max()) ** 2))
    chunks = tokens.lengths.argsort(descending=True, stable=True).split(at_once)
    whole: dict[str, Tensor] = {}
    for number, rows in enumerate(track(chunks, f"read {layers * heads} heads", sink=runs.sink)):
        found = runs.stored(f"heads in text {number}", lambda rows=rows: _of_some(runs, rows))  # type: ignore[misc]
        for name, values in found.items():
            if name not in whole:
                whole[name] = torch.zeros(*values.shape[:-1], len(tokens))
            whole[name][..., rows] = torch.from_numpy(values)
    parts: dict[Part, int] = {Unit(Site("z", n // heads, n % heads)): n for n in range(layers * heads)}
    mass, elsewhere = (dict(zip(TARGETS, whole[name], strict=True)) for name in ("mass", "elsewhere"))
    return Seen(parts, mass, elsewhere, whole.get("copied"), whole["entropy"].mean(1))


def _layout(model: Model) -> tuple[int, int]:
    return model.architecture[1].n_layers, model.architecture[1].n_heads


def _of_some(runs: Runs, rows: Int[Tensor, " example"]) -> dict[str, NDArray[Any]]:
    """What a few texts show: mass and elsewhere [target, head, example], copied and entropy [head, example]."""
    model, (layers, _), text = runs.model, _layout(runs.model), text_of(runs)
    assert isinstance(runs.data, Corpus)
    tokens, direct, last = runs.data.tokens, model.architecture[0].direct, f"layers.{layers - 1}.resid_post"
    some = tokens.take(rows, int(tokens.lengths[rows].max()))
    places = _Places.of(some, {name: text.of_class(name)[rows, : some.ids.shape[1]] for name in _CLASSES})
    found: dict[str, list[Tensor]] = {name: [] for name in ("mass", "elsewhere", "copied", "entropy")}
    with computing(), torch.no_grad():
        run = model.run(some, capture=["layers.*.pattern", *([last, "layers.*.z"] if direct else [])])
        toward = _toward(model, some, run[last]) if direct else None
        for layer in range(layers):
            pattern = run[f"layers.{layer}.pattern"].float().cpu()
            both = [places.looked(pattern, to) for to in TARGETS]
            found["mass"].append(torch.stack([mass for mass, _ in both]))
            found["elsewhere"].append(torch.stack([mean for _, mean in both]))
            found["entropy"].append(places.averaged(torch.special.entr(pattern).sum(-1)))
            if toward is not None:
                writes = toward(model.head_writes(layer, run[f"layers.{layer}.z"]))
                found["copied"].append(places.averaged(places.copied(pattern, writes)))
    return {name: torch.cat(of, -2).numpy() for name, of in found.items() if of}


def _toward(
    model: Model, some: Tokens, final: Float[Tensor, "example pos d_model"]
) -> Callable[[Tensor], Float[Tensor, "example head query_pos key_pos"]]:
    """From what heads write to what that adds to the logit of every token of the same text."""
    adapter, layout = model.architecture
    norm, unembedding = submodule(model.module, adapter.final_norm), model.unembedding.matrix
    rows = unembedding[some.ids.to(unembedding.device)].to(final) * gain(adapter.norm, norm).to(final)
    scale = frozen_scale(adapter.norm, norm, final) * layout.logit_scale
    if adapter.norm == "layer":
        rows = rows - rows.mean(-1, keepdim=True)

    def logits(writes: Float[Tensor, "example query_pos head d_model"]) -> Tensor:
        return torch.einsum("eqhd,ekd->ehqk", writes * scale[:, :, None], rows).float().cpu()

    return logits


@dataclass(frozen=True, eq=False)
class _Places:
    """Targets of some texts. queries: tokens whose attention counts; visible: what they see, but for the first."""

    masks: Mapping[str, Bool[Tensor, "example query_pos key_pos"]]
    queries: Bool[Tensor, "example query_pos"]
    visible: Bool[Tensor, "example query_pos key_pos"]

    @classmethod
    def of(cls, tokens: Tokens, classes: Mapping[str, Bool[Tensor, "example pos"]]) -> _Places:
        ids: Int[Tensor, "example pos"] = tokens.ids.cpu()
        real, at = tokens.real.cpu(), torch.arange(ids.shape[1])
        back = at[:, None] - at[None]
        same = (ids[:, :, None] == ids[:, None]) & (back > 0)
        after = torch.nn.functional.pad(same, (1, 0))[:, :, :-1] & (back > 0)
        masks = {name: (back == steps).expand_as(same) for name, steps in _BACK.items()}
        masks |= {"repeated": same, "after repeated": after, "first": (at == 0).expand_as(same)}
        masks |= {name: of[:, None] & (back > 0) for name, of in classes.items()}
        visible = ((back >= 0) & (at > 0)).expand_as(same)
        # Attention to the first token is rest, whatever token it is.
        masks = {name: mask if name == "first" else mask & visible for name, mask in masks.items()}
        return cls(masks, real & (at >= FIRST_QUERY), visible)

    def looked(self, pattern: Float[Tensor, "example head query_pos key_pos"], to: str) -> tuple[Tensor, Tensor]:
        """Attention to a target, and to as many other places: [head, example]."""
        mask = self.masks[to]
        others = self.visible & ~mask
        n, rest = mask.sum(-1), others.sum(-1)
        counted = self.queries & (n > 0) & (rest > 0)
        seen = torch.einsum("ehqk,eqk->ehq", pattern, mask.float())
        mean = torch.einsum("ehqk,eqk->ehq", pattern, others.float()) * (n / rest.clamp_min(1))[:, None]
        return self.averaged(seen, counted), self.averaged(mean, counted)

    def copied(self, pattern: Tensor, logits: Tensor) -> Float[Tensor, "example head query_pos"]:
        """What the tokens that are looked at gain, less the mean of those that could have been."""
        weights = pattern * self.visible[:, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(pattern.dtype).tiny)
        mean = (logits * self.visible[:, None]).sum(-1) / self.visible.sum(-1).clamp_min(1)[:, None]
        return (weights * logits).sum(-1) - mean

    def averaged(self, values: Tensor, counted: Tensor | None = None) -> Float[Tensor, "head example"]:
        """Mean over the tokens that count."""
        which = (self.queries if counted is None else counted)[:, None]
        return ((values * which).sum(-1) / which.sum(-1).clamp_min(1)).T
