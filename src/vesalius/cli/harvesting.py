"""`vesalius harvest`: activations of a model over texts, written to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.checks import COMPUTE, TAGGED
from vesalius.cli.screen import Screen, bars, say
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Sink
from vesalius.site import Site


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    texts: str
    models: list[str]
    sites: list[str]
    out: Path | None
    tokens: int | None
    context: int
    dtype: str = "float32"
    compute: str = "float32"
    bos: str = "auto"
    keep_bos: bool = False
    max_norm: float = 10.0
    column: str = "text"
    nulls: str = "skip"
    device: str | None = None
    """None is the GPU where there is one."""

    def check(self) -> None:
        """Refuse what cannot be done before a model is loaded."""
        checks.device(self.device)
        if self.dtype not in vs.data.DTYPES:
            raise UnknownNameError("--dtype", self.dtype, vs.data.DTYPES)
        if self.compute not in COMPUTE:
            raise UnknownNameError("--compute", self.compute, COMPUTE)
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"--tokens must be at least 1; got {self.tokens}")
        for site in self.sites:
            if "*" not in site:
                Site.parse(site)


def harvest(request: Request) -> None:
    """Harvest with progress bars, and say what was written."""
    assert request.out is not None
    request.check()
    with bars() as progress:
        screen = Screen(progress)
        store = harvested(request, None, request.out, screen)
    for line in summary(store):
        say(line)


def harvested(request: Request, model: Any, out: Path, sink: Sink) -> vs.data.ActivationStore:
    """The activations asked for, in a folder; the texts are checked before a model is loaded."""
    texts = vs.data.texts_from(request.texts, request.column, request.nulls)
    return vs.data.harvest(
        model or loaded(request.models, request.device, sink),
        texts,
        sites=request.sites,
        out=out,
        tokens=request.tokens,
        context=request.context,
        dtype=vs.data.DTYPES[request.dtype],
        compute=vs.data.DTYPES[request.compute],
        bos=request.bos,
        keep_bos=request.keep_bos,
        max_norm=request.max_norm or None,
        column=request.column,
        sink=sink,
    )


def loaded(names: Sequence[str], device: str | None, sink: Sink) -> Any:
    """One model, or several by their tags: `tag=name`, else a, b, c in the order given. Raises InputError."""
    where_to = checks.chosen_device(device)
    if len(names) == 1 and TAGGED.fullmatch(names[0]) is None:
        return vs.load(names[0], device=where_to, sink=sink)
    found: dict[str, str] = {}
    for number, name in enumerate(names):
        tagged = TAGGED.fullmatch(name)
        tag, where = (tagged[1], tagged[2]) if tagged else (chr(ord("a") + number), name)
        if tag in found:
            raise InputError(f"two models have the tag {tag!r}; write --model TAG=NAME for each")
        found[tag] = where
    return {tag: vs.load(where, device=where_to, sink=sink) for tag, where in found.items()}


def plain_name(sites: Sequence[str]) -> str:
    """Sites as part of the name of a folder."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in site) for site in sites)


def summary(store: vs.data.ActivationStore) -> list[str]:
    """What is in a store, line by line, and last its folder."""
    manifest = store.manifest
    counts = manifest.counts or {}
    size = sum(shard.bytes for shard in manifest.shards)
    null = f", {counts['null_texts']:,} null" if counts.get("null_texts") else ""
    lines = [
        f"{store.n_rows:,} rows from {counts['texts']:,} texts ({counts['empty_texts']:,} of them empty{null}), as "
        f"{manifest.plan['dtype']} in {len(manifest.shards)} shards, {size / 1e6:,.1f} MB"
    ]
    for site, width in zip(store.sites, store.widths, strict=True):
        error = manifest.errors.get(str(site))
        note = "" if error is None else f", {manifest.plan['compute']}: relative error {error:.2g} on the first batch"
        lines.append(f"{site}: width {width}{note}")
    first = "kept" if store.bos["kept"] else "dropped"
    dropped = f"{counts['outliers']:,} norm outliers dropped"
    return [*lines, f"bos {store.bos['token']}, first position {first}, {dropped}", str(store.folder)]
