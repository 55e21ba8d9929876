"""delphi's latent cache and sae-dashboard's runner, given our model and our dictionary."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from torch import Tensor

import vesalius as vs
from vesalius.dictionaries import Dictionary

# delphi imports these for parts that are not used here.
for _name in ("faiss", "sentence_transformers"):
    if _name not in sys.modules:
        _module = types.ModuleType(_name)
        _module.__spec__ = ModuleSpec(_name, None)
        _module.SentenceTransformer = object  # type: ignore[attr-defined]
        sys.modules[_name] = _module

from delphi.latents.cache import LatentCache
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import TopKSAE, TopKSAEConfig
from transformer_lens.model_bridge import TransformerBridge

BATCH = 8
SPLITS = 5


def delphi(model: vs.Model, dictionary: Dictionary, layer: int) -> Callable[[Tensor, Path], Tensor]:
    """ids, folder -> how often each latent fires, over all positions but each text's first."""
    encoder, k = dictionary.encoders[0], dictionary.k

    def encode(x: Tensor) -> Tensor:
        """As delphi's loader of TopK dictionaries does it: densely, with zeros."""
        pre = torch.relu(x @ encoder)
        values, indices = pre.topk(k or 0, dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def run(ids: Tensor, folder: Path) -> Tensor:
        folder.mkdir(parents=True)
        name = f"model.layers.{layer}"
        cache = LatentCache(model.module, {name: encode}, batch_size=BATCH)
        cache.run(ids.numel(), ids)
        cache.save_splits(SPLITS, folder)
        place = cache.cache.latent_locations[name]
        shutil.rmtree(folder)
        inside = place[place[:, 1] > 0]
        counts = torch.bincount(inside[:, 2].long(), minlength=encoder.shape[1])
        return counts.double() / (ids.shape[0] // BATCH * BATCH * (ids.shape[1] - 1))

    return run


def dashboard(
    model: vs.Model, dictionary: Dictionary, layer: int, cache: Path
) -> Callable[[Tensor, Sequence[int]], Tensor | None]:
    """ids, latents -> nothing to compare: its pages' statistics are rounded. cache: of the model's activations."""
    net = TransformerBridge.boot_transformers(
        "HuggingFaceTB/SmolLM2-135M-Instruct", hf_model=model.module, tokenizer=model.tokenizer
    )
    width, latents = dictionary.encoders[0].shape
    config = TopKSAEConfig(
        d_in=width, d_sae=latents, k=dictionary.k, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=True
    )
    sae = TopKSAE(config)
    sae.W_enc.data, sae.W_dec.data = dictionary.encoders[0].clone(), dictionary.decoders[0].clone()
    hook = (
        f"blocks.{layer}.hook_resid_post"
        if f"blocks.{layer}.hook_resid_post" in net.hook_dict
        else f"blocks.{layer}.hook_out"
    )
    sae.cfg.metadata.hook_name = hook

    def run(ids: Tensor, some: Sequence[int]) -> Tensor | None:
        asked = SaeVisConfig(hook_point=hook, features=list(some), minibatch_size_tokens=BATCH, cache_dir=cache)
        SaeVisRunner(asked).run(encoder=sae, model=net, tokens=ids)
        return None

    return run
