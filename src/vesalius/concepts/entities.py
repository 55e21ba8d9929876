"""RAVEL (Huang et al. 2024, arXiv:2402.17700): entities, their attributes, and prompts that ask for one of them.

Of pairs of such prompts, a part of one run is put into the other, to see what the model says then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.data.packing import bos_for
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import begun
from vesalius.intervention import Replace
from vesalius.jobs.untrusted import read_json
from vesalius.model import Model
from vesalius.model.products import computing
from vesalius.seeds import generator_for
from vesalius.site import Site

KINDS = ("city", "nobel_prize_winner", "occupation", "physical_object", "verb")
SPLITS = ("train", "val", "test")
MOST_PROMPTS = 400
"""Prompts of an attribute that are tried on the model, at most."""
MOST_TEMPLATES = 8
Rows = Float[Tensor, "pair width"]


@dataclass(frozen=True)
class Entities:
    """prompts: attribute -> templates with one %s. values: entity -> attribute -> value. splits: entity -> split."""

    kind: str
    prompts: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Mapping[str, str]]
    splits: Mapping[str, str]

    def known(self, attribute: str) -> None:
        """Raises UnknownNameError for an attribute that there is not."""
        if attribute not in self.prompts:
            raise UnknownNameError(f"attribute of {self.kind}", attribute, self.prompts)

    def of_split(self, split: str) -> tuple[str, ...]:
        """Entities of a split, in the order of the file. Raises UnknownNameError."""
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        return tuple(entity for entity in self.values if self.splits[entity] == split)


def load_ravel(folder: str | Path, kind: str = "city") -> Entities:
    """One kind of entity from the files of RAVEL, `ravel_<kind>_entity_attributes.json` and so on.

    Raises UnknownNameError for another kind, FileFormatError naming the file that is missing or not as it should be.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of entity", kind, KINDS)
    where = Path(folder)
    prompts = _read(where / f"ravel_{kind}_attribute_to_prompts.json", _lists)
    values = _read(where / f"ravel_{kind}_entity_attributes.json", _texts)
    splits = _read(where / f"ravel_{kind}_entity_to_split.json", str)
    # A template without the entity asks nothing, and one with two has no single last token.
    once = {name: tuple(text for text in texts if text.count("%s") == 1) for name, texts in prompts.items()}
    unsplit = [entity for entity in values if splits.get(entity) not in SPLITS]
    if unsplit:
        raise FileFormatError(f"{where}: {unsplit[0]!r} has no split among {', '.join(SPLITS)}")
    return Entities(kind, once, values, splits)


def _read(path: Path, value_of: Any) -> dict[str, Any]:
    """A table of RAVEL: name -> value_of(what is there), which raises TypeError for what should not be."""
    try:
        found = read_json(path)
        return {str(name): value_of(value) for name, value in found.items()}
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file {path.absolute()}; it is part of RAVEL's data") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path.absolute()} is not a table of RAVEL: {error}") from error


def _lists(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError("prompts must be lists of text")
    return tuple(value)


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()}


# Pairs of prompts


@dataclass(frozen=True, eq=False)
class PromptPairs:
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
def prompt_pairs(
    model: Model, entities: Entities, attribute: str, split: str, n: int, seed: int, batch: int = 32
) -> PromptPairs:
    """Up to n pairs of prompts of one template, with entities whose attribute the model knows and that differ in it.

    A model knows an attribute when the token it finds likeliest begins the value. Raises InputError when it knows too
    little for a single pair, UnknownNameError for an unknown attribute.
    """
    entities.known(attribute)
    candidates = _candidates(entities, attribute, split, seed)
    chunks = [candidates[at : at + batch] for at in range(0, len(candidates), batch)]
    known = [prompt for few in chunks for prompt in _known(model, entities, attribute, few)]
    by_template: dict[str, list[Prompt]] = {}
    for prompt in known:
        by_template.setdefault(prompt.template, []).append(prompt)
    pairs = [(one, other) for same in by_template.values() for one in same for other in same if one.says != other.says]
    if not pairs:
        raise InputError(
            f"{model.name} knows {attribute} in {len(known)} prompts of {entities.kind}, no two of one template with "
            "different answers; take another attribute, or a larger model"
        )
    chosen = [
        pairs[place] for place in torch.randperm(len(pairs), generator=generator_for("swaps", seed, attribute))[:n]
    ]
    base, source = [one for one, _ in chosen], [other for _, other in chosen]
    return PromptPairs(
        attribute,
        base=Tokens.from_rows([prompt.ids for prompt in base]),
        source=Tokens.from_rows([prompt.ids for prompt in source]),
        base_at=torch.tensor([prompt.at for prompt in base]),
        source_at=torch.tensor([prompt.at for prompt in source]),
        base_says=torch.tensor([prompt.says for prompt in base]),
        source_says=torch.tensor([prompt.says for prompt in source]),
        entities=tuple(prompt.entity for prompt in base),
    )


