"""Every way to find circuits on every network whose circuit is known: the table of docs/circuits-calibration.md.

    python tools/circuits_calibration.py docs/circuits-calibration.md

Takes some minutes on one core.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import vesalius as vs
from vesalius.circuits import ablation, discover, edge_attribution
from vesalius.circuits.search import SMALLEST
from vesalius.circuits.verified import ZERO
from vesalius.errors import VesaliusError
from vesalius.jobs import silent
from vesalius.toys import MECHANISMS, PROGRAMS, compiled, compiled_pairs, mechanism

PAIRS = 24
ESTIMATES = ("eap", "eap_ig_inputs", "eap_ig_activations", "mask_ig", "relp")
SETS = ("acdc", "pruning", "hybrid")
LARGE = ("reverse", "sort", "pair_balance")
"""Where learning a mask takes minutes."""
PAGE = """# Circuits: how far each method can be trusted

Networks whose circuits are known: RASP programs compiled to transformers
([Tracr](https://arxiv.org/abs/2301.05062)), and small ones built by hand, each with a mechanism that discovery is known
to get wrong. The truth is every edge whose cutting alone changes the metric, found by cutting every one; under zero
ablation it is another one than under resampling.

- **AUROC** of the scores (of edges found against not found, for methods that give a set), **P** and **R**: precision
  and recall of the edges whose score is at least {smallest:.1%} of the effect of cutting everything.
- **zero**: share of true edges whose score is zero. No threshold can bring those back; `discover` warns of them
  ("saturated").
- `length` has no edge under resampling: its circuit is empty.
- The networks are small enough for `hybrid` to check every edge, so its rows say that the exact check is exact. What it
  does where it cannot check all is told by its bound, and by the last table.
- `pruning` was not run under zero ablation and on the largest programs, where it takes minutes.

Where the truth is not unique: `or` and `xor`. Of `or` either input is enough, so that single cuts see none of them;
what restores corrupted runs sees both. `xor` under zero ablation has seven sets of its six edges that give every answer
right, three of them connected. `backup` has heads that no single cut sees; `coablation` finds them.

{tables}

Written by `python tools/circuits_calibration.py docs/circuits-calibration.md`.
"""


@dataclass(frozen=True)
class Network:
    name: str
    model: vs.Model
    pairs: vs.Pairs
    kind: str


def networks() -> list[Network]:
    found = []
    for kind in ("resample", "zero"):
        found += [Network(name, compiled(name), compiled_pairs(name, PAIRS), kind) for name in PROGRAMS]
    known = [(name, mechanism(name)) for name in MECHANISMS]
    return found + [Network(name, one.model, one.pairs, "resample") for name, one in known]


def scored(network: Network, method: str, total: float) -> tuple[Tensor, Tensor]:
    """Scores of all edges, and which of them are found."""
    if method in SETS:
        circuit = discover(network.model, network.pairs, method, kind=network.kind, sink=silent)
        mask = ablation(network.model, network.pairs, vs.logit_diff).wired.graph.mask(circuit.edges)
        return mask.double(), mask
    effects = edge_attribution(network.model, network.pairs, method=method, kind=network.kind, sink=silent).effects
    scores = effects.abs().mean(1)
    scores = torch.where(scores <= ZERO * scores.max(), 0.0, scores)
    # Where cutting everything changes nothing, no edge has an effect.
    return scores, (scores >= SMALLEST * total) & (total > ZERO)


def row(network: Network) -> str:
    """One network: its edges, and a cell for each method."""
    cut = ablation(network.model, network.pairs, vs.logit_diff, network.kind)
    everything = torch.ones(1, len(cut.wired.graph), dtype=torch.bool)
    base, empty = cut.plain()[0], vs.circuits.with_only(cut, ~everything)[0]
    truth = cut.wired.graph.mask(discover(network.model, network.pairs, "exact", kind=network.kind, sink=silent).edges)
    cells = []
    for method in (*ESTIMATES, *SETS):
        if method == "pruning" and (network.kind == "zero" or network.name in LARGE):
            cells.append("")
            continue
        try:
            scores, found = scored(network, method, float((base - empty).abs().mean()))
        except VesaliusError as error:
            cells.append("refused")
            print(network.name, method, error)
            continue
        cells.append(cell(truth, scores, found))
    print(network.name, network.kind, int(truth.sum()), cells, flush=True)
    return f"| {network.name} | {len(truth)} | {int(truth.sum())} | {' | '.join(cells)} |"


def cell(truth: Tensor, scores: Tensor, found: Tensor) -> str:
    hits = int((truth & found).sum())
    if not bool(truth.any()):
        return "empty" if not bool(found.any()) else f"{int(found.sum())} false"
    precision = hits / int(found.sum()) if bool(found.any()) else float("nan")
    area = roc_auc_score(truth.numpy(), scores.double().numpy())
    zero = float((scores[truth] == 0).double().mean())
    return f"{area:.2f}, {precision:.2f}, {hits / int(truth.sum()):.2f}, {zero:.0%}".replace("nan", "none")


def table(title: str, some: list[Network]) -> str:
    head = f"| network | edges | true | {' | '.join((*ESTIMATES, *SETS))} |\n|{' --- |' * (3 + len(ESTIMATES + SETS))}"
    return f"## {title}\n\nEach cell: AUROC, P, R, zero.\n\n{head}\n" + "\n".join(map(row, some))


def shortlists() -> str:
    """Hybrid with a shortlist of a third of the edges."""
    lines = [
        "## A shortlist of a third of the edges",
        "",
        "Hybrid without checking all edges, under resampling: found of true, and how many it says may be missed.",
        "",
        "| network | checked of edges | found of true | missed, at most |",
        "| --- | --- | --- | --- |",
    ]
    for name in [name for name in PROGRAMS if name != "length"]:
        model, pairs = compiled(name), compiled_pairs(name, PAIRS)
        truth = discover(model, pairs, "exact", sink=silent)
        edges = len(ablation(model, pairs, vs.logit_diff).wired.graph)
        found = discover(model, pairs, shortlist=edges // 3, drawn=edges // 6, sink=silent)
        both = len({*found.edges} & {*truth.edges})
        assert found.check is not None and found.scores is not None
        checked, most = len(found.scores.items), found.check.most_missed
        lines.append(f"| {name} | {checked} of {edges} | {both} of {len(truth.edges)} | {most} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    some = networks()
    tables = [
        table("Compiled, resample ablation", [n for n in some if n.name in PROGRAMS and n.kind == "resample"]),
        table("Compiled, zero ablation", [n for n in some if n.name in PROGRAMS and n.kind == "zero"]),
        table("Built by hand, resample ablation", [n for n in some if n.name in MECHANISMS]),
        shortlists(),
    ]
    Path(sys.argv[1]).write_text(PAGE.format(smallest=SMALLEST, tables="\n\n".join(tables)))


if __name__ == "__main__":
    main()
