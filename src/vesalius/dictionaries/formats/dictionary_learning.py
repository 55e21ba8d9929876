"""dictionary_learning (Marks, Karvonen, Mueller): a folder with ae.pt, a pickle, and config.json.

What its own loader computes: decoder rows of an AutoEncoder are brought to norm 1 and its latents multiplied instead.
It opens nothing but pickles, so nothing is written for it. A state dict that was turned into ae.safetensors is read
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.folding import latents_times
from vesalius.dictionaries.formats.names import from_module
from vesalius.dictionaries.formats.reading import Weights
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError
from vesalius.site import Site

PICKLE, SAFE, CONFIG = "ae.pt", "ae.safetensors", "config.json"
_LAYER_KINDS = {"resid": "resid_post", "attn": "attn_out", "attention": "attn_out", "mlp": "mlp_out"}


def claims(found: Found) -> bool:
    """By the name of its weights."""
    return found.has(PICKLE) or found.has(SAFE)


def read(found: Found) -> Dictionary:
    """A Dictionary from ae.pt (with unpickle=True) or ae.safetensors, and config.json.

    Raises FileFormatError naming the class of dictionary that is not read here, or the tensor that is missing.
    """
    config = found.json(CONFIG).get("trainer")
    if not isinstance(config, dict):
        raise FileFormatError(f"{found.folder / CONFIG} has no `trainer` that says which class the dictionary is of")
    name = str(config.get("dict_class"))
    if name not in CLASSES:
        raise FileFormatError(
            f"{found.folder / CONFIG}: dict_class={name!r} is not read here; what is: {', '.join(sorted(CLASSES))}"
        )
    weights = _weights(found)
    return _dictionary(weights.path, CLASSES[name](weights), config, name)


def _weights(found: Found) -> Weights:
    if found.has(SAFE):
        return found.weights(SAFE)
    path = found.folder / PICKLE
    stored = {key.split("_orig_mod.")[-1]: value for key, value in found.pickled(PICKLE).items()}
    others = [key for key, value in stored.items() if not isinstance(value, Tensor)]
    if others:
        raise FileFormatError(f"{path} holds {', '.join(map(str, others))}, which are no tensors")
    return Weights(path, stored, found.options.dtype)


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
