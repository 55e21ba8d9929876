"""Edits to and from files: JSON for what they are, safetensors beside it for the tensors they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.activations import Activations
from vesalius.directions import Direction, Subspace, digest
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.intervention.apply import Intervention
from vesalius.intervention.basic import Ablate, Freeze, Interchange, Patch, Steer
from vesalius.intervention.edits import Erase, Noise, Project, Replace
from vesalius.intervention.form import Recorded, by_hash
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import read_json, read_safetensors, understood
from vesalius.parts import HasLatents, Part
from vesalius.protocol import canonical_json
from vesalius.refs import resolve, stored_part
from vesalius.site import Site

KINDS: Mapping[str, type[Any]] = {
    cls.__name__.lower(): cls for cls in (Ablate, Erase, Freeze, Interchange, Noise, Patch, Project, Replace, Steer)
}
Functions = Mapping[str, Callable[..., Tensor]]


def from_json(
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    functions: Functions | None = None,
    parts: Sequence[Part | HasLatents] = (),
) -> Any:
    """The edit of a JSON form.

    tensors: floating-point tensors by content hash (see `tensors_of`), for edits that hold any. functions: ref -> the
    function of a Replace. parts: those that are kept elsewhere, and dictionaries of latents, found by their reference.
    Raises UnknownNameError for an unknown kind of edit, InputError for a tensor, function or part that is missing,
    FileFormatError for a tensor that does not match its hash.
    """
    given = dict(data)
    kind = given.pop("edit", None)
    if kind not in KINDS:
        raise UnknownNameError("edit", str(kind), KINDS)
    held = tensors or {}
    part = _part(given.pop("part"), held, parts)
    fields = {name: _value(value, held) for name, value in given.items()}
    if kind != "replace":
        return KINDS[kind](part, **fields)
    listed = given["read"] if isinstance(given["read"], list) else [given["read"]]
    read, ref = [_part(one, held, parts) for one in listed], str(given["ref"])
    if ref not in (functions or {}):
        raise InputError(f"Replace at {part.writes[0]} needs its function: pass functions={{{ref!r}: ...}}")
    assert functions is not None
    return Replace(read, part, functions[ref], ref, fields["positions"])


def tensors_of(edits: Sequence[Intervention]) -> dict[str, Tensor]:
    """Every floating-point tensor the edits hold, by content hash."""
    found: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> dict[str, Any]:
        data = by_hash(tensor)
        if "tensor" in data:
            found[data["tensor"]] = tensor.detach().cpu().contiguous()
        return data

    for edit in edits:
        if not isinstance(edit, Recorded):
            raise InputError(
                f"a {type(edit).__name__} is not one of vesalius's edits ({', '.join(KINDS)}); store it yourself"
            )
        edit.written(keep)
        for part in (edit.target, *getattr(edit, "inputs", ())):
            if isinstance(part, Direction | Subspace):
                keep(part.vector if isinstance(part, Direction) else part.basis)
    return found


def save(edits: Sequence[Intervention], path: str | Path) -> None:
    """Write edits as JSON, in their order, and their tensors beside it as `<path>.safetensors` when there are any."""
    # Late and here only: importing vesalius must stay light.
    from safetensors.torch import save as as_bytes

    target, tensors = Path(path), tensors_of(edits)
    if tensors:
        # Copies, because one storage may not be saved under two names.
        write_atomic(_beside(target), as_bytes({name: tensor.clone() for name, tensor in tensors.items()}))
    write_atomic(target, canonical_json([edit.to_json() for edit in edits]))


def load(path: str | Path, functions: Functions | None = None, parts: Sequence[Part | HasLatents] = ()) -> list[Any]:
    """The edits that `save` wrote. Raises FileFormatError for a file that is none, and as `from_json`."""
    target = Path(path)
    try:
        listed = read_json(target)
        tensors = read_safetensors(_beside(target)) if _beside(target).exists() else {}
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{target} holds no stored interventions: {error}") from error
    with understood(f"{target} holds no stored interventions"):
        return [from_json(data, tensors, functions, parts) for data in listed]


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".safetensors")


def _value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, Mapping):
        if "activations" in value or "sites" in value:
            return _activations(value, tensors)
        if "values" in value:
            return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
        if "tensor" in value:
            return _tensor(value["tensor"], tensors).view(getattr(torch, value["dtype"])).reshape(value["shape"])
    return value


def _activations(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Activations:
    by_site = data["sites"] if "sites" in data else {data["site"]: data["activations"]}
    values = {Site.parse(site): _value(one, tensors) for site, one in by_site.items()}
    if data["tokens"] is None:
        return Activations(values)
    return Activations(values, Tokens(_value(data["ids"], tensors), _value(data["mask"], tensors)))


def _tensor(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise InputError(
            f"the tensor {name[:12]}... of this edit is missing: pass tensors={{hash: tensor}}, or use load"
        )
    if digest(tensors[name]) != name:
        raise FileFormatError(f"the tensor stored as {name[:12]}... does not match its hash: the file was changed")
    return tensors[name]


def _part(data: Mapping[str, Any], tensors: Mapping[str, Tensor], parts: Sequence[Part | HasLatents]) -> Part:
    if data["kind"] in ("direction", "subspace") and data["sha256"] in tensors:
        return stored_part(data, _tensor(data["sha256"], tensors))
    return resolve(data, *parts)
