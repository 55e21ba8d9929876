"""From the quality of a dictionary to one HTML page, made as the report of a study is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from vesalius.jobs import write_atomic
from vesalius.report import quality_schema
from vesalius.report.histograms import cosines, densities
from vesalius.report.html import environment
from vesalius.report.scales import Scale
from vesalius.report.words import number

HTML_NAME, JSON_NAME = "quality.html", "quality.json"
Figures = Mapping[str, Mapping[str, Any]]
BAR_WIDTH = 260.0
KINDS = {"dictionary": "own", "seed": "own", "mean": "ablation", "zero": "ablation"}
NAMES = {
    "dictionary": "the dictionary", "pca": "principal components", "linear": "linear map",
    "random": "random directions", "untrained": "untrained dictionary", "neurons": "the site's own coordinates",
    "mean": "mean ablation", "zero": "zero ablation",
}  # fmt: skip
LABELS = {
    "fvu": "variance unexplained (FVU)", "l0": "latents per row (L0)", "dead": "dead latents",
    "dense_1pct": "latents in over 1 % of rows", "dense_10pct": "latents in over 10 % of rows", "cosine": "cosine",
    "l2_ratio": "norm ratio", "reconstruction_bias": "reconstruction bias", "ce_clean": "cross-entropy, clean",
    "ce": "cross-entropy, spliced", "ce_increase": "added to the cross-entropy",
    "ce_increase_mean": "added by mean ablation", "ce_increase_zero": "added by zero ablation", "kl": "KL divergence",
    "kl_mean": "KL divergence, mean ablation", "kl_zero": "KL divergence, zero ablation",
    "loss_recovered": "loss recovered, of zero ablation", "loss_recovered_mean": "loss recovered, of mean ablation",
    "kl_recovered": "KL recovered, of zero ablation", "kl_recovered_mean": "KL recovered, of mean ablation",
}  # fmt: skip
SHARES = (
    "dead",
    "dense_1pct",
    "dense_10pct",
    "loss_recovered",
    "loss_recovered_mean",
    "kl_recovered",
    "kl_recovered_mean",
)


@dataclass(frozen=True)
class Bar:
    """Pixel places along one line: from zero to the value, and the ends of the interval, if there is one."""

    zero: float
    end: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """A line of a table: name, what it is, one figure with its bar, and further figures. kind: its colour."""

    name: str
    words: str
    figure: Mapping[str, Any]
    bar: Bar
    kind: str
    more: Figures


def render_quality(found: Mapping[str, Any], words: Mapping[str, str], command: str = "") -> str:
    """One self-contained HTML page. The same figures give the same page, byte for byte.

    found: `Quality.to_json()`. words: what each figure is (`dictionaries.WORDS`). command: how to get the same. Raises
    as `quality_schema.check`.
    """
    quality_schema.check(found)
    return environment().get_template("quality.html.j2").render(_view(found, words, command))


def write_quality(found: Mapping[str, Any], words: Mapping[str, str], folder: str | Path, command: str = "") -> Path:
    """Writes quality.html and quality.json into the folder, each atomically; returns the path of the page.

    Nothing is written unless the page could be made. Raises as `render_quality` and `jobs.write_atomic`.
    """
    page, target = render_quality(found, words, command), Path(folder)
    write_atomic(target / JSON_NAME, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(target / HTML_NAME, page)


_EXPLAINED = re.compile(r'<p class="lead" id="explained">.*?</p>', re.DOTALL)


def link_explained(page: str | Path, index: str, answer: str) -> bool:
    """Puts a link to the index of explained latents (relative to the page), and its answer, into a quality page.

    False, and nothing is changed, when there is no such page.
    """
    target = Path(page)
    text = target.read_text("utf-8") if target.exists() else ""
    linked = (
        f'<p class="lead" id="explained">{escape(answer)} <a href="{escape(index)}">Every latent by itself</a>.</p>'
    )
    changed, count = _EXPLAINED.subn(lambda _: linked, text)
    if count:
        write_atomic(target, changed)
    return bool(count)


def _view(found: Mapping[str, Any], words: Mapping[str, str], command: str) -> dict[str, Any]:
    figures = found["figures"]
    return {
        "q": found,
        "f": figures,
        "answer": quality_answer(found),
        "reconstructed": _rows(found, "fvu"),
        "losses": _losses(found),
        "densities": densities(found["density"]),
        "nearest": None if found["geometry"] is None else cosines(found["geometry"]["histogram"], "nearest"),
        "seeds": [(seed, cosines(seed["shared"]["histogram"], "matched")) for seed in found["seeds"]],
        "concepts": [(scores, _scored(scores["lines"])) for scores in found["concepts"]],
        "every": [(LABELS[name], figure, words[name], _unit(name)) for name, figure in figures.items()],
        "labels": LABELS,
        "bar_width": BAR_WIDTH,
        "command": command,
    }


def _unit(name: str) -> str:
    return "share" if name in SHARES else ""


def quality_answer(found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    figures, about = found["figures"], found["dictionary"]
    explained = number(1 - figures["fvu"]["value"], "share")
    kept = f"{figures['l0']['value']:.3g}"
    sites = " and ".join(about["out_sites"])
    said = [
        f"{explained} of the variance of {sites} is reconstructed, with {kept} of {about['latents']:,} latents per row."
    ]
    if found["baselines"]:
        others = [f"{NAMES[b['name']]} {number(1 - b['figures']['fvu']['value'], 'share')}" for b in found["baselines"]]
        said.append(f"With as many numbers per row: {', '.join(others)}.")
    if "ce_increase" in figures:
        added, clean = number(figures["ce_increase"]["value"]), number(figures["ce_clean"]["value"])
        mean = number(figures["ce_increase_mean"]["value"])
        said.append(
            f"In the model it adds {added} nats to a cross-entropy of {clean}; the mean in its place adds {mean}."
        )
    return said


def _rows(found: Mapping[str, Any], name: str) -> list[Row]:
    """The dictionary and its baselines by one figure, on one scale that begins at zero."""
    entries = [("dictionary", found["dictionary"]["name"], found["figures"])]
    entries += [(seed["name"], seed["words"], seed["figures"]) for seed in found["seeds"]]
    entries += [(one["name"], one["words"], one["figures"]) for one in found["baselines"]]
    return _drawn([(key, words, figures[name], figures) for key, words, figures in entries if name in figures])


def _scored(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Bar]]:
    """The lines of a metric with a bar each, on one scale; counts, which are no shares, get none that says anything."""
    # Of all metrics only counts of latents exceed this; on their axis every share would shrink to nothing.
    shares = [line for line in lines if -1.5 <= line["value"] <= 1.5]
    ends = [value for line in shares for value in (line["value"], line["low"], line["high"]) if value is not None]
    scale = Scale(min(0.0, *ends), max(1.0, *ends), 1.0, BAR_WIDTH - 1.0)
    return [(line, _bar(line, scale) if line in shares else Bar(scale(0.0), scale(0.0), None)) for line in lines]


def _losses(found: Mapping[str, Any]) -> list[Row]:
    """What each adds to the cross-entropy, with both ablations; empty without a model."""
    figures = found["figures"]
    if "ce_increase" not in figures:
        return []
    entries = [("dictionary", "in place of the model's own activations", figures)]
    entries += [
        (one["name"], one["words"], one["figures"]) for one in found["baselines"] if "ce_increase" in one["figures"]
    ]
    rows = [(key, words, own["ce_increase"], own) for key, words, own in entries]
    ends = {"mean": "the mean activation at every token", "zero": "zeros at every token"}
    for key, words in ends.items():
        own = {"kl": figures[f"kl_{key}"]}
        rows.append((key, words, figures[f"ce_increase_{key}"], own))
    return _drawn(rows)


def _drawn(entries: Sequence[tuple[str, str, Mapping[str, Any], Figures]]) -> list[Row]:
    """Bars on one scale that holds zero."""
    ends = [value for _, _, figure, _ in entries for value in figure.values() if value is not None]
    scale = Scale(min(0.0, *ends), max(*ends, 1e-9) * 1.02, 1.0, BAR_WIDTH - 1.0)
    return [
        Row(NAMES.get(key, "another seed"), words, figure, _bar(figure, scale), KINDS.get(key, "baseline"), own)
        for key, words, figure, own in entries
    ]


def _bar(figure: Mapping[str, Any], scale: Scale) -> Bar:
    low, high = figure["low"], figure["high"]
    return Bar(scale(0.0), scale(figure["value"]), None if low is None else (scale(low), scale(high)))
