"""Places: from what a user names to what a sweep edits, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vesalius.errors import InputError, UnknownNameError
from vesalius.model import Model
from vesalius.parts import Part
from vesalius.patching.donors import EDITS
from vesalius.patching.record import Record
from vesalius.patching.scores import PROMPTS
from vesalius.patching.variants import Variant
from vesalius.patching.what import What, place_of, what_of
from vesalius.site import INDEX_AXIS, Site

EACH = ("position", "head", "neuron", "latent")


@runtime_checkable
class Latents(Protocol):
    """A dictionary, as far as a sweep needs it."""

    @property
    def n_latents(self) -> int: ...

    def latent(self, index: int) -> Part: ...


@dataclass(frozen=True, eq=False)
class Asked:
    """rows: what the first axis of the scores counts. whats: everything that is edited."""

    rows: tuple[What, ...]
    whats: tuple[What, ...]
    each: str | None
    group: int


def asked_for(model: Model, sites: Any, each: str | None, group: int, edit: str, base: str) -> Asked:
    """What is asked, when everything named is known. Raises UnknownNameError and InputError."""
    if each is not None and each not in EACH:
        raise UnknownNameError("each", each, EACH, "None edits whole sites.")
    if edit not in EDITS:
        raise UnknownNameError("edit", edit, EDITS)
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    if group < 1 or (group > 1 and each not in ("neuron", "latent")):
        raise InputError(f'group={group}: neighbours are edited together with each="neuron" or "latent", at least 1')
    if each == "latent":
        return _latents(model, sites, group)
    found = _listed(model, sites)
    if each in ("head", "neuron"):
        _check_units(model, found, each)
    if edit == "steer":
        _check_steered(found, each)
    stacks = {place_of(what)[0].of_encoder for what in found}
    if each == "position" and model.adapter is not None and len(model.adapter.stack_names) > 1 and len(stacks) > 1:
        raise InputError("positions of an encoder and of a decoder are not the same: sweep their sites apart")
    return Asked(found, found, each, group)


def _listed(model: Model, sites: Any) -> tuple[What, ...]:
    listed = [sites] if isinstance(sites, str | Site | Part) else list(sites)
    found = tuple(dict.fromkeys(what for name in listed for what in _resolved(model, name)))
    if not found:
        raise InputError('no sites to sweep; give sites= such as "layers.*.resid_post"')
    for what in found:
        place_of(what)
    return found


def _resolved(model: Model, name: str | Site | Part) -> list[What]:
    if not isinstance(name, str | Site):
        what = what_of(name)
        model.check_site(what if isinstance(what, Site) else what.site)
        return [what]
    found = model.sites(str(name)) if "*" in str(name) else [Site.parse(name)]
    for site in found:
        model.check_site(site)
    return list(found)


def _latents(model: Model, coder: Any, group: int) -> Asked:
    if not isinstance(coder, Latents):
        raise InputError(f'each="latent" goes through a dictionary: sites= must be one; got {type(coder).__name__}')
    parts = tuple(coder.latent(index) for index in range(coder.n_latents))
    row = parts[0].site
    model.check_site(row)
    return Asked((row,), parts, "latent", group)


def _check_units(model: Model, sites: Sequence[What], each: str) -> None:
    for site in sites:
        if not isinstance(site, Site) or site.index is not None:
            raise InputError(f'{site} is one part already; each="{each}" takes whole sites')
        if each == "head" and not {"head", "kv_head"} & set(site.axes):
            raise InputError(f'{site} has no heads to go through; each="head" takes whole z, q, k or v sites')
        if each == "neuron" and site.kind != "mlp_post":
            raise InputError(f'{site} has no neurons; each="neuron" takes whole mlp_post sites')
    if each == "head" and len({_heads(model, site) for site in sites if isinstance(site, Site)}) > 1:
        raise InputError("query heads and key-value heads differ in number here: sweep z and q apart from k and v")


def _check_steered(whats: Sequence[What], each: str | None) -> None:
    for what in whats:
        if isinstance(what, Site) and each != "neuron" and what.index is None:
            raise InputError(
                f'edit="steer" adds a number to a coordinate; {what} is a whole site. Give a Direction, a latent, '
                "or one neuron or dimension, such as vs.Direction(site, vector)"
            )


def _heads(model: Model, site: Site) -> int:
    layout = model.architecture[1]
    return layout.n_kv_heads if "kv_head" in site.axes else layout.n_heads


def variants_of(asked: Asked, row: What, base: Record) -> list[Variant]:
    """The variants of one row of the scores."""
    site = place_of(row)[0]
    if asked.each == "position":
        return [Variant((row,), position) for position in range(base.real_at(site).shape[1])]
    if asked.each is None:
        return [Variant((row,))]
    if asked.each == "latent":
        return [Variant(asked.whats[first : first + asked.group]) for first in range(0, len(asked.whats), asked.group)]
    assert isinstance(row, Site)
    count = base.at(site).shape[INDEX_AXIS[site.kind]]
    return [
        Variant(tuple(row[index] for index in range(first, min(first + asked.group, count))))
        for first in range(0, count, asked.group)
    ]
