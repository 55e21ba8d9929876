"""The schema of quality.json, as data: what `dictionaries.Quality.to_json` gives and the page is made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.errors import InputError
from vesalius.report.nodes import Items, Named, Node, Record, Value, check_node, rows

NAME = "vesalius/quality/1"


def _text(doc: str, *, null: bool = False) -> Value:
    return Value("text", doc, null)


def _whole(doc: str) -> Value:
    return Value("whole number", doc)


def _number(doc: str = "", *, null: bool = False) -> Value:
    return Value("number", doc, null)


def _histogram(*names: str) -> Record:
    counts = {name: Items(_whole(""), "per bin") for name in names}
    return Record({"edges": Items(_number(), "ends of the bins, one more than bins"), **counts}, "histogram")


FIGURES = Named(
    Record(
        {
            "value": _number("the figure"),
            "low": _number("95 % interval, lower end", null=True),
            "high": _number("upper end", null=True),
        }
    ),
    "figures by name",
)
SUMMARY = Record({name: _number() for name in ("mean", "q25", "median", "q75")}, "quartiles of a cosine")
COMPARED: dict[str, Node] = {"name": _text("name"), "words": _text("what it is"), "figures": FIGURES}
SHARED = Record(
    {
        "n": _whole("latents matched one to one"),
        "share": _number("share of them with a cosine of at least .7 by decoder and by encoder row"),
        "null_share": _number("the same by decoder row, matched to random directions"),
        "cosine": Record({name: _number() for name in ("decoder", "encoder", "null")}, "means"),
        "histogram": _histogram("matched", "null"),
    },
    "what it shares with the dictionary",
)
SCORES = Record(
    {
        "metric": _text("name of the metric"),
        "concept": _text("name of the concept"),
        "n_train": _whole("texts fitted to"),
        "n_test": _whole("texts tested on"),
        "note": _text("what to know before it is believed"),
        "lines": Items(
            Record(
                {
                    "method": _text("what was scored"),
                    "words": _text("what that is"),
                    "k": Value("whole number", "latents or coordinates used", True),
                    "value": _number("mean over the dictionaries"),
                    "low": _number("95 % interval, lower end", null=True),
                    "high": _number("upper end", null=True),
                    "spread": _number("standard deviation over the dictionaries", null=True),
                    "values": Items(_number(), "one per dictionary"),
                    "parts": Named(_number(), "the same per label", null=True),
                }
            ),
            "one per method",
        ),
    }
)
QUALITY = Record(
    {
        "schema": Value("text", "name of this schema", False, (NAME,)),
        "version": _text("version of vesalius"),
        "dictionary": Record(
            {
                "name": _text("what it is, in short"),
                "hash": _text("content hash"),
                "latents": _whole("number of latents"),
                "in_sites": Items(_text(""), "sites it reads"),
                "out_sites": Items(_text(""), "sites it rebuilds"),
                "trained": _text("how it was trained, where that is known", null=True),
            },
            "what was judged",
        ),
        "data": Record(
            {
                "words": _text("which rows were used, and whether they were trained on"),
                "seen": Value("true or false", "whether they were trained on; null: cannot be told", True),
                "rows": _whole("rows measured on"),
                "groups": _whole("groups that intervals respect"),
                "unit": _text("what the groups are"),
                "tokens": _whole("tokens whose predictions were measured in the model"),
                "hash": _text("content hash of the activations"),
                "seed": _whole("seed of everything random"),
            },
            "what it was judged on",
        ),
        "model": Record(
            {"name": _text("name"), "hash": _text("hash of the weights"), "note": _text("what to know")},
            "what it was spliced into; null without one",
            null=True,
        ),
        "figures": FIGURES,
        "sites": Named(FIGURES, "figures of each site, when it rebuilds several"),
        "density": Record(
            {
                "edges": Items(_number(), "ends of the bins, log10 of the share of rows"),
                "counts": Items(_whole(""), "latents per bin"),
                "silent": _whole("latents active in no row"),
            },
            "how often latents are active",
        ),
        "geometry": Record(
            {"nearest": SUMMARY, "null": SUMMARY, "histogram": _histogram("nearest", "null")},
            "cosine of decoder rows to the nearest other one; null: of random directions",
            null=True,
        ),
        "baselines": Items(Record(COMPARED), "what it is compared with"),
        "seeds": Items(Record({**COMPARED, "shared": SHARED}), "the same from other seeds"),
        "concepts": Items(SCORES, "scores on concepts, over the dictionary and its seeds"),
    },
    "the quality of a dictionary",
)


def check(found: Mapping[str, Any]) -> None:
    """Raises InputError, UnknownNameError or NotFiniteError, naming the path, unless this follows the schema."""
    check_node(QUALITY, found, "quality")
    for path, histogram, names in _histograms(found):
        for name in names:
            if len(histogram[name]) != len(histogram["edges"]) - 1:
                raise InputError(f"{path}.{name} has {len(histogram[name])} bins for {len(histogram['edges'])} edges")


def markdown() -> str:
    """The schema as a Markdown page, one table per top-level key."""
    parts = [
        "# The schema of quality.json",
        f'`vesalius quality` writes `quality.json` with `"schema": "{NAME}"` beside its page. Every key is always '
        "there; what was not measured is `null` or an empty list; every number is finite. This page is generated from "
        "the description that every file is checked against; [quality.md](quality.md) says what the figures are.",
    ]
    for name, node in QUALITY.fields.items():
        table = "\n".join(f"| `{path}` | {kind} | {doc} |" for path, kind, doc in rows(node, name))
        parts.append(f"## {name}\n\n| path | type | meaning |\n| --- | --- | --- |\n{table}")
    return "\n\n".join(parts) + "\n"


def _histograms(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], tuple[str, ...]]]:
    known: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [("quality.density", found["density"], ("counts",))]
    if found["geometry"] is not None:
        known.append(("quality.geometry.histogram", found["geometry"]["histogram"], ("nearest", "null")))
    for number, seed in enumerate(found["seeds"]):
        known.append((f"quality.seeds[{number}].shared.histogram", seed["shared"]["histogram"], ("matched", "null")))
    return known
