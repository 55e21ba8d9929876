"""Targets: from what a user names to the parts that a sweep edits one after the other, and where each is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vesalius.directions import Direction, Subspace
from vesalius.errors import InputError, UnknownNameError
from vesalius.model import Model
from vesalius.parts import Group, HasLatents, Part, Together, Unit, as_part
from vesalius.site import ATTENTION, INDEX_AXIS, RESULTS, Site

EACH = ("position", "head", "neuron", "latent")
EDITS = ("patch", "zero", "mean", "resample", "steer")
PROMPTS = ("corrupted", "clean")
_NOT_SWEPT = (*ATTENTION, *RESULTS, "resid_mid", "resid_mid_cross")


@dataclass(frozen=True)
class Variant:
    """Parts that are edited together in one run; position None is every position that can differ."""

    parts: tuple[Part, ...]
    position: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(one for part in self.parts for one in _each(part)))

    @property
    def item(self) -> Part:
        """Them as one Part."""
        if len(self.parts) == 1:
            return self.parts[0]
        units = [part.site for part in self.parts if isinstance(part, Unit) and part.site.index is not None]
        if len(units) == len(self.parts) and len({site.whole for site in units}) == 1:
            return Group(units[0].whole, tuple(site.index for site in units if site.index is not None))
        return Together(self.parts)


def _each(part: Part) -> tuple[Part, ...]:
    """Several parts together are edited one by one."""
    return tuple(one for inner in part.parts for one in _each(inner)) if isinstance(part, Together) else (part,)


@dataclass(frozen=True, eq=False)
class Targets:
    """What a sweep goes through. rows: what the first axis of the scores counts. parts: everything that is edited."""

    rows: tuple[Part, ...]
    parts: tuple[Part, ...]
    each: str | None
    group: int

    def variants(self, row: Part, count: int) -> list[Variant]:
        """The edited runs of one row. count: positions there, or units of its axis."""
        if self.each is None:
            return [Variant((row,))]
        if self.each == "position":
            return [Variant((row,), position) for position in range(count)]
        if self.each == "latent":
            units = self.parts
        else:
            assert isinstance(row, Unit)
            units = tuple(Unit(row.site[index]) for index in range(count))
        return [Variant(units[first : first + self.group]) for first in range(0, len(units), self.group)]

    def axis_of(self, row: Part) -> int:
        """The axis of a row's tensor that `each` counts units of."""
        assert isinstance(row, Unit)
        return INDEX_AXIS[row.site.kind]


def normal(site: Site) -> tuple[Site, int]:
    """The whole site an edit is written at, and the index there (-1: all of it).

    A layer's output is the next one's input, and edited there.
    `embed` is the first layer's input: with learned positions it holds token and position embedding. Raises InputError
    for a site that a replay cannot write.
    """
    index = -1 if site.index is None else site.index
    whole = site.whole
    if whole.kind in _NOT_SWEPT or (whole.layer is None and whole.kind not in ("embed", "module")):
        raise InputError(
            f"{site} cannot be swept; sweep embed, resid_pre, resid_post, attn_out, mlp_out, mlp_post, router, "
            "expert_out, q, k, v, z (and cross_q, cross_k, cross_v, cross_z, cross_attn_out) or module:<path>|in, |out"
        )
    if whole.kind == "resid_post" and whole.layer is not None and not whole.stack:
        return Site("resid_pre", whole.layer + 1), index
    if whole.kind == "embed" and not whole.stack:
        return Site("resid_pre", 0), index
    return whole, index


def normal_read(site: Site) -> Site:
    """A site by the name it is written under, as far as it can be written."""
    return normal(site)[0] if site.kind in ("resid_post", "embed") else site.whole


def as_written(part: Part) -> Part:
    """The same part where an edit is written: of the embeddings, where they enter the first layer."""
    if not isinstance(part, Unit | Direction | Subspace) or part.site.kind != "embed" or part.site.stack:
        return part
    return replace(part, site=replace(normal(part.site)[0], index=part.site.index))


