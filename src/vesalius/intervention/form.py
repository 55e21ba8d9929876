"""The JSON form of an edit: plain data, with floating-point tensors by the hash of their content."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vesalius.activations import Activations
from vesalius.directions import digest
from vesalius.errors import InputError
from vesalius.parts import Part
from vesalius.protocol import content_hash
from vesalius.site import Site

Source = Activations | Tensor
Write = Callable[[Tensor], dict[str, Any]]


def by_hash(tensor: Tensor) -> dict[str, Any]:
    """Integers and masks as they are; floating-point tensors by hash, shape and dtype."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if not tensor.dtype.is_floating_point:
        return {"values": tensor.tolist(), "dtype": dtype}
    return {"tensor": digest(tensor), "shape": list(tensor.shape), "dtype": dtype}


def by_shape(tensor: Tensor) -> dict[str, Any]:
    """Only what can be said without reading the tensor."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def form(value: Any, part: Part, write: Write) -> Any:
    """One field of an edit as plain data. part: the edit's own, whose site is what activations are read at."""
    if isinstance(value, Tensor):
        return write(value)
    if isinstance(value, Activations):
        return _activations_form(value, part, write)
    if isinstance(value, Site | str):
        return str(value)
    if isinstance(value, Sequence):
        return [form(item, part, write) for item in value]
    if isinstance(value, Part):
        return value.ref
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(
        f"a {type(value).__name__} at {part.writes[0]} has no JSON form; give numbers, tensors or activations"
    )


def _activations_form(source: Activations, part: Part, write: Write) -> dict[str, Any]:
    """Activations at the sites that a part reads: under the one site's name, or by site where there are several."""
    sites = tuple(dict.fromkeys(site.whole for site in part.reads))
    found: dict[str, Any] = {"tokens": None}
    if len(sites) == 1:
        found |= {"site": str(sites[0]), "activations": write(source[sites[0]])}
    else:
        found |= {"sites": {str(site): write(source[site]) for site in sites}}
    if source.tokens is not None:
        mask = source.tokens.mask
        found["tokens"] = source.tokens.content_hash
        found["ids"] = write(source.tokens.ids)
        found["mask"] = None if mask is None else write(mask)
    return found


class Recorded:
    """An edit that prints, has a JSON form and a content hash: fields of a dataclass with `part`."""

    part: Part

    @property
    def target(self) -> Part:
        """The part as it was given."""
        return self.part

    def to_json(self) -> dict[str, Any]:
        """Everything that makes the edit, tensors by content hash. Read back by `intervention.from_json`."""
        return self.written(by_hash)

    @property
    def content_hash(self) -> str:
        """Two edits with one hash do the same."""
        return content_hash(self.to_json())

    def describe(self) -> dict[str, Any]:
        """The JSON form with shapes in place of hashes: cheap, for printing and diagnostics."""
        return self.written(by_shape)

    def written(self, write: Write) -> dict[str, Any]:
        """The JSON form, with tensors as `write` has them."""
        fields = [f for f in dataclasses.fields(self) if f.init and not f.metadata.get("kept_out")]  # type: ignore[arg-type]
        data = {f.name: form(getattr(self, f.name), self.part, write) for f in fields}
        return {"edit": type(self).__name__.lower(), "part": self.target.ref, **data}

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.describe().items() if name not in ("edit", "part")}
        rest = "".join(f", {name}={_short(value)}" for name, value in shown.items() if value is not None)
        kind = self.target.ref["kind"]
        where = str(self.target) if kind == "unit" else f"{kind} at {self.part.writes[0]}"
        return f"{type(self).__name__}({where}{rest})"


def _short(value: Any) -> str:
    if isinstance(value, dict) and "activations" in value:
        return f"activations {value['activations']['shape']}"
    if isinstance(value, dict) and "sites" in value:
        return f"activations at {', '.join(value['sites'])}"
    if isinstance(value, dict) and "shape" in value:
        return f"{value['dtype']} {value['shape']}"
    text = str(value)
    return text if len(text) < 60 else f"{text[:50]}... ({len(value)} items)"
