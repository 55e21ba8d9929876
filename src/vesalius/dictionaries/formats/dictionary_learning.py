"""dictionary_learning (Marks, Karvonen, Mueller): a folder with ae.pt, a pickle, and config.json.

What its own loader computes: decoder rows of an AutoEncoder are brought to norm 1 and its latents multiplied instead.
It opens nothing but pickles, so nothing is written for it. A state dict that was turned into ae.safetensors is read
too, and so are checkpoints of a run (checkpoints/ae_<step>.pt). In science-of-finetuning's branch of it a BatchTopKSAE
may centre and scale its inputs (activation_mean, activation_global_scale); that is folded into the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.folding import latents_times
from vesalius.dictionaries.formats.names import from_module
from vesalius.dictionaries.formats.reading import Weights, check_sizes, read_json
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError
from vesalius.site import Site

PICKLE, SAFE, CONFIG = "ae.pt", "ae.safetensors", "config.json"
_CHECKPOINT = re.compile(r"ae_\d+\.pt")
NORMALISERS = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
EPS = 1e-8
"""What the library adds to the factor, on the way back only."""
_LAYER_KINDS = {"resid": "resid_post", "attn": "attn_out", "attention": "attn_out", "mlp": "mlp_out"}


def claims(found: Found) -> bool:
    """By the name of its weights."""
    return found.has(PICKLE) or found.has(SAFE) or _CHECKPOINT.fullmatch(found.given) is not None


def read(found: Found) -> Dictionary:
    """A Dictionary from ae.pt (with unpickle=True) or ae.safetensors, and config.json.

    Raises FileFormatError naming the class of dictionary that is not read here, or the tensor that is missing.
    """
    path = _config_path(found)
    config = read_json(path).get("trainer")
    if not isinstance(config, dict):
        raise FileFormatError(f"{path} has no `trainer` that says which class the dictionary is of")
    name = str(config.get("dict_class"))
    if name not in CLASSES:
        raise FileFormatError(f"{path}: dict_class={name!r} is not read here; what is: {', '.join(sorted(CLASSES))}")
    weights = _weights(found)
    # All that its own loader goes by is in the tensors; the rest of the config is of training.
    weights.refuse_others(f"{name} of dictionary_learning", TENSORS[name])
    fields = CLASSES[name](weights)
    check_sizes(path, config, activation_dim=fields["encoder"].shape[0], dict_size=fields["encoder"].shape[1])
    if "k" in fields:
        check_sizes(path, config, k=fields["k"])
    return _dictionary(weights.path, _on_plain_activations(weights, fields), config, name)


def _config_path(found: Found) -> Path:
    """config.json, which is in the folder above that of checkpoints."""
    beside, above = found.folder / CONFIG, found.folder.parent / CONFIG
    return above if _CHECKPOINT.fullmatch(found.given) and not beside.is_file() else beside


def _weights(found: Found) -> Weights:
    if found.has(SAFE):
        return found.weights(SAFE)
    name = found.given or PICKLE
    path = found.folder / name
    return found.of(path, state_of(path, found.pickled(name)))


def state_of(path: Path, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict. Raises FileFormatError when there is more than tensors in it."""
    if {"ae", "optimizer", "norm_factor"} <= set(stored):
        raise FileFormatError(
            f"{path} is a backup of a run of dictionary_learning that had not ended (step {stored.get('step')}): its "
            "biases are in units of training. Let the run end, or save its checkpoints (save_steps=)"
        )
    state = {key.split("_orig_mod.")[-1]: value for key, value in stored.items()}
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise FileFormatError(f"{path} holds {', '.join(map(str, others))}, which are no tensors")
    return state


def normaliser(weights: Weights, *axes: str | int) -> tuple[Tensor, Tensor] | None:
    """Mean and factor of inputs that are centred and scaled before encoding; None where they are not.

    axes: of the mean; the factor has all but the last. NaN stands for none, as the library has it. Raises
    FileFormatError when only some of its tensors are there.
    """
    there = [name for name in NORMALISERS if name in weights]
    if not there:
        return None
    # The root of the target is in the factor already.
    missing = [name for name in NORMALISERS[:3] if name not in weights]
    if missing:
        raise FileFormatError(f"{weights.path} holds {', '.join(there)} and no {', '.join(missing)}")
    mean, std = (weights.take(name, *axes) for name in NORMALISERS[:2])
    scale = weights.take(NORMALISERS[2], *axes[:-1])
    return None if bool(torch.isnan(mean).any()) or bool(torch.isnan(std).any()) else (mean, scale)


