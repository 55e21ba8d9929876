"""Claims about a whole circuit: what it keeps alone (sufficient) and what is lost without it (necessary).

Both are compared with random sets of the same size and composition. The verdict uses the paired leg against their mean;
the rank among them is reported beside it with the p-value that this many draws can give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesalius.bench import Bench
from vesalius.protocol import Claim, Evidence
from vesalius.site import Site

KEEPS, NEEDED = "circuit keeps", "circuit is needed"
"""Names of the two checks."""
KEEPS_AT_LEAST, MARGIN = 0.5, 0.25
"""Smallest share of the effect worth claiming, and by how much the random sets must be beaten."""
Floats = NDArray[np.float64]


def needed_draws(draws: int) -> int:
    """How many random sets the claim `NEEDED` is compared with: no rank is reported there, so a fifth will do."""
    return min(draws, max(draws // 5, 4))


def circuit_claims(
    bench: Bench, members: Sequence[Site], total: float, draws: int, common: Mapping[str, Any]
) -> tuple[Claim, Claim]:
    """Two claims under resample ablation. total: mean effect of ablating everything, in logits, on discovery.

    common: fields every claim of the study shares (n, seed, parents, study, the model's hash as `subject_model`).
    """
    fields = dict(common)
    model_hash = fields.pop("subject_model")
    shared = {
        **fields,
        "subject": {"kind": "circuit", "members": [str(part) for part in members], "model_hash": model_hash},
        "kind": "circuit", "unit": "logits", "role": "circuit", "parameters": {"ablation": "resample"},
        "total_effect": total, "delta": KEEPS_AT_LEAST * abs(total), "delta_c": MARGIN * abs(total),
        "sign": 1 if total > 0 else -1,
        "condition": {"corruption": bench.main, "direction": "noising", "effect": "total"},
    }  # fmt: skip
    count = f"the {len(members)} components of the circuit" if len(members) > 1 else "the circuit's one component"
    keep = "keep" if len(members) > 1 else "keeps"
    return (
        Claim(
            statement=f"{count} {keep} at least half of the effect when all others get corrupted values",
            check=KEEPS, control=_control(draws), **shared,
        ),
        Claim(
            statement=f"without {count} (the embeddings left alone) at least half of the effect is lost",
            check=NEEDED, control=_control(needed_draws(draws), ", outside the circuit as far as that goes"), **shared,
        ),
    )  # fmt: skip


def _control(draws: int, where: str = "") -> dict[str, Any]:
    return {"rule": f"mean of {draws} random sets of the same size and composition{where}", "draws": draws}


def circuit_evidence(
    claim: Claim, bench: Bench, effects: Floats, control: Floats, provenance: Mapping[str, Any]
) -> Evidence:
    """Evidence of a claim about a circuit. effects, control: [example], in logits; control: the random sets' mean."""
    pairs = bench.pairs
    return Evidence(
        claim_id=claim.id,
        effects=tuple(effects.tolist()),
        control=tuple(control.tolist()),
        groups={name: tuple(labels) for name, labels in pairs.groups.items()},
        example_hashes=pairs.example_hashes,
        seed=claim.seed,
        **provenance,
    )
