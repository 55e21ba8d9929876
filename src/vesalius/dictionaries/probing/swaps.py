"""Swaps: pairs of prompts that differ in the entity, and what a model says when parts of one are put into the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data import Entities
from vesalius.data.forward import captured
from vesalius.data.packing import bos_for
from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.intervention import Replace
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.seeds import generator_for
from vesalius.site import Site

MOST_PROMPTS = 400
"""Prompts of an attribute that are tried on the model, at most."""


@dataclass(frozen=True, eq=False)
class Swaps:
    """Pairs of prompts for one attribute; row i of each belongs together.

    base, source: prompts. base_at, source_at: [pair] position of the entity's last token. base_says, source_says:
    [pair] token that the model continues each with, never the same. entities: [pair] name of the base's.
    """

    attribute: str
    base: Tokens
    source: Tokens
    base_at: Int[Tensor, " pair"]
    source_at: Int[Tensor, " pair"]
    base_says: Int[Tensor, " pair"]
    source_says: Int[Tensor, " pair"]
    entities: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.entities)


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer the model knows. at: position of the entity's last token. says: its next token."""

    template: str
    entity: str
    ids: tuple[int, ...]
    at: int
    says: int


@torch.no_grad()
def swaps_for(
    model: Model, entities: Entities, attribute: str, split: str, n: int, seed: int, batch: int = 32
) -> Swaps:
    """Up to n pairs of prompts of one template, with entities whose attribute the model knows and that differ in it.

    A model knows an attribute when the token it finds likeliest begins the value. Raises InputError when it knows too
    little for a single pair, UnknownNameError for an unknown attribute.
    """
    entities.known(attribute)
    known = [prompt for few in _in_batches(_candidates(entities, attribute, split, seed), batch)
             for prompt in _known(model, entities, attribute, few)]  # fmt: skip
    by: dict[str, list[Prompt]] = {}
    for prompt in known:
        by.setdefault(prompt.template, []).append(prompt)
    pairs = [(one, other) for same in by.values() for one in same for other in same if one.says != other.says]
    if not pairs:
        raise InputError(
            f"{model.name} knows {attribute} in {len(known)} prompts of {entities.kind}, no two of one template with "
            "different answers; take another attribute, or a larger model"
        )
    chosen = [
        pairs[place] for place in torch.randperm(len(pairs), generator=generator_for("swaps", seed, attribute))[:n]
    ]
    base, source = [one for one, _ in chosen], [other for _, other in chosen]
    tokens = lambda side: Tokens.from_rows([prompt.ids for prompt in side])  # noqa: E731
    at = lambda side: torch.tensor([prompt.at for prompt in side])  # noqa: E731
    says = lambda side: torch.tensor([prompt.says for prompt in side])  # noqa: E731
    return Swaps(
        attribute, tokens(base), tokens(source), at(base), at(source), says(base), says(source),
        tuple(prompt.entity for prompt in base),
    )  # fmt: skip


def _candidates(entities: Entities, attribute: str, split: str, seed: int) -> list[tuple[str, str]]:
    """(template, entity) to try: few templates with many entities, since pairs are within a template."""
    templates = list(entities.prompts[attribute])
    order = torch.randperm(len(templates), generator=generator_for("templates", seed)).tolist()[:8]
    names = entities.of_split(split)
    each = MOST_PROMPTS // max(len(order), 1)
    some = torch.randperm(len(names), generator=generator_for("entities", seed, split)).tolist()[:each]
    return [(templates[place], names[name]) for place in order for name in some]


def _in_batches(items: list[tuple[str, str]], batch: int) -> list[list[tuple[str, str]]]:
    return [items[at : at + batch] for at in range(0, len(items), batch)]


def _known(model: Model, entities: Entities, attribute: str, few: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Those of some prompts whose answer the model knows."""
    asked = [(template, entity, *found) for template, entity in few if (found := _tokens(model, template, entity))]
    if not asked:
        return []
    tokens = Tokens.from_rows([ids for _, _, ids, _ in asked])
    with computing():
        logits = model.run(tokens).logits
    says = logits[torch.arange(len(asked)), (tokens.lengths - 1).to(logits.device)].argmax(-1).tolist()
    right = [
        _begins(model, said, entities.values[entity].get(attribute, ""))
        for said, (_, entity, _, _) in zip(says, asked, strict=True)
    ]
    return [Prompt(template, entity, ids, at, said)
            for (template, entity, ids, at), said, knows in zip(asked, says, right, strict=True) if knows]  # fmt: skip


def _tokens(model: Model, template: str, entity: str) -> tuple[tuple[int, ...], int] | None:
    """Token ids with the bos token in front, and where the entity ends; None where its end is inside a token."""
    first = bos_for(model.tokenizer, "auto", False)
    head = [] if first.id is None else [first.id]
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    before, whole = encode(template[: template.index("%s")] + entity), encode(template.replace("%s", entity))
    if whole[: len(before)] != before:
        return None
    return (*head, *whole), len(head) + len(before) - 1


def _begins(model: Model, token: int, value: str) -> bool:
    """Whether a token begins a value."""
    text = str(model.tokenizer.decode([token])).strip()
    return bool(text) and value.strip().startswith(text)


Change = Float[Tensor, "pair width"]


@torch.no_grad()
def rows_at(model: Model, site: Site, tokens: Tokens, at: Int[Tensor, " pair"], batch: int = 32) -> Change:
    """[pair, width] activations at one position of each prompt."""
    found = []
    for part in torch.arange(len(tokens)).split(batch):
        whole = captured(model, tokens.take(part), [site])[site].flatten(2)
        found.append(whole[torch.arange(len(part)), at[part].to(whole.device)].cpu())
    return torch.cat(found)


@torch.no_grad()
def says_after(model: Model, site: Site, swaps: Swaps, change: Change, batch: int = 32) -> Int[Tensor, " pair"]:
    """[pair] what the model says when `change` is added to the base's activations at the entity's last token."""
    found = []
    for part in torch.arange(len(swaps)).split(batch):
        tokens = swaps.base.take(part)
        at, add = swaps.base_at[part], change[part]

        def fn(whole: Tensor, at: Tensor = at, add: Tensor = add) -> Tensor:
            edited = whole.flatten(2).clone()
            edited[torch.arange(len(at)), at] += add.to(edited)
            return edited.reshape(whole.shape)

        with computing():
            logits = model.run(tokens, interventions=[Replace(site, site, fn=fn, ref="swap", positions=at)]).logits
        found.append(logits[torch.arange(len(part)), (tokens.lengths - 1).to(logits.device)].argmax(-1).cpu())
    return torch.cat(found)


def slopes(model: Model, site: Site, swaps: Swaps, batch: int = 16) -> Change:
    """[pair, width] gradient, at the entity's last token, of the source's answer's logit less the base's."""
    found = []
    for part in torch.arange(len(swaps)).split(batch):
        tokens = swaps.base.take(part)
        run = model.run(tokens, capture=[site], grad=True)
        rows, last = torch.arange(len(part)), (tokens.lengths - 1).to(run.logits.device)
        logits = run.logits[rows, last]
        gap = logits[rows, swaps.source_says[part]] - logits[rows, swaps.base_says[part]]
        (slope,) = torch.autograd.grad(gap.sum(), run[site])
        found.append(slope.flatten(2)[rows, swaps.base_at[part]].detach().cpu())
    return torch.cat(found)
