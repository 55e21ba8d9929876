"""Files of dictionaries as other libraries write them, written by hand from the formats' descriptions, and what the
libraries compute with them, written out plainly: an implementation that shares nothing with the one under test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, M, OUT, K, N = 6, 20, 4, 3, 40


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(width: int = D) -> Tensor:
    return normal(N, width, seed=77) * 2


def largest(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, the negative of them as zero."""
    kth = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(pre >= kth, pre, torch.zeros(())).clamp(min=0)


def over(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre > threshold, pre, torch.zeros(())).clamp(min=0)


@dataclass(frozen=True)
class Written:
    """A folder or file, and what the library that it is of computes with it."""

    path: Path
    encode: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    options: dict[str, Any]


def _written(
    path: Path, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], **options: Any
) -> Written:
    return Written(path, encode, lambda x: decode(encode(x)), options)


# SAELens


def saelens(folder: Path, architecture: str = "standard", *, old: bool = False, **changes: Any) -> Written:
    """cfg.json and sae_weights.safetensors. changes: fields of the config."""
    transcodes, skips = "transcoder" in architecture, "skip" in architecture
    to = OUT if transcodes else D
    w = {
        "W_enc": normal(D, M, seed=1),
        "b_enc": normal(M, seed=2),
        "W_dec": normal(M, to, seed=3),
        "b_dec": normal(to, seed=4),
    }
    if architecture == "gated":
        del w["b_enc"]
        w |= {"b_gate": normal(M, seed=5), "b_mag": normal(M, seed=6), "r_mag": normal(M, seed=7)}
    if "jumprelu" in architecture:
        w["threshold"] = normal(M, seed=8).abs()
    if skips:
        w["W_skip"] = normal(to, D, seed=9)
    cfg = {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": not transcodes, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small",
                     "hook_name_out": "blocks.3.hook_mlp_out"},
    }  # fmt: skip
    if architecture == "topk":
        cfg["k"] = K
    cfg |= changes
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(_as_old(cfg) if old else cfg))
    return _saelens_computes(folder, w, cfg)


def _as_old(cfg: dict[str, Any]) -> dict[str, Any]:
    """The same as versions before 6 wrote it, with the names of version 1."""
    dropped = ("metadata", "architecture", "k", "reshape_activations")
    old = {name: value for name, value in cfg.items() if name not in dropped}
    old |= {"hook_point": "blocks.3.hook_resid_post", "hook_point_head_index": None, "model_name": "gpt2-small",
            "normalize_activations": False, "activation_fn_str": "relu", "prepend_bos": True}  # fmt: skip
    if cfg["architecture"] == "topk":
        return old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": cfg["k"]}}
    return old | {"architecture": cfg["architecture"]}


