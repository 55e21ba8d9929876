"""Testing a sealed family on the validation split: the circuit against random sets, claims against their controls."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius import __version__
from vesalius.bench import EMBED, Bench, components
from vesalius.circuits import ABLATIONS, Circuit, kept, random_sets, removed
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Sink, track
from vesalius.model import Model
from vesalius.protocol import Claim, Evidence, Family, Verdict
from vesalius.protocol.ledger import Ledger
from vesalius.site import Site
from vesalius.studies.gate import Gate, gate
from vesalius.validate import check, prefetch
from vesalius.validate.circuit import KEEPS, circuit_evidence, needed_draws

Floats = NDArray[np.float64]
# Random sets evaluated per stored block.
SETS_TOGETHER = 11


@dataclass(frozen=True, eq=False)
class Tested:
    """What the validation split showed.

    kept: ablation -> [set, example] logit difference with only that set kept; set 0 is the circuit, set 1 nothing, the
    rest random. removed: ablation -> [set, example] with the set ablated; set 0 is the circuit, set 1 everything. The
    embeddings are not among what is removed (but in set 1): without them there is no prompt, and any set would do.
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
    draws: int,
    provenance: Mapping[str, Any],
    *,
    other_model: bool = False,
) -> Tested:
    """Measure everything the family claims, once, and append one piece of evidence per claim.

    Claims that have their evidence (a resumed study) are not measured again.
    """
    tested = _circuit_runs(circuit, bench, passed, draws)
    # All of them, also those that are done: what this finds is kept, and its cost must not depend on interruptions.
    prefetch([claim for claim in family.claims if claim.kind != "circuit"], bench)
    todo = [claim for claim in family.claims if not any(e.measured for e in ledger.evidence(claim))]
    for claim in track(todo, "test claims", sink=bench.sink):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stamped = {**provenance, "created_at": now}
        if claim.kind == "circuit":
            evidence = _of_circuit(claim, tested, stamped)
        else:
            evidence = check(claim, bench=bench, allow_other_model=other_model, **stamped)
        ledger.append(evidence)
    return tested


def _of_circuit(claim: Claim, tested: Tested, provenance: Mapping[str, Any]) -> Evidence:
    """Evidence of a claim about the circuit, from runs already made."""
    kept_runs, removed_runs = tested.kept["resample"], tested.removed["resample"]
    if claim.check == KEEPS:
        effects, control = kept_runs[0] - kept_runs[1], kept_runs[2:].mean(0) - kept_runs[1]
    else:
        full = tested.bench.metric("clean").double().numpy()
        effects, control = full - removed_runs[0], full - removed_runs[2:].mean(0)
    return circuit_evidence(claim, tested.bench, effects, control, provenance)


def _circuit_runs(circuit: Circuit, bench: Bench, passed: Gate, draws: int) -> Tested:
    random = random_sets(bench, circuit.members, draws, bench.seed)
    others = random_sets(bench, circuit.members, needed_draws(draws), bench.seed, outside=True)
    nothing: tuple[Site, ...] = ()
    everything = tuple(components(bench.model))
    keep, lose = {}, {}
    for ablation in ABLATIONS:
        keep[ablation] = _stored(bench, "keep", [circuit.members, nothing, *random], ablation, kept)
        compared = others if ablation == "resample" else []
        parts = [_without_input(members) for members in (circuit.members, *compared)]
        lose[ablation] = _stored(bench, "remove", [parts[0], everything, *parts[1:]], ablation, removed)
    smaller = [tuple(m for m in circuit.members if m != part) for part in circuit.members]
    return Tested(bench, passed, keep, lose, _stored(bench, "without", smaller, "resample", kept))


def _without_input(members: Sequence[Site]) -> tuple[Site, ...]:
    return tuple(part for part in members if part != EMBED)


def _stored(bench: Bench, what: str, sets: Sequence[Sequence[Site]], ablation: str, measure: Any) -> Floats:
    """Runs of many sets in stored blocks, so that a killed study loses a few at most."""
    found = []
    for first in range(0, len(sets), SETS_TOGETHER):
        some = sets[first : first + SETS_TOGETHER]
        key = f"{what} {ablation} {first} {[list(map(str, members)) for members in some]}"
        found.append(bench.stored(key, lambda some=some: {"values": measure(bench, some, ablation)})["values"])  # type: ignore[misc]
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
        bench = Bench(model, opened, seed, sink=sink, blocks=blocks, name="validation")
        main = opened[bench.main]
        stamp = {
            "data_hash": main.content_hash, "model_hash": model.content_hash, "plan_hash": blocks.plan_hash,
            "version": __version__,
        }  # fmt: skip
        passed = gate(model, main, "validation")
        measure_claims(ledger, sealed, circuit, bench, passed, draws, stamp, other_model=True)
        return ledger.verdicts(sealed), {claim.id: ledger.evidence(claim)[-1] for claim in sealed.claims}
