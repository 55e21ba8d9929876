"""Training of dictionaries against SAELens, sparsify and dictionary_learning: a step, in processor seconds.

    make bench-training                   every kind, into RESULTS.md
    python training.py --rounds 3 --only topk

Residual stream of SmolLM2 (width 576), 4096 rows a step, k 32, Adam at 1e-3 throughout, 2 threads. Every round each
contender takes one step on the same batch. Peers keep their own losses and extras; the fraction of variance that each
leaves unexplained on other rows after the last round is told beside, so that a fast step that learns nothing is seen.
Memory is measured in a process of its own for each.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would be counted as work

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import measure
import vesalius as vs
from training_peers import KNOWN, LR, PEERS, Trainee
from vesalius.data import TensorSource
from vesalius.dictionaries.training.finish import fitted
from vesalius.dictionaries.training.fitter import make_fitter
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.dictionaries.training.wiring import wire
from vesalius.dictionaries.training.workers import Workers

ROWS, K, SITE = 4096, 32, "layers.15.resid_post"
WORKS = {
    "topk": ("topk", 8192, ["fp32", "bf16-screen"]), "topk-wide": ("topk", 16384, ["fp32", "bf16-screen"]),
    "batchtopk": ("batchtopk", 8192, ["fp32"]), "jumprelu": ("jumprelu", 8192, ["fp32"]),
    "matryoshka": ("matryoshka", 8192, ["fp32"]), "relu": ("relu", 8192, ["fp32"]), "gated": ("gated", 8192, ["fp32"]),
}  # fmt: skip


def activations(tokens: int) -> Tensor:
    """Rows of one layer of SmolLM2 over text, scaled to mean norm sqrt(576)."""
    kept = Path(tempfile.gettempdir()) / f"vesalius-training-{tokens}"
    model = vs.load("smollm2-135m-instruct")
    store = vs.data.harvest(model, vs.data.texts_from("stdlib"), sites=[SITE], out=kept, tokens=tokens)
    (x,) = store.sample(tokens, seed=0)
    return x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean())


def ours(kind: str, precision: str, m: int, x: Tensor, workers: Workers) -> Trainee:
    """Our fitter, stepped by hand."""
    source = TensorSource(x)
    config = vs.TrainConfig(kind=kind, n_latents=m, k=K, lr=LR, warmup=0, decay=0.0, precision=precision)
    fitter = make_fitter(source, config, wire(source, config), workers, Ranks(), torch.device("cpu"))

    def rebuilt(rows: Tensor) -> Tensor:
        return torch.as_tensor(fitted(fitter, {}).reconstruct(rows))

    return Trainee(lambda rows: fitter.step([rows]), rebuilt)


def trainees(name: str, x: Tensor, workers: Workers) -> dict[str, Callable[[], Trainee]]:
    """Contenders of one work, ours first, made when they are called."""
    kind, m, precisions = WORKS[name]
    prefixes = vs.TrainConfig(kind=kind, n_latents=m).prefixes
    made: dict[str, Callable[[], Trainee]] = {
        f"vesalius {precision}": partial(ours, kind, precision, m, x, workers) for precision in precisions
    }
    for peer, known in KNOWN.items():
        if kind in known:
            made[peer] = partial(PEERS[peer], kind, x.shape[1], m, K, prefixes)
    return made


def batches(x: Tensor, rounds: int) -> tuple[list[Tensor], Tensor]:
    """One batch per round, and rows that are in none of them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:ROWS], order[ROWS:]
    draws = [rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(n))[:ROWS]] for n in range(rounds)]
    return [x[draw] for draw in draws], x[held]


def unexplained(x: Tensor, rebuilt: Tensor) -> float:
    return float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())


def work(name: str, x: Tensor, rounds: int, workers: Workers) -> measure.Work:
    """All contenders of one kind, step by step in turn."""
    given, held = batches(x, rounds + 1)
    made = {who: make() for who, make in trainees(name, x, workers).items()}

    def step(trainee: Trainee, number: int) -> Tensor:
        trainee.step(given[number])
        return torch.zeros(())

    contenders = [measure.Contender(who, partial(step, trainee)) for who, trainee in made.items()]
    for trainee in made.values():
        trainee.step(given[-1])
    found = measure.Work(f"{name}, {WORKS[name][1]} latents", contenders)
    for number in range(rounds):
        found.round(number)
    errors = [f"{who} {unexplained(held, trainee.rebuilt(held)):.3f}" for who, trainee in made.items()]
    memory = [f"{who} {peak(name, who):,.0f}" for who in made]
    found.note = (
        f"unexplained after {rounds + 1} steps: {', '.join(errors)}. Peak memory of steps, MB: {', '.join(memory)}"
    )
    return found


def peak(name: str, who: str) -> float:
    """MB that three steps need beyond what was there before the dictionary was made."""
    command = [sys.executable, __file__, "--peak", name, who]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measured_peak(name: str, who: str) -> float:
    x = torch.randn(4 * ROWS, 576, generator=torch.Generator().manual_seed(0))
    with Workers() as workers:
        make = trainees(name, x, workers)[who]
        make().step(x[:64])  # what is loaded once
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        trainee = make()
        for start in range(3):
            trainee.step(x[start * ROWS : (start + 1) * ROWS])
        return _memory("VmHWM") - before


def _memory(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", choices=WORKS, nargs="*", default=list(WORKS))
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "CONTENDER"), help="only the memory of one contender")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    if asked.peak:
        print(measured_peak(*asked.peak))
        return
    x, done = activations(asked.tokens), []
    for name in asked.only:
        with Workers() as workers:
            done.append(work(name, x, asked.rounds, workers))
        print(measure.table(done[-1:]), flush=True)
    if asked.only == list(WORKS):
        how = (__doc__ or "").split("\n\n")[2]
        head = f"## Training of dictionaries\n\n{measure.machine()}; {asked.rounds} rounds. {how}"
        measure.write("training", f"{head}\n\n{measure.table(done)}")


if __name__ == "__main__":
    main()
