"""The engine against plain hooks, TransformerLens, nnsight and pyvene: SmolLM2, float32, 8 prompts of 15 tokens.

    make bench-engine                      five rounds of everything, into RESULTS.md
    python engine.py --rounds 1 --only heads

Peers run one whole forward per patch, so that a layer costs what any other does: each round they do the patches of one
layer (another one every round), which counts as a thirtieth. We do all of them. The self-check is off; what it costs is
a row of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would be counted as work
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import measure
import vesalius as vs
from vesalius.jobs import silent
from vesalius.model import products

LAYERS, HEADS, WIDTH = 30, 9, 15
NAMES = ["Mary", "John", "Tom", "Anna", "Paul", "Kate", "Mark", "Jane", "Peter"]
TEXT = "{first} {a} and {b} went to the park, {s} gave a ball to"
LAYER_ORDER = [14, 3, 26, 9, 20, 0, 29, 12, 6, 23]


def prompts(model: vs.Model, skip: bool) -> vs.Pairs:
    """Eight pairs of fifteen tokens that differ at the repeated name; skip False: at the first word too."""
    rows: dict[str, list[list[int]]] = {"clean": [], "corrupted": []}
    answers = []
    for number in range(8):
        a, b = NAMES[number], NAMES[number + 1]
        for which, subject in (("clean", b), ("corrupted", a)):
            first = "When" if skip or which == "clean" else "While"
            text = TEXT.format(first=first, a=a, b=b, s=subject)
            rows[which].append([2, *model.tokenizer.encode(text, add_special_tokens=False)])
        answers.append([model.tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in (a, b)])
    if not skip:
        # Another first token for every corrupted prompt, so that no position is before the first difference.
        rows["corrupted"] = [[0, *row[1:]] for row in rows["corrupted"]]
    ids = {which: torch.tensor(found) for which, found in rows.items()}
    assert ids["clean"].shape == (8, WIDTH), ids["clean"].shape
    answer, distractor = torch.tensor(answers).T
    return vs.Pairs(clean=ids["clean"], corrupted=ids["corrupted"], answer=answer.contiguous(),
                    distractor=distractor.contiguous())  # fmt: skip


def layer_of(number: int) -> int:
    return LAYER_ORDER[number % len(LAYER_ORDER)]


def sweep_work(
    name: str, model: vs.Model, pairs: vs.Pairs, kind: str, peers: Sequence[Any], compute: str = "float32"
) -> measure.Work:
    """A whole sweep of ours against one layer's patches of theirs."""
    sites, each = ("layers.*.resid_post", "position") if kind == "resid" else ("layers.*.z", "head")
    places = WIDTH if kind == "resid" else HEADS

    def ours(number: int) -> Tensor:
        scores = vs.sweep(model, pairs, sites=sites, each=each, check=False, sink=silent, compute=compute)
        return scores.values[layer_of(number)]

    def theirs(peer: Any, source: dict[tuple[str, int], Tensor], number: int) -> Tensor:
        layer = layer_of(number)
        value = source[kind, layer]
        found = [
            vs.logit_diff(peer.patched(pairs.corrupted, kind, layer, where, value), pairs) for where in range(places)
        ]
        return torch.stack(found)

    contenders = [measure.Contender("vesalius", ours)]
    for peer in peers:
        kinds = [kind] if hasattr(peer, "cache") else []
        source = peer.cache(pairs.clean, kinds) if kinds else _resid(peers, pairs)
        contenders.append(measure.Contender(peer.name, partial(theirs, peer, source), share=1 / LAYERS))
    allowed = 2e-3 if compute == "float32" else 5.0
    return measure.Work(name, contenders, allowed=allowed)


def _resid(peers: Sequence[Any], pairs: vs.Pairs) -> dict[tuple[str, int], Tensor]:
    found: dict[tuple[str, int], Tensor] = peers[0].cache(pairs.clean, ["resid"])
    return found


