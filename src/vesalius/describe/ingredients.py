"""Ingredients of roles: one predicted figure each, with its threshold on discovery and the claim it leads to.

Thresholds were fixed on discovery data before any claim was tested; roles share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vesalius.bench import Bench
from vesalius.describe.context import FITS, Behaviour, Context, Estimate, RoleFit, short_name
from vesalius.describe.matching import Matched, matched_controls
from vesalius.describe.measures import UNITS, figure, later, lean
from vesalius.describe.places import in_words
from vesalius.protocol import Claim
from vesalius.protocol.claim import DEFAULT_SHARE
from vesalius.site import Site

# Smallest attention worth claiming: uniform attention over the prompts of the built-in tasks gives .03 to .1.
LEAST_ATTENTION = 0.1
# A head looks somewhere when half its mean is still worth claiming: claims are made at half the mean.
LOOKS = 2 * LEAST_ATTENTION
# A head that moves the movers' attention does at least a tenth of what the whole corruption does to it, and no less
# than .02, because R itself may be near zero.
SHIFT_SHARE, LEAST_SHIFT = 0.1, 0.02


@dataclass(frozen=True)
class Ingredient:
    """One figure of a component on discovery, how far it passes its threshold, and the claim's terms.

    strength: 0 to 1, .5 at the threshold. delta None: nothing is claimed (the figure only helps to choose the role).
    """

    behaviour: Behaviour
    mean: float
    strength: float
    words: str
    delta: float | None = None
    sign: int = 1
    kind: str = "causal"
    total_effect: float | None = None
    nulls: tuple[tuple[str, float], ...] = ()
    condition: Mapping[str, Any] = field(default_factory=dict)
    controls: Matched | None = None
    """None: the context's controls of the component."""


def above(value: float, threshold: float) -> float:
    """Strength of a figure that should be at least the threshold: 0 at 0 and below, .5 at it, towards 1 far above."""
    return value / (value + threshold) if value > 0 else 0.0


def within(value: float, limit: float) -> float:
    """Strength of a figure that should be at most the limit in size: 1 at 0, .5 at it, towards 0 far above."""
    return limit / (limit + abs(value))


def mean_of(bench: Bench, check: str, component: Site, **parameters: Any) -> tuple[Behaviour, float]:
    """A behaviour of a component and its mean over the prompts."""
    behaviour = Behaviour(check, {"component": str(component), **parameters})
    return behaviour, float(figure(bench, check, behaviour.parameters).mean())


def looks(
    context: Context, component: Site, query: str, key: str, elsewhere: str, at_least: float = LOOKS
) -> Ingredient:
    """It attends from `query` to `key`, and more than to `elsewhere`."""
    behaviour, mean = mean_of(context.bench, "attends", component, query=query, key=key, elsewhere=elsewhere)
    _, other = mean_of(context.bench, "attends", component, query=query, key=elsewhere)
    delta = max(LEAST_ATTENTION, mean / 2)
    return Ingredient(
        behaviour, mean, min(above(mean, at_least), above(mean - other, at_least / 2)),
        f"attends from {in_words(query)} to {in_words(key)} ({mean:.2f} of its attention; "
        f"{in_words(elsewhere)} gets {other:.2f})",
        delta, kind="predictive", nulls=(("elsewhere", delta / 2),),
        condition={"corruption": context.bench.main, "prompts": "clean"},
    )  # fmt: skip


def copies(context: Context, component: Site, key: str, sign: int) -> Ingredient:
    """What it reads at `key` it writes (sign +1) or erases (-1) as the next token."""
    behaviour, mean = mean_of(context.bench, "copies", component, key=key)
    verb = "adds to" if mean > 0 else "takes from"
    return Ingredient(
        behaviour, mean, above(sign * mean, context.delta),
        f"{verb} that token's logit ({mean:+.2f} against other prompts' tokens, at full attention)",
        context.delta, sign, "predictive", context.total_effect,
        condition={"corruption": context.bench.main, "prompts": "clean"},
    )  # fmt: skip


def writes(context: Context, component: Site, sign: int) -> Ingredient:
    """It writes straight onto the logit difference, for the answer (+1) or for the distractor (-1)."""
    behaviour, mean = mean_of(context.bench, "direct_effect", component)
    return Ingredient(
        behaviour, mean, above(sign * mean, context.delta),
        f"writes {mean:+.2f} onto the logit difference directly",
        context.delta, sign, "causal", context.total_effect,
        nulls=(("shuffled labels", context.delta / 2),),
        condition={"corruption": context.bench.main, "effect": "direct"},
    )  # fmt: skip


