"""Training steps of other libraries, each with its own defaults, on batches that they are handed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LR = 1e-3


@dataclass(frozen=True)
class Trainee:
    """A dictionary in training. step(x): one optimiser step. rebuilt(x): what it makes of rows now."""

    step: Callable[[Tensor], None]
    rebuilt: Callable[[Tensor], Tensor]


def saelens(kind: str, d: int, m: int, k: int, prefixes: tuple[int, ...]) -> Trainee:
    """SAELens: the step of its `SAETrainer`, statistics and clipping included."""
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    made = {
        "topk": ("TopK", {"k": k}), "batchtopk": ("BatchTopK", {"k": k}), "jumprelu": ("JumpReLU", {}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": k, "matryoshka_widths": list(prefixes)}),
        "relu": ("Standard", {}), "gated": ("Gated", {}),
    }  # fmt: skip
    name, changes = made[kind]
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d, d_sae=m, **changes)
    )
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.9, 0.999))
    coefficients = {name: value.value for name, value in sae.get_coefficients().items()}
    silent, active = torch.zeros(m), torch.zeros(m)

    def step(x: Tensor) -> None:
        sae.train()
        given = TrainStepInput(
            sae_in=x, dead_neuron_mask=silent > 1000, coefficients=coefficients, n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        out = sae.training_forward_pass(step_input=given)
        with torch.no_grad():
            fired = out.feature_acts.bool().float()
            did_fire = fired.sum(-2).bool()
            silent.add_(1)
            silent[did_fire] = 0
            active.add_(fired.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return Trainee(step, lambda x: sae(x).detach())


def sparsify(_kind: str, d: int, m: int, k: int, _prefixes: tuple[int, ...]) -> Trainee:
    """EleutherAI's sparsify, with Adam instead of its signum."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return Trainee(step, lambda x: coder(x).sae_out.detach())


def dictionary_learning(kind: str, d: int, m: int, k: int, prefixes: tuple[int, ...]) -> Trainee:
    """dictionary_learning's own trainers. Its buffers of activations, which need nnsight, are not used."""
    for absent in ("nnsight", "wandb"):
        module = types.ModuleType(absent)
        module.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules.setdefault(absent, module)
    from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, top_k

    common: dict[str, Any] = {
        "steps": 100_000, "activation_dim": d, "dict_size": m, "layer": 0, "lm_name": "none", "device": "cpu",
        "lr": LR, "warmup_steps": 1,
    }  # fmt: skip
    shares = [(end - start) / m for start, end in zip((0, *prefixes), prefixes, strict=False)]
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (top_k.TopKTrainer, {"k": k}), "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": k}),
        "matryoshka": (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, {"k": k, "group_fractions": shares}),
        "jumprelu": (jumprelu.JumpReluTrainer, {}),
    }  # fmt: skip
    trainer_of, changes = made[kind]
    trainer, count = trainer_of(**common, **changes), [1]  # step 0 finds a geometric median, once

    def step(x: Tensor) -> None:
        trainer.update(count[0], x)
        count[0] += 1

    return Trainee(step, lambda x: trainer.ae(x).detach())


PEERS = {"SAELens": saelens, "sparsify": sparsify, "dictionary_learning": dictionary_learning}
KNOWN = {
    "SAELens": {"topk", "batchtopk", "jumprelu", "matryoshka", "relu", "gated"},
    "sparsify": {"topk"},
    "dictionary_learning": {"topk", "batchtopk", "jumprelu", "matryoshka"},
}