def capture_work(model: vs.Model, peers: Sequence[Any]) -> measure.Work:
    """Residual stream, heads, attention and MLP outputs of every layer on 8 x 128 tokens, against a plain forward."""
    ids = torch.randint(5, 40000, (8, 128), generator=torch.Generator().manual_seed(0))
    kinds = ["resid", "z", "attn", "mlp"]
    sites = [f"layers.*.{kind}" for kind in ("resid_post", "z", "attn_out", "mlp_out")]

    def plain(_: int) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(model.module(ids).logits[:, -1, :9])

    def ours(_: int) -> Tensor:
        run = model.run(ids, capture=sites)
        assert run["layers.29.z"].shape == (8, 128, 9, 64)
        return run.logits[:, -1, :9]

    def theirs(peer: Any, _: int) -> Tensor:
        assert len(peer.cache(ids, kinds)) == 4 * LAYERS
        return torch.zeros(())

    same = lambda one, other: float((one - other).abs().max()) if other.ndim else 0.0  # noqa: E731
    contenders = [measure.Contender("vesalius", ours), measure.Contender("plain forward", plain)]
    contenders += [measure.Contender(peer.name, partial(theirs, peer)) for peer in peers if hasattr(peer, "cache")]
    return measure.Work("capture 30 x {resid, z, attn, mlp}, 8 x 128", contenders, same=same,
                        note="a ratio of 1 means that reading costs nothing")  # fmt: skip


def attribution_work(model: vs.Model, pairs: vs.Pairs, hooks: Any) -> measure.Work:
    """Attribution patching of the residual stream, every layer and position."""
    score = partial(_score, pairs)

    def ours(_: int) -> Tensor:
        return vs.attribution_patching(model, pairs, sites="layers.*.resid_post", each="position").effects

    def plain(_: int) -> Tensor:
        source = hooks.cache(pairs.clean, ["resid"])
        base = hooks.cache(pairs.corrupted, ["resid"])
        gradients = hooks.gradients(pairs.corrupted, score)
        shares = [
            (gradient * (source["resid", layer] - base["resid", layer])).sum(-1).T
            for layer, gradient in enumerate(gradients)
        ]
        return torch.stack(shares)

    def frugal(_: int) -> Tensor:
        source = hooks.cache(pairs.clean, ["resid"])
        kept: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, __, output: kept.append(output)) for layer in hooks.layers
        ]  # fmt: skip
        logits = model.module(pairs.corrupted).logits
        gradients = torch.autograd.grad(score(logits).sum(), kept)
        for handle in handles:
            handle.remove()
        shares = [
            (gradient * (source["resid", layer] - kept[layer].detach())).sum(-1).T
            for layer, gradient in enumerate(gradients)
        ]
        return torch.stack(shares)

    return measure.Work(
        "attribution patching, 30 x 15",
        [
            measure.Contender("vesalius", ours),
            measure.Contender("plain autograd", frugal),
            measure.Contender("plain autograd, base run apart", plain),
        ],
    )


def _score(pairs: vs.Pairs, logits: Tensor) -> Tensor:
    return vs.logit_diff(logits, pairs)


def check_work(model: vs.Model, pairs: vs.Pairs) -> measure.Work:
    """What the self-check costs: a sweep with it against the same without."""

    def with_check(check: bool, _: int) -> Tensor:
        return vs.sweep(model, pairs, sites="layers.*.z", each="head", check=check, sink=silent).values

    return measure.Work(
        "head sweep without the self-check",
        [measure.Contender("vesalius", partial(with_check, False)),
         measure.Contender("the same with it", partial(with_check, True))],
    )  # fmt: skip


def arithmetic(model: vs.Model, pairs: vs.Pairs, seconds: float) -> str:
    """Arithmetic rate of the residual sweep against what this machine can do."""
    with FlopCounterMode(display=False) as counted:
        vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", check=False, sink=silent)
    matmul, best = measure.ceiling(), best_product()
    rate = (counted.get_total_flops() + _hidden_flops(model, pairs)) / seconds / 1e9
    return (
        f"Arithmetic rate inside the residual sweep: {rate:.0f} GFLOP per CPU-s, {rate / matmul:.0%} of PyTorch's "
        f"float32 product ({matmul:.0f}) and {rate / best:.0%} of the faster library's ({best:.0f}; "
        f"`vesalius.model.products` takes {products.library()})."
    )


def _hidden_flops(model: vs.Model, pairs: vs.Pairs) -> float:
    """The counter does not know oneDNN's linear layers: count them in a run with the other library."""
    if products.library() == "mkl":
        return 0.0
    with FlopCounterMode(display=False) as seen:
        vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", check=False, sink=silent)
    known = seen.get_total_flops()
    os.environ[products.VARIABLE] = "mkl"
    products.library.cache_clear()
    with FlopCounterMode(display=False) as every:
        vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", check=False, sink=silent)
    del os.environ[products.VARIABLE]
    products.library.cache_clear()
    return float(every.get_total_flops() - known)


