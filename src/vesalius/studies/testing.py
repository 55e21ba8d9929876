"""Testing a sealed family on the validation split: the circuit against random sets, then every claim against its controls."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius import __version__
from vesalius.bench import Bench, components
from vesalius.circuits import ABLATIONS, Circuit, kept, random_sets, removed
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Event, Sink
from vesalius.ledger import Ledger
from vesalius.model import Model
from vesalius.records import Claim, Evidence, Family, Verdict
from vesalius.site import Site
from vesalius.studies.gate import Gate, gate
from vesalius.validate import check, prefetch
from vesalius.validate.circuit import circuit_evidence

Floats = NDArray[np.float64]
# Random sets evaluated per stored block.
SETS_TOGETHER = 11


@dataclass(frozen=True, eq=False)
class Tested:
    """What the validation split showed.

    kept: ablation -> [set, example] logit difference with only that set kept; set 0 is the circuit, set 1 nothing, the
    rest random. removed: ablation -> [set, example] with the set ablated; set 0 is the circuit, set 1 everything.
    without: [member, example], the circuit kept without that member (resample ablation of the rest).
    """

    bench: Bench
    gate: Gate
    kept: Mapping[str, Floats]
    removed: Mapping[str, Floats]
    without: Floats


def measure_claims(
    ledger: Ledger,
    family: Family,
    circuit: Circuit,
    bench: Bench,
    passed: Gate,
    blocks: Blocks,
    draws: int,
    provenance: Mapping[str, Any],
    *,
    other_model: bool = False,
) -> Tested:
    """Measure everything the family claims, once, and append one piece of evidence per claim."""
    tested = _circuit_runs(circuit, bench, passed, blocks, draws)
    open_claims = [claim for claim in family.claims if not any(e.measured for e in ledger.evidence(claim))]
    parts = [claim for claim in open_claims if claim.kind != "circuit"]
    prefetch(parts, bench)
    bench.sink(Event("start", "test claims", 0, len(open_claims)))
    for number, claim in enumerate(open_claims, 1):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stamped = {**provenance, "created_at": now}
        evidence = (
            _of_circuit(claim, tested, stamped)
            if claim.kind == "circuit"
            else check(claim, bench=bench, allow_other_model=other_model, **stamped)
        )
        ledger.append(evidence)
        bench.sink(Event("advance", "test claims", number, len(open_claims)))
    bench.sink(Event("end", "test claims", len(open_claims), len(open_claims)))
    return tested


def _of_circuit(claim: Claim, tested: Tested, provenance: Mapping[str, Any]) -> Evidence:
    """Evidence of a claim about the circuit, from runs already made."""
    runs = tested.kept["resample"]
    if claim.check == "circuit keeps":
        effects, control = runs[0] - runs[1], runs[2:].mean(0) - runs[1]
    else:
        full = tested.bench.metric("clean").double().numpy()
        lost = tested.removed["resample"]
        effects, control = full - lost[0], full - lost[2:].mean(0)
    return circuit_evidence(claim, tested.bench, effects, control, provenance)


def _circuit_runs(circuit: Circuit, bench: Bench, passed: Gate, blocks: Blocks, draws: int) -> Tested:
    random = random_sets(bench, circuit.members, draws, bench.seed)
    nothing: tuple[Site, ...] = ()
    everything = tuple(components(bench.model))
    keep = {a: _stored(blocks, f"kept-{a}", bench, [circuit.members, nothing, *random], a, kept) for a in ABLATIONS}
    few = random[: max(draws // 5, 4)]
    lose = {
        a: _stored(
            blocks, f"removed-{a}", bench, [circuit.members, everything, *(few if a == "resample" else [])], a, removed
        )
        for a in ABLATIONS
    }
    smaller = [tuple(m for m in circuit.members if m != part) for part in circuit.members]
    without = _stored(blocks, "without", bench, smaller, "resample", kept)
    return Tested(bench, passed, keep, lose, without)


def _stored(
    blocks: Blocks, key: str, bench: Bench, sets: Sequence[Sequence[Site]], ablation: str, measure: Any
) -> Floats:
    """Runs of many sets in stored blocks, so that a killed study loses a few at most."""
    found = []
    for first in range(0, len(sets), SETS_TOGETHER):
        some = sets[first : first + SETS_TOGETHER]
        block = bench.stored(
            blocks, f"validation-{key}-{first}", lambda some=some: {"values": measure(bench, some, ablation)}
        )  # type: ignore[misc]
        found.append(block["values"])
    return np.concatenate(found)


def claims_on(
    family: Family,
    circuit: Circuit,
    corruptions: Mapping[str, Pairs],
    model: Model,
    path: Path,
    *,
    draws: int,
    blocks: Blocks,
    seed: int,
    sink: Sink,
) -> tuple[tuple[Verdict, ...], dict[str, Evidence]]:
    """Test a family of claims on another model (the random-weights control), in a ledger of its own.

    corruptions: both splits. The same claims, data and controls; only the model differs, so whatever is supported here
    does not depend on what training made.
    """
    with Ledger(path) as ledger:
        sealed = ledger.register(family.claims, study=f"{family.study}, on {model.name}")
        opened = {name: ledger.open(pairs, "validation") for name, pairs in corruptions.items()}
        bench = Bench(model, opened, seed, True, sink)
        main = opened[bench.main]
        stamp = {
            "data_hash": main.content_hash,
            "model_hash": model.content_hash,
            "plan_hash": blocks.plan_hash,
            "version": __version__,
        }
        measure_claims(
            ledger, sealed, circuit, bench, gate(model, main, "validation"), blocks, draws, stamp, other_model=True
        )
        return ledger.verdicts(sealed), {claim.id: ledger.evidence(claim)[-1] for claim in sealed.claims}