def writes_at(part: Part) -> list[Site]:
    """Whole sites at which an edit of a part is written, in the order of the forward pass."""
    found = [normal(site)[0] for site in part.writes]
    if not isinstance(part, Unit) and any(site.kind == "module" for site in found):
        raise InputError(f"{part} cannot be swept: a Part of a module's tensor has no known axes; sweep the module")
    return sorted(dict.fromkeys(found), key=lambda site: site.order)


def to_record(parts: Iterable[Part]) -> list[Site]:
    """Whole sites whose values a sweep of these parts needs of the base run and of the run that values come from."""
    found: dict[Site, None] = {}
    for part in parts:
        found |= dict.fromkeys((*writes_at(part), *map(normal_read, part.reads)))
    return sorted(found, key=lambda site: site.order)


def requested(model: Model, sites: Any, each: str | None, group: int, edit: str, base: str) -> Targets:
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
    if edit == "steer" and each != "neuron":
        _check_steered(found)
    stacks = {site.of_encoder for part in found for site in writes_at(part)}
    if each == "position" and model.adapter is not None and len(model.adapter.stack_names) > 1 and len(stacks) > 1:
        raise InputError("positions of an encoder and of a decoder are not the same: sweep their sites apart")
    return Targets(found, found, each, group)


def _listed(model: Model, sites: Any) -> tuple[Part, ...]:
    listed = [sites] if isinstance(sites, str | Site | Part) else list(sites)
    found = tuple(dict.fromkeys(part for name in listed for part in _parts(model, name)))
    if not found:
        raise InputError('no sites to sweep; give sites= such as "layers.*.resid_post"')
    for part in found:
        writes_at(part)
    return found


def _parts(model: Model, name: str | Site | Part) -> list[Part]:
    many = isinstance(name, str | Site) and "*" in str(name)
    found: list[Part] = [Unit(site) for site in model.sites(str(name))] if many else [as_part(name)]
    for part in found:
        for site in (*part.reads, *part.writes):
            model.check_site(site)
    return found


def _latents(model: Model, dictionary: Any, group: int) -> Targets:
    if not isinstance(dictionary, HasLatents):
        raise InputError(
            f'each="latent" goes through a dictionary: sites= must be one; got {type(dictionary).__name__}'
        )
    parts = tuple(dictionary.latent(index) for index in range(dictionary.n_latents))
    for site in (*parts[0].reads, *parts[0].writes):
        model.check_site(site)
    # One row, named by the site that is read.
    return Targets((Unit(parts[0].reads[0]),), parts, "latent", group)


def _check_units(model: Model, parts: Sequence[Part], each: str) -> None:
    for part in parts:
        if not isinstance(part, Unit) or part.site.index is not None:
            raise InputError(f'{part} is one part already; each="{each}" takes whole sites')
        if each == "head" and not {"head", "kv_head"} & set(part.site.axes):
            raise InputError(f'{part} has no heads to go through; each="head" takes whole z, q, k or v sites')
        if each == "neuron" and part.site.kind != "mlp_post":
            raise InputError(f'{part} has no neurons; each="neuron" takes whole mlp_post sites')
    if each == "head" and len({_heads(model, part.site) for part in parts if isinstance(part, Unit)}) > 1:
        raise InputError("query heads and key-value heads differ in number here: sweep z and q apart from k and v")


def _check_steered(parts: Sequence[Part]) -> None:
    for part in parts:
        if isinstance(part, Unit) and part.site.index is None:
            raise InputError(
                f'edit="steer" adds a number to a coordinate; {part} is a whole site. Give a Direction, a latent, '
                "or one neuron or dimension, such as vs.Direction(site, vector)"
            )


def _heads(model: Model, site: Site) -> int:
    layout = model.architecture[1]
    return layout.n_kv_heads if "kv_head" in site.axes else layout.n_heads
