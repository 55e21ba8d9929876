"""Training of dictionaries against SAELens, sparsify and dictionary_learning: a step, in processor seconds.

    make bench-dictionaries               every kind and end to end, into RESULTS.md
    python dictionaries.py --rounds 6 --only topk

Residual stream of SmolLM2 (layer 15, width 576; rows of more than 10 times the median norm left out, scaled to mean
norm sqrt(576)), 4096 rows a step, k 32, Adam at 1e-3, 2 threads. Everyone begins with the same weights (encoder rows =
decoder rows = random unit vectors, decoder's bias = mean) and takes one step a round on the same batch. Norms of
decoder rows are free, as SAELens has them; sparsify and dictionary_learning bring them back to 1. Beside the
times stands the fraction of variance that each leaves unexplained, after all rounds, of rows that nobody trained on:
the work was the same where these agree. Memory is measured in a process of its own for each.
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

import dictionaries_text
import measure
import vesalius as vs
from dictionaries_peers import FLAVOURS, LR, PEERS, Asked, Trainee
from vesalius.data import TensorSource
from vesalius.dictionaries.training.fitter import Fitter, make_fitter
from vesalius.dictionaries.training.layout import layout_of
from vesalius.dictionaries.training.run import Processes
from vesalius.jobs.workers import Workers

ROWS, K, SITE = 4096, 32, "layers.15.resid_post"
WORKS = {
    "topk": ("topk", 8192, ["fp32", "bf16-screen"]), "topk-wide": ("topk", 16384, ["fp32", "bf16-screen"]),
    "batchtopk": ("batchtopk", 8192, ["fp32"]), "jumprelu": ("jumprelu", 8192, ["fp32"]),
    "matryoshka": ("matryoshka", 8192, ["fp32"]), "relu": ("relu", 8192, ["fp32"]), "gated": ("gated", 8192, ["fp32"]),
}  # fmt: skip
LEAST = 5
"""Rounds of which results are kept."""
WITHIN = 1.02
"""Times the least unexplained variance: ours has to be under it."""


def activations(tokens: int) -> Tensor:
    """Rows of one layer of SmolLM2 over text, scaled to mean norm sqrt(576)."""
    kept = Path(tempfile.gettempdir()) / f"vesalius-training-{tokens}"
    model = vs.load("smollm2-135m-instruct")
    store = vs.data.harvest(model, vs.data.texts_from("stdlib"), sites=[SITE], out=kept, tokens=tokens)
    (x,) = store.sample(tokens, seed=0)
    norms = x.norm(dim=1)
    x = x[norms < 10 * norms.median()]
    return x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean())


def config_of(kind: str, precision: str, m: int) -> vs.TrainConfig:
    """What is asked of everyone, in our words."""
    return vs.TrainConfig(
        kind=kind, n_latents=m, k=K, lr=LR, warmup=0, decay=0.0, sparsity_warmup=0, normalise=False,
        decoder_norm="free", precision=precision,
    )  # fmt: skip


def fitter_of(config: vs.TrainConfig, x: Tensor, workers: Workers) -> Fitter:
    source = TensorSource(x)
    return make_fitter(source, config, layout_of(source, config), workers, Processes(), torch.device("cpu"))


def ours(config: vs.TrainConfig, x: Tensor, workers: Workers) -> Trainee:
    """Our fitter, stepped by hand."""
    fitter = fitter_of(config, x, workers)

    def left(rows: Tensor) -> float:
        fitter.step([rows])  # measures before it steps
        return fitter.history[-1][1]

    return Trainee(lambda rows: fitter.step([rows]), left)


def asked_of(config: vs.TrainConfig, x: Tensor, workers: Workers) -> Asked:
    """The weights that our fitter begins with, for the others."""
    values = {name: value.clone() for name, value in fitter_of(config, x, workers).parameters.values.items()}
    threshold = float(values["0.log_threshold"][0].exp()) if "0.log_threshold" in values else 0.0
    return Asked(
        config.kind, values["0.W_enc"], values["0.W_dec"], values["b_dec"], K, config.prefixes,
        config.sparsity_coefficient, threshold, config.bandwidth,
    )  # fmt: skip


def trainees(name: str, x: Tensor, workers: Workers) -> dict[str, Callable[[], Trainee]]:
    """Contenders of one work, ours first, made when they are called."""
    kind, m, precisions = WORKS[name]
    made: dict[str, Callable[[], Trainee]] = {
        f"vesalius {precision}": partial(ours, config_of(kind, precision, m), x, workers) for precision in precisions
    }
    asked = asked_of(config_of(kind, "fp32", m), x, workers)
    for peer, kinds in FLAVOURS.items():
        if kind in kinds:
            made[peer] = partial(PEERS[peer], asked)
    return made


def batches(x: Tensor, rounds: int) -> tuple[list[Tensor], Tensor]:
    """One batch per round, and rows that are in none of them."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:ROWS], order[ROWS:]
    draws = [rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(n))[:ROWS]] for n in range(rounds)]
    return [x[draw] for draw in draws], x[held]


def work(name: str, x: Tensor, rounds: int, workers: Workers) -> measure.Work:
    """All contenders of one kind, step by step in turn."""
    given, held = batches(x, rounds + 1)
    made = {who: make() for who, make in trainees(name, x, workers).items()}

    def step(trainee: Trainee, number: int) -> None:
        trainee.step(given[number])  # what came of it is told in the note

    contenders = [measure.Contender(who, partial(step, trainee)) for who, trainee in made.items()]
    for trainee in made.values():
        trainee.step(given[-1])
    found = measure.Work(f"{name}, {WORKS[name][1]} latents", contenders)
    for number in range(rounds):
        found.round(number)
    left = {who: trainee.left(held) for who, trainee in made.items()}
    best = min(left.values())
    late = [who for who, value in left.items() if who.startswith("vesalius") and value > WITHIN * best]
    if late:
        print(f"{name}: {late} leave more than {WITHIN} times the least: {left}", file=sys.stderr)
    memory = [f"{who} {peak(name, who):,.0f}" for who in made]
    found.note = (
        f"unexplained after {rounds + 1} steps: {', '.join(f'{who} {value:.4f}' for who, value in left.items())}. "
        f"Peak memory of steps, MB: {', '.join(memory)}"
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
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", choices=[*WORKS, "text"], nargs="*", default=[*WORKS, "text"])
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "CONTENDER"), help="only the memory of one contender")
    asked = parser.parse_args()
    torch.set_num_threads(2)
    if asked.peak:
        print(measured_peak(*asked.peak))
        return
    for name in asked.only:
        if name == "text":
            measure.write("dictionaries text", dictionaries_text.section(rounds=5))
            continue
        with Workers() as workers:
            found = work(name, activations(asked.tokens), asked.rounds, workers)
        print(measure.table([found]), flush=True)
        if asked.rounds >= LEAST:
            measure.write(f"dictionaries {name}", f"{_head(name, asked.rounds)}{measure.table([found])}")


def _head(name: str, rounds: int) -> str:
    if name != next(iter(WORKS)):
        return f"### {name}\n\n"
    how = (__doc__ or "").split("\n\n")[2]
    return f"## Training of dictionaries\n\n{measure.machine()}; {rounds} rounds. {how}\n\n### {name}\n\n"


if __name__ == "__main__":
    main()