def best_product(size: int = 2048, repeats: int = 3) -> float:
    """GFLOP per processor second of a float32 product by the library that edited runs use."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    products.linear(a, b)
    began = time.process_time()
    for _ in range(repeats):
        products.linear(a, b)
    return 2 * size**3 * repeats / (time.process_time() - began) / 1e9


def imports(rounds: int) -> str:
    """Processor time of `import vesalius`, with what a sweep needs, against torch and transformers."""
    base = "import torch, transformers; transformers.AutoModelForCausalLM, transformers.AutoTokenizer"
    ours = f"{base}; import vesalius as vs; vs.load, vs.sweep, vs.Model"
    alone = "import vesalius"
    taken: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for code in (base, ours, alone):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.setdefault(code, []).append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    ratio = statistics.median(mine / theirs for mine, theirs in zip(taken[ours][1:], taken[base][1:], strict=True))
    light = statistics.median(mine / theirs for mine, theirs in zip(taken[alone][1:], taken[base][1:], strict=True))
    return (
        f"Import: torch, transformers and vesalius with `load`, `sweep` and `Model` take {ratio:.2f} times the "
        f"processor time of torch and transformers alone; `import vesalius` by itself {light:.2f} times."
    )


def rounding(model: vs.Model, pairs: vs.Pairs, rounds: int) -> str:
    """bfloat16 products in a sweep: speed, and the error against float32."""
    options: dict[str, Any] = {"sites": "layers.*.z", "each": "head", "check": False, "sink": silent}
    ratios, worst, spread = [], 0.0, 0.0
    for _ in range(rounds):
        taken = []
        found = []
        for compute in ("float32", "bfloat16"):
            began = time.process_time()
            found.append(vs.sweep(model, pairs, compute=compute, **options).values)
            taken.append(time.process_time() - began)
        ratios.append(taken[0] / taken[1])
        worst = float((found[0] - found[1]).abs().max())
        spread = float(found[0].max() - found[0].min())
    rms = float((found[0] - found[1]).pow(2).mean().sqrt())
    return (
        f'`compute="bfloat16"`, head sweep: {statistics.median(ratios):.2f} times as fast as float32; largest error '
        f"{worst:.2g} logits, root mean square {rms:.2g}, of a range of {spread:.3g}."
    )


def works(model: vs.Model, only: Sequence[str]) -> list[measure.Work]:
    # Late: the peers are not needed for the wide case, and take long to import.
    import engine_peers as peers

    hooks = peers.Hooks(model)
    others = [peers.Lens(model), peers.Sight(model)]
    skip, all_positions = prompts(model, skip=True), prompts(model, skip=False)
    makers: dict[str, Callable[[], measure.Work]] = {
        "resid": lambda: sweep_work("residual sweep 30 x 15, nothing skippable", model, all_positions, "resid",
                                    [hooks, *others, peers.Vene(model)]),
        "resid-skip": lambda: sweep_work("residual sweep 30 x 15, skippable positions", model, skip, "resid",
                                         [hooks, *others, peers.Vene(model)]),
        "heads": lambda: sweep_work("head sweep 30 x 9, nothing skippable", model, all_positions, "z",
                                    [hooks, *others]),
        "heads-skip": lambda: sweep_work("head sweep 30 x 9, skippable positions", model, skip, "z", [hooks, *others]),
        "capture": lambda: capture_work(model, [hooks, *others]),
        "attribution": lambda: attribution_work(model, skip, hooks),
        "check": lambda: check_work(model, skip),
    }  # fmt: skip
    return [make() for name, make in makers.items() if not only or name in only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    model = vs.load("smollm2-135m-instruct", sink=silent)
    todo = works(model, asked.only)
    for number in range(-1, asked.rounds):
        for work in todo:
            gc.collect()
            work.round(max(number, 0))
        if number < 0:
            # The first round warms up and is not counted.
            for work in todo:
                work.seconds.clear()
        sys.stderr.write(f"round {number + 1} of {asked.rounds}\n")
    text = [f"## Engine\n\n{measure.machine()}; {asked.rounds} rounds. A ratio is their processor time over ours.\n",
            measure.table(todo)]  # fmt: skip
    if not asked.only:
        seconds = next(work for work in todo if "nothing" in work.name).median("vesalius")
        text += [
            arithmetic(model, prompts(model, skip=False), seconds), "", imports(asked.rounds), "",
            rounding(model, prompts(model, skip=False), asked.rounds),
        ]  # fmt: skip
        measure.write("engine", "\n".join(text))
    sys.stdout.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
