"""Reading files of unknown origin: safetensors, npz without pickle, JSON; a pickle only when the user says so, and of
it tensors only. `Weights` hands out the tensors of a file one by one, so that what is missing or left over is noticed.

Every function raises FileFormatError naming the file and what to do about it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.errors import FileFormatError
from vesalius.jobs import untrusted

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
AGAIN = "Download or copy it again."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = untrusted.read_json(path)
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} is missing: without it the weights beside it cannot be understood") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON ({error}). {AGAIN}") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a JSON object, it holds a {type(found).__name__}")
    return found


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, of which only the header is read."""
    try:
        return {name: stored.shape for name, stored in untrusted.safetensors_header(path).items()}
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    try:
        return untrusted.read_safetensors(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def partly(path: Path, without: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, all but those named."""
    try:
        return untrusted.read_safetensors(path, without)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    if not path.is_file():
        return FileFormatError(f"{path} is missing. {AGAIN}")
    # Files renamed to .safetensors are how a pickle would be smuggled in.
    if looks_pickled(path):
        return FileFormatError(
            f"{path} is a pickle and not a safetensors file, whatever its name; it is not opened, because a pickle can "
            "run any program. Get the file as safetensors, or rename it to .pt and see what load says"
        )
    return FileFormatError(f"{path} cannot be read as safetensors: truncated or corrupt ({error}). {AGAIN}")


def read_npz(path: Path) -> dict[str, Tensor]:
    """Every array of an .npz file; arrays of objects, which are pickles, are refused."""
    try:
        # A copy, because torch shares memory and wants rows first.
        return {name: torch.from_numpy(array.copy(order="C")) for name, array in untrusted.read_npz(path).items()}
    except (OSError, ValueError, TypeError) as error:
        reason = untrusted.reason_of(error)
        raise FileFormatError(f"{path} cannot be read as .npz arrays without pickle ({reason}). {AGAIN}") from error


def looks_pickled(path: Path) -> bool:
    """Whether a file begins as torch.save's files do."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError:
        return False
    return start == _ZIP or start[:1] == _PICKLE


def read_pickle(path: Path, unpickle: bool) -> dict[str, Any]:
    """The dictionary in a file of torch.save: tensors, numbers and text only. Refused unless unpickle is True."""
    if not unpickle:
        raise FileFormatError(
            f"{path} is a pickle, which can run any program when opened. If you trust whoever made it, "
            f"vesalius.dictionaries.load({str(path)!r}, unpickle=True) reads the tensors in it and nothing else "
            "(torch.load with weights_only=True), as --unpickle does on the command line; "
            "vesalius.dictionaries.save(...) then keeps them as safetensors"
        )
    warnings.warn(
        f"{path} is a pickle: reading tensors from it and nothing else. Save it again as safetensors.",
        UserWarning,
        stacklevel=2,
    )
    try:
        # weights_only builds tensors, numbers and text and calls nothing that a file names.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{path} does not hold plain tensors, or is truncated ({reason}). It is not opened in any other way"
        ) from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a state dict, it holds a {type(found).__name__}")
    return found


def refuse_settings(
    path: Path, settings: Mapping[str, Any], known: Collection[str], kind: str, ignored: Collection[str] = ()
) -> None:
    """Raises FileFormatError naming the settings of a file that are not taken into account here. null says nothing.

    ignored: settings that whoever loads it has said don't matter.
    """
    others = [f"{name}={settings[name]!r:.60}" for name in sorted(settings) if name not in {*known, *ignored}]
    others = [one for one in others if not one.endswith("=None")]
    if others:
        names = ", ".join(repr(one.partition("=")[0]) for one in others)
        raise FileFormatError(
            f"{path} says {', '.join(others)}, which is not known of {kind} here and may change what is computed. If "
            f"it does not, say so: load(..., ignore=[{names}]), or --ignore on the command line"
        )


def flag(path: Path, settings: Mapping[str, Any], name: str, default: bool) -> bool:
    """A setting that is true or false; null and a missing one are the default. Raises FileFormatError for another."""
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FileFormatError(f"{path}: {name} should be true or false, it is {value!r}")
    return value


def check_sizes(path: Path, settings: Mapping[str, Any], **sizes: int) -> None:
    """Raises FileFormatError for a size (a setting by name) that the weights do not have: they belong elsewhere."""
    for name, size in sizes.items():
        said = settings.get(name)
        if said is not None and said != size:
            raise FileFormatError(f"{path} says {name}={said}, and the weights beside it have {size}")


@dataclass(frozen=True)
class Weights:
    """Tensors of one file."""

    path: Path
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    """What floating-point tensors are turned into."""

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str, *axes: str | int) -> Tensor:
        """The tensor with this name. axes: a size each, or a word for an axis of any size.

        Raises FileFormatError for a tensor that is missing or of another shape.
        """
        if name not in self.tensors:
            raise FileFormatError(
                f"{self.path} holds no tensor {name!r}; it holds {', '.join(sorted(self.tensors)) or 'none'}"
            )
        tensor = self.tensors[name]
        fits = tensor.ndim == len(axes) and all(
            isinstance(axis, str) or axis == size for axis, size in zip(axes, tensor.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, axes))
            raise FileFormatError(
                f"{self.path}: {name} should have shape [{wanted}] beside the other tensors, it has "
                f"{tuple(tensor.shape)}"
            )
        return self._cast(tensor)

    def maybe(self, name: str, *axes: str | int) -> Tensor | None:
        """The tensor, or None where there is none."""
        return self.take(name, *axes) if name in self.tensors else None

    def refuse_others(self, kind: str, known: Iterable[str]) -> None:
        """Raises FileFormatError for tensors that a dictionary of this kind has no use for."""
        others = sorted(set(self.tensors) - set(known))
        if others:
            raise FileFormatError(
                f"{self.path} holds {', '.join(others)}, which {kind} has no use for: reading it would leave out "
                "something that it computes. If that is meant, "
                f"load(..., ignore=[{', '.join(map(repr, others))}]), or --ignore on the command line"
            )

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype).contiguous() if tensor.is_floating_point() else tensor
