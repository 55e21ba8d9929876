"""LEACE against concept-erasure, and a step of alignment search against pyvene and the rest of the pass.

    make bench-concepts            all, into RESULTS.md
    python concepts.py --rows 100000 --rounds 2

LEACE: rows of width 576 with two classes, in blocks, counted in float64 by both; the erasers' results on a sample are
compared. Alignment search: SmolLM2, the output of a layer at the last token, rank 8, a batch of prompts of equal
length; both start from the same rotation, and the logits that it gives are compared before training. Ours records the
prompts once, which is not part of a step and is quoted beside it. "The rest alone" is the same replay forward and
backward without rotation and optimiser.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would be counted as work

import argparse
import time
import warnings

import torch
from torch import Tensor

import measure
import vesalius as vs
from measure import OURS, Contender, Work
from vesalius.concepts import Counterfactuals, DasConfig, Exchange, LeaceFitter
from vesalius.concepts.das import _loss, _Search

WIDTH, BLOCK, RANK, LAYER, BATCH, LENGTH, STEPS = 576, 10_000, 8, 15, 16, 24, 4


def leace(rows: int) -> Work:
    """Fitting one eraser in one pass over all rows."""
    from concepts_peers import peers_leace

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    blocks = []
    for _ in range(rows // BLOCK):
        z = torch.randint(0, 2, (BLOCK,), generator=generator)
        x = torch.randn(BLOCK, WIDTH, generator=generator) @ mix
        x[:, 0] += z
        blocks.append((x, torch.nn.functional.one_hot(z, 2)))
    sample = blocks[0][0][:1000]

    def ours(_: int) -> Tensor:
        fitter = LeaceFitter(WIDTH, 2)
        for x, z in blocks:
            fitter.update(x, z)
        return fitter.eraser(sample.double())

    theirs = Contender("concept-erasure", lambda _: peers_leace(blocks, sample))
    return Work(f"LEACE, {rows:,} x {WIDTH}", [Contender(OURS, ours), theirs], allowed=1e-9)


def search() -> Work:
    """Steps of training a rotation."""
    from concepts_peers import PyveneSearch

    model = vs.load("smollm2-135m-instruct")
    generator = torch.Generator().manual_seed(0)
    base, source = (torch.randint(100, 40_000, (BATCH, LENGTH), generator=generator) for _ in range(2))
    expected = torch.randint(100, 40_000, (BATCH,), generator=generator)
    began = time.process_time()
    data = Counterfactuals(vs.Tokens(base), vs.Tokens(source), expected)
    exchange = Exchange.of(model, data, f"layers.{LAYER}.resid_post")
    recorded = time.process_time() - began
    rows = torch.arange(BATCH)

    def ours(_: int) -> Tensor:
        own = _Search(WIDTH, DasConfig(rank=RANK))
        optimiser = torch.optim.Adam(own.free, lr=0.01)
        first = exchange.logits(own.basis().detach(), rows).detach()
        for _ in range(STEPS):
            optimiser.zero_grad()
            _loss(exchange, own, rows, 0.0).backward()
            optimiser.step()
        return first

    def rest(_: int) -> None:
        with torch.no_grad():
            exchange.tail.logits(exchange.base, rows)
        for _ in range(STEPS):
            values = exchange.base.clone().requires_grad_()
            logits = exchange.tail.logits(values, rows, grad=True)
            torch.nn.functional.cross_entropy(logits, expected).backward()

    def theirs(_: int) -> Tensor:
        peer = PyveneSearch(model.module, LAYER, RANK, 0.01)
        with torch.no_grad():
            peer.rotation.rotate_layer.weight = _Search(WIDTH, DasConfig(rank=RANK)).basis().detach().T.contiguous()
        first = peer.logits(base, source).detach()
        for _ in range(STEPS):
            peer.step(base, source, expected)
        return first

    note = f"one exchange and {STEPS} steps; the prompts were recorded once, in {recorded:.2f} CPU-s"
    contenders = [Contender(OURS, ours), Contender("pyvene", theirs), Contender("the rest alone", rest)]
    return Work(f"alignment search, layer {LAYER}, {BATCH} x {LENGTH} tokens", contenders, allowed=1e-2, note=note)


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("leace", "search"), help="one of the two, printed only")
    parser.add_argument("--dry", action="store_true", help="print only")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    works = [*([leace(given.rows)] if given.only != "search" else []), *([search()] if given.only != "leace" else [])]
    for work in works:
        for number in range(given.rounds):
            work.round(number)
    text = f"## Concepts\n\n{measure.machine()}; {given.rounds} rounds.\n\n{measure.table(works)}"
    print(text)
    if not (given.dry or given.only):
        measure.write("concepts", text)


if __name__ == "__main__":
    main()
