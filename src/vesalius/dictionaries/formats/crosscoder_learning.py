"""crosscoder_learning (Minder, Dumas et al. 2025): a folder with model.safetensors and config.json.

encoder.weight [site, d, latent], encoder.bias, decoder.weight [site, latent, d], decoder.bias [site, d]; BatchTopK ones
have a threshold that is compared with the latent times its decoder norms, combined as code_normalization_id says. With
activation_mean, inputs are centred and scaled per site, and outputs brought back: all of that is folded into the
weights. Which sites they are is in no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.dictionary_learning import EPS, NORMALISERS, normaliser
from vesalius.dictionaries.formats.reading import Weights, check_sizes, shapes
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_NORMS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}
_TINY = 1e-30
_TENSORS = {
    "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "threshold", "k", "code_normalization_id",
    *NORMALISERS,
}  # fmt: skip
_SETTINGS = {
    "activation_dim", "activation_mean", "activation_std", "code_normalization", "code_normalization_alpha_cc",
    "code_normalization_alpha_sae", "dict_size", "encoder_layers", "init_with_transpose", "k", "norm_init_scale",
    "num_decoder_layers", "num_layers", "same_init_for_all_layers", "target_rms", "trainer", "buffer",
}  # fmt: skip


def claims(found: Found) -> bool:
    """By a file of weights with an encoder of three axes."""
    return found.has(WEIGHTS) and len(shapes(found.folder / WEIGHTS).get("encoder.weight", ())) == 3


def read(found: Found) -> Dictionary:
    """A Dictionary of several sites, in the order they were stacked in; give their names as site=.

    Raises FileFormatError for DECOUPLED codes, which are several codes and not one.
    """
    return read_weights(found, found.maybe_json(CONFIG), found.weights(WEIGHTS))


def read_weights(found: Found, config: Mapping[str, Any], weights: Weights) -> Dictionary:
    """The same of a state dict that was read already."""
    found.refuse_settings(found.folder / CONFIG, config, _SETTINGS, "a crosscoder of crosscoder_learning")
    weights.refuse_others("a crosscoder of crosscoder_learning", _TENSORS)
    encoder = weights.take("encoder.weight", "site", "d", "latent")
    sites, d, n = encoder.shape
    check_sizes(found.folder / CONFIG, config, activation_dim=d, dict_size=n)
    decoder = weights.take("decoder.weight", "site", n, d)
    b_dec = weights.take("decoder.bias", decoder.shape[0], d)
    reads, writes = _site_numbers(config, sites, len(decoder))
    extras = _threshold(weights, decoder, config)
    encoder, b_enc, decoder, b_dec = _on_plain_activations(weights, reads, encoder, decoder, b_dec)
    return built(
        weights.path,
        "batchtopk" if extras else "relu",
        in_sites=tuple(unknown_site(str(number)) for number in reads),
        out_sites=tuple(unknown_site(str(number)) for number in writes),
        encoders=tuple(encoder),
        decoders=tuple(decoder),
        b_enc=b_enc,
        b_dec=tuple(b_dec),
        extras=extras,
        metadata={"format": "crosscoder_learning", "config": config, **_trained_with(weights)},
    )


def _site_numbers(config: Mapping[str, Any], n_in: int, n_out: int) -> tuple[list[int], list[int]]:
    """Numbers of the stacked sites that are read, and of those that are reconstructed."""
    chosen = config.get("encoder_layers")
    reads = list(chosen) if isinstance(chosen, list) and len(chosen) == n_in else list(range(n_in))
    return reads, list(range(n_out))


def _threshold(weights: Weights, decoder: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    if "threshold" not in weights:
        return {}
    name = _code(weights, config)
    each = decoder.norm(dim=2)  # [site, latent]
    summed, together = each.sum(0), decoder.norm(dim=(0, 2))
    alphas = [_alpha(config, "sae", 1.0), _alpha(config, "cc", 0.1)]
    known = {
        "CROSSCODER": summed,
        "SAE": together,
        "NONE": torch.ones_like(summed),
        "MIXED": alphas[0] * together + alphas[1] * summed,
    }
    if name not in known:
        raise FileFormatError(
            f"{weights.path}: code normalisation {name} is not read here; what is: {', '.join(known)}"
        )
    return {"threshold": weights.take("threshold") / known[name].clamp(min=_TINY)}


def _code(weights: Weights, config: Mapping[str, Any]) -> str:
    """How the decoder norms of a latent are combined. Raises FileFormatError when two places say different things."""
    number = int(weights.take("code_normalization_id")) if "code_normalization_id" in weights else 1
    name, said = _NORMS.get(number, str(number)), config.get("code_normalization")
    if said is not None and str(said).upper() != name:
        raise FileFormatError(
            f"{weights.path} has the code normalisation {name}, and {weights.path.parent / CONFIG} says {said!r}"
        )
    return name


def _alpha(config: Mapping[str, Any], of: str, default: float) -> float:
    said = config.get(f"code_normalization_alpha_{of}")
    return default if said is None else float(said)


def _trained_with(weights: Weights) -> dict[str, Any]:
    """The scales in which decoder norms were compared, which `relative_norms` wants to know."""
    scale = weights.maybe("activation_global_scale", "site")
    return {} if scale is None else {"trained_with": {"out_scale": scale.tolist()}}


def _on_plain_activations(
    weights: Weights, reads: list[int], encoder: Tensor, decoder: Tensor, b_dec: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """encoder, b_enc, decoder and b_dec that take and give activations as they are."""
    b_enc = weights.take("encoder.bias", encoder.shape[2])
    found = normaliser(weights, len(decoder), encoder.shape[1])
    if found is None:
        return encoder, b_enc, decoder, b_dec
    mean, scale = found[0], found[1][:, None, None]
    scaled = encoder * scale[reads]
    b_enc = b_enc - (mean[reads][:, None] @ scaled).sum((0, 1))
    back = scale + EPS
    return scaled, b_enc, decoder / back, b_dec / back[:, 0] + mean
