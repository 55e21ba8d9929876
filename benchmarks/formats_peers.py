"""The other libraries as `formats.py` uses them: dictionaries they made and saved, files of ours that they open."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

D, M, OUT, K, LAYERS = 16, 48, 12, 5, 3


@dataclass(frozen=True)
class Peer:
    """One dictionary of another library: its latents [row, latent] and what it reconstructs [row, d_out]."""

    encode: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with random parameters; thresholds above zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.5)
                tensor.copy_(tensor.abs() if "threshold" in name else tensor)
    return module


# SAELens


def saelens_cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> architecture and what its config differs in."""
    z = {"reshape_activations": "hook_z"}
    cases = {name: (name, {}) for name in ("standard", "gated", "jumprelu")}
    cases["topk"] = ("topk", {"k": K})
    cases["topk, rescaled by decoder norm"] = ("topk", {"k": K, "rescale_acts_by_decoder_norm": True})
    cases["standard, b_dec not on inputs"] = ("standard", {"apply_b_dec_to_input": False})
    cases["standard, layer_norm"] = ("standard", {"normalize_activations": "layer_norm"})
    cases["topk, constant_norm_rescale"] = ("topk", {"k": K, "normalize_activations": "constant_norm_rescale"})
    cases["standard, hook_z"] = ("standard", z)
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        cases[name] = (name, {"d_out": OUT, "apply_b_dec_to_input": False})
    return cases


def saelens_made(architecture: str, changes: dict[str, Any], folder: Path) -> Peer:
    """A SAELens dictionary, saved by it."""
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    kind, config = get_sae_class(architecture)
    hook = "attn.hook_z" if "reshape_activations" in changes else "hook_resid_post"
    metadata = SAEMetadata(hook_name=f"blocks.3.{hook}", hook_name_out="blocks.3.hook_mlp_out", model_name="gpt2")
    sae = filled(kind(config(d_in=D, d_sae=M, metadata=metadata, **changes)))
    sae.save_model(folder)
    return saelens_peer(sae)


def saelens_trained(architecture: str, changes: dict[str, Any], folder: Path) -> Peer:
    """A SAELens training dictionary, exported by it for inference and opened again."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    kind, config = get_sae_training_class(architecture)
    sae = filled(kind(config(d_in=D, d_sae=M, metadata=SAEMetadata(hook_name="blocks.3.hook_resid_post"), **changes)))
    sae.save_inference_model(folder)
    return saelens_opened(folder)


def saelens_opened(folder: Path) -> Peer:
    """A folder, opened by SAELens."""
    from sae_lens import SAE

    return saelens_peer(SAE.load_from_disk(folder))


def saelens_peer(sae: Any) -> Peer:
    heads = sae.cfg.reshape_activations == "hook_z"
    shaped = (lambda x: x.reshape(len(x), 4, -1)) if heads else (lambda x: x)

    def reconstruct(x: Tensor) -> Tensor:
        return sae(shaped(x)).flatten(1)

    def encode(x: Tensor) -> Tensor:
        return sae.encode(shaped(x))

    return Peer(torch.no_grad()(encode), torch.no_grad()(reconstruct))


def saelens_gemma_scope(folder: Path) -> Peer:
    """A folder of Gemma Scope, opened by SAELens' converter, which is given the file instead of a download."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    with patch.object(loaders, "hf_hub_download", lambda *_, filename, **__: str(folder / filename)):
        config, state, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", folder.name, cfg_overrides={"d_in": D, "d_sae": M}
        )
    return saelens_converted(config, state)


def saelens_gemma_scope_2(folder: Path) -> Peer:
    """The same of Gemma Scope 2."""
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors.torch import load_file

    named = json.loads((folder / "config.json").read_text()) | {"model_name": "gemma-v3-1b-pt"}
    (folder / "config.json").write_text(json.dumps(named))
    shapes = {name: list(tensor.shape) for name, tensor in load_file(folder / "params.safetensors").items()}
    # It asks for config.json with the folder before its name, and for the weights with the folder beside it.
    with (
        patch.object(loaders, "hf_hub_download", lambda *a, **k: str(folder / Path(k.get("filename") or a[1]).name)),
        patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
    ):
        config, state, _ = loaders.gemma_3_sae_huggingface_loader("google/x", f"resid_post/{folder.name}")
    return saelens_converted(config, state)


def saelens_converted(config: dict[str, Any], state: dict[str, Tensor]) -> Peer:
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
    from sae_lens.registry import get_sae_class

    known = handle_config_defaulting(config)
    kind, settings = get_sae_class(known["architecture"])
    sae = kind(settings.from_dict(known))
    sae.load_state_dict(state)
    return saelens_peer(sae)


