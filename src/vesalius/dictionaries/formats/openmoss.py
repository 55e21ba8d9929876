"""OpenMOSS's library (lm-saes, now llamascopium), with which Llama Scope was made; three layouts of a folder.

Llama Scope: hyperparams.json and checkpoints/final.safetensors. Since January 2025: config.json and
sae_weights.safetensors with encoder.weight [latent, d], encoder.bias, decoder.weight [d, latent], decoder.bias; since
May 2025 W_E [d, latent], b_E, W_D [latent, d], b_D. The logarithm of JumpReLU's thresholds is beside them in the last
two.

Activations are brought to mean norm sqrt(d) first; those norms are in hyperparams.json, later among the tensors. With
sparsity_include_decoder_norm latents are compared (with a threshold, or with each other) times their decoder norms.
Llama Scope's own loader folds norms and decoder norms into the weights, and only then compares with its threshold.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.folding import latents_times
from vesalius.dictionaries.formats.names import from_hook, two_sites
from vesalius.dictionaries.formats.reading import Weights, check_sizes, flag, read_json
from vesalius.errors import FileFormatError, InputError
from vesalius.site import Site

HYPERPARAMETERS, CONFIG, WEIGHTS, NAME = "hyperparams.json", "config.json", "sae_weights.safetensors", "OpenMOSS"
_FILES = (WEIGHTS, "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
_SETTINGS = {
    "act_fn", "apply_decoder_bias_to_pre_encoder", "d_model", "d_sae", "dataset_average_activation_norm",
    "expansion_factor", "hook_point_in", "hook_point_out", "jump_relu_threshold", "norm_activation", "sae_type",
    "sparsity_include_decoder_norm", "top_k", "use_decoder_bias", "use_glu_encoder",
}  # fmt: skip
_TRAINED = {
    "bias_init_method", "ddp_size", "decoder_exactly_fixed_norm", "device", "dtype", "force_unit_decoder_norm",
    "init_decoder_norm", "init_encoder_norm", "init_encoder_with_decoder_transpose", "jumprelu_threshold_grad_scale",
    "jumprelu_threshold_window", "k_warmup_steps", "l1_coefficient", "l1_coefficient_warmup_steps", "lp", "seed",
    "sae_pretrained_name_or_path", "sparsity_threshold_for_triton_spmm_kernel", "strict_loading", "tp_size",
    "use_batch_norm_mse", "use_ghost_grads", "use_triton_kernel",
}  # fmt: skip
_OTHERS = {
    "lorsa": "low-rank sparse attention (Lorsa), whose latents read several positions",
    "molt": "a mixture of linear transforms (MOLT)", "mixcoder": "a MixCoder", "crosscoder": "a crosscoder",
    "clt": "a cross-layer transcoder",
}  # fmt: skip
_NORM = "dataset_average_activation_norm."
_THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
_NEW, _OLD = ("W_E", "b_E", "W_D", "b_D"), ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_TINY = 1e-30


@dataclass(frozen=True)
class _Settings:
    """A config of any of the three."""

    path: Path
    raw: Mapping[str, Any]

    @property
    def first(self) -> bool:
        """Whether it is of the first layout."""
        return self.path.name == HYPERPARAMETERS

    def flag(self, name: str, default: bool) -> bool:
        return flag(self.path, self.raw, name, default)

    def one_of(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = str(self.raw.get(name) or default).lower()
        if value not in known:
            raise FileFormatError(f"{self.path}: {name}={value!r} is not read here; what is: {', '.join(known)}")
        return value

    def activation(self) -> str:
        return self.one_of("act_fn", "relu", ("relu", "jumprelu", "topk"))

    def number(self, name: str, least: float) -> float:
        value = self.raw.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
            raise FileFormatError(f"{self.path} says {name}={value!r}; a number of at least {least:g} is needed")
        return value


def claims(found: Found) -> bool:
    """hyperparams.json with weights; or sae_weights.safetensors with a config.json that names its hooks."""
    path = _config_path(found)
    if path is None or path.name == HYPERPARAMETERS:
        return path is not None
    # SAELens calls its weights the same, and has a cfg.json.
    return not (path.parent / "cfg.json").is_file() and "d_model" in read_json(path)


def _config_path(found: Found) -> Path | None:
    if found.given and found.path.suffix != ".safetensors":
        return None
    folder = found.folder.parent if found.folder.name == "checkpoints" else found.folder
    if (folder / HYPERPARAMETERS).is_file():
        return folder / HYPERPARAMETERS
    there = found.given or (found.folder / WEIGHTS).is_file()
    return folder / CONFIG if there and (folder / CONFIG).is_file() else None


def read(found: Found) -> Dictionary:
    """A Dictionary, or a transcoder where the two hooks differ.

    Raises FileFormatError naming the kind of dictionary (Lorsa, crosscoder, ...), the activation or the norm that is
    not read here.
    """
    path = _config_path(found)
    assert path is not None
    settings = _Settings(path, read_json(path))
    found.refuse_settings(path, settings.raw, _SETTINGS | _TRAINED, "a dictionary of OpenMOSS")
    kind = str(settings.raw.get("sae_type") or "sae")
    if kind != "sae":
        what = _OTHERS.get(kind, f"sae_type={kind!r}")
        raise FileFormatError(f"{path} is of {what}, which is not read here; of {NAME}'s, what is: sae")
    if settings.flag("use_glu_encoder", False):
        raise FileFormatError(f"{path} says use_glu_encoder=True: latents times a gate of their own are not read here")
    settings.activation()
    weights = _weights(found, path.parent)
    return _dictionary(found, settings, weights, _matrices(settings, weights))


def _weights(found: Found, folder: Path) -> Weights:
    if found.given:
        return found.weights(found.given)
    name = next((name for name in _FILES if (folder / name).is_file()), None)
    if name is None:
        raise FileFormatError(f"{folder} has {HYPERPARAMETERS} and none of {', '.join(_FILES)}")
    return found.weights(os.path.relpath(folder / name, found.folder))


def _matrices(settings: _Settings, weights: Weights) -> dict[str, Tensor]:
    """encoder [d, latent], decoder [latent, d], b_enc and b_dec."""
    new = "W_E" in weights
    names = (
        ("W_E", "b_E", "W_D", "b_D") if new else ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    )
    biased = settings.flag("use_decoder_bias", True)
    extra = {name for name in weights.tensors if name.startswith(_NORM)}
    known = {*names[: 4 if biased else 3], *extra, *(_THRESHOLDS if settings.activation() == "jumprelu" else ())}
    weights.refuse_others("a dictionary of OpenMOSS with this config", known)
    encoder, decoder = weights.take(names[0], "a", "b"), weights.take(names[2], "a", "b")
    encoder, decoder = (encoder, decoder) if new else (encoder.T, decoder.T)
    d, n = encoder.shape
    if decoder.shape != (n, d):
        raise FileFormatError(f"{weights.path}: {names[0]} and {names[2]} do not fit each other")
    check_sizes(settings.path, settings.raw, d_model=d, d_sae=n)
    if settings.raw.get("expansion_factor") is not None:
        check_sizes(settings.path, {"expansion_factor": int(d * settings.raw["expansion_factor"])}, expansion_factor=n)
    b_dec = weights.take(names[3], d) if biased else torch.zeros(d, dtype=encoder.dtype)
    return {
        "encoder": encoder.contiguous(),
        "decoder": decoder.contiguous(),
        "b_enc": weights.take(names[1], n),
        "b_dec": b_dec,
    }


def _dictionary(found: Found, settings: _Settings, weights: Weights, of: dict[str, Tensor]) -> Dictionary:
    hooks = [str(settings.raw.get(f"hook_point_{end}") or "") for end in ("in", "out")]
    hooks[1] = hooks[1] or hooks[0]
    read_at = from_hook(hooks[0] or None)
    sites = (read_at, read_at) if hooks[0] == hooks[1] else two_sites(read_at, from_hook(hooks[1]))
    norm = settings.one_of("norm_activation", "dataset-wise", ("token-wise", "dataset-wise", "inference"))
    if norm == "token-wise" and hooks[0] != hooks[1]:
        raise FileFormatError(f"{settings.path}: norm_activation={norm!r} of a transcoder is not read here")
    scales = _scales(found, settings, weights, hooks, of["encoder"].shape[0]) if norm == "dataset-wise" else (1.0, 1.0)
    subtracts = settings.flag("apply_decoder_bias_to_pre_encoder", False) and settings.flag("use_decoder_bias", True)
    row_norm = "constant_norm" if norm == "token-wise" else "none"
    if settings.first:
        return _llama_scope(settings, weights, of, sites, scales, row_norm, subtracts)
    activation = settings.activation()
    norms = of["decoder"].norm(dim=1).clamp(min=_TINY)
    compared = norms if settings.flag("sparsity_include_decoder_norm", True) else torch.ones_like(norms)
    extras = {"threshold": _threshold(settings, weights, len(norms)) / compared} if activation == "jumprelu" else {}
    dictionary = _built(
        settings, weights, of, sites, activation, extras, in_scale=(scales[0],), out_scale=(scales[1],),
        row_norm=row_norm, apply_b_dec_to_input=subtracts, k=_k(settings, activation),
    )  # fmt: skip
    # The k largest are chosen by latent times decoder norm: latents of that size choose the same.
    return latents_times(dictionary, compared) if activation == "topk" else dictionary


def _k(settings: _Settings, activation: str) -> int | None:
    return int(settings.number("top_k", 1)) if activation == "topk" else None


def _threshold(settings: _Settings, weights: Weights, n: int) -> Tensor:
    name = next((name for name in _THRESHOLDS if name in weights), None)
    if name is not None:
        return weights.take(name, n).exp()
    return torch.full((n,), float(settings.number("jump_relu_threshold", 0)))


def _llama_scope(
    settings: _Settings, weights: Weights, of: dict[str, Tensor], sites: tuple[Site, Site],
    scales: tuple[float, float], row_norm: str, subtracts: bool,
) -> Dictionary:  # fmt: skip
    """Of the first layout: scales folded, then decoder rows of norm 1, then the threshold."""
    activation = settings.activation()
    decoder = of["decoder"] * (scales[0] / scales[1])
    unit = settings.flag("sparsity_include_decoder_norm", True)
    norms = decoder.norm(dim=1).clamp(min=_TINY) if unit else torch.ones(len(decoder))
    threshold = settings.raw.get("jump_relu_threshold")
    # A TopK dictionary that has a threshold is used with it.
    if activation == "topk" and isinstance(threshold, int | float) and threshold > 0:
        activation = "jumprelu"
    extras = {}
    if activation == "jumprelu":
        extras = {"threshold": torch.full((len(norms),), float(settings.number("jump_relu_threshold", 0)))}
    folded = {
        "encoder": of["encoder"] * norms,
        "decoder": decoder / norms[:, None],
        "b_enc": of["b_enc"] / scales[0] * norms,
        "b_dec": of["b_dec"] / scales[1],
    }
    return _built(
        settings, weights, folded, sites, activation, extras, row_norm=row_norm, apply_b_dec_to_input=subtracts,
        k=_k(settings, activation),
    )  # fmt: skip


def _built(
    settings: _Settings, weights: Weights, of: dict[str, Tensor], sites: tuple[Site, Site], activation: str,
    extras: dict[str, Tensor], **fields: Any,
) -> Dictionary:  # fmt: skip
    return built(
        weights.path,
        activation,
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(of["encoder"],),
        decoders=(of["decoder"],),
        b_enc=of["b_enc"],
        b_dec=(of["b_dec"],),
        extras={name: tensor.to(of["b_enc"]) for name, tensor in extras.items()},
        metadata={"format": "openmoss", "prepend_bos": True, "config": dict(settings.raw)},
        **fields,
    )


def _scales(found: Found, settings: _Settings, weights: Weights, hooks: list[str], d: int) -> tuple[float, float]:
    """What inputs and outputs are multiplied by: sqrt(d) over their mean norm."""
    given = found.options.in_scale
    said = settings.raw.get("dataset_average_activation_norm")
    norms = [said.get(end) for end in ("in", "out")] if isinstance(said, dict) else [None, None]
    if not settings.first:
        norms = [float(weights.take(_NORM + hook)) if _NORM + hook in weights else None for hook in hooks]
    if None not in norms:
        if given is not None:
            raise InputError(f"in_scale was given, and {settings.path.parent} has the mean norms {norms}")
        bad = [norm for norm in norms if not isinstance(norm, int | float) or not 0 < norm < math.inf]
        if bad:
            raise FileFormatError(f"{settings.path}: mean norms of activations should be above 0, they are {norms}")
        return math.sqrt(d) / float(norms[0] or 1), math.sqrt(d) / float(norms[1] or 1)
    if given is None or hooks[0] != hooks[1]:
        raise FileFormatError(
            f"{settings.path}: norm_activation='dataset-wise', so it was trained on activations times sqrt(d_model) / "
            "their mean norm, which is not in the folder. For a dictionary of one site give that factor as in_scale=, "
            "or --in-scale on the command line"
        )
    return given, given
