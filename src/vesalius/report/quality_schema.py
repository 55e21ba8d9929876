"""The schema of quality.json, as data: what `dictionaries.Quality.to_json` gives and the page is made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vesalius.errors import InputError
from vesalius.report.nodes import Items, Named, Node, Object, check_node, flag, number, rows, text, whole

NAME = "vesalius/quality/1"


def _histogram(*names: str) -> Object:
    counts = {name: Items(whole(""), "per bin") for name in names}
    return Object({"edges": Items(number(null=False), "ends of the bins, one more than bins"), **counts}, "histogram")


FIGURES = Named(
    Object(
        {
            "value": number("the figure", null=False),
            "low": number("95 % interval, lower end"),
            "high": number("upper end"),
        }
    ),
    "figures by name",
)
SUMMARY = Object({name: number(null=False) for name in ("mean", "q25", "median", "q75")}, "quartiles of a cosine")
COMPARED: dict[str, Node] = {"name": text("name"), "words": text("what it is"), "figures": FIGURES}
SHARED = Object(
    {
        "n": whole("latents matched one to one"),
        "share": number("share of them with a cosine of at least .7 by decoder and by encoder row", null=False),
        "null_share": number("the same by decoder row, matched to random directions", null=False),
        "cosine": Object({name: number(null=False) for name in ("decoder", "encoder", "null")}, "means"),
        "histogram": _histogram("matched", "null"),
    },
    "what it shares with the dictionary",
)
SCORES = Object(
    {
        "metric": text("name of the metric"),
        "concept": text("name of the concept"),
        "n_train": whole("texts fitted to"),
        "n_test": whole("texts tested on"),
        "note": text("what to know before it is believed"),
        "lines": Items(
            Object(
                {
                    "method": text("what was scored"),
                    "words": text("what that is"),
                    "k": whole("latents or coordinates used", null=True),
                    "value": number("mean over the dictionaries", null=False),
                    "low": number("95 % interval, lower end"),
                    "high": number("upper end"),
                    "spread": number("standard deviation over the dictionaries"),
                    "values": Items(number(null=False), "one per dictionary"),
                    "parts": Named(number(null=False), "the same per label", null=True),
                }
            ),
            "one per method",
        ),
    }
)
QUALITY = Object(
    {
        "schema": text("name of this schema", one_of=(NAME,)),
        "version": text("version of vesalius"),
        "dictionary": Object(
            {
                "name": text("what it is, in short"),
                "hash": text("content hash"),
                "latents": whole("number of latents"),
                "in_sites": Items(text(""), "sites it reads"),
                "out_sites": Items(text(""), "sites it rebuilds"),
                "trained": text("how it was trained, where that is known", null=True),
            },
            "what was judged",
        ),
        "data": Object(
            {
                "words": text("which rows were used, and whether they were trained on"),
                "seen": flag("whether they were trained on; null: cannot be told", null=True),
                "rows": whole("rows measured on"),
                "groups": whole("groups that intervals respect"),
                "unit": text("what the groups are"),
                "tokens": whole("tokens whose predictions were measured in the model"),
                "hash": text("content hash of the activations"),
                "seed": whole("seed of everything random"),
            },
            "what it was judged on",
        ),
        "model": Object(
            {"name": text("name"), "hash": text("hash of the weights"), "note": text("what to know")},
            "what it was spliced into; null without one",
            null=True,
        ),
        "figures": FIGURES,
        "sites": Named(FIGURES, "figures of each site, when it rebuilds several"),
        "density": Object(
            {
                "edges": Items(number(null=False), "ends of the bins, log10 of the share of rows"),
                "counts": Items(whole(""), "latents per bin"),
                "silent": whole("latents active in no row"),
            },
            "how often latents are active",
        ),
        "geometry": Object(
            {"nearest": SUMMARY, "null": SUMMARY, "histogram": _histogram("nearest", "null")},
            "cosine of decoder rows to the nearest other one; null: of random directions",
            null=True,
        ),
        "baselines": Items(Object(COMPARED), "what it is compared with"),
        "seeds": Items(Object({**COMPARED, "shared": SHARED}), "the same from other seeds"),
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
    for index, seed in enumerate(found["seeds"]):
        known.append((f"quality.seeds[{index}].shared.histogram", seed["shared"]["histogram"], ("matched", "null")))
    return known
