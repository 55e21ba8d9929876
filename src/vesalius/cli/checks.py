"""Errors in a command that can be found at once: before torch, transformers or a model is loaded, which takes seconds.

The rooms that do the work check everything again, and more. The names listed here are theirs; a test compares them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs.paths import check_file
from vesalius.model.loading import look_up
from vesalius.site import Site

QUESTIONS = (
    "capitals", "gendered_pronoun", "greater_than", "induction", "insecure_code", "ioi", "sva", "translation",
)  # fmt: skip
TABLE_STUDIES = ("by-design", "shortcut")
"""Studies that bring their data and models along."""
TABLES = (".jsonl", ".json", ".csv", ".tsv")
STDLIB, TEXTS = "stdlib", (".txt", ".jsonl", ".parquet")
KINDS = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")
CODERS = ("auto", "sae", "transcoder", "crosscoder", "cross_layer")
PRECISIONS = ("fp32", "bf16-screen", "bf16")
DTYPES = ("float32", "bfloat16", "float16")
COMPUTE = ("float32", "bfloat16")
CIRCUIT_METHODS = (
    "hybrid", "exact", "acdc", "pruning", "eap", "eap_ig_inputs", "eap_ig_activations", "mask_ig", "relp", "atp_star",
)  # fmt: skip
ABLATIONS = ("resample", "mean", "zero")
SHORTLIST, SAMPLED, SMALLEST = 1500, 300, 0.005
BASELINES = ("random-directions", "random-network", "untrained-dictionary")
NULLS = ("skip", "error")
MANIFEST = "manifest.json"
FEWEST_SETS = 4
TAGGED = re.compile(r"([A-Za-z][A-Za-z0-9_]*)=(.+)")
"""A model with a tag, `base=NAME`."""
_DEVICES = ("cpu", "cuda", "hpu", "mps", "mtia", "npu", "xla", "xpu")


def question(what: str) -> None:
    """A built-in question by name, or a file of pairs."""
    if what in QUESTIONS:
        return
    path = Path(what)
    if path.suffix == "" and "/" not in what and not path.exists():
        hint = "Or give a .jsonl, .json, .csv or .tsv file with your own pairs."
        raise UnknownNameError("question", what, (*QUESTIONS, *TABLE_STUDIES), hint)
    check_file(path, TABLES, "pairs")


def models(names: Sequence[str]) -> None:
    """Names of models, with or without tags."""
    for name in names:
        tagged = TAGGED.fullmatch(name)
        look_up(tagged[2] if tagged else name)


def texts(name: str) -> None:
    """The built-in corpus, a file, or a folder of files."""
    path = Path(name).expanduser()
    if name == STDLIB or path.is_dir():
        return
    if not path.exists():
        raise FileFormatError(
            f"there is no file or folder {path.absolute()}; texts are {STDLIB!r} (a built-in corpus), or a path"
        )
    check_file(path, TEXTS, "texts")


def harvest(
    given: str, names: Sequence[str], site: Sequence[str], dtype: str, compute: str, tokens: int | None
) -> None:
    """What activations are made of: texts, models, sites, and how they are computed and kept."""
    one_of("--dtype", [dtype], DTYPES)
    one_of("--compute", [compute], COMPUTE)
    at_least("--tokens", tokens, 1)
    sites(site)
    texts(given)
    models(names)


def store(folder: Path) -> None:
    """A folder of activations, as `vesalius harvest` makes it."""
    if not (folder / MANIFEST).is_file():
        what = f"there is no {MANIFEST} in it" if folder.exists() else "there is nothing of that name"
        raise FileFormatError(f"{folder.absolute()} is no activation store: {what}; `vesalius harvest` makes one")


def dictionary(path: Path) -> None:
    """A file or folder that may hold a dictionary."""
    if not path.exists():
        raise FileFormatError(f"there is no file or folder {path.absolute()}; a dictionary is made by `vesalius train`")


def sites(names: Iterable[str]) -> None:
    """Names of sites. Globs can be checked against a model only."""
    for name in names:
        if "*" not in name:
            Site.parse(name)


def training(fields: Mapping[str, Any], where: str | None) -> None:
    """Fields of TrainConfig that take names, and the device."""
    one_of("kind of dictionary", fields["kind"] or (), KINDS)
    one_of("coder", [fields["coder"]], CODERS)
    one_of("precision", [fields["precision"]], PRECISIONS)
    sites([*(fields["in_sites"] or ()), *(fields["out_sites"] or ())])
    device(where)


def device(name: str | None) -> None:
    """A device that can be used on this machine; None is left to `chosen_device`."""
    if name is None:
        return
    kind = name.partition(":")[0]
    if kind not in _DEVICES:
        raise UnknownNameError("device", name, _DEVICES)
    if name == "cpu":
        return
    # Late and at this one edge: only torch knows which devices there are, and the cpu always is.
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); the cpu always can."
        ) from error


def chosen_device(name: str | None) -> str:
    """The device asked for; without a word the GPU where there is one, and the CPU for processes of torchrun."""
    if name is not None:
        return name
    # Late and at this one edge: other commands, such as `ledger`, start without torch.
    import torch

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return "cuda" if alone and torch.cuda.is_available() else "cpu"


def one_of(what: str, values: Iterable[str], known: Sequence[str]) -> None:
    """Values that have to be among the known ones. what: of which kind, for the message."""
    for value in values:
        if value not in known:
            raise UnknownNameError(what, value, known)


def at_least(option: str, value: int | None, least: int) -> None:
    """A number, if given, that has a lower limit."""
    if value is not None and value < least:
        raise InputError(f"{option} must be at least {least}; got {value}")
