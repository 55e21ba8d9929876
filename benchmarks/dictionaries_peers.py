"""Training steps of other libraries, from weights and on batches that they are handed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

LR = 1e-3


@dataclass(frozen=True)
class Asked:
    """What everyone is to do. encoder, decoder: [latent, d], rows; bias: [d] the decoder's. prefixes: matryoshka's.
    sparsity, threshold, bandwidth: of penalised kinds, in the units of a loss summed over d and averaged over rows.
    """

    kind: str
    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    k: int
    prefixes: tuple[int, ...]
    sparsity: float
    threshold: float
    bandwidth: float


@dataclass(frozen=True)
class Trainee:
    """A dictionary in training. step(x): one optimiser step. left(x): share of the variance of rows that it leaves
    unexplained as it is, with latents chosen as in training."""

    step: Callable[[Tensor], object]
    left: Callable[[Tensor], float]


def unexplained(x: Tensor, reconstruction: Tensor) -> float:
    return float((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum())


def saelens(asked: Asked, fastest: bool = False, autocast: bool = False) -> Trainee:
    """SAELens: the step of its `SAETrainer`, statistics and clipping included. fastest: its sparse TopK, which needs
    its rescaling by decoder norms off."""
    import sae_lens
    from sae_lens.saes.sae import TrainStepInput

    by_k = {
        "k": asked.k,
        **({"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False} if fastest else {}),
    }
    by_l1 = {"l1_coefficient": asked.sparsity}
    jump = {
        "jumprelu_init_threshold": asked.threshold, "jumprelu_bandwidth": asked.bandwidth,
        "l0_coefficient": asked.sparsity,
    }  # fmt: skip
    made = {
        "topk": ("TopK", by_k), "batchtopk": ("BatchTopK", by_k), "jumprelu": ("JumpReLU", jump),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": asked.k, "matryoshka_widths": list(asked.prefixes)}),
        "relu": ("Standard", by_l1), "gated": ("Gated", by_l1),
    }  # fmt: skip
    name, changes = made[asked.kind]
    m, d = asked.encoder.shape
    sae = getattr(sae_lens, f"{name}TrainingSAE")(
        getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d, d_sae=m, **changes)
    )
    for held, given in ((sae.W_enc, asked.encoder.T), (sae.W_dec, asked.decoder), (sae.b_dec, asked.bias)):
        held.data.copy_(given)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.9, 0.999))
    coefficients = {name: value.value for name, value in sae.get_coefficients().items()}
    silent, active = torch.zeros(m), torch.zeros(m)

    def forward(x: Tensor) -> Any:
        given = TrainStepInput(
            sae_in=x, dead_neuron_mask=silent > 1000, coefficients=coefficients, n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return sae.training_forward_pass(step_input=given)

    def step(x: Tensor) -> None:
        sae.train()
        out = forward(x)
        with torch.no_grad():
            codes = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
            fired = codes.bool().float()
            did_fire = fired.sum(-2).bool()
            silent.add_(1)
            silent[did_fire] = 0
            active.add_(fired.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def left(x: Tensor) -> float:
        return unexplained(x, forward(x).sae_out)

    return Trainee(step, left)


def sparsify(asked: Asked) -> Trainee:
    """EleutherAI's sparsify, with Adam instead of its signum."""
    from sparsify import SparseCoder, SparseCoderConfig

    m, d = asked.encoder.shape
    coder = SparseCoder(d, SparseCoderConfig(num_latents=m, k=asked.k))
    for held, given in ((coder.encoder.weight, asked.encoder), (coder.W_dec, asked.decoder), (coder.b_dec, asked.bias)):
        held.data.copy_(given)
    optimiser = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return Trainee(step, lambda x: unexplained(x, coder(x).sae_out.detach()))


def dictionary_learning(asked: Asked) -> Trainee:
    """dictionary_learning's own trainers. Its buffers of activations, which need nnsight, are not used."""
    for absent in ("nnsight", "wandb"):
        module = types.ModuleType(absent)
        module.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules.setdefault(absent, module)
    from dictionary_learning.trainers import batch_top_k, jumprelu, matryoshka_batch_top_k, top_k

    m, d = asked.encoder.shape
    common: dict[str, Any] = {
        "steps": 100_000, "activation_dim": d, "dict_size": m, "layer": 0, "lm_name": "none", "device": "cpu",
        "lr": LR, "warmup_steps": 1,
    }  # fmt: skip
    shares = [(end - start) / m for start, end in zip((0, *asked.prefixes), asked.prefixes, strict=False)]
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "topk": (top_k.TopKTrainer, {"k": asked.k}), "batchtopk": (batch_top_k.BatchTopKTrainer, {"k": asked.k}),
        "matryoshka": (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, {"k": asked.k, "group_fractions": shares}),
        "jumprelu": (jumprelu.JumpReluTrainer, {"bandwidth": asked.bandwidth, "target_l0": 2.0 * asked.k}),
    }  # fmt: skip
    trainer_of, changes = made[asked.kind]
    trainer, count = trainer_of(**common, **changes), [1]  # step 0 finds a geometric median, once
    ae = trainer.ae
    stored = (
        ((ae.W_enc, asked.encoder.T), (ae.W_dec, asked.decoder), (ae.b_dec, asked.bias))
        if hasattr(ae, "W_enc")
        else ((ae.encoder.weight, asked.encoder), (ae.decoder.weight, asked.decoder.T), (ae.b_dec, asked.bias))
    )
    for held, given in stored:
        held.data.copy_(given)
    if asked.kind == "jumprelu":
        ae.threshold.data.fill_(asked.threshold)

    def step(x: Tensor) -> None:
        trainer.update(count[0], x)
        count[0] += 1

    @torch.no_grad()
    def left(x: Tensor) -> float:
        codes = ae.encode(x) if asked.kind == "jumprelu" else ae.encode(x, use_threshold=False)
        return unexplained(x, ae.decode(codes))

    return Trainee(step, left)


PEERS: dict[str, Callable[[Asked], Trainee]] = {
    "SAELens": saelens,
    "SAELens, sparse": partial(saelens, fastest=True),
    "SAELens, autocast": partial(saelens, autocast=True),
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}
FLAVOURS = {
    "SAELens": {"topk", "batchtopk", "jumprelu", "matryoshka", "relu", "gated"},
    "SAELens, sparse": {"topk"},
    "SAELens, autocast": {"topk"},
    "sparsify": {"topk"},
    "dictionary_learning": {"topk", "batchtopk", "jumprelu", "matryoshka"},
}