# sparsify


def sparsify_made(changes: dict[str, Any], folder: Path) -> Peer:
    """A coder of sparsify, saved by it."""
    from sparsify import SparseCoder, SparseCoderConfig

    k = 4 if "activation" in changes else K  # groupmax needs groups of one size
    coder = filled(SparseCoder(D, SparseCoderConfig(num_latents=M, k=k, **changes)))
    coder.save_to_disk(folder)
    return sparsify_peer(coder)


def sparsify_opened(folder: Path) -> Peer:
    from sparsify import SparseCoder

    return sparsify_peer(SparseCoder.load_from_disk(folder))


def sparsify_peer(coder: Any) -> Peer:
    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return torch.zeros(len(x), M).scatter(1, found.top_indices, found.top_acts)

    return Peer(torch.no_grad()(encode), torch.no_grad()(lambda x: coder(x).sae_out))


# dictionary_learning: its classes, without the package's own __init__, which wants an old nnsight


def dictionary_learning_classes() -> dict[str, Any]:
    if "dictionary_learning" not in sys.modules:
        found = importlib.util.find_spec("dictionary_learning")
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["dictionary_learning"] = package
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {
        "AutoEncoder": dictionary.AutoEncoder, "AutoEncoderNew": dictionary.AutoEncoderNew,
        "GatedAutoEncoder": dictionary.GatedAutoEncoder, "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder,
        "AutoEncoderTopK": top_k.AutoEncoderTopK, "BatchTopKSAE": batch_top_k.BatchTopKSAE,
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    }  # fmt: skip


def dictionary_learning_made(name: str, folder: Path) -> Peer:
    """A dictionary, saved and opened as the library does."""
    kind = dictionary_learning_classes()[name]
    more = {"AutoEncoderTopK": [K], "BatchTopKSAE": [K], "MatryoshkaBatchTopKSAE": [K, [8, 16, M - 24]]}
    folder.mkdir(parents=True)
    torch.save(filled(kind(D, M, *more.get(name, []))).state_dict(), folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "EleutherAI/pythia-70m",
               "submodule_name": "resid_post_layer_3"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    opened = kind.from_pretrained(folder / "ae.pt")
    return Peer(torch.no_grad()(opened.encode), torch.no_grad()(opened))


# circuit-tracer, which also opens Gemma Scope


def circuit_tracer_made(activation: str, skip: bool, folder: Path) -> Peer:
    """A transcoder of layer 3, saved by circuit-tracer."""
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    function = torch.nn.functional.relu if activation == "relu" else JumpReLU(torch.zeros(M))
    made = filled(SingleLayerTranscoder(D, M, function, 3, skip_connection=skip, dtype=torch.float32))
    folder.mkdir(parents=True)
    made.to_safetensors(str(folder / "layer_3.safetensors"))
    (folder / "config.yaml").write_text(
        "model_name: gpt2\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\n"
    )
    return circuit_tracer_peer(made)


def circuit_tracer_opened(folder: Path) -> Peer:
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    return circuit_tracer_peer(load_relu_transcoder(str(folder / "layer_3.safetensors"), 3))


def gemma_scope_opened(folder: Path) -> Peer:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    return circuit_tracer_peer(load_gemma_scope_transcoder(str(folder / "params.npz"), 3))


def gemma_scope_2_opened(folder: Path) -> Peer:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_2_transcoder

    return circuit_tracer_peer(load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 3))


def circuit_tracer_peer(transcoder: Any) -> Peer:
    return Peer(torch.no_grad()(transcoder.encode), torch.no_grad()(transcoder))


def cross_layer_made(activation: str, folder: Path) -> Peer:
    """A cross-layer transcoder, saved by circuit-tracer. Its rows are [row, layer * d]."""
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    made = CrossLayerTranscoder(LAYERS, M, D, activation_function=activation, lazy_decoder=False, dtype=torch.float32)
    filled(made).to_safetensors(str(folder))
    return cross_layer_opened(folder)


def cross_layer_opened(folder: Path) -> Peer:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    clt = load_clt(str(folder), dtype=torch.float32)
    stacked = lambda x: x.reshape(len(x), LAYERS, D).transpose(0, 1)  # noqa: E731

    def encode(x: Tensor) -> Tensor:
        return clt.encode(stacked(x)).transpose(0, 1).flatten(1)

    return Peer(torch.no_grad()(encode), torch.no_grad()(lambda x: clt(stacked(x)).transpose(0, 1).flatten(1)))
