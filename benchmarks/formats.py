"""Round trips of dictionaries with the libraries whose files are read and written: latents and reconstructions agree.

    make check-formats

For each kind of dictionary a library has, one with random weights is made and saved by that library and read by us, and
one of ours is written by us and opened by that library. Both are given the same rows. The numbers are the largest
difference over the largest value; the script fails when one is over 1e-5.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import formats_peers as peers
import vesalius as vs
from formats_peers import LAYERS, OUT, D, K, M, Peer
from vesalius.dictionaries import CrossLayerTranscoder, Dictionary
from vesalius.errors import FileFormatError, InputError

ALLOWED = 1e-5
RESID, IN, MLP = (vs.Site.parse(f"layers.3.{kind}") for kind in ("resid_post", "mlp_in", "mlp_out"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def ours(activation: str, *, to: int = D, **changes: Any) -> Dictionary:
    """A dictionary with random weights; of layer 3's stream, or from MLP input to output when `to` differs or skips."""
    transcodes = to != D or changes.pop("transcodes", False) or changes.get("skip") is not None
    extras = {
        "gated": {"r_mag": normal(M, seed=5), "b_mag": normal(M, seed=6)},
        "jumprelu": {"threshold": normal(M, seed=7).abs()}, "batchtopk": {"threshold": torch.tensor(0.6)},
    }.get(activation, {})  # fmt: skip
    fields: dict[str, Any] = {
        "in_sites": (IN if transcodes else RESID,), "out_sites": (MLP if transcodes else RESID,),
        "encoders": (normal(D, M, seed=1),), "decoders": (normal(M, to, seed=2),), "b_enc": normal(M, seed=3),
        "b_dec": (normal(to, seed=4),), "extras": extras, "k": K if activation == "topk" else None,
        "apply_b_dec_to_input": not transcodes,
    }  # fmt: skip
    return Dictionary(activation, **{**fields, **changes})


def cross_layer(activation: str) -> CrossLayerTranscoder:
    ins, outs = ([vs.Site.parse(f"layers.{n}.{kind}") for n in range(LAYERS)] for kind in ("resid_mid", "mlp_out"))
    layers = []
    for number in range(LAYERS):
        count = LAYERS - number
        layers.append(
            ours(activation, in_sites=(ins[number],), out_sites=tuple(outs[number:]), apply_b_dec_to_input=False,
                 encoders=(normal(D, M, seed=10 + number),), b_dec=tuple(torch.zeros(D) for _ in range(count)),
                 decoders=tuple(normal(M, D, seed=20 + 5 * number + end) for end in range(count)))
        )  # fmt: skip
    return CrossLayerTranscoder(tuple(layers), tuple(normal(D, seed=40 + n) for n in range(LAYERS)))


def as_peer(coder: Any) -> Peer:
    """One of ours on rows [row, sites * d]."""
    wide = len(coder.in_sites)
    parts = lambda x: x if wide == 1 else list(x.chunk(wide, dim=1))  # noqa: E731

    def reconstruct(x: Tensor) -> Tensor:
        found = coder.reconstruct(parts(x))
        return found if isinstance(found, Tensor) else torch.cat(found, 1)

    return Peer(lambda x: coder.encode(parts(x)), reconstruct)


