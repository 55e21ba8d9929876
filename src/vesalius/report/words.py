"""Numbers, names and reasons as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "–"
SHARE = "share"
NO_ROLE = "no role fits"
VERDICTS = {
    "SUPPORTED": ("supported", "✓"),
    "REFUTED": ("refuted", "✕"),
    "NOT SPECIFIC": ("not specific", "≈"),
    "INCONCLUSIVE": ("inconclusive", "?"),
}
_REASONS = {
    "absent": "There is no such effect: it lies within ±δ of zero.",
    "opposite": "The effect goes the other way.",
    "too_small": "There is an effect, but it is smaller than the δ that was declared worth claiming.",
    "not_specific": "The effect is there, but matched controls (or a declared null) have it too: it is not special to "
    "this part.",
    "unmeasured": "It could not be measured.",
    "n_too_small": "Inconclusive: too few prompts.",
}
_NO_REASON = {
    "REFUTED": "The effect that was claimed is not there.",
    "NOT SPECIFIC": _REASONS["not_specific"],
    "INCONCLUSIVE": "Inconclusive: neither shown nor ruled out.",
}
_COMPONENT = re.compile(r"^layers\.(\d+)\.(?:z\[(\d+)\]|(mlp_out)|attn_out|mlp_post\[(\d+)\])$")
# As `Latent` prints itself.
_LATENT = re.compile(r"^(.*) latent (\d+)$")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits with a real minus sign; a unit that begins with "share" is shown in per cent."""
    if value is None:
        return NOT_MEASURED
    if unit.startswith(SHARE):
        # Small shares keep a digit: 2.1 % and 1.6 % are not the same size of effect.
        text = f"{100 * value:.0f}" if abs(value) >= 0.0995 or value == 0 else f"{100 * value:.1f}"
        return _signed("0" if float(text) == 0 else text) + " %"
    if value == 0 or abs(value) >= 1e6 or abs(value) < 1e-3:
        return _signed(f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-"))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{min(digits, 3)}f}")


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """Both ends in brackets, or nothing when they were not measured."""
    if low is None or high is None:
        return ""
    ends = [number(end, unit).removesuffix(" %") for end in (low, high)]
    return f"[{ends[0]}, {ends[1]}]"


def estimate(found: Mapping[str, Any], unit: str = "") -> str:
    """Estimate and interval in one line."""
    return f"{number(found['estimate'], unit)} {interval(found['low'], found['high'], unit)}".strip()


def p_value(value: float | None) -> str:
    """Two digits; very small ones as a bound."""
    if value is None:
        return NOT_MEASURED
    return "< .0001" if value < 1e-4 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def rank(value: float | None) -> str:
    """A median rank, which may lie halfway between two."""
    return NOT_MEASURED if value is None else f"{value:,.1f}".removesuffix(".0")


def size(value: float | None) -> str:
    """Bytes as GB or MB."""
    if value is None:
        return NOT_MEASURED
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def component(name: str | None) -> str:
    """A part as a person says it: "head 17.3", "MLP 5", "neuron 5.1203", "embedding"; other names stay as they are."""
    if name is None:
        return ""
    match = _COMPONENT.match(name)
    if match is None:
        return "embedding" if name == "embed" else name
    layer, head, mlp, neuron = match.groups()
    if head is not None or neuron is not None:
        return f"head {layer}.{head}" if head is not None else f"neuron {layer}.{neuron}"
    return f"MLP {layer}" if mlp else f"attention {layer}"


def short_component(name: str, most: int = 8) -> str:
    """The same for a small box whose row tells the layer: "17.3", "MLP 5", "L 512" for a latent, "N 1203"."""
    latent = _LATENT.match(name)
    said = f"L {latent[2]}" if latent else component(name).removeprefix("head ")
    if said.startswith("neuron "):
        said = f"N {said.split('.')[-1]}"
    return said if len(said) <= most else said[: most - 1] + "…"


def reason(claim: Mapping[str, Any]) -> str:
    """Why a claim was not supported, in plain words, and what would decide it; empty for a supported one."""
    if claim["verdict"] == "SUPPORTED":
        return ""
    known, needed = claim["reason"], claim["n_to_decide"]
    # What would decide says more than why it is open.
    if claim["verdict"] == "INCONCLUSIVE" and needed is not None:
        return f"Inconclusive: about {needed:,} prompts would decide."
    if known is None:
        return _NO_REASON[claim["verdict"]]
    return _REASONS.get(known, known.replace("_", " ").capitalize() + ".")


def css(verdict: str) -> str:
    """The class of a verdict in the style sheet."""
    return VERDICTS[verdict][0].replace(" ", "-")


def condition(found: Mapping[str, Any] | None) -> str:
    """Where an effect was measured: "swap, noising, total effect"."""
    if found is None:
        return ""
    effect = found.get("effect")
    parts = [found.get("corruption"), found.get("direction"), f"{effect} effect" if effect else None]
    return ", ".join(part for part in parts if part)


def token(text: str) -> str:
    """A token so that one can see it: spaces trimmed, line ends and blank tokens drawn, long ones cut."""
    # In GPT-style vocabularies nearly every token begins with a space, which says nothing on an axis.
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣"
    return shown if len(shown) <= 14 else shown[:13] + "…"


def tick(value: float, unit: str = "") -> str:
    """A round value at an axis, as short as can be."""
    return _signed(f"{100 * value:.6g} %" if unit.startswith(SHARE) else f"{value:.6g}")


def words_changed(clean: str, other: str) -> list[tuple[str, bool]]:
    """The words, punctuation and spaces of `other`, in order, and whether each differs from the clean prompt's."""
    before, after = _words(clean), _words(other)
    # Most corruptions put one word in the place of another; then the places can be compared.
    if len(before) == len(after):
        return [(word, word != old) for word, old in zip(after, before, strict=True)]
    old = set(before)
    return [(word, word not in old) for word in after]


def _words(text: str) -> list[str]:
    # Punctuation stands alone, so that "Anna," against "Paul," highlights the name only.
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _signed(text: str) -> str:
    return text.replace("-", "−")
