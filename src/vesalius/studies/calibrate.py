"""Calibration: how often the whole procedure supports a claim about noise, and how often it finds what is planted.

False positives, on networks with random weights and fresh prompts: the whole study, past its gate; and, since a study
of noise claims little, null claims about the strongest parts (`studies.known_claims`). A false positive is a network
with any SUPPORTED claim: the error rate of a whole family, which Holm's correction should hold.

Both lie far below the threshold of a claim. How often the rule errs when an effect is exactly at it, on uneven and on
skewed data, is simulated (`studies.simulated`).

Power, on networks with a planted circuit: the whole study (was the part found, given a role it has, and all its claims
supported), and true claims about the planted parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vesalius import __version__
from vesalius.errors import InputError
from vesalius.jobs import Blocks, Sink, silent, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.protocol import Claim, Verdict, content_hash
from vesalius.quantities import COMPLETENESS, FAITHFULNESS
from vesalius.studies.known_claims import circular, null_claims, tested, true_claims
from vesalius.studies.question import Question
from vesalius.studies.simulated import LEVEL, Rate, Simulated, simulated
from vesalius.studies.study import Options, Study
from vesalius.studies.task_circuit import CIRCUIT, DESCRIPTIONS, EFFECTS, run_study
from vesalius.studies.text_trials import QUICK_TRIALS, TRIALS, UnitTrials, text_trials
from vesalius.toys import PLANTED, planted_induction, planted_pairs, random_model

BOUND, POWER = 0.08, 0.8
"""What the upper bound of false positives may be; what the power must be."""
PROMPTS, RANDOM_SETS = 36, 9
"""Prompts per split, three of each template; random sets of the circuit's control."""
PLANTED_SEEDS = 40
"""Planted networks at most: one takes longer than a random one, and power needs no tight bound."""
QUICK = (8, 2)
STUDY, KNOWN, CIRCULAR = "whole study", "true and null claims", "null claims on their own prompts"
OF_CIRCUIT = (FAITHFULNESS.name, COMPLETENESS.name)
# A mover of this task attends to what followed the last token's earlier occurrence: it is an induction head as well.
TRUE_ROLES = {
    "previous-token": {"previous-token"},
    "name mover": {"name mover", "induction"},
    "negative mover": {"negative mover"},
}
FIELDS = ("arm", "quantity", "part", "role", "outcome", "p", "student_p")


@dataclass(frozen=True)
class Tried:
    """One claim and what became of it. arm: `STUDY`, `KNOWN` or `CIRCULAR`.

    p: uncorrected p-value of support. student_p: the same by Student's t alone, NaN in the study.
    """

    arm: str
    quantity: str
    part: str
    role: str
    outcome: str
    p: float
    student_p: float = field(default=math.nan, compare=False)

    @property
    def supported(self) -> bool:
        return self.outcome == "SUPPORTED"


@dataclass(frozen=True)
class Network:
    """What was claimed about one network. members: part -> role it was given ("" for none) in the study's circuit."""

    claims: tuple[Tried, ...]
    members: dict[str, str]

    def of(self, name: str) -> list[Tried]:
        """Claims of an arm, or about a quantity: the circuit's in the study, all others among the known claims."""
        if name in (STUDY, KNOWN, CIRCULAR):
            return [claim for claim in self.claims if claim.arm == name]
        arm = STUDY if name in OF_CIRCUIT else KNOWN
        return [claim for claim in self.claims if claim.quantity == name and claim.arm == arm]

    def stands(self, part: str) -> bool:
        """Whether the study gave the part a role and all claims of that role were supported."""
        claims = [claim for claim in self.of(STUDY) if claim.part == part]
        return bool(claims) and all(claim.supported for claim in claims)


@dataclass(frozen=True)
class Validator:
    """One row: networks without mechanism in which it supported anything; true claims (or parts) that it supported."""

    name: str
    false_positives: Rate
    claims: int
    """Claims about random networks that it was tried on."""
    power: Rate

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "false_positive_rate": _short(self.false_positives.share),
            "upper_bound": _short(self.false_positives.upper),
            "power": _short(self.power.share),
            "power_lower_bound": _short(self.power.lower),
            "n": self.false_positives.n,
            "claims": self.claims,
            "n_power": self.power.n,
        }


