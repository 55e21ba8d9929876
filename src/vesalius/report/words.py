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
    "INCONCLUSIVE": ("inconclusive", "?"),
}
_REASONS = {
    "absent": "There is no such effect: it lies within ±δ of zero.",
    "opposite": "The effect goes the other way.",
    "too_small": "There is an effect, but it is smaller than the δ that was declared worth claiming.",
    "not_specific": "Matched controls (or a declared null) do about as much: the effect is not special to this part.",
    "unmeasured": "It could not be measured.",
    "n_too_small": "The data allow both: too few examples.",
}
_UNDECIDED = "The interval allows both an effect worth claiming and none."
_COMPONENT = re.compile(r"^layers\.(\d+)\.(?:z\[(\d+)\]|(mlp_out)|(attn_out))$")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits with a real minus sign; a unit that begins with "share" is shown in per cent."""
    if value is None:
        return NOT_MEASURED
    if unit.startswith(SHARE):
        text = f"{100 * value:.0f}" if abs(value) >= 0.0995 or value == 0 else f"{100 * value:.1f}"
        return _signed(text) + " %"
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
    """A component as a person says it: "head 17.3", "MLP 5", "embedding"; other names stay as they are."""
    if name is None:
        return ""
    match = _COMPONENT.match(name)
    if match is None:
        return "embedding" if name == "embed" else name
    layer, head, mlp, _ = match.groups()
    return f"head {layer}.{head}" if head is not None else f"MLP {layer}" if mlp else f"attention {layer}"


def reason(claim: Mapping[str, Any]) -> str:
    """Why a claim was refuted or stayed open, in plain words; empty for a supported one."""
    if claim["verdict"] == "SUPPORTED":
        return ""
    known = claim["reason"]
    text = _REASONS.get(known, "") if known else _UNDECIDED
    text = text or known.replace("_", " ").capitalize() + "."
    needed = claim["n_to_decide"]
    return f"{text} About {needed:,} examples would decide." if needed is not None else text


def condition(found: Mapping[str, Any] | None) -> str:
    """Where an effect was measured: "swap, noising, total effect"."""
    if found is None:
        return ""
    effect = found.get("effect")
    parts = [found.get("corruption"), found.get("direction"), f"{effect} effect" if effect else None]
    return ", ".join(part for part in parts if part)


def token(text: str) -> str:
    """A token so that one can see it: spaces trimmed, line ends and blank tokens drawn, long ones cut."""
    shown = text.strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣"
    return shown if len(shown) <= 14 else shown[:13] + "…"


def tick(value: float, unit: str = "") -> str:
    """A round value at an axis, as short as can be."""
    return _signed(f"{100 * value:.6g} %" if unit.startswith(SHARE) else f"{value:.6g}")


def words_changed(clean: str, other: str) -> list[tuple[str, bool]]:
    """The words, punctuation and spaces of `other`, in order, and whether each differs from the clean prompt's."""
    before, after = _words(clean), _words(other)
    if len(before) == len(after):
        return [(word, word != old) for word, old in zip(after, before, strict=True)]
    old = set(before)
    return [(word, word not in old) for word in after]


def _words(text: str) -> list[str]:
    # Punctuation stands alone, so that "Anna," against "Paul," highlights the name only.
    return re.findall(r"\w+|\s+|[^\w\s]", text)


def _signed(text: str) -> str:
    return text.replace("-", "−")