def quiet(context: Context, component: Site) -> Ingredient:
    """It writes nothing worth claiming onto the logit difference. Only helps to choose: no claim comes of it."""
    behaviour, mean = mean_of(context.bench, "direct_effect", component)
    words = f"writes next to nothing ({mean:+.2f}) onto the logit difference directly"
    return Ingredient(behaviour, mean, within(mean, context.delta), words)


def matters(context: Context, component: Site, sign: int = 0) -> Ingredient:
    """Patching its corrupted value changes the logit difference; sign 0 takes the sign found on discovery."""
    behaviour, mean = mean_of(context.bench, "total_effect", component)
    sign = sign or (1 if mean >= 0 else -1)
    what = "lowers" if mean > 0 else "raises"
    return Ingredient(
        behaviour, mean, above(sign * mean, context.delta),
        f"giving it its corrupted value {what} the logit difference by {abs(mean):.2f}",
        context.delta, sign, "causal", context.total_effect,
        nulls=(("shuffled labels", context.delta / 2),),
        condition={"corruption": context.bench.main, "direction": "noising", "effect": "total"},
    )  # fmt: skip


def turns(context: Context, component: Site) -> Ingredient | None:
    """Its corrupted value turns the later movers' attention from the answer; None when there is no later mover.

    The claim's total effect is in its own unit: what the whole corruption does to the movers' attention.
    """
    movers = later(component, context.movers)
    if not movers:
        return None
    bench = context.bench
    behaviour, mean = mean_of(bench, "moves_attention", component, movers=[str(mover) for mover in movers])
    total = sum(float((lean(bench, m) - lean(bench, m, bench.main)).mean()) for m in movers) / len(movers)
    first = min(int(mover.layer) for mover in movers if mover.layer is not None)
    threshold = max(LEAST_SHIFT, SHIFT_SHARE * abs(total))
    return Ingredient(
        behaviour, mean, above(mean, threshold),
        f"giving it its corrupted value turns the name movers' attention by {mean:.2f} from answer to distractor",
        max(mean / 2, DEFAULT_SHARE * abs(total), LEAST_SHIFT / 2), 1, "causal", total,
        condition={"corruption": bench.main, "direction": "noising", "effect": "total"},
        controls=matched_controls(bench, component, context.members, before=first),
    )  # fmt: skip


def role_fit(
    context: Context, component: Site, role: str, ingredients: Sequence[Ingredient], note: str = ""
) -> RoleFit:
    """A role from its ingredients: as good as the weakest of them; claims only when all thresholds hold."""
    score = min(ingredient.strength for ingredient in ingredients)
    told = "; ".join(ingredient.words for ingredient in ingredients)
    claimed = [ingredient for ingredient in ingredients if ingredient.delta is not None]
    return RoleFit(
        role, score,
        tuple(Estimate(ingredient.behaviour, ingredient.mean) for ingredient in ingredients),
        f"{short_name(component)} as {role}: {told}{note}.",
        tuple(_claim(context, component, role, i) for i in claimed) if score >= FITS else (),
    )  # fmt: skip


def _claim(context: Context, component: Site, role: str, ingredient: Ingredient) -> Claim:
    assert ingredient.delta is not None
    kind = "head" if component.kind == "z" else "mlp"
    unit = UNITS[ingredient.behaviour.check]
    side = "at least" if ingredient.sign > 0 else "at most"
    bound = ingredient.sign * ingredient.delta
    return Claim(
        statement=f"{short_name(component)} {ingredient.words}; predicted on fresh prompts: {side} {bound:+.3g} {unit}",
        subject={"kind": kind, "site": str(component), "model_hash": context.model_hash},
        check=ingredient.behaviour.check, parameters=ingredient.behaviour.parameters,
        sign=ingredient.sign, delta=ingredient.delta, total_effect=ingredient.total_effect, unit=unit,
        control=_control(ingredient.controls or context.controls(component)),
        nulls=ingredient.nulls, condition=ingredient.condition, kind=ingredient.kind,
        n=context.n, seed=context.seed, parents=context.parents, role=role, study=context.study,
    )  # fmt: skip


def _control(matched: Matched) -> dict[str, Any]:
    """Without any component to compare with, the claim has no control leg."""
    return {"rule": matched.rule, "parts": [str(part) for part in matched.parts]} if matched.parts else {}