def _candidates(entities: Entities, attribute: str, split: str, seed: int) -> list[tuple[str, str]]:
    """(template, entity) to try: few templates with many entities, since pairs are within a template."""
    templates = list(entities.prompts[attribute])
    order = torch.randperm(len(templates), generator=generator_for("templates", seed)).tolist()[:MOST_TEMPLATES]
    names = entities.of_split(split)
    each = MOST_PROMPTS // max(len(order), 1)
    some = torch.randperm(len(names), generator=generator_for("entities", seed, split)).tolist()[:each]
    return [(templates[place], names[name]) for place in order for name in some]


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
    return [
        Prompt(template, entity, ids, at, said)
        for (template, entity, ids, at), said, knows in zip(asked, says, right, strict=True)
        if knows
    ]


def _tokens(model: Model, template: str, entity: str) -> tuple[tuple[int, ...], int] | None:
    """Token ids with the bos token in front, and where the entity ends; None where its end is inside a token."""
    first = bos_for(model.tokenizer, "auto", False)
    encode = lambda text: model.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    before, whole = encode(template[: template.index("%s")] + entity), encode(template.replace("%s", entity))
    # A token that joins the entity's end with what follows would put its last position in doubt.
    if whole[: len(before)] != before:
        return None
    ids = begun(whole, first.id)
    return tuple(ids), len(ids) - len(whole) + len(before) - 1


def _begins(model: Model, token: int, value: str) -> bool:
    """Whether a token begins a value."""
    text = str(model.tokenizer.decode([token])).strip()
    return bool(text) and value.strip().startswith(text)


@torch.no_grad()
def rows_at(model: Model, site: Site, tokens: Tokens, at: Int[Tensor, " pair"], batch: int = 32) -> Rows:
    """[pair, width] activations at one position of each prompt."""
    found = []
    for part in torch.arange(len(tokens)).split(batch):
        whole = captured(model, tokens.take(part), [site])[site].flatten(2)
        found.append(whole[torch.arange(len(part)), at[part].to(whole.device)].cpu())
    return torch.cat(found)


@torch.no_grad()
def says_after(model: Model, site: Site, pairs: PromptPairs, change: Rows, batch: int = 32) -> Int[Tensor, " pair"]:
    """[pair] what the model says when `change` is added to the base's activations at the entity's last token."""
    found = []
    for part in torch.arange(len(pairs)).split(batch):
        tokens = pairs.base.take(part)
        at, add = pairs.base_at[part], change[part]

        def fn(whole: Tensor, at: Tensor = at, add: Tensor = add) -> Tensor:
            edited = whole.flatten(2).clone()
            edited[torch.arange(len(at)), at] += add.to(edited)
            return edited.reshape(whole.shape)

        with computing():
            logits = model.run(tokens, interventions=[Replace(site, site, fn=fn, ref="swap", positions=at)]).logits
        found.append(logits[torch.arange(len(part)), (tokens.lengths - 1).to(logits.device)].argmax(-1).cpu())
    return torch.cat(found)


def slopes(model: Model, site: Site, pairs: PromptPairs, batch: int = 16) -> Rows:
    """[pair, width] gradient, at the entity's last token, of the source's answer's logit less the base's."""
    found = []
    for part in torch.arange(len(pairs)).split(batch):
        tokens = pairs.base.take(part)
        run = model.run(tokens, capture=[site], grad=True)
        rows, last = torch.arange(len(part)), (tokens.lengths - 1).to(run.logits.device)
        logits = run.logits[rows, last]
        gap = logits[rows, pairs.source_says[part]] - logits[rows, pairs.base_says[part]]
        (slope,) = torch.autograd.grad(gap.sum(), run[site])
        # Of the entity's last token only: it is the one position that is changed.
        found.append(slope.flatten(2)[rows, pairs.base_at[part]].detach().cpu())
    return torch.cat(found)