def _on_plain_activations(weights: Weights, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a dictionary that takes and gives activations as they are."""
    found = normaliser(weights, fields["encoder"].shape[0])
    if found is None:
        return fields
    mean, scale = found
    encoder, b_dec = fields["encoder"], fields["b_dec"]
    # b_dec is subtracted in the units of training: ((x - mean) scale - b_dec) W.
    shift = mean * scale + (b_dec if fields.get("subtract", True) else 0.0)
    back = scale + EPS
    return {
        **fields,
        "encoder": encoder * scale,
        "b_enc": fields["b_enc"] - shift @ encoder,
        "decoder": fields["decoder"] / back,
        "b_dec": b_dec / back + mean,
        "subtract": False,
    }


def _dictionary(path: Path, fields: Mapping[str, Any], config: Mapping[str, Any], name: str) -> Dictionary:
    site = _site(config)
    encoder, decoder, b_dec = fields["encoder"], fields["decoder"], fields["b_dec"]
    dictionary = built(
        path,
        fields["activation"],
        in_sites=(site,),
        out_sites=(site,),
        encoders=(encoder.contiguous(),),
        decoders=(decoder.contiguous(),),
        b_enc=fields["b_enc"],
        b_dec=(b_dec,),
        extras=fields.get("extras", {}),
        k=fields.get("k"),
        groups=fields.get("groups", ()),
        apply_b_dec_to_input=fields.get("subtract", True),
        metadata={
            "format": "dictionary_learning",
            "dict_class": name,
            "trainer": dict(config),
            **({"model_name": config["lm_name"]} if config.get("lm_name") else {}),
        },
    )
    norms = decoder.norm(dim=1)
    # As its loader does, and only where it does: other classes keep the decoder's norms.
    if name == "AutoEncoder" and not torch.allclose(norms, torch.ones_like(norms)):
        dictionary = latents_times(dictionary, norms)
    return dictionary


def _site(config: Mapping[str, Any]) -> Site:
    layer, name = config.get("layer"), config.get("submodule_name")
    if not isinstance(name, str):
        return Site("resid_post", layer=layer) if isinstance(layer, int) else unknown_site(None)
    if isinstance(layer, int):
        for word, kind in _LAYER_KINDS.items():
            if name.startswith(word):
                return Site(kind, layer=layer)
    return from_module(name, str(config.get("lm_name") or ""))


def _linear(weights: Weights, bias: str) -> dict[str, Any]:
    """Encoder and decoder stored as torch.nn.Linear layers."""
    encoder = weights.take("encoder.weight", "latent", "d")
    n, d = encoder.shape
    return {"encoder": encoder.T, "decoder": weights.take("decoder.weight", d, n).T, "b_dec": weights.take(bias, d)}


def _matrices(weights: Weights) -> dict[str, Any]:
    encoder = weights.take("W_enc", "d", "latent")
    d, n = encoder.shape
    return {
        "encoder": encoder,
        "decoder": weights.take("W_dec", n, d),
        "b_enc": weights.take("b_enc", n),
        "b_dec": weights.take("b_dec", d),
    }


def _auto_encoder(weights: Weights) -> dict[str, Any]:
    fields = _linear(weights, "bias")
    return {**fields, "activation": "relu", "b_enc": weights.take("encoder.bias", fields["encoder"].shape[1])}


def _auto_encoder_new(weights: Weights) -> dict[str, Any]:
    fields = _linear(weights, "decoder.bias")
    b_enc = weights.take("encoder.bias", fields["encoder"].shape[1])
    return {**fields, "activation": "relu", "b_enc": b_enc, "subtract": False}


def _gated(weights: Weights) -> dict[str, Any]:
    fields = _linear(weights, "decoder_bias")
    n = fields["encoder"].shape[1]
    extras = {"r_mag": weights.take("r_mag", n), "b_mag": weights.take("mag_bias", n)}
    return {**fields, "activation": "gated", "b_enc": weights.take("gate_bias", n), "extras": extras}


def _top_k(weights: Weights) -> dict[str, Any]:
    return {**_auto_encoder_bias(weights), "activation": "topk", "k": int(weights.take("k"))}


def _auto_encoder_bias(weights: Weights) -> dict[str, Any]:
    fields = _linear(weights, "b_dec")
    return {**fields, "b_enc": weights.take("encoder.bias", fields["encoder"].shape[1])}


def _batch_top_k(weights: Weights) -> dict[str, Any]:
    return {
        **_auto_encoder_bias(weights),
        "activation": "batchtopk",
        "extras": {"threshold": weights.take("threshold")},
    }


def _jump_relu(weights: Weights) -> dict[str, Any]:
    fields = _matrices(weights)
    extras = {"threshold": weights.take("threshold", fields["encoder"].shape[1])}
    return {**fields, "activation": "jumprelu", "extras": extras, "subtract": False}


def _matryoshka(weights: Weights) -> dict[str, Any]:
    sizes = weights.take("group_sizes", "group").tolist()
    groups = tuple(sum(sizes[: number + 1]) for number in range(len(sizes)))
    return {
        **_matrices(weights),
        "activation": "batchtopk",
        "extras": {"threshold": weights.take("threshold")},
        "groups": groups,
    }


CLASSES: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "AutoEncoder": _auto_encoder, "AutoEncoderNew": _auto_encoder_new, "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _top_k, "BatchTopKSAE": _batch_top_k, "JumpReluAutoEncoder": _jump_relu,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}  # fmt: skip
TENSORS: dict[str, set[str]] = {
    "AutoEncoder": {"bias", "encoder.weight", "encoder.bias", "decoder.weight"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "GatedAutoEncoder": {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"},
    "AutoEncoderTopK": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"},
    "BatchTopKSAE": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold", *NORMALISERS},
    "JumpReluAutoEncoder": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "b_enc", "W_dec", "b_dec", "k", "threshold", "group_sizes"},
}
"""Of each class. The threshold of a TopK is what its loader computes with only when asked to."""
