"""Wide sweeps: 16 pairs of 128 tokens, 30 layers x 128 positions, and how cost grows with length, layers and pairs.

    make bench-wide

A sweep of all of it by plain hooks is 3,840 forwards of 16 prompts. Both sides are sampled and scaled: of plain hooks
some forwards are timed, of ours some layers are swept whole and the rest is counted in forward equivalents, which grow
with what has to be computed.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import measure
import vesalius as vs
from vesalius.jobs import silent
from vesalius.patching.plan import Plan
from vesalius.patching.record import record
from vesalius.patching.sources import source_for
from vesalius.patching.targets import Variant

LAYERS = 30
SAMPLED = [5, 15, 25]
PICTURE = Path(__file__).parent / "growth.svg"


def random_pairs(count: int, length: int, first: int) -> vs.Pairs:
    """Random prompts that differ at one token, `first`."""
    generator = torch.Generator().manual_seed(length * 1000 + first)
    clean = torch.randint(100, 40000, (count, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, first] = (clean[:, first] + 777) % 40000
    tokens = torch.randint(100, 40000, (2, count), generator=generator)
    return vs.Pairs(clean=clean, corrupted=corrupted, answer=tokens[0], distractor=tokens[1])


def spent(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def hooked_forward(model: vs.Model, pairs: vs.Pairs) -> float:
    """Processor seconds of one forward with one hook, of all pairs."""
    layer = model.module.model.layers[10]

    def once() -> None:
        handle = layer.register_forward_hook(lambda _, __, output: output.clone())
        with torch.no_grad():
            model.module(pairs.corrupted)
        handle.remove()

    once()
    return min(spent(once) for _ in range(2))


def ours(model: vs.Model, pairs: vs.Pairs, layers: Sequence[int]) -> float:
    """Processor seconds of the sweep of all positions at these layers."""
    sites = [f"layers.{layer}.resid_post" for layer in layers]
    return spent(lambda: vs.sweep(model, pairs, sites=sites, each="position", check=False, sink=silent))


def equivalents(model: vs.Model, pairs: vs.Pairs, layers: Sequence[int]) -> float:
    """Forward equivalents of a sweep, counted without running it."""
    parts = [vs.Unit(vs.Site("resid_post", layer)) for layer in layers]
    runs = [record(model, pairs.tokens(which)) for which in ("corrupted", "clean")]
    variants = [Variant((part,), position) for part in parts for position in range(pairs.clean.shape[1])]
    return Plan(runs[0], variants, source_for("patch", *runs, 0), pairs.ends).estimate().spent + 2 * len(pairs)


def wide(model: vs.Model) -> list[str]:
    """Ratios for 16 pairs of 128 tokens, by where the prompts begin to differ."""
    rows = [
        "| prompts differ from position | ours, CPU-s | plain hooks, CPU-s | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for first in (0, 64, 115):
        pairs = random_pairs(16, 128, first)
        layers = SAMPLED if first < 100 else range(LAYERS)
        mine = ours(model, pairs, layers)
        scale = equivalents(model, pairs, range(LAYERS)) / equivalents(model, pairs, layers)
        hooks = hooked_forward(model, pairs) * LAYERS * 128
        rows.append(f"| {first} | {mine * scale:.0f} | {hooks:.0f} | {hooks / mine / scale:.1f} |")
        sys.stderr.write(rows[-1] + "\n")
    return rows


def growth(model: vs.Model) -> dict[str, list[tuple[float, float, float]]]:
    """(size, our CPU-s, plain hooks' CPU-s) along each axis; prompts differ from two thirds of their length on."""
    found: dict[str, list[tuple[float, float, float]]] = {"tokens": [], "layers": [], "pairs": []}

    def point(axis: str, size: int, count: int, length: int, layers: int) -> None:
        pairs, chosen = random_pairs(count, length, 2 * length // 3), range(LAYERS - layers, LAYERS)
        hooks = hooked_forward(model, pairs) * layers * length
        found[axis].append((size, ours(model, pairs, chosen), hooks))
        sys.stderr.write(f"{axis} {found[axis][-1]}\n")

    for length in (16, 32, 64, 128):
        point("tokens", length, 4, length, LAYERS)
    for layers in (4, 8, 15, 30):
        point("layers", layers, 4, 48, layers)
    for count in (2, 4, 8, 16):
        point("pairs", count, count, 48, LAYERS)
    return found


def drawn(found: dict[str, list[tuple[float, float, float]]]) -> str:
    """Three panels, both axes logarithmic: processor seconds over size."""
    every = [value for points in found.values() for _, mine, hooks in points for value in (mine, hooks)]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))

    def y(value: float) -> float:
        return 230 - 190 * (math.log10(value) - low) / (high - low)

    parts = []
    for number, (axis, points) in enumerate(found.items()):
        left = 70 + 250 * number
        sizes = [math.log2(size) for size, _, _ in points]

        def x(size: float, left: int = left, sizes: list[float] = sizes) -> float:
            return left + 200 * (math.log2(size) - sizes[0]) / (sizes[-1] - sizes[0])

        for power in range(low, high + 1):
            parts.append(f'<path d="M{left} {y(10.0**power):.1f}h200" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 8}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
        for colour, which in (("#1f5fa8", 1), ("#b0412b", 2)):
            path = " ".join(f"{x(point[0]):.1f},{y(point[which]):.1f}" for point in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [
                f'<circle cx="{x(p[0]):.1f}" cy="{y(p[which]):.1f}" r="3.5" fill="{colour}"><title>{p[which]:.3g} CPU-s'
                "</title></circle>"
                for p in points
            ]
        parts += [f'<text x="{x(p[0]):.1f}" y="250" text-anchor="middle">{p[0]:g}</text>' for p in points]
        parts.append(f'<text x="{left + 100}" y="272" text-anchor="middle">{axis}</text>')
    legend = (
        '<text x="70" y="20" fill="#1f5fa8">vesalius</text><text x="150" y="20" fill="#b0412b">plain hooks</text>'
        '<text x="250" y="20" fill="#555">processor seconds of a residual sweep, every layer and position named</text>'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 285" width="800" height="285" font-size="12" '
        'font-family="sans-serif" fill="#333"><rect width="800" height="285" fill="#fff"/>'
        f"{legend}{''.join(parts)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    model = vs.load("smollm2-135m-instruct", sink=silent)
    rows, found = wide(model), growth(model)
    PICTURE.write_text(drawn(found))
    text = [
        f"## Wide sweeps\n\n{measure.machine()}. 16 pairs x 128 tokens, 30 layers x 128 positions; sampled and",
        "scaled, see `engine_wide.py`.\n", *rows,
        "\n![Processor seconds against length, layers and pairs, ours and plain hooks](growth.svg)\n",
        "4 pairs x 48 tokens x 30 layers where an axis does not say otherwise; prompts differ from two thirds of their",
        "length on.",
    ]  # fmt: skip
    measure.write("wide", "\n".join(text))
    sys.stdout.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
