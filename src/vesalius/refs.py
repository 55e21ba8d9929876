"""From a reference back to the part that it names, and latents by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vesalius.directions import Direction, Labelled, Subspace, digest
from vesalius.errors import InputError, UnknownNameError
from vesalius.parts import ALIVE, Channel, Group, HasLatents, LeavesOver, Part, Together, Unit
from vesalius.site import Site

KINDS = ("unit", "group", "channel", "together", "direction", "subspace", "latent", "unexplained")
OF_DICTIONARY = ("latent", "unexplained")


def latent(dictionary: HasLatents, index: int) -> Part:
    """Latent `index` of a dictionary of any kind: SAE, transcoder, crosscoder, cross-layer transcoder.

    Raises InputError for a latent that does not exist.
    """
    return dictionary.latent(index)


def resolve(ref: Mapping[str, Any], *given: HasLatents | Part | Tensor) -> Part:
    """The Part that a ref names.

    given: what the ref only names by hash: the dictionary of a latent, a Direction, or the vector or basis of one. What
    is alive in this process and has been named by its `ref` before need not be given. Raises UnknownNameError for an
    unknown kind of part, InputError for one that has to be given.
    """
    own = next((one for one in given if isinstance(one, Part) and one.ref == ref), None)
    if own is not None:
        return own
    kind = str(ref.get("kind"))
    if kind == "unit":
        return Unit(Site.parse(ref["site"]))
    if kind == "group":
        return Group(Site.parse(ref["site"]), tuple(ref["indices"]))
    if kind == "channel":
        return Channel(Site.parse(ref["site"]), int(ref["index"]))
    if kind == "together":
        return Together(tuple(resolve(one, *given) for one in ref["parts"]))
    if kind not in KINDS:
        hint = "Give a part of your own as well: resolve(ref, part), or load(..., parts=[part])."
        raise UnknownNameError("kind of part", kind, KINDS, hint)
    found = _among(ref, [*given, *_alive(ref)])
    if found is None:
        what = "the dictionary" if kind in OF_DICTIONARY else f"the {kind}, or its numbers as a tensor,"
        raise InputError(f"{dict(ref)} names what is kept elsewhere: give {what} as well, resolve(ref, ...)")
    return found


def _among(ref: Mapping[str, Any], given: Sequence[HasLatents | Part | Tensor]) -> Part | None:
    for one in given:
        if isinstance(one, Tensor) and ref["kind"] not in OF_DICTIONARY and digest(one) == ref["sha256"]:
            return stored_part(ref, one)
        if isinstance(one, HasLatents) and ref["kind"] == "latent" and one.content_hash == ref["dictionary"]:
            return one.latent(int(ref["index"]))
        if isinstance(one, LeavesOver) and ref["kind"] == "unexplained" and one.content_hash == ref["dictionary"]:
            return one.unexplained
        if isinstance(one, Labelled) and one.ref["sha256"] == ref.get("sha256"):
            return stored_part(ref, one.numbers)
    return None


def stored_part(ref: Mapping[str, Any], numbers: Tensor) -> Direction | Subspace:
    """A Direction or Subspace from its ref and its numbers, to the last bit: normalising again could move one."""
    kind = Direction if ref["kind"] == "direction" else Subspace
    name, kept = ("vector", numbers.reshape(-1)) if kind is Direction else ("basis", torch.atleast_2d(numbers))
    part = kind(Site.parse(ref["site"]), kept, str(ref["label"]))
    object.__setattr__(part, name, kept)
    return part


def _alive(ref: Mapping[str, Any]) -> list[Any]:
    found = ALIVE.get(str(ref.get("dictionary" if ref["kind"] in OF_DICTIONARY else "sha256")))
    return [] if found is None else [found]
