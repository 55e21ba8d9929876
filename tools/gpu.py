"""Everything that runs a model, on a real GPU: one table, under five minutes, exit code 1 when a line fails.

    python tools/gpu.py                 (or: make gpu)
    python tools/gpu.py --only llama    families and entry points whose name contains this
    python tools/gpu.py --device cpu    what a machine without a GPU can check: the script itself
    python tools/gpu.py --out gpu.txt   the table in a file as well, and the whole tracebacks below it

It needs the project's own environment (transformers, numpy, scipy) and a torch that was built with CUDA; neither pytest
nor a download. The code that is run is this checkout's, whatever is installed. From another folder set nothing: the
paths are found from this file.

Per family of tests/families.py, on tiny random models: captured sites against plain hooks on the model's own modules,
edited runs and a sweep of every edit against one plain hooked forward each (`--dtype` float32, bfloat16, and TF32 where
the device has it), and the bytes that a run, a sweep and a generation leave behind. Then every entry point of
tests/entries.py against the CPU's numbers. Each failing line is followed by the last lines of its traceback.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch

import families
import tiny
import vesalius as vs
from entries import ENTRIES, worst_difference
from vesalius.parts import Unit
from vesalius.patching.evaluate import evaluate
from vesalius.patching.plain import plain_value
from vesalius.patching.record import record
from vesalius.patching.sources import source_for
from vesalius.patching.targets import Variant

KINDS = ("z", "attn_out", "mlp_out", "mlp_post", "q", "k", "v")
LEFT = 1 << 20
"""Bytes that a call may leave on the device: what libraries keep for themselves."""


@dataclass
class Line:
    """One row of the table."""

    what: str
    precision: str
    worst: float | None
    seconds: float
    error: str = ""

    @property
    def text(self) -> str:
        worst = "" if self.worst is None else f"{self.worst:.1e}"
        return f"{'FAIL' if self.error else 'ok':<5}{self.what:<44}{self.precision:<10}{worst:>9}{self.seconds:>7.1f} s"


def quiet(_event: Any) -> None:
    """Nobody listens."""


@contextmanager
def precision(name: str) -> Iterator[None]:
    """float32 products as they are, or rounded to TF32 (which bfloat16 does not touch)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def built(name: str, device: torch.device, dtype: torch.dtype) -> vs.Model:
    return vs.Model(families.FAMILIES[name].build().to(device, dtype))


def captured(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of a captured site from a plain hook's, over the largest number there."""
    family, model, tokens = families.FAMILIES[name], built(name, device, dtype), tiny.pairs(n=4).tokens("clean")
    here: Any = SimpleNamespace(ids=tokens.ids.to(device), real=tokens.real.to(device))
    expected = families.raw_layers(family, model.module, here)
    found = model.run(tokens, capture=[site for site in expected if vs.Site.parse(site) in set(model.sites())])
    worst = 0.0
    for site in found.activations:
        one, other = found[site].float(), expected[str(site)].float().view(found[site].shape)
        real = tokens.real.to(device)
        if one.shape[:2] == real.shape:
            one, other = one[real], other[real]
        worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-9)))
    return worst