def _saelens_computes(folder: Path, w: dict[str, Tensor], cfg: dict[str, Any]) -> Written:
    architecture, norm = cfg["architecture"], cfg["normalize_activations"]
    norms = w["W_dec"].norm(dim=1) if cfg.get("rescale_acts_by_decoder_norm") else torch.ones(M)
    is_centred = ((cfg.get("metadata") or {}).get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")

    def undo(x: Tensor) -> tuple[Tensor, Tensor | float]:
        if is_centred:
            return torch.ones(len(x), 1), x.mean(1, keepdim=True)
        if norm == "layer_norm":
            centred = x - x.mean(1, keepdim=True)
            return centred.std(1, keepdim=True), x.mean(1, keepdim=True)
        return (
            (x.norm(dim=1, keepdim=True) / D**0.5, 0.0)
            if norm == "constant_norm_rescale"
            else (torch.ones(len(x), 1), 0.0)
        )

    def encode(x: Tensor) -> Tensor:
        size, centre = undo(x)
        seen = (x - centre) / (size + 1e-5 if norm == "layer_norm" else size)
        seen = seen - w["b_dec"] if cfg["apply_b_dec_to_input"] else seen
        if architecture == "gated":
            magnitude = (seen @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
            return magnitude * (seen @ w["W_enc"] + w["b_gate"] > 0)
        pre = (seen @ w["W_enc"] + w["b_enc"]) * norms
        if architecture == "topk":
            return largest(pre, cfg["k"])
        return over(pre, w.get("threshold", torch.zeros(M)))

    def reconstruct(x: Tensor) -> Tensor:
        size, centre = undo(x)
        skipped = x @ w["W_skip"].T if "W_skip" in w else 0.0
        return (encode(x) / norms @ w["W_dec"] + w["b_dec"]) * size + centre + skipped

    return Written(folder, encode, reconstruct, {})


# sparsify


def sparsify(folder: Path, **changes: Any) -> Written:
    """cfg.json and sae.safetensors."""
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": M, "k": K,
           "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D, **changes}  # fmt: skip
    w = {"encoder.weight": normal(M, D, seed=1), "encoder.bias": normal(M, seed=2), "W_dec": normal(M, D, seed=3),
         "b_dec": normal(D, seed=4)}  # fmt: skip
    if cfg["skip_connection"]:
        w["W_skip"] = normal(D, D, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))

    def encode(x: Tensor) -> Tensor:
        seen = x if cfg["transcode"] else x - w["b_dec"]
        return largest(seen @ w["encoder.weight"].T + w["encoder.bias"], K)

    skip = w.get("W_skip", torch.zeros(D, D))
    return Written(folder, encode, lambda x: encode(x) @ w["W_dec"] + w["b_dec"] + x @ skip.T, {})


# dictionary_learning


def dictionary_learning(folder: Path, name: str) -> Written:
    """ae.pt and config.json."""
    linear = {
        "encoder.weight": normal(M, D, seed=1),
        "encoder.bias": normal(M, seed=2),
        "decoder.weight": normal(D, M, seed=3),
    }
    matrices = {
        "W_enc": normal(D, M, seed=1),
        "b_enc": normal(M, seed=2),
        "W_dec": normal(M, D, seed=3),
        "b_dec": normal(D, seed=4),
    }
    bias, one = normal(D, seed=4), torch.tensor(0.7)
    vectors = {name: normal(M, seed=seed) for name, seed in (("r_mag", 5), ("gate_bias", 6), ("mag_bias", 7))}
    gated = {key: t for key, t in linear.items() if key != "encoder.bias"} | {"decoder_bias": bias, **vectors}
    k = torch.tensor(K, dtype=torch.int32)
    states: dict[str, dict[str, Tensor]] = {
        "AutoEncoder": {**linear, "bias": bias}, "AutoEncoderNew": {**linear, "decoder.bias": bias},
        "GatedAutoEncoder": gated, "AutoEncoderTopK": {**linear, "b_dec": bias, "k": k, "threshold": one},
        "BatchTopKSAE": {**linear, "b_dec": bias, "k": k, "threshold": one},
        "JumpReluAutoEncoder": {**matrices, "threshold": normal(M, seed=8).abs()},
        "MatryoshkaBatchTopKSAE": {**matrices, "k": k, "threshold": one, "group_sizes": torch.tensor([5, 5, 10])},
    }  # fmt: skip
    state = states[name]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    trainer = {
        "dict_class": name,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": "resid_post_layer_3",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return _dictionary_learning_computes(folder, name, state)


def _dictionary_learning_computes(folder: Path, name: str, s: dict[str, Tensor]) -> Written:
    encoder = s["W_enc"] if "W_enc" in s else s["encoder.weight"].T
    decoder = s["W_dec"] if "W_dec" in s else s["decoder.weight"].T
    bias = next(s[key] for key in ("bias", "b_dec", "decoder_bias", "decoder.bias") if key in s)
    subtracts = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    norms = decoder.norm(dim=1) if name == "AutoEncoder" else torch.ones(M)  # as its loader normalises

    def encode(x: Tensor) -> Tensor:
        shared = (x - bias if subtracts else x) @ encoder
        if name == "GatedAutoEncoder":
            return (s["r_mag"].exp() * shared + s["mag_bias"]).relu() * (shared + s["gate_bias"] > 0)
        pre = shared + (s["b_enc"] if "b_enc" in s else s["encoder.bias"])
        if name == "AutoEncoderTopK":
            return largest(pre, K)
        return over(pre, s.get("threshold", torch.zeros(())) if name != "AutoEncoderTopK" else 0.0) * norms

    return _written(folder, encode, lambda f: (f / norms) @ decoder + bias, unpickle=True)


def normalised_sae(folder: Path) -> Written:
    """ae.pt of a BatchTopKSAE of science-of-finetuning's branch, whose inputs are centred and scaled."""
    written = dictionary_learning(folder, "BatchTopKSAE")
    mean, std = normal(D, seed=5), normal(D, seed=6).abs() + 0.5
    scale = 2 / std.square().sum().sqrt()
    state = torch.load(folder / "ae.pt") | {
        "activation_mean": mean,
        "activation_std": std,
        "activation_global_scale": scale,
        "target_rms": torch.tensor(2.0),
    }
    torch.save(state, folder / "ae.pt")

    def encode(x: Tensor) -> Tensor:
        return written.encode((x - mean) * scale)

    return Written(folder, encode, lambda x: written.reconstruct((x - mean) * scale) / scale + mean, {"unpickle": True})


# crosscoder_learning


def crosscoder(
    folder: Path, *, code: int = 1, batchtopk: bool = True, normalised: bool = False, **config: Any
) -> Written:
    """model.safetensors and config.json of a crosscoder of two sites; rows are [row, 2 * D]."""
    w = {"encoder.weight": normal(2, D, M, seed=1), "encoder.bias": normal(M, seed=2),
         "decoder.weight": normal(2, M, D, seed=3), "decoder.bias": normal(2, D, seed=4),
         "code_normalization_id": torch.tensor(code),
         "target_rms": torch.tensor(1.0),
         "activation_mean": torch.full((2, D), torch.nan), "activation_std": torch.full((2, D), torch.nan),
         "activation_global_scale": torch.ones(2)}  # fmt: skip
    if batchtopk:
        w |= {"threshold": torch.tensor(4.0), "k": torch.tensor(K, dtype=torch.int32)}
    if normalised:
        w |= {"activation_mean": normal(2, D, seed=5), "activation_std": normal(2, D, seed=6).abs() + 0.5}
        w["activation_global_scale"] = 1 / w["activation_std"].square().sum(1).sqrt()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"activation_dim": D, "dict_size": M, "num_layers": 2, **config}))
    mean = torch.nan_to_num(w["activation_mean"])
    scale = w["activation_global_scale"][:, None]
    each = w["decoder.weight"].norm(dim=2)
    together = w["decoder.weight"].norm(dim=(0, 2))
    alphas = [config.get(f"code_normalization_alpha_{of}", default) for of, default in (("sae", 1.0), ("cc", 0.1))]
    mixed = alphas[0] * together + alphas[1] * each.sum(0)
    weight = {1: each.sum(0), 2: together, 3: mixed, 4: torch.ones(M)}.get(code, torch.ones(M))

    def encode(x: Tensor) -> Tensor:
        seen = (x.reshape(-1, 2, D) - mean) * scale
        f = (torch.einsum("bld,ldf->bf", seen, w["encoder.weight"]) + w["encoder.bias"]).relu()
        return torch.where(f * weight > w["threshold"], f, torch.zeros(())) if batchtopk else f

    def decode(f: Tensor) -> Tensor:
        return ((torch.einsum("bf,lfd->bld", f, w["decoder.weight"]) + w["decoder.bias"]) / scale + mean).flatten(1)

    return _written(folder, encode, decode)


