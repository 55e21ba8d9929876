"""Checkpoints of a training run: whole or not there, checked by hash, the last two kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vesalius.dictionaries.training.fitter import Fitter
from vesalius.errors import FileFormatError, InputError
from vesalius.intervention import digest
from vesalius.jobs import Event, Sink, write_atomic

FOLDER, KEPT = "checkpoints", 2


class Checkpoints:
    """The checkpoints of one plan in a folder; None keeps nothing. plan: hash of config and data.

    Raises InputError for a folder with checkpoints of another plan.
    """

    def __init__(self, out: Path | None, plan: str, sink: Sink) -> None:
        self._folder = None if out is None else out / FOLDER
        self._plan, self._sink = plan, sink

    def save(self, fitter: Fitter) -> None:
        """Write the fitter's state, and drop what is older than the last two."""
        if self._folder is None:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitter.tensors().items()}
        about = {"plan": self._plan, "sha256": _hash(tensors)}
        write_atomic(self._folder / f"{fitter.steps:09}.safetensors", safetensors.torch.save(tensors, about))
        for path in self._paths()[:-KEPT]:
            path.unlink()

    def resume(self, fitter: Fitter) -> None:
        """Put the fitter where the last whole checkpoint was; damaged ones are announced and passed over."""
        for path in reversed(self._paths()):
            try:
                fitter.restore(self._read(path))
            except FileFormatError as error:
                self._sink(Event("note", "train", message=f"{error}; going on from an earlier step"))
                continue
            self._sink(Event("note", "train", message=f"going on after step {fitter.steps} ({path})"))
            return

    def remove(self) -> None:
        """Delete all, when they are not needed any more."""
        for path in self._paths():
            path.unlink()
        if self._folder is not None and self._folder.is_dir():
            self._folder.rmdir()

    def _paths(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob("*.safetensors"))

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise FileFormatError(f"the checkpoint {path} is truncated or was altered ({error})") from error
        if about.get("sha256") != _hash(tensors):
            raise FileFormatError(f"the checkpoint {path} was altered: its hash is not the one it was written with")
        if about.get("plan") != self._plan:
            raise InputError(
                f"{path} belongs to another config or other data; use another folder, or delete it to start afresh"
            )
        return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    rows = [f"{name} {tuple(tensors[name].shape)} {digest(tensors[name])}" for name in sorted(tensors)]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
