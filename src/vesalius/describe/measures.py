"""What roles predict about one component, as figures per example: the same functions measure discovery and validation.

    attends           attention mass from one place to another, on the clean prompts
    copies            what a head would write onto a token if it attended fully to it, against other prompts' tokens
    direct_effect     contribution to the logit difference with the final norm frozen (direct logit attribution)
    total_effect      effect of patching the component's corrupted value (or its clean one, denoising)
    moves_attention   how far the same patch moves other heads' attention from answer to distractor

Every figure is raw and oriented so that positive helps the answer, or is more attention. Figures are kept on the bench.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.bench import Bench
from vesalius.describe.places import positions, present
from vesalius.errors import InputError, PairsError, UnknownNameError
from vesalius.model.direct import frozen_norm
from vesalius.patching.variants import Variant
from vesalius.site import Site

Parameters = Mapping[str, Any]
PerExample = Float[Tensor, " example"]

UNITS = {
    "attends": "attention",
    "copies": "logits",
    "direct_effect": "logits",
    "total_effect": "logits",
    "moves_attention": "attention",
}
# Attention to the place before is averaged from here on: earlier queries have too few keys to choose from.
FIRST_QUERY = 3


def attends(bench: Bench, parameters: Parameters) -> PerExample:
    """Attention mass of head `component` from place `query` to place `key`, per clean prompt.

    query "every" with key "previous" or "two back": mean over the queries from position 3 to the end. key "others":
    mean over all positions but the first that the query can see. Raises PairsError where a prompt lacks a place.
    """
    component, query, key = head(parameters), str(parameters["query"]), str(parameters["key"])
    if query == "every":
        return _relative(bench, component, key)
    at = positions(bench, query)
    seen = _attention_from(bench, component, at)
    if key == "others":
        return (1 - seen[:, 0]) / at.clamp_min(1)
    # A key behind the query gets no attention: what causal attention says.
    return seen.gather(1, positions(bench, key)[:, None])[:, 0]


def _attention_from(bench: Bench, component: Site, at: Int[Tensor, " example"]) -> Float[Tensor, "example key_pos"]:
    return bench.pattern(component)[torch.arange(bench.n), at]


def _relative(bench: Bench, component: Site, key: str) -> PerExample:
    back = {"previous": 1, "two back": 2}
    if key not in back:
        raise UnknownNameError("relative place", key, back)
    end = bench.named_positions["end"]
    if bool((end < FIRST_QUERY).any()):
        raise PairsError(f"a prompt ends before position {FIRST_QUERY}: too short for attention to {key!r}")
    mass = bench.pattern(component).diagonal(-back[key], 1, 2)
    query = torch.arange(mass.shape[1])[None] + back[key]
    counted = (query >= FIRST_QUERY) & (query <= end[:, None])
    return (mass * counted).sum(1) / counted.sum(1)


def copies(bench: Bench, parameters: Parameters) -> PerExample:
    """Logits that head `component` adds to the token at place `key` if it attends to that place alone, minus what it
    adds, on average, to the answers and distractors of the other prompts. The final norm is frozen at the clean run.

    `key` is "answer" or a place of the distractor (Wang et al. 2022, section 3.1, "copy score", as a difference of
    logits). Raises PairsError when other prompts have no other tokens.
    """
    component, key = head(parameters), str(parameters["key"])
    assert component.layer is not None and component.index is not None
    run = bench.run("clean")
    value = run.values[component.layer][torch.arange(bench.n), :, positions(bench, key)]
    # As if every head attended there; one head's write does not depend on the others, short of a norm after them.
    heads = bench.model.architecture[1].n_heads
    spread = value.repeat_interleave(heads // value.shape[1], 1)
    write = bench.model.head_writes(component.layer, spread)[:, component.index]
    return torch.einsum("ed,ed->e", write, _copying_direction(bench, key).to(write))


def _copying_direction(bench: Bench, key: str) -> Float[Tensor, "example d_model"]:
    """Towards the token at `key`, away from the mean of the other prompts' tokens."""
    if ("copying", key) not in bench.memo:
        pairs = bench.pairs
        own = pairs.answer if key == "answer" else pairs.distractor
        final = bench.run("clean").resid[-1][torch.arange(bench.n), pairs.at]
        vocabulary, counted = _other_tokens(bench)
        total = torch.zeros_like(final)
        for token, here in zip(vocabulary, counted.T, strict=True):
            total += here[:, None] * frozen_norm(bench.model, final, own, token.expand_as(own)).direction
        bench.memo["copying", key] = total / counted.sum(1)[:, None]
    return bench.memo["copying", key]


def _other_tokens(bench: Bench) -> tuple[Int[Tensor, " token"], Bool[Tensor, "example token"]]:
    """All answers and distractors of the data, and which of them are not the example's own."""
    pairs = bench.pairs
    vocabulary = torch.cat([pairs.answer, pairs.distractor]).unique()
    counted = (vocabulary[None] != pairs.answer[:, None]) & (vocabulary[None] != pairs.distractor[:, None])
    if not bool(counted.any(1).all()):
        raise PairsError("copying is measured against the other prompts' answers and distractors, but there are none")
    return vocabulary, counted