# Gemma Scope


def gemma_scope(folder: Path, lower: bool = False) -> Written:
    """params.npz."""
    w = {"W_enc": normal(D, M, seed=1), "b_enc": normal(M, seed=2), "W_dec": normal(M, D, seed=3),
         "b_dec": normal(D, seed=4), "threshold": normal(M, seed=8).abs()}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    named = {name.replace("W_", "w_") if lower else name: tensor.numpy() for name, tensor in w.items()}
    np.savez(folder / "params.npz", **named)
    return _written(
        folder, lambda x: over(x @ w["W_enc"] + w["b_enc"], w["threshold"]), lambda f: f @ w["W_dec"] + w["b_dec"]
    )


def gemma_scope_2(folder: Path, *, skip: bool = False, config: dict[str, Any] | None = None) -> Written:
    """params.safetensors and, when config is given, config.json."""
    w = {"w_enc": normal(D, M, seed=1), "b_enc": normal(M, seed=2), "w_dec": normal(M, D, seed=3),
         "b_dec": normal(D, seed=4), "threshold": normal(M, seed=8).abs()}  # fmt: skip
    if skip:
        w["affine_skip_connection"] = normal(D, D, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    affine = w.get("affine_skip_connection", torch.zeros(D, D))

    def encode(x: Tensor) -> Tensor:
        return over(x @ w["w_enc"] + w["b_enc"], w["threshold"])

    return Written(folder, encode, lambda x: encode(x) @ w["w_dec"] + w["b_dec"] + x @ affine, {})


# circuit-tracer


HOOKS = 'model_name: gpt2  # the small one\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: "hook_mlp_out"\n'


def circuit_tracer(folder: Path, activation: str = "relu", *, skip: bool = False, layer: int = 3) -> Written:
    """layer_<n>.safetensors and config.yaml."""
    w = {
        "W_enc": normal(M, D, seed=layer),
        "b_enc": normal(M, seed=2),
        "W_dec": normal(M, D, seed=3),
        "b_dec": normal(D, seed=4),
    }
    if activation == "jumprelu":
        w["activation_function.threshold"] = normal(M, seed=8).abs()
    if skip:
        w["W_skip"] = normal(D, D, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(w, folder / f"layer_{layer}.safetensors")
    topk = f"activation: topk\nk: {K}\n" if activation == "topk" else ""
    (folder / "config.yaml").write_text(HOOKS + "model_kind: transcoder_set\n" + topk)
    threshold = w.get("activation_function.threshold", torch.zeros(M))
    affine = w.get("W_skip", torch.zeros(D, D))

    def encode(x: Tensor) -> Tensor:
        pre = x @ w["W_enc"].T + w["b_enc"]
        return largest(pre, K) if activation == "topk" else over(pre, threshold)

    return Written(folder, encode, lambda x: encode(x) @ w["W_dec"] + w["b_dec"] + x @ affine.T, {})


LAYERS = 3


def cross_layer(
    folder: Path, style: str = "circuit_tracer", *, jumprelu: bool = True, dtype: torch.dtype = torch.float32
) -> Written:
    """A cross-layer transcoder of three layers as circuit-tracer or Gemma Scope 2 has it; rows are [row, 3 * D]."""
    encoders = [normal(M, D, seed=10 + n).to(dtype) for n in range(LAYERS)]
    decoders = [normal(M, LAYERS - n, D, seed=20 + n).to(dtype) for n in range(LAYERS)]
    b_enc, b_dec = normal(LAYERS, M, seed=2).to(dtype), normal(LAYERS, D, seed=4).to(dtype)
    threshold = normal(LAYERS, M, seed=8).abs().to(dtype) if jumprelu else torch.zeros(LAYERS, M)
    skips = normal(LAYERS, D, D, seed=5) if style == "gemma_scope_2" else torch.zeros(LAYERS, D, D)
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(LAYERS):
        if style == "gemma_scope_2":
            padded = torch.cat([torch.zeros(M, n, D), decoders[n]], 1)
            own = {"w_enc": encoders[n].T.contiguous(), "w_dec": padded, "b_enc": b_enc[n].clone(),
                   "b_dec": b_dec[n].clone(), "threshold": threshold[n].clone(),
                   "affine_skip_connection": skips[n].clone()}  # fmt: skip
            save_file(own, folder / f"params_layer_{n}.safetensors")
        else:
            own = {f"W_enc_{n}": encoders[n], f"b_enc_{n}": b_enc[n].clone(), f"b_dec_{n}": b_dec[n].clone()}
            save_file(
                own | ({f"threshold_{n}": threshold[n].clone()} if jumprelu else {}), folder / f"W_enc_{n}.safetensors"
            )
            save_file({f"W_dec_{n}": decoders[n]}, folder / f"W_dec_{n}.safetensors")
            (folder / "config.yaml").write_text(HOOKS + "model_kind: cross_layer_transcoder\n")

    def latents(x: Tensor) -> list[Tensor]:
        parts = x.chunk(LAYERS, dim=1)
        return [over(parts[n] @ encoders[n].float().T + b_enc[n].float(), threshold[n].float()) for n in range(LAYERS)]

    def reconstruct(x: Tensor) -> Tensor:
        f, parts = latents(x), x.chunk(LAYERS, dim=1)
        outs = [sum(f[n] @ decoders[n][:, out - n].float() for n in range(out + 1)) for out in range(LAYERS)]
        return torch.cat([outs[n] + b_dec[n].float() + parts[n] @ skips[n] for n in range(LAYERS)], 1)

    return Written(folder, lambda x: torch.cat(latents(x), 1), reconstruct, {})


# OpenAI


def openai(path: Path, activation: str = "TopK", *, normalised: bool | None = None) -> Written:
    """One pickled state dict. normalised: rows, default those of TopK, which is what their loader takes for granted."""
    normalised = activation == "TopK" if normalised is None else normalised
    w: dict[str, Any] = {
        "pre_bias": normal(D, seed=4), "latent_bias": normal(M, seed=2), "encoder.weight": normal(M, D, seed=1),
        "decoder.weight": normal(D, M, seed=3), "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(w, path)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        if not normalised:
            return torch.zeros(len(x), 1), torch.ones(len(x), 1)
        return x.mean(1, keepdim=True), (x - x.mean(1, keepdim=True)).std(1, keepdim=True)

    def encode(x: Tensor) -> Tensor:
        mean, std = parts(x)
        seen = (x - mean) / (std + 1e-5 if normalised else 1.0)
        pre = (seen - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        return largest(pre, K) if activation == "TopK" else pre.relu()

    def reconstruct(x: Tensor) -> Tensor:
        mean, std = parts(x)
        return (encode(x) @ w["decoder.weight"].T + w["pre_bias"]) * std + mean

    return Written(path, encode, reconstruct, {"unpickle": True})


# Single files of others


def _state(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def goodfire(folder: Path) -> Written:
    """Llama-3.1-8B-Instruct-SAE-l19.pth."""
    w = {"encoder_linear.weight": normal(M, D, seed=1), "encoder_linear.bias": normal(M, seed=2),
         "decoder_linear.weight": normal(D, M, seed=3), "decoder_linear.bias": normal(D, seed=4)}  # fmt: skip
    path = _state(folder / "Llama-3.1-8B-Instruct-SAE-l19.pth", w)
    return _written(
        path,
        lambda x: (x @ w["encoder_linear.weight"].T + w["encoder_linear.bias"]).relu(),
        lambda f: f @ w["decoder_linear.weight"].T + w["decoder_linear.bias"],
        unpickle=True,
    )


def kissane(folder: Path) -> Written:
    """gpt2-small_L3_Hcat_z.pt and its config."""
    w = {"W_enc": normal(D, M, seed=1), "b_enc": normal(M, seed=2), "W_dec": normal(M, D, seed=3),
         "b_dec": normal(D, seed=4)}  # fmt: skip
    path = _state(folder / "gpt2-small_L3_Hcat_z.pt", w)
    config = {"act_name": "blocks.3.attn.hook_z", "act_size": D, "dict_size": M, "head": "cat", "layer": 3,
              "model_name": "gpt2-small", "l1_coeff": 1.2, "site": "z"}  # fmt: skip
    (folder / "gpt2-small_L3_Hcat_z_cfg.json").write_text(json.dumps(config))
    return _written(
        path,
        lambda x: ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(),
        lambda f: f @ w["W_dec"] + w["b_dec"],
        unpickle=True,
    )


def qwen_scope(folder: Path) -> Written:
    """layer3.sae.pt in a folder named as Qwen names it."""
    w = {"W_enc": normal(M, D, seed=1), "b_enc": normal(M, seed=2), "W_dec": normal(D, M, seed=3),
         "b_dec": normal(D, seed=4)}  # fmt: skip
    path = _state(folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer3.sae.pt", w)
    return _written(
        path,
        lambda x: largest(x @ w["W_enc"].T + w["b_enc"], K),
        lambda f: f @ w["W_dec"].T + w["b_dec"],
        unpickle=True,
    )


# OpenMOSS


def openmoss(folder: Path, layout: int = 3, act_fn: str = "jumprelu", **changes: Any) -> Written:
    """A folder in one of three layouts, of activations with mean norm 3, and 5 where it writes.

    Latents are the library's own: of layout 1 as its loader gives them (folded), else of normalised inputs; of topk
    times their decoder norms, by which they are chosen.
    """
    hooks = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"}
    config: dict[str, Any] = {"d_model": D, "expansion_factor": M / D, "act_fn": act_fn, "top_k": K, **hooks,
                              "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True,
                              "use_decoder_bias": True} | changes  # fmt: skip
    encoder, decoder, b_enc, b_dec = normal(D, M, seed=1), normal(M, D, seed=3), normal(M, seed=2), normal(D, seed=4)
    thresholds = normal(M, seed=8).abs() + 0.1
    norms = {config["hook_point_in"]: 3.0, config["hook_point_out"]: 3.0 if hooks.items() <= config.items() else 5.0}
    if layout == 3:
        w = {"W_E": encoder, "b_E": b_enc, "W_D": decoder, "b_D": b_dec}
    else:
        w = {"encoder.weight": encoder.T, "encoder.bias": b_enc, "decoder.weight": decoder.T, "decoder.bias": b_dec}
    if layout > 1:
        w |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
        name = "activation_function.log_jumprelu_threshold" if layout == 3 else "log_jumprelu_threshold"
        w |= {name: thresholds.log()} if act_fn == "jumprelu" else {}
        config |= {"sae_type": "sae"}
    else:
        config |= {"jump_relu_threshold": 0.4,
                   "dataset_average_activation_norm": {"in": 3.0, "out": list(norms.values())[-1]}}  # fmt: skip
    place = folder / ("checkpoints/final.safetensors" if layout == 1 else "sae_weights.safetensors")
    place.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in w.items()}, place)
    (folder / ("hyperparams.json" if layout == 1 else "config.json")).write_text(json.dumps(config))
    into, out = (D**0.5 / norm for norm in (3.0, list(norms.values())[-1]))
    if config["norm_activation"] == "inference":
        into = out = 1.0
    size = decoder.norm(dim=1)
    if layout == 1:
        b_enc, b_dec, decoder = b_enc / into, b_dec / out, decoder * into / out
        into, out, size = 1.0, 1.0, decoder.norm(dim=1)

    def encode(x: Tensor) -> Tensor:
        pre = x * into @ encoder + b_enc
        if act_fn == "relu":
            return pre.relu() * (size if layout == 1 else 1.0)
        if act_fn == "topk" and layout > 1:
            return largest(pre * size, K)
        if layout == 1:
            return over(pre * size, 0.4)
        return torch.where(pre * size > thresholds, pre, torch.zeros(()))

    def reconstruct(x: Tensor) -> Tensor:
        f = encode(x)
        f = f / size if layout == 1 or act_fn == "topk" else f
        return (f @ decoder + b_dec) / out

    return Written(folder, encode, reconstruct, {})
