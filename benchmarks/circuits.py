"""What circuits cost on SmolLM2, in forward passes of the same batch: 4 IOI pairs of one length.

    python benchmarks/circuits.py [--rounds 5] [--write]

Contenders take turns; a ratio is processor time over that of a plain forward in the same round, and the median over
rounds is told (see `measure`). Targets beside the figures; Hanna et al.'s EAP-IG code took 9.3, 42.7 and 3.8 to 5.4
forwards for the first three on a machine of this kind.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from dataclasses import replace

import torch

import measure
import vesalius as vs
from measure import Contender, Work
from vesalius.circuits import ablation, edge_attribution, edge_patching, wiring, with_only
from vesalius.circuits.exact import sample
from vesalius.jobs import silent

TARGETS = {
    "EAP, all edges, per example and position": "4",
    "EAP-IG (inputs, 5 steps), all edges, per example and position": "17",
    "one circuit of 2,000 edges, other prompts' run included": "2.5",
    "one edge exactly (of 32 random ones)": "",
}
SAMPLE = 32


def four_pairs(model: vs.Model) -> vs.Pairs:
    """The shortest IOI prompts, all of one length."""
    pairs = vs.data.ioi(model, n=64, seed=0).split("discovery")
    shortest = int(pairs.size.min())
    rows = [row for row, size in enumerate(pairs.size.tolist()) if size == shortest][:4]
    some = pairs.subset(rows)
    return replace(some, clean=some.clean[:, :shortest], corrupted=some.corrupted[:, :shortest], named_positions={})


def works(model: vs.Model, pairs: vs.Pairs) -> list[Work]:
    """A row for each figure: ours, then the plain forward."""
    wired = wiring(model)
    graph = wired.graph
    scores = edge_attribution(wired, pairs, sink=silent)
    circuit = torch.zeros(len(graph), dtype=torch.bool)
    circuit[scores.effects.mean(1).abs().argsort(descending=True)[:2000]] = True
    edges = [graph.edges[number] for number in sample(len(graph), SAMPLE, 0).tolist()]

    def forward(_: int) -> None:
        with torch.no_grad():
            model.module(pairs.clean)

    # Every one sets up anew: nothing is kept from round to round.
    def attributed(method: str) -> None:
        edge_attribution(wired, pairs, method=method, each="position", sink=silent)

    def evaluated() -> None:
        with_only(ablation(wired, pairs, vs.logit_diff), circuit[None])

    def exact() -> None:
        edge_patching(wired, pairs, edges=edges, check=False, sink=silent)

    ours: list[tuple[Callable[[], None], float]] = [
        (lambda: attributed("eap"), 1.0),
        (lambda: attributed("eap_ig_inputs"), 1.0),
        (evaluated, 1.0),
        (exact, float(SAMPLE)),
    ]
    return [
        Work(name, [Contender(measure.OURS, lambda _, run=run: run(), share), Contender("forward", forward)])
        for name, (run, share) in zip(TARGETS, ours, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = vs.load("smollm2-135m-instruct")
    pairs = four_pairs(model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = works(model, pairs)
    for number in range(-1, given.rounds):
        for work in found:
            work.round(number % 2)
            if number < 0:
                work.seconds.clear()
    lines = ["| work | forwards | target |", "| --- | ---: | ---: |"]
    for work in found:
        times = [one / two for one, two in zip(work.seconds[measure.OURS], work.seconds["forward"], strict=True)]
        lines.append(f"| {work.name} | {sorted(times)[len(times) // 2]:.2f} | {TARGETS[work.name]} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = f"{len(pairs)} IOI pairs of {pairs.clean.shape[1]} tokens, {len(wiring(model).graph):,} edges"
    memory = f"Memory at its peak {peak / 2**20:.2f} GB, of which the model {before / 2**20:.2f} GB."
    text = (
        f"## Circuits\n\n{measure.machine()}; {given.rounds} rounds; {size}.\n\n" + "\n".join(lines) + f"\n\n{memory}"
    )
    print(text)
    if given.write:
        measure.write("circuits", text)


if __name__ == "__main__":
    main()