def edited(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """A layer's output set to the other prompts', by the engine and by a plain hook; over the logits' range."""
    family, model, pairs = families.FAMILIES[name], built(name, device, dtype), tiny.pairs(n=4)
    clean, other = pairs.tokens("clean"), pairs.tokens("corrupted")
    source = model.run(other, capture=["layers.0.resid_post"])
    found = model.run(clean, interventions=[vs.Patch("layers.0.resid_post", source=source.activations)]).logits
    layer = model.layer(0)
    calls = iter(range(99))

    def hook(_module: Any, _args: Any, out: Any) -> Any:
        # A shared layer is called once for each layer: only its first call is layer 0.
        if next(calls):
            return None
        value = source["layers.0.resid_post"]
        return value if isinstance(out, torch.Tensor) else (value, *out[1:])

    handle = layer.register_forward_hook(hook)
    with torch.no_grad():
        plain = model.module(clean.ids.to(device), attention_mask=clean.real.long().to(device)).logits
    handle.remove()
    assert family.name == name
    real = clean.real.to(device)
    gap = (found.float() - plain.float())[real].abs().max()
    return float(gap / (plain.float()[real].max() - plain.float()[real].min()))


def swept(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """A sweep of every edit at every kind of site against plain forwards; over the values' range.

    The sweep's own self-check runs too: it raises when rounding is more than it allows for this precision.
    """
    model, pairs = built(name, device, dtype), tiny.pairs(n=4)
    sites = [site for site in model.sites() if site.layer is not None and site.kind in KINDS]
    runs = [record(model, pairs.tokens(side), sites) for side in ("clean", "corrupted")]
    variants = [Variant((Unit(site),)) for site in sites]
    worst = 0.0
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    for mode in ("patch", "zero", "mean", "resample") if exact else ("patch",):
        source = source_for(mode, *runs, 0)
        out = evaluate(runs[0], variants, source, pairs, vs.logit_diff, seed=1)
        assert out.values.device.type == "cpu"
        for number in range(0, len(variants), 3):
            example = number % len(pairs)
            plain = plain_value(runs[0], variants[number], source, pairs, vs.logit_diff, example)
            worst = max(worst, abs(plain - float(out.values[number, example])))
    return worst / float(out.values.max() - out.values.min())


def left(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes on the device after runs, edits, sweeps and generation, less what was there before. Raises when many."""
    if device.type != "cuda":
        return 0.0
    model, pairs = built(name, device, dtype), tiny.pairs(n=4)

    def work() -> None:
        model.run(pairs.tokens("clean"), capture=["layers.*.*"])
        vs.sweep(model, pairs, sites="layers.*.mlp_out", check=False, sink=quiet)
        if families.FAMILIES[name].causal:
            model.generate(pairs.tokens("clean"), 3)

    work()
    counts = []
    for _ in range(2):
        gc.collect()
        torch.cuda.synchronize()
        counts.append(torch.cuda.memory_allocated())
        work()
    gc.collect()
    counts.append(torch.cuda.memory_allocated())
    if counts[-1] - counts[0] > LEFT:
        raise AssertionError(f"{counts[-1] - counts[0]} bytes are left on the device after two rounds: {counts}")
    return float(counts[-1] - counts[0])


def tolerance(what: str, name: str) -> float:
    """How far from plain hooks is still rounding."""
    if name == "float32":
        return 1e-4
    # Eight units in the last place of the logits' range, as the self-check has it, of each run that is compared.
    return 2 * 8 * {"bfloat16": 2.0**-7, "tf32": 2.0**-10}[name] if what != "bytes left" else float(LEFT)


CHECKS: dict[str, Callable[[str, torch.device, torch.dtype], float]] = {
    "capture": captured, "edit": edited, "sweep": swept, "bytes left": left,
}  # fmt: skip


def family_lines(name: str, device: torch.device) -> Iterator[Line]:
    for rounded in ("float32", "bfloat16", "tf32"):
        if rounded == "tf32" and device.type != "cuda":
            continue
        dtype = torch.bfloat16 if rounded == "bfloat16" else torch.float32
        for what, check in CHECKS.items():
            if what == "bytes left" and rounded != "float32":
                continue
            with precision(rounded):
                line = timed(f"{name}: {what}", rounded, lambda check=check, dtype=dtype: check(name, device, dtype))
            most = float(LEFT) if what == "bytes left" else tolerance(what, rounded)
            if not line.error and line.worst is not None and not line.worst <= most:
                line.error = f"differs from plain hooks by {line.worst:.3g}; allowed is {most:.3g}"
            yield line


def timed(what: str, precise: str, check: Callable[[], float]) -> Line:
    began = time.perf_counter()
    try:
        worst, error = check(), ""
    except Exception:
        worst, error = None, traceback.format_exc()
    return Line(what, precise, worst, time.perf_counter() - began, error)


def entry_lines(device: torch.device, only: str) -> Iterator[Line]:
    """Every entry point of tests/entries.py against the CPU's numbers."""
    for entry in ENTRIES:
        for family in ("llama", "gpt2"):
            if only not in f"{family}: {entry}":
                continue
            with precision("float32"):
                line = timed(
                    f"{family}: {entry} as on the CPU",
                    "float32",
                    lambda entry=entry, family=family: worst_difference(
                        entry, tiny.model(family), vs.Model(tiny.FAMILIES[family]().to(device))
                    ),
                )
            if not line.error and line.worst is not None and line.worst > 1e-3:
                line.error = f"differs from the CPU by {line.worst:.3g} of the largest number"
            yield line


def dictionary_lines(device: torch.device, only: str) -> Iterator[Line]:
    """A short training of every kind to the CPU's weights."""
    from vesalius.dictionaries import TrainConfig, train

    rows = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0))

    def trained(kind: str) -> float:
        config = TrainConfig(kind=kind, n_latents=128, k=8, steps=20, batch_size=256)
        both = [train(rows, config, device=where, sink=quiet).decoders[0].cpu() for where in ("cpu", device)]
        return float((both[0] - both[1]).abs().max())

    for kind in ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"):
        if only in f"train {kind}":
            line = timed(f"train {kind} as on the CPU", "float32", lambda kind=kind: trained(kind))
            if not line.error and line.worst is not None and line.worst > 1e-2:
                line.error = f"weights differ from the CPU's by {line.worst:.3g}"
            yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="families and entry points whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the table here, with whole tracebacks")
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.set_num_threads(2)
    # Everything that a loop below meets first is made here, so that no line pays for the start.
    torch.zeros(8, 8, device=device) @ torch.zeros(8, 8, device=device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    began, lines = time.perf_counter(), []

    def every() -> Iterator[Line]:
        yield from entry_lines(device, given.only)
        yield from dictionary_lines(device, given.only)
        for name in families.FAMILIES:
            if given.only in name:
                yield from family_lines(name, device)

    for line in every():
        lines.append(line)
        print(line.text, flush=True)
        if line.error:
            print("     " + "\n     ".join(line.error.strip().splitlines()[-6:]), flush=True)
    failed = [line for line in lines if line.error]
    print(f"{len(lines) - len(failed)} of {len(lines)} hold, {time.perf_counter() - began:.0f} s")
    if given.out is not None:
        whole = [f"{card}, torch {torch.__version__}", *(line.text for line in lines)]
        given.out.write_text("\n".join([*whole, *(f"\n{line.what}\n{line.error}" for line in failed)]) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