class Table:
    """Prints a line per comparison, and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = 0
        self.lines = 0

    def compare(self, library: str, what: str, way: str, one: Peer, other: Peer, width: int = D) -> None:
        x = normal(64, width, seed=99) * 3
        active = one.encode(x)
        differences = [apart(other.encode(x), active), apart(other.reconstruct(x), one.reconstruct(x))]
        l0 = float((active > 0).sum(1).float().mean())
        good = max(differences) <= ALLOWED and 0 < l0 < active.shape[1]
        self.failed += not good
        self.lines += 1
        word = "" if good else "   DIFFERS"
        found = f"l0 {l0:5.1f}  latents {differences[0]:.1e}  reconstruction {differences[1]:.1e}"
        print(f"{library:20} {what:34} {way:12} {found}{word}")

    def refused(self, library: str, what: str, act: Callable[[], object], word: str) -> None:
        try:
            act()
        except (InputError, FileFormatError) as error:
            good = word in str(error)
            print(f"{library:20} {what:34} refused      {'' if good else 'but says ' + str(error)}")
            self.failed += not good
        else:
            print(f"{library:20} {what:34} NOT refused")
            self.failed += 1
        self.lines += 1


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))


def read_and_write(table: Table, out: Path) -> None:
    load, save = vs.dictionaries.load, vs.dictionaries.save
    folders = (out / str(number) for number in range(1000))

    def theirs(library: str, what: str, made: Callable[[Path], Peer], width: int = D, **options: Any) -> None:
        folder = next(folders) / "layers.3"
        peer = made(folder)
        table.compare(library, what, "we read", peer, as_peer(load(folder, **options)), width)

    def written(library: str, what: str, coder: Any, opened: Callable[[Path], Peer], name: str, width: int = D) -> None:
        folder = save(coder, next(folders) / "layers.3", format=name)
        table.compare(library, what, "we write", as_peer(coder), opened(folder), width)
        table.compare(library, what, "and read", as_peer(coder), as_peer(load(folder)), width)

    for what, (architecture, changes) in peers.saelens_cases().items():
        theirs("SAELens", what, lambda folder, a=architecture, c=changes: peers.saelens_made(a, c, folder))
    matryoshka = {"k": K, "matryoshka_widths": [8, 24, M]}
    for name, changes in (("batchtopk", {"k": K}), ("matryoshka_batchtopk", matryoshka), ("topk", {"k": K})):
        theirs("SAELens", f"{name}, exported", lambda folder, a=name, c=changes: peers.saelens_trained(a, c, folder))
    skip = normal(D, OUT, seed=8)
    for what, coder in (
        *((kind, ours(kind)) for kind in ("relu", "gated", "jumprelu", "topk", "batchtopk")),
        ("matryoshka", ours("batchtopk", groups=(8, 24, M))), ("layer_norm", ours("topk", row_norm="layer_norm")),
        ("constant_norm", ours("relu", row_norm="constant_norm")), ("transcoder", ours("relu", to=OUT)),
        ("skip transcoder", ours("relu", to=OUT, skip=skip)), ("jumprelu transcoder", ours("jumprelu", to=OUT)),
        ("jumprelu skip transcoder", ours("jumprelu", to=OUT, skip=skip)),
        ("b_dec on a transcoder's input", ours("relu", transcodes=True, apply_b_dec_to_input=True)),
    ):  # fmt: skip
        written("SAELens", what, coder, peers.saelens_opened, "saelens")
    table.refused(
        "SAELens", "topk transcoder", lambda: save(ours("topk", to=OUT), out / "no", format="saelens"), "topk"
    )

    for what, changes in (
        ("sae", {}), ("transcoder", {"transcode": True}), ("skip", {"transcode": True, "skip_connection": True}),
    ):  # fmt: skip
        theirs("sparsify", what, lambda folder, c=changes: peers.sparsify_made(c, folder))
    square = normal(D, D, seed=9)
    for what, coder in (
        ("sae", ours("topk")), ("sae, b_dec not on inputs", ours("topk", apply_b_dec_to_input=False)),
        ("transcoder", ours("topk", transcodes=True)), ("skip transcoder", ours("topk", skip=square)),
    ):  # fmt: skip
        written("sparsify", what, coder, peers.sparsify_opened, "sparsify")
    table.refused("sparsify", "relu", lambda: save(ours("relu"), out / "no", format="sparsify"), "relu")
    peers.sparsify_made({"activation": "groupmax"}, out / "groupmax")
    table.refused("sparsify", "groupmax", lambda: load(out / "groupmax"), "groupmax")

    for name in peers.dictionary_learning_classes():
        made = lambda folder, n=name: peers.dictionary_learning_made(n, folder)  # noqa: E731
        theirs("dictionary_learning", name, made, unpickle=True)
    peers.dictionary_learning_made("AutoEncoder", out / "pickle")
    table.refused("dictionary_learning", "ae.pt unless asked", lambda: load(out / "pickle"), "unpickle=True")

    for activation in ("relu", "jumprelu"):
        for skips in (False, True):
            what = f"{activation} transcoder{' with skip' if skips else ''}"
            made = lambda folder, a=activation, s=skips: peers.circuit_tracer_made(a, s, folder)  # noqa: E731
            theirs("circuit-tracer", what, made)
            coder = ours(activation, transcodes=True, skip=square if skips else None)
            written("circuit-tracer", what, coder, peers.circuit_tracer_opened, "circuit_tracer")
            if not skips:
                written("Gemma Scope", what, coder, peers.gemma_scope_opened, "gemma_scope")
            written("Gemma Scope 2", what, coder, peers.gemma_scope_2_opened, "gemma_scope_2")
        theirs("circuit-tracer", f"{activation} cross-layer",
               lambda folder, a=activation: peers.cross_layer_made("relu" if a == "relu" else "jump_relu", folder),
               LAYERS * D)  # fmt: skip
        written("circuit-tracer", f"{activation} cross-layer", cross_layer(activation), peers.cross_layer_opened,
                "circuit_tracer", LAYERS * D)  # fmt: skip
    for name, converted in (("gemma_scope", peers.saelens_gemma_scope), ("gemma_scope_2", peers.saelens_gemma_scope_2)):
        coder = ours("jumprelu", apply_b_dec_to_input=False)
        folder = save(coder, out / "gemma-scope-2b-pt-res" / "resid_post" / name / "layer_3_width_16k", format=name)
        table.compare("SAELens, Gemma Scope", name, "we write", as_peer(coder), converted(folder))
    scaled = replace(ours("relu"), in_scale=(2.0,), out_scale=(2.0,))
    folder = save(scaled, next(folders) / "layers.3", format="saelens")
    table.compare("SAELens", "scales, folded", "we write", as_peer(scaled.folded()), peers.saelens_opened(folder))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    table = Table()
    with tempfile.TemporaryDirectory() as out:
        read_and_write(table, Path(out))
    print(f"\n{table.lines} comparisons, {table.failed} failed (allowed {ALLOWED:g} of the largest value)")
    sys.exit(bool(table.failed))


if __name__ == "__main__":
    main()
