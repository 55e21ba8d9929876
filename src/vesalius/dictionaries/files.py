"""`load` and `save`: from a file or folder, ours or another library's, to a coder, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from vesalius.dictionaries import folder as own
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.evaluation.verify import verify
from vesalius.dictionaries.formats import FORMATS, PICKLED, READ_ONLY, WRITERS, Found, Options
from vesalius.dictionaries.stored_layer import StoredLayer
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs.untrusted import understood
from vesalius.model import Model
from vesalius.site import Site

OWN = "vesalius"
"""Name of our own format."""
Sites = str | Site | Sequence[str | Site]


def save(coder: Any, out: str | Path, *, format: str = OWN) -> Path:
    """Writes a coder to a folder, which is made when missing.

    format: `vesalius` keeps everything; `saelens`, `sparsify`, `gemma_scope`, `gemma_scope_2` and `circuit_tracer`
    write what those libraries open. What a format has no field for is folded into the weights where the function stays
    the same (scales of inputs, b_dec on inputs), and refused where it does not.

    In our format the same coder may be saved again over itself. Raises InputError naming what the format cannot
    express, or when the folder holds another dictionary; UnknownNameError listing the formats that are written.
    """
    where = Path(out)
    if format == OWN:
        return own.save(coder, where)
    if format not in WRITERS:
        why = f"{format} is read only." if format in READ_ONLY else ""
        raise UnknownNameError("format to write", format, [OWN, *WRITERS], why)
    if isinstance(coder, CrossLayerTranscoder) and format != "circuit_tracer":
        raise InputError(f"{format} cannot express a cross-layer transcoder; circuit_tracer and {OWN} can")
    # Other formats have a config.json too, and the two would overwrite each other's.
    if (where / own.CONFIG).exists() and own.is_folder(where):
        raise InputError(f"{where} holds a dictionary in our own format; choose another folder")
    WRITERS[format](coder, where)
    return where


def load(
    where: str | Path,
    *,
    site: Sites | None = None,
    out_site: Sites | None = None,
    layer: int | None = None,
    unpickle: bool = False,
    in_scale: float | None = None,
    k: int | None = None,
    row_norm: str | None = None,
    ignore: Sequence[str] = (),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    model: Model | None = None,
    texts: Any = "stdlib",
) -> SparseCoder:
    """The dictionary in a file or folder, recognised by what is in it: ours, or one of the formats in `formats`.

    Nothing of a file is run. site: where it reads, when the file does not say or says it in words that stand for no
    site here; one per site that is read. out_site: where it writes; default `site` for a dictionary that reconstructs
    what it reads. layer: which, of a folder of transcoders. unpickle: read the tensors of a pickle (.pt), with a
    warning. in_scale: factor on inputs that a dictionary of SAELens or OpenMOSS was trained with, where its folder
    lacks it. k: active latents, of Qwen Scope in another folder than Qwen's. row_norm: `none` or `layer_norm`, of
    OpenAI's, whose files don't say (default: as their loader takes it). ignore: tensors and settings of the file, by
    name, that are left out although they are not understood (default: they are an error). dtype: default as stored for
    our own format, else float32. model: it is checked on this model with some of `texts` against what its file claims
    (`verify`), so that a misreading is an error.

    A cross-layer transcoder's layers stay on disk (`StoredLayer`) and are read when they are used.

    Raises FileFormatError naming the file that is missing, truncated, altered, unsafe or of a kind that is not read,
    and what to do; InputError for arguments that do not fit what is there.
    """
    sites, outs = _parsed(site), _parsed(out_site)
    path = Path(where).expanduser()
    if not path.exists():
        raise FileFormatError(f"there is no file or folder {path}")
    coder = _read(path, Options(layer, unpickle, in_scale, k, row_norm, dtype or torch.float32, _names(ignore)))
    # The type first: a device may not have the type of the file.
    for change in (dtype, device):
        coder = coder if change is None else cast(Any, coder).to(change)
    coder = _at_sites(coder, sites, outs)
    if model is not None:
        verify(coder, model, texts)
    return coder


def _names(ignore: Sequence[str]) -> tuple[str, ...]:
    # A single name is a sequence too, of letters.
    return (ignore,) if isinstance(ignore, str) else tuple(ignore)


def _parsed(site: Sites | None) -> tuple[Site, ...]:
    if site is None:
        return ()
    return tuple(map(Site.parse, [site] if isinstance(site, str | Site) else site))


def _read(path: Path, options: Options) -> SparseCoder:
    needless = {name for name in ("in_scale", "k", "row_norm") if getattr(options, name) is not None}
    if path.is_dir() and own.is_folder(path):
        _refuse(needless, path, OWN)
        return own.read(path)
    found = Found(path, options)
    known = next((known for known in FORMATS if known.claims(found)), None)
    if known is None:
        raise FileFormatError(_nothing(path))
    _refuse(needless - set(known.options), path, known.name)
    # Nothing in a stranger's JSON can be trusted to be of the type it should be.
    with understood(f"{path} is not understood as a dictionary of {known.name}"):
        return known.read(found)


def _refuse(needless: Collection[str], path: Path, name: str) -> None:
    """Raises InputError for arguments that are for files of other formats."""
    for argument in sorted(needless):
        takes = ", ".join(sorted({one.name for one in FORMATS if argument in one.options}))
        raise InputError(f"{argument} is for files of {takes}; {path} is one of {name}")


def _nothing(path: Path) -> str:
    """Why a file or folder holds no dictionary that is known here."""
    listed = "; ".join(dict.fromkeys(known.holds for known in FORMATS))
    if path.is_file():
        return f"{path} is no file of a dictionary that is known here. Known are: {listed}"
    inside = sorted(f.name for f in path.iterdir() if f.is_dir() and any(known.claims(Found(f)) for known in FORMATS))
    if inside:
        more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
        return f"{path} holds folders with a dictionary each ({', '.join(inside[:6])}{more}): load one of them"
    names = sorted(entry.name for entry in path.iterdir())
    alone = [name for name in names if name.endswith(PICKLED)]
    if alone:
        return (
            f"{path} holds single files ({', '.join(alone[:6])}), each of which may be a dictionary: load one of them"
        )
    return (
        f"{path} holds no dictionary that is known here: no {own.CONFIG} of format {own.FORMAT!r}, nor {listed}. "
        f"It holds {', '.join(names[:8]) or 'nothing'}"
    )


def _at_sites(coder: SparseCoder, sites: tuple[Site, ...], outs: tuple[Site, ...]) -> SparseCoder:
    """The coder at other sites than its file says."""
    if not sites and not outs:
        return coder
    if not outs:
        outs = sites if coder.in_sites == coder.out_sites else coder.out_sites
    sites = sites or coder.in_sites
    for name, given, has in (("site", sites, coder.in_sites), ("out_site", outs, coder.out_sites)):
        if len(given) != len(has):
            raise InputError(f"{name}= names {len(given)} site(s), and this dictionary has {len(has)}; give one each")
    if isinstance(coder, CrossLayerTranscoder):
        layers = tuple(
            replace(cast(Any, layer), in_sites=(sites[number],), out_sites=outs[number:])
            for number, layer in enumerate(coder.layers)
        )
        return replace(coder, layers=layers)
    assert isinstance(coder, Dictionary | StoredLayer)
    return replace(coder, in_sites=sites, out_sites=outs)
