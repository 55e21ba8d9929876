"""How often claims about what a part fires on are wrong, or are missed: units that are planted in text (`toys.text`).

Every trial is one unit, on texts that were never drawn before, and one claim of each quantity about it, as a family of
its own. `nothing`: the unit is noise. `exactly at the threshold`: the claim's delta is what is true of the unit, so
that neither SUPPORTED nor REFUTED is right; with one text a document, and with documents of uneven size. `planted`: the
unit fires on words that are 1 % of the text with an AUROC of .85, and half of what is true of it is claimed. `decoy`:
the unit fires on a topic, and the words are three times as frequent there. `copy`: what it is to be told apart from is
its copy. `reads, does not act`: nothing reads the unit. `not at the top`: it fires on other words four times as
strongly, so that its strongest tokens never show the ones that are spoken of, and acts on those all the same.

Two ways to do without a test are tried on the same units: a label that the strongest tokens suggest, and a detection
score that is above 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm

from vesalius.describe.description import subject_of
from vesalius.inputs import Corpus, Tokens
from vesalius.jobs import Blocks, Sink, track
from vesalius.parts import neuron
from vesalius.protocol import Claim, Evidence
from vesalius.protocol.verdict import decide
from vesalius.quantities import (
    AUPRC,
    AUPRC_BALANCED,
    AUROC,
    DETECTION,
    FIRES_WHERE,
    FUZZING,
    PROMOTES,
    SIMULATION,
    STANDS_IN,
    TOLD_APART,
    Quantity,
    Runs,
)
from vesalius.quantities.activation import counted, token_values
from vesalius.quantities.fires_where import picked
from vesalius.studies.simulated import Rate
from vesalius.toys.text import PlantedText, PlantedUnit, text_network
from vesalius.validate import check

TRIALS, QUICK_TRIALS, PILOTS = 760, 16, 60
TEXTS, LENGTH, AREA = 200, 64, 0.85
STRONGEST = 20
"""Tokens that are looked at where only the strongest are."""
RULE = {"word": ["w2", "w3"], "at": 0}
SUBJECT, NEIGHBOUR, NOTHING = neuron(0, 0), neuron(0, 1), (neuron(0, 10), neuron(0, 11))
QUANTITIES: tuple[Quantity, ...] = (
    FIRES_WHERE, AUROC, AUPRC, AUPRC_BALANCED, SIMULATION, FUZZING, TOLD_APART, STANDS_IN, PROMOTES,
)  # fmt: skip
STRONGEST_TOKENS, PLAIN_DETECTION, DRAWN = "strongest tokens", "detection above 0", "a causal effect"
WITHOUT_A_TEST = (STRONGEST_TOKENS, PLAIN_DETECTION)
WEAK = (AUPRC.name,)
"""Held to the bound of false claims only: at 1 % of the text, 200 texts are too few to decide half of its claims."""
STRENGTH = 2**0.5 * float(norm.ppf(AREA))
PLANTED, NOISE = PlantedUnit((2, 3), STRENGTH, writes=0.5), PlantedUnit(writes=0.5)
TWIN = PlantedUnit((5, 6), STRENGTH)
TEXT = PlantedText()
# Trials that are kept together, and seeds of the texts from which the true sizes are taken.
_BLOCK, _PILOT = 20, 10_000_000


@dataclass(frozen=True)
class Setting:
    """What the units and texts of some trials are. times: delta, as a multiple of what is true of the planted unit."""

    name: str
    unit: PlantedUnit
    times: float
    text: PlantedText = TEXT
    uneven: bool = False
    only: tuple[str, ...] = ()
    """Quantities of which the claim is false (or true) here; default all."""
    neighbour: PlantedUnit = TWIN
    true: bool = False

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return tuple(one for one in QUANTITIES if not self.only or one.name in self.only)


NULLS = (
    Setting("nothing", NOISE, 0.5),
    Setting("exactly at the threshold", PLANTED, 1.0),
    Setting("at the threshold, uneven documents", PLANTED, 1.0, uneven=True),
    Setting(
        "decoy: fires on a topic",
        PlantedUnit(topic=1.5, writes=0.5),
        0.5,
        PlantedText(on_topic=3.0),
        only=("fires_where",),
    ),
    Setting("copy", PLANTED, 0.5, only=("told_apart",), neighbour=PlantedUnit(copy_of=0)),
    Setting("reads, does not act", replace(PLANTED, writes=0.0), 0.5, only=("promotes",)),
)
TRUE = (
    Setting("planted, AUROC .85 at 1 %", PLANTED, 0.5, true=True),
    Setting("not at the top", replace(PLANTED, loud=(9, 10)), 0.5, only=("promotes",), true=True),
)


@dataclass(frozen=True)
class UnitTrials:
    """One quantity (or way to do without a test) on the units of one setting."""

    quantity: str
    setting: str
    true: bool
    """Whether the claim is true there."""
    supported: Rate
    refuted: Rate
    inconclusive: Rate

    def holds(self, bound: float, power: float) -> bool:
        """Of a true claim: power enough, and few left open. Of another: the bound of wrongly supported ones."""
        if self.quantity in WITHOUT_A_TEST:
            return True
        if not self.true:
            return self.supported.upper <= bound
        if self.quantity in WEAK:
            return True
        return self.supported.share >= power and self.inconclusive.share <= 1 - power

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name).to_json() for name in ("supported", "refuted", "inconclusive")}
        return {"quantity": self.quantity, "setting": self.setting, "true": self.true, **rates}


def text_trials(trials: int, blocks: Blocks, sink: Sink) -> tuple[UnitTrials, ...]:
    """All settings, null and true. The ways without a test are not held to anything: they are there to compare."""
    pilots = min(PILOTS, trials)
    sizes = blocks.get(f"sizes {pilots}", lambda: {"sizes": np.array(_sizes(pilots))})["sizes"]
    true = dict(zip([one.name for one in QUANTITIES], sizes.tolist(), strict=True))
    found = []
    for setting in (*NULLS, *TRUE):
        names, outcomes = _names(setting), []
        for first in track(range(0, trials, _BLOCK), f"calibrate: units, {setting.name}", None, sink):
            some = range(first, min(first + _BLOCK, trials))
            kept = blocks.get(
                f"units {setting.name} {first} {len(some)}",
                lambda some=some, setting=setting: {"outcomes": np.array([_trial(setting, true, n) for n in some])},  # type: ignore[misc]
            )
            outcomes += kept["outcomes"].tolist()
        found += [
            _counted(name, setting, column) for name, column in zip(names, zip(*outcomes, strict=True), strict=True)
        ]
    return (*found, _drawn(trials))


def _names(setting: Setting) -> list[str]:
    return [*(one.name for one in setting.quantities), STRONGEST_TOKENS, PLAIN_DETECTION]


def _counted(name: str, setting: Setting, outcomes: Sequence[str]) -> UnitTrials:
    rates = [Rate(sum(one in kinds for one in outcomes), len(outcomes)) for kinds in _KINDS]
    return UnitTrials(name, setting.name, setting.true, *rates)


_KINDS = (("SUPPORTED",), ("REFUTED", "NOT SPECIFIC"), ("INCONCLUSIVE",))


def _trial(setting: Setting, true: Mapping[str, float], seed: int) -> list[str]:
    """The outcome of one claim of each quantity about one unit, then of the ways without a test."""
    runs = _runs(setting, seed)
    made = []
    for of in setting.quantities:
        claim = _claim(of, runs, setting.times * true[of.name])
        made.append(decide([claim], {claim.id: check(claim, runs=runs)})[0].outcome)
    return [*made, *("SUPPORTED" if yes else "REFUTED" for yes in _without_a_test(runs))]


def _runs(setting: Setting, seed: int, texts: int = TEXTS) -> Runs:
    """One unit beside its neighbour, and texts of one trial. Documents are numbered from 0."""
    model = text_network([setting.unit, setting.neighbour], seed)
    ids = setting.text.draw(texts, LENGTH, seed)
    # Sizes of documents fall as 1 / rank, from 10 texts to 1.
    sizes = [max(1, round(10 / rank)) for rank in range(1, texts + 1)] if setting.uneven else [1] * texts
    document = [str(number) for number, size in enumerate(sizes) for _ in range(size)][:texts]
    return Runs(model, Corpus(Tokens(ids), {"document": tuple(document)}), seed=seed, check=False)


def _parameters() -> dict[str, Any]:
    told = {"threshold": 2.0, "neighbour": NEIGHBOUR.ref, "neighbour_threshold": 2.0}
    return {"rule": RULE, **told, "tokens": [TEXT.target], "rest": 0.0}


def _claim(of: Quantity, runs: Runs, delta: float) -> Claim:
    control = {} if of is TOLD_APART else {"rule": "units of noise", "parts": [str(part) for part in NOTHING]}
    return Claim(
        statement=f"unit 0 {of.phrase(_parameters())}",
        subject=subject_of(SUBJECT, runs.model.content_hash),
        quantity=of.name,
        parameters=_parameters(),
        kind=of.kind,
        unit=of.unit(runs),
        delta=delta,
        scale=1.0,
        scale_name=of.scale,
        control=control,
        nulls=(("shuffled", delta / 2),),
        n=runs.n,
        seed=runs.seed,
    )


def _sizes(pilots: int) -> list[float]:
    """What is true of the planted unit: the mean over many draws of texts."""
    setting = Setting("pilot", PLANTED, 1.0)
    every = [_runs(setting, _PILOT + number, 2 * TEXTS) for number in range(pilots)]
    return [
        float(np.mean([runs.mean(of.measure(runs, SUBJECT, _parameters())) for runs in every])) for of in QUANTITIES
    ]


def _without_a_test(runs: Runs) -> tuple[bool, bool]:
    """Whether the rule's words are commoner among the strongest tokens than elsewhere; whether detection is above 0."""
    values, some, real = token_values(runs, [SUBJECT])[0], picked(runs, RULE), counted(runs)
    strongest = values[real].topk(STRONGEST).indices
    common = float(some[real][strongest].float().mean()) > float(some[real].float().mean())
    return common, runs.mean(DETECTION.measure(runs, SUBJECT, _parameters())) > 0


def _drawn(trials: int) -> UnitTrials:
    """A causal effect of 10 % of the total, with a spread over examples of twice that, claimed at the usual delta."""
    rng = np.random.default_rng(0)
    outcomes = []
    for number in range(trials):
        effects = 0.1 + 0.2 * rng.standard_normal(TEXTS)
        control = 0.2 * rng.standard_normal(TEXTS)
        claim = Claim(
            statement="matters", subject={"part": number}, quantity=DRAWN, delta=0.05, scale=1.0, n=TEXTS,
            control={"rule": "a part that does nothing"},
        )  # fmt: skip
        outcomes.append(decide([claim], {claim.id: _evidence(claim, effects, control)})[0].outcome)
    rates = [Rate(sum(one in kinds for one in outcomes), len(outcomes)) for kinds in _KINDS]
    return UnitTrials(DRAWN, "10 % of the total, spread twice that", True, *rates)


def _evidence(claim: Claim, effects: Any, control: Any) -> Evidence:
    return Evidence(
        claim_id=claim.id,
        effects=tuple(effects.tolist()),
        control=tuple(control.tolist()),
        groups={"document": tuple(map(str, range(len(effects))))},
        example_hashes=tuple(f"{claim.id}{number}" for number in range(len(effects))),
    )