@dataclass(frozen=True)
class Calibration:
    """Figures over all networks. `holds`: false positives and power are within what is asked of the whole study, and
    false verdicts on simulated data within what is asked of the rule.
    """

    random: tuple[Network, ...] = field(repr=False)
    planted: tuple[Network, ...] = field(repr=False)
    simulated: tuple[Simulated, ...] = field(repr=False, compare=False, default=())
    units: tuple[UnitTrials, ...] = field(repr=False, default=())
    """Claims about what units fire on, and what they do."""

    @property
    def validators(self) -> tuple[Validator, ...]:
        """The whole study, the family of known claims, then every quantity."""
        quantities = sorted({claim.quantity for network in self.planted for claim in network.of(KNOWN)})
        return tuple(self._validator(name) for name in (STUDY, KNOWN, *quantities, *OF_CIRCUIT))

    def _validator(self, name: str) -> Validator:
        right = [claim.supported for network in self.planted for claim in network.of(name)]
        power = self.parts["supported"] if name == STUDY else Rate(sum(right), len(right))
        return Validator(name, self._wrong(name), sum(len(network.of(name)) for network in self.random), power)

    def _wrong(self, name: str) -> Rate:
        """Random networks about which anything was supported."""
        return Rate(
            sum(any(claim.supported for claim in network.of(name)) for network in self.random), len(self.random)
        )

    @property
    def parts(self) -> dict[str, Rate]:
        """Of all planted parts: found in the circuit, named by a role they have, and all claims of that supported."""
        listed = [
            (network, str(part), role) for network in self.planted for role, parts in PLANTED.items() for part in parts
        ]
        found = [part in network.members for network, part, _ in listed]
        exact = [network.members.get(part) == role for network, part, role in listed]
        named = [network.members.get(part) in TRUE_ROLES[role] for network, part, role in listed]
        stood = [good and network.stands(part) for good, (network, part, _) in zip(named, listed, strict=True)]
        counted = {"found": found, "named as planted": exact, "named truly": named, "supported": stood}
        return {name: Rate(sum(hits), len(hits)) for name, hits in counted.items()}

    def uncorrected(self, arm: str, student: bool = False) -> Rate:
        """Null claims whose own p-value (or Student's) is at most .05, before the correction for the family."""
        p = [claim.student_p if student else claim.p for network in self.random for claim in network.of(arm)]
        return Rate(sum(value <= 1 - LEVEL + 1e-12 for value in p), len(p))

    @property
    def described(self) -> Rate:
        """Random networks whose study made any claim beside the two about the circuit."""
        return Rate(sum(any(c.quantity not in OF_CIRCUIT for c in n.of(STUDY)) for n in self.random), len(self.random))

    @property
    def holds(self) -> bool:
        study, known = self.validators[:2]
        bounded = max(study.false_positives.upper, known.false_positives.upper) <= BOUND
        rule = all(row.holds(BOUND) for row in self.simulated) and all(row.holds(BOUND, POWER) for row in self.units)
        return bounded and rule and study.power.share >= POWER

    def to_json(self) -> dict[str, Any]:
        return {
            "seeds": len(self.random),
            "planted_seeds": len(self.planted),
            "prompts_per_split": PROMPTS,
            "random_sets": RANDOM_SETS,
            "validators": [validator.to_json() for validator in self.validators],
            "planted_parts": {name: rate.to_json() for name, rate in self.parts.items()},
            "random_networks_with_described_parts": self.described.to_json(),
            "null_claims_uncorrected": self.uncorrected(KNOWN).to_json(),
            "null_claims_uncorrected_on_their_own_prompts": self.uncorrected(CIRCULAR).to_json(),
            "null_claims_by_student": self.uncorrected(KNOWN, student=True).to_json(),
            "null_claims_by_student_on_their_own_prompts": self.uncorrected(CIRCULAR, student=True).to_json(),
            "false_positives_on_their_own_prompts": self._wrong(CIRCULAR).to_json(),
            "simulated": [row.to_json() for row in self.simulated],
            "units": [row.to_json() for row in self.units],
            "holds": self.holds,
            "version": __version__,
        }

    def _repr_html_(self) -> str:
        names = ("name", "false_positive_rate", "upper_bound", "power", "n")
        rows = [[row.to_json()[name] for name in names] for row in self.validators]
        caption = f"Calibration on {len(self.random)} random and {len(self.planted)} planted networks"
        networks = _table(caption, [name.replace("_", " ") for name in names], rows)
        if not self.simulated:
            return networks
        told = [[row.data, row.m, *map(str, row.rates.values())] for row in self.simulated]
        heads = ["data", "claims", *self.simulated[0].rates]
        networks += _table("Simulated families, effects exactly at the threshold (95 % bounds)", heads, told)
        units = [[row.setting, row.quantity, str(row.supported), str(row.inconclusive)] for row in self.units]
        return networks + _table("Units planted in text", ["setting", "quantity", "SUPPORTED", "INCONCLUSIVE"], units)


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def calibrate(
    seeds: int = 100,
    quick: bool = False,
    out: Path | None = None,
    sink: Sink | None = None,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Measure false positives on `seeds` random networks and power on up to 40 planted ones, seeds 0, 1, 2, ...

    quick: 8 random and 2 planted networks, a smoke test whose bounds say little. The simulated rows are the same in any
    case, and take seconds. out: folder in which finished networks are kept, so that an interrupted run goes on, and
    more seeds can be added. sink: None shows progress. device: where the networks run; they are so small that a CPU
    core is fast. Raises InputError for fewer than 1 seed.
    """
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; give at least 1 (at least 36 for a bound of 8 %)")
    count, planted = QUICK if quick else (seeds, min(seeds, PLANTED_SEEDS))
    with shown(sink) as screen:
        blocks = Blocks(out, content_hash({"calibration": [PROMPTS, RANDOM_SETS], "version": __version__}), screen)
        return Calibration(
            _networks(count, "random networks", partial(on_random, device=device), blocks, screen),
            _networks(planted, "planted networks", partial(on_planted, device=device), blocks, screen),
            simulated(),
            text_trials(QUICK_TRIALS if quick else TRIALS, blocks, screen),
        )


def on_random(seed: int, device: torch.device | str = "cpu") -> Network:
    """A study of a random network on fresh prompts, and null claims about its strongest parts."""
    question, model = _question(seed), random_model(seed)
    model.module.to(device)
    study = _study(question, model, seed)
    claims = null_claims(question, model, study[EFFECTS], seed)
    network = _network(study, question, model, claims, seed)
    control = _tried(CIRCULAR, claims, *circular(question, model, claims, seed))
    return replace(network, claims=(*network.claims, *control))


def on_planted(seed: int, device: torch.device | str = "cpu") -> Network:
    """A study of a planted network on fresh prompts, and true claims about its parts."""
    question, model = _question(seed), planted_induction(seed)
    model.module.to(device)
    return _network(_study(question, model, seed), question, model, true_claims(question, model, seed), seed)


def _networks(
    count: int, task: str, measure: Callable[[int], Network], blocks: Blocks, sink: Sink
) -> tuple[Network, ...]:
    kept = []
    for seed in track(range(count), f"calibrate: {task}", count, sink):
        kept.append(_unpacked(blocks.get(f"{task} {seed}", lambda seed=seed: _packed(measure(seed)))))  # type: ignore[misc]
    return tuple(kept)


def _question(seed: int) -> Question:
    text = "Which parts bring the token that followed the last one before?"
    return Question("planted induction", text, planted_pairs(PROMPTS, seed), seed=seed)


def _study(question: Question, model: Model, seed: int) -> Study:
    # Past the gate: a random network cannot do the task, and would never be looked into.
    # That the quick runs equal plain ones is tested elsewhere, and not checked a thousand times more here.
    options = Options(seed=seed, past_gate=True, random_sets=RANDOM_SETS, check=False)
    return run_study(question, model, options=options, sink=silent)


def _network(study: Study, question: Question, model: Model, claims: Sequence[Claim], seed: int) -> Network:
    fits = study[DESCRIPTIONS].fits
    given = {str(part): fits.get(str(part)) for part in study[CIRCUIT].members}
    found = [
        *_tried(STUDY, study.claims, study.verdicts),
        *_tried(KNOWN, claims, *tested(question, model, claims, seed)),
    ]
    return Network(tuple(found), {part: "" if fit is None else fit.label for part, fit in given.items()})


def _tried(
    arm: str, claims: Sequence[Claim], verdicts: Sequence[Verdict], student_p: Sequence[float] = ()
) -> list[Tried]:
    return [
        Tried(
            arm,
            claim.quantity,
            str(claim.subject.get("name", "")),
            claim.role or "",
            verdict.outcome,
            verdict.p_supported,
            student,
        )
        for claim, verdict, student in zip(claims, verdicts, student_p or [math.nan] * len(claims), strict=True)
    ]


def _packed(network: Network) -> dict[str, NDArray[Any]]:
    columns = {name: [getattr(claim, name) for claim in network.claims] for name in FIELDS}
    columns |= {"member": list(network.members), "given": list(network.members.values())}
    return {
        name: np.array(column, dtype=np.float64 if name in ("p", "student_p") else np.str_)
        for name, column in columns.items()
    }


def _unpacked(stored: dict[str, NDArray[Any]]) -> Network:
    claims = tuple(Tried(*row) for row in zip(*(stored[name].tolist() for name in FIELDS), strict=True))
    return Network(claims, dict(zip(stored["member"].tolist(), stored["given"].tolist(), strict=True)))


def _short(value: float) -> float:
    return round(value, 4)
