"""How often the verdict on a concept is wrong, or left open, on networks whose answer is known (make verdicts).

Three planted networks a seed: one that uses the concept, one that carries and ignores it, one with random weights. The
figures stand in docs/concepts.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter

import torch

import vesalius as vs
from vesalius.stats import clopper_pearson
from vesalius.toys.carrier import SITE, carrier

TRUE = {"uses it": vs.studies.USED, "ignores it": vs.studies.UNUSED, "random weights": vs.studies.ABSENT}
STEPS = 4
"""Of the study, up to the verdict."""


def said(kind: str, seed: int) -> str:
    """The verdict on one network."""
    planted = carrier(used=kind != "ignores it", seed=seed)
    model = vs.validate.reinitialised(planted.model, seed + 1) if kind == "random weights" else planted.model
    ids, bits = planted.sequences(seed)
    concept = vs.Concept("kind", ids, tuple("ab"[int(bit)] for bit in bits))
    asked = vs.studies.probing(model, concept, sites=[SITE], most=240, seed=seed)
    study = vs.studies.probe(model, asked, sink=vs.silent, steps=vs.studies.PROBE[:STEPS])
    return vs.studies.said_of(study.verdicts)[0]


def main() -> None:
    """Count over seeds, and print shares with one-sided 95 % bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = {
        kind: Counter(said(kind, seed) for seed in range(given.first, given.first + given.seeds)) for kind in TRUE
    }
    opened = sum(count[vs.studies.OPEN] for count in counts.values())
    n = 3 * given.seeds
    wrong = sum(count.total() - count[TRUE[kind]] - count[vs.studies.OPEN] for kind, count in counts.items())
    print(json.dumps({kind: dict(count) for kind, count in counts.items()}))
    print(f"wrong: {wrong} of {n}, upper bound {clopper_pearson(wrong, n, 0.95, 'upper').high:.3f} (target .08)")
    print(f"open: {opened} of {n}, share {opened / n:.3f} (target .20)")


if __name__ == "__main__":
    main()