def direct_effect(bench: Bench, parameters: Parameters) -> PerExample:
    """Contribution of `component` to the clean run's logit difference, the final norm frozen (Elhage et al. 2021)."""
    return bench.direct(component_of(parameters))


def total_effect(bench: Bench, parameters: Parameters) -> PerExample:
    """Effect of patching `component` alone, by `corruption` and `direction` (default the main one, noising)."""
    return bench.effects([component_of(parameters)], *condition(bench, parameters))[0]


def moves_attention(bench: Bench, parameters: Parameters) -> PerExample:
    """Change in the `movers`' attention, at the end, to the answer minus the distractor, when `component` is patched.

    Mean over the movers; positive: the component's clean value turns them towards the answer. Movers that are not in a
    later layer cannot change: InputError.
    """
    component = component_of(parameters)
    movers = [Site.parse(name) for name in parameters["movers"]]
    measure_shifts(bench, [component], movers, *condition(bench, parameters))
    kept = [bench.memo[_shift_key(component, mover, *condition(bench, parameters))] for mover in movers]
    return torch.stack(kept).mean(0)


MEASURES: Mapping[str, Callable[[Bench, Parameters], PerExample]] = {
    "attends": attends,
    "copies": copies,
    "direct_effect": direct_effect,
    "total_effect": total_effect,
    "moves_attention": moves_attention,
}


def figure(bench: Bench, check: str, parameters: Parameters) -> PerExample:
    """A figure by name. Raises UnknownNameError for an unknown name."""
    if check not in MEASURES:
        raise UnknownNameError("figure", check, MEASURES)
    return MEASURES[check](bench, parameters)


def component_of(parameters: Parameters) -> Site:
    return Site.parse(parameters["component"])


def head(parameters: Parameters) -> Site:
    """The component, which must be a head. Raises InputError."""
    site = component_of(parameters)
    if site.kind != "z" or site.layer is None or site.index is None:
        raise InputError(f"{site} is not an attention head; give one as layers.<layer>.z[<head>]")
    return site


def condition(bench: Bench, parameters: Parameters) -> tuple[str, str]:
    """Corruption and direction that the parameters name, by default the main corruption, noising."""
    return str(parameters.get("corruption", bench.main)), str(parameters.get("direction", "noising"))


def later(component: Site, movers: Sequence[Site]) -> list[Site]:
    """Those of the movers that the component can reach: heads of later layers."""
    assert component.layer is not None
    return [mover for mover in movers if mover.layer is not None and mover.layer > component.layer]


def measure_shifts(
    bench: Bench, parts: Sequence[Site], movers: Sequence[Site], corruption: str, direction: str
) -> None:
    """Measures, in one sweep, how patching each part moves each mover's `lean`, and keeps it on the bench."""
    blocked = [(part, mover) for part in parts for mover in movers if mover not in later(part, movers)]
    if blocked or not movers:
        part, mover = blocked[0] if blocked else (parts[0], "(none)")
        raise InputError(f"{part} cannot move the attention of {mover}: give movers in later layers")
    wanted = [
        part for part in dict.fromkeys(parts)
        if any(_shift_key(part, mover, corruption, direction) not in bench.memo for mover in movers)
    ]  # fmt: skip
    if not wanted:
        return
    base, donor = bench.donor(corruption, direction)
    layers = sorted({int(mover.layer) for mover in movers if mover.layer is not None})
    variants, watch = [Variant((part,)) for part in wanted], [Site("pattern", layer) for layer in layers]
    seen = bench.evaluate(variants, base, donor, f"watch {len(movers)} heads", watch).watched
    which = "clean" if direction == "noising" else corruption
    for mover in movers:
        edited = seen[Site("pattern", mover.layer)][:, :, mover.index]
        moved = (lean(bench, mover, which) - _lean(bench, edited)) * (1 if direction == "noising" else -1)
        for part, values in zip(wanted, moved, strict=True):
            bench.memo[_shift_key(part, mover, corruption, direction)] = values


def _shift_key(part: Site, mover: Site, corruption: str, direction: str) -> tuple[object, ...]:
    return ("shift", part, mover, corruption, direction)


def lean(bench: Bench, mover: Site, which: str = "clean") -> PerExample:
    """A head's attention at the end to the answer minus that to the distractor (all its mentions)."""
    return _lean(bench, bench.pattern(mover, which)[torch.arange(bench.n), bench.named_positions["end"]])


def _lean(bench: Bench, attention: Float[Tensor, "*variant example key_pos"]) -> Float[Tensor, "*variant example"]:
    def mass(place: str) -> Tensor:
        index = positions(bench, place).expand(attention.shape[:-1])[..., None]
        return attention.gather(-1, index)[..., 0]

    mentions = [place for place in ("distractor_first", "distractor_last") if present(bench, place)]
    return mass("answer") - sum((mass(place) for place in mentions), torch.zeros_like(attention[..., 0]))
