"""From text to a trained dictionary, model included: processor seconds per token, ours and SAELens's.

Every contender is a process of its own, in turn. After warming up, each trains twice, for `FEW` steps and for `MORE`,
and what is told is the difference: filling the first buffer, samples for scales and set-up fall out. The same model
(SmolLM2), texts, contexts of 256 tokens and shuffle buffer; SAELens runs the model by way of transformers and stops at
the layer. All keep freed memory, as our command line does.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from typing import Any

import torch

import measure
import vesalius as vs
from vesalius.cli.process import settle

LAYER, CONTEXT, ROWS, LATENTS, K = 15, 256, 4096, 8192, 32
BUFFER = 8 * ROWS
FEW, MORE = 1, 1 + 2 * BUFFER // ROWS
WAYS = {
    "vesalius fp32": ("vesalius", False), "vesalius bf16": ("vesalius", True),
    "SAELens": ("SAELens", False), "SAELens, autocast": ("SAELens", True),
}  # fmt: skip


def texts() -> list[str]:
    return [str(text) for text in islice(vs.data.texts_from("stdlib").read(), 400)]


def ours(steps: int, half: bool, model: vs.Model) -> None:
    source = vs.data.stream(
        model, texts(), sites=[f"layers.{LAYER}.resid_post"], buffer=BUFFER, context=CONTEXT,
        compute=torch.bfloat16 if half else None,
    )  # fmt: skip
    config = vs.TrainConfig(
        kind="topk", n_latents=LATENTS, k=K, steps=steps, warmup=0, decay=0.0,
        precision="bf16-screen" if half else "fp32",
    )  # fmt: skip
    vs.dictionaries.train(source, config, sink=vs.silent)


def runner(steps: int, half: bool, model: vs.Model) -> Any:
    """SAELens's own training runner."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )
    from sae_lens.load_model import HookedProxyLM

    hook = f"model.layers.{LAYER}"
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=576, d_sae=LATENTS, k=K), model_name="smollm2", hook_name=hook,
        model_class_name="AutoModelForCausalLM", dataset_path="texts", streaming=False, is_dataset_tokenized=False,
        context_size=CONTEXT, n_batches_in_buffer=BUFFER // (8 * CONTEXT), store_batch_size_prompts=8,
        training_tokens=steps * ROWS, train_batch_size_tokens=ROWS, lr=1e-3, autocast=half, autocast_lm=half,
        logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=None, verbose=False, device="cpu",
    )  # fmt: skip
    dataset = Dataset.from_list([{"text": text} for text in texts()])
    return LanguageModelSAETrainingRunner(
        config, override_dataset=dataset, override_model=HookedProxyLM(model.module, model.tokenizer, [hook])
    )


def same_activations(model: vs.Model) -> float:
    """Largest difference of what both read from the model, over its range."""
    store = runner(1, False, model).activations_store
    tokens = store.get_batch_tokens()
    theirs = store.get_activations(tokens).reshape(*tokens.shape, -1)
    run = model.run(vs.Tokens(tokens), capture=[f"layers.{LAYER}.resid_post"])
    mine = run.activations[f"layers.{LAYER}.resid_post"]
    return float((mine - theirs).abs().max() / theirs.abs().max())


def spent(name: str) -> float:
    """Processor seconds per 1,000 tokens, this process."""
    who, half = WAYS[name]
    torch.set_num_threads(2)
    settle()
    model = vs.load("smollm2-135m-instruct")
    train = partial(ours, half=half, model=model) if who == "vesalius" else None
    seconds = []
    for steps in (FEW, FEW, MORE):
        run = partial(train, steps) if train else runner(steps, half, model).run
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return (seconds[2] - seconds[1]) / ((MORE - FEW) * ROWS) * 1000


def section(rounds: int) -> str:
    """The section of RESULTS.md."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        names = list(WAYS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            command = [sys.executable, __file__, name]
            printed = subprocess.run(command, capture_output=True, text=True)
            if printed.returncode:
                raise SystemExit(printed.stderr)
            found[name].append(float(printed.stdout.split()[-1]))
            print(name, found[name], file=sys.stderr, flush=True)
    difference = float(subprocess.run([sys.executable, __file__, "same"], capture_output=True, text=True, check=True)
                       .stdout.split()[-1])  # fmt: skip
    return f"{_HEAD.format(rounds=rounds, machine=measure.machine(), difference=difference)}\n\n{_table(found)}"


_HEAD = """### From text to dictionary

{machine}; {rounds} rounds. SmolLM2, layer 15, TopK, 8192 latents, k 32, contexts of 256 tokens: processor seconds for
1,000 tokens once the buffers are full, model and training together. bf16: the model in bfloat16 and the screened
encoder. Largest difference of the activations that both read, over their range: {difference:.1e}."""


def _table(found: dict[str, list[float]]) -> str:
    lines = [
        "| way | CPU-s for 1,000 tokens | SAELens over it | SAELens, autocast over it |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, mine in found.items():
        ratios = [
            statistics.median(theirs / own for theirs, own in zip(found[peer], mine, strict=True))
            for peer in ("SAELens", "SAELens, autocast")
        ]
        lines.append(f"| {name} | {statistics.median(mine):.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1] == "same":
        print(same_activations(vs.load("smollm2-135m-instruct")))
    else:
        print(spent(sys.argv[1]))
