"""Manifest of an activation store: what its rows are, and what each of its files holds.

Everything in it is decided by the texts, the models and the arguments, so that two harvests of the same give the same
bytes; nothing says when or where.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import WRONG, read_json, reason_of
from vesalius.protocol import content_hash
from vesalius.site import Site

NAME, FORMAT = "manifest.json", 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib")


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one file.

    outliers: rows that were dropped. group: hash of the tokens it was made from. checks: hash of its checksums.
    """

    rows: int
    outliers: int
    contexts: int
    bytes: int
    sha256: str
    group: str
    checks: str


@dataclass(frozen=True)
class Manifest:
    """plan: everything that decides the rows. errors: relative error of the compute dtype, by site, where measured.

    counts: of texts, empty texts and so on; None while the harvest is not finished.
    """

    plan: Mapping[str, Any]
    errors: Mapping[str, float]
    shards: tuple[ShardRecord, ...] = ()
    counts: Mapping[str, int] | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site.parse(entry["site"]) for entry in self.plan["sites"])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(int(entry["width"]) for entry in self.plan["sites"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored rows."""
        return DTYPES[self.plan["dtype"]]

    @property
    def block_rows(self) -> int:
        """Rows that share a checksum and are read together."""
        return int(self.plan["block_rows"])

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def with_shard(self, number: int, record: ShardRecord) -> Manifest:
        """The manifest with shard `number` put in its place."""
        return replace(self, shards=(*self.shards[:number], record, *self.shards[number + 1 :]))

    def write(self, folder: Path) -> None:
        body = self._body()
        write_atomic(folder / NAME, json.dumps({**body, "sha256": content_hash(body)}, indent=1, sort_keys=True) + "\n")

    def _body(self) -> dict[str, Any]:
        shards = [{"file": shard_name(number), **asdict(record)} for number, record in enumerate(self.shards)]
        return {
            "format": FORMAT,
            "kind": "vesalius activations",
            "plan": dict(self.plan),
            "relative_error": dict(self.errors),
            "shards": shards,
            "counts": None if self.counts is None else dict(self.counts),
        }

    @property
    def content_hash(self) -> str:
        """Of everything the manifest says, the hash of every file with it."""
        return content_hash(self._body())


def shard_name(number: int) -> str:
    """Name of a file. It follows from the number alone, so that a manifest cannot name a file elsewhere."""
    return f"shard-{number:05d}.safetensors"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises FileFormatError when there is none, or it is not as it was written."""
    path = folder / NAME
    # Said first, since activations of other tools often come as pickles.
    if folder.suffix.lower() in PICKLES and folder.is_file():
        raise FileFormatError(
            f"{folder} looks like a pickle, which can run code when it is opened and is refused; a store is a folder "
            f"with {NAME} and safetensors files"
        )
    try:
        found = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileFormatError(f"{folder.absolute()} is no activation store: there is no {NAME} in it") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    try:
        return _parsed(found)
    except (*WRONG, InputError) as error:
        raise FileFormatError(
            f"{path} is not a manifest of activations as it was written ({reason_of(error)}); harvest again into "
            "another folder, or restore it from a copy"
        ) from error


def _parsed(found: Any) -> Manifest:
    body = {name: value for name, value in found.items() if name != "sha256"}
    if body["format"] != FORMAT:
        raise ValueError(f"its format is {body['format']!r}, and {FORMAT} can be read")
    if content_hash(body) != found["sha256"]:
        raise ValueError("its sha256 does not match: it was changed")
    records = [{name: value for name, value in shard.items() if name != "file"} for shard in body["shards"]]
    manifest = Manifest(
        body["plan"], body["relative_error"], tuple(ShardRecord(**record) for record in records), body["counts"]
    )
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """Checks all that is used later, so that it cannot fail there. Raises what is caught in `read_manifest`."""
    sizes = [size for shard in manifest.shards for size in (shard.rows, shard.contexts, shard.bytes)]
    if not all(isinstance(size, int) and size > 0 for size in (*sizes, *manifest.widths, manifest.block_rows)):
        raise ValueError("its sizes are not those of files that hold something")
    row = sum(manifest.widths) * manifest.dtype.itemsize
    if any(shard.rows * row + shard.contexts > shard.bytes for shard in manifest.shards) or manifest.block_rows > 2**40:
        raise ValueError("it promises more rows than its files have bytes for")
    if not manifest.sites or manifest.dtype is None or (manifest.counts is not None and not sizes):
        raise ValueError("it has no sites or no rows")
    bos = manifest.plan["bos"]
    if not isinstance(bos["token"], str) or not isinstance(bos["kept"], bool):
        raise ValueError("it does not say what contexts begin with")
    if bos["id"] is not None and not isinstance(bos["id"], int):
        raise ValueError("its bos token is no id")


def differences(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What two plans disagree on, in words; empty when they agree."""
    names = [name for name in {**kept, **asked} if kept.get(name) != asked.get(name)]
    return "; ".join(f"{name}: {_short(kept.get(name))} there, {_short(asked.get(name))} asked for" for name in names)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
