"""What makes latents fire, found by us, by delphi's latent cache and by sae-dashboard, in processor seconds.

    make bench-describe                      all, into RESULTS.md
    python describe.py --tokens 20000 --rounds 3

One TopK dictionary with 8,192 latents (k 32, random weights) on the residual stream of SmolLM2 after layer 15, and the
same texts of token ids for everyone, 256 tokens each. Ours is `vs.describe.collect_examples`: counts, histograms, the
strongest, a random sample and near misses of every latent. delphi's `LatentCache.run` and `save_splits` only store the
activations that are not zero, from which examples are made later. sae-dashboard's `SaeVisRunner.run` makes statistics
and examples, some latents at a time: 256 of them are run, counted as 256/8192 of the work, with the model's activations
already in its cache (that forward is not counted). How often each latent fires is compared with delphi's count.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would be counted as work

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import measure
import vesalius as vs
from describe_peers import dashboard, delphi
from measure import OURS, Contender, Work
from vesalius.dictionaries import Dictionary
from vesalius.jobs.progress import most_resident

LAYER, LATENTS, K, CONTEXT = 15, 8192, 32, 256
SITE = vs.Site.parse(f"layers.{LAYER}.resid_post")
SOME = 256
"""Latents that sae-dashboard is given."""


@dataclass(frozen=True)
class Setting:
    """The model, the dictionary, and ids [text, 256]."""

    model: vs.Model
    dictionary: Dictionary
    ids: Tensor


def setting(tokens: int) -> Setting:
    model = vs.load("smollm2-135m-instruct")
    draw = torch.Generator().manual_seed(0)
    width = model.architecture[1].d_model
    encoder = torch.nn.functional.normalize(torch.randn(width, LATENTS, generator=draw), dim=0)
    dictionary = Dictionary(
        "topk", in_sites=(SITE,), out_sites=(SITE,), encoders=(encoder,), decoders=(encoder.T.contiguous(),),
        b_enc=torch.zeros(LATENTS), b_dec=(torch.zeros(width),), k=K, apply_b_dec_to_input=False,
    )  # fmt: skip
    stream = []
    for text in vs.data.texts_from("stdlib").read():
        stream += model.tokenizer.encode(text, add_special_tokens=False)
        if len(stream) >= tokens:
            break
    if len(stream) < tokens:  # long runs go through the corpus again
        stream *= -(-tokens // len(stream))
    rows = tokens // CONTEXT
    ids = torch.tensor(stream[: rows * CONTEXT]).view(rows, CONTEXT)
    special = torch.tensor(model.tokenizer.all_special_ids)
    return Setting(model, dictionary, torch.where(torch.isin(ids, special), torch.tensor(28), ids))


def ours(given: Setting) -> Tensor:
    """How often each latent fires, as everyone gives it: over all positions but each text's first."""
    parts = list(map(given.dictionary.latent, range(LATENTS)))
    texts = given.ids.tolist()
    found = vs.describe.collect_examples(given.model, texts, parts, context=CONTEXT, bos="none", sink=vs.silent)
    return found.density


def alone(tokens: int) -> tuple[int, float, float]:
    """Tokens, our processor seconds, and bytes at the peak above those of a short pass, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--alone", str(tokens)], capture_output=True, text=True, check=True
    )
    seconds, memory = map(float, done.stdout.split())
    print(tokens, seconds, memory, flush=True)
    return tokens, seconds, memory


def measured_alone(tokens: int) -> None:
    given = setting(tokens)
    ours(Setting(given.model, given.dictionary, given.ids[:16]))
    before, began = most_resident(), time.process_time()
    ours(given)
    print(time.process_time() - began, most_resident() - before)


def same(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference of the shares of tokens that a latent fires on, of those that both looked at."""
    return float((mine[: len(theirs)] - theirs).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", type=int, nargs="*", default=[20480, 81920])
    parser.add_argument("--alone", type=int)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if asked.alone:
        measured_alone(asked.alone)
        return
    given, folder = setting(asked.tokens), Path(tempfile.mkdtemp())
    sae = dashboard(given.model, given.dictionary, LAYER, folder / "cache")
    cache = delphi(given.model, given.dictionary, LAYER)
    print("warming the dashboard's cache", flush=True)
    sae(given.ids, range(8))
    works = [
        Work(
            f"{given.ids.numel():,} tokens, {LATENTS:,} latents",
            [
                Contender(OURS, lambda _: ours(given)),
                Contender("delphi, caching", lambda number: cache(given.ids, folder / str(number))),
                Contender("sae-dashboard", lambda _: sae(given.ids, range(SOME)), SOME / LATENTS),
            ],
            same=same,
            allowed=2e-3,
        )
    ]
    for number in range(asked.rounds):
        for work in works:
            work.round(number)
        print(measure.table(works), flush=True)
    shutil.rmtree(folder)
    grown = [alone(tokens) for tokens in asked.growth]
    lines = ["| tokens | ours, CPU-s per 1,000 tokens | memory above a short pass, MB |", "| ---: | ---: | ---: |"]
    lines += [f"| {n:,} | {seconds / n * 1000:.3f} | {memory / 1e6:.0f} |" for n, seconds, memory in grown]
    about = (__doc__ or "").split("\n\n")[2]
    head = f"## What makes latents fire\n\n{measure.machine()}; {asked.rounds} rounds. {about}"
    measure.write("describe", "\n\n".join([head, measure.table(works), "\n".join(lines)]))


if __name__ == "__main__":
    main()
