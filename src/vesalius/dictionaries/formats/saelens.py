"""SAELens: a folder with cfg.json and sae_weights.safetensors; versions 1 to 6.

W_enc [d_in, latent], b_enc, W_dec [latent, d_out], b_dec; threshold [latent] of jumprelu; gated has b_gate, b_mag and
r_mag in place of b_enc; skip transcoders have W_skip [d_out, d_in]. BatchTopK and Matryoshka dictionaries are exported
as jumprelu, their training checkpoints hold topk_threshold instead.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.folding import latents_times
from vesalius.dictionaries.formats.names import from_hook, from_module, from_module_end, two_sites
from vesalius.dictionaries.formats.reading import Weights, check_sizes, flag
from vesalius.dictionaries.formats.saelens_config import (
    COMPUTED,
    KEPT,
    TRAINED,
    SaelensConfig,
    read_config,
    scale_needed,
)
from vesalius.dictionaries.unknown_sites import is_unknown
from vesalius.errors import FileFormatError
from vesalius.site import Site

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
ACTIVATIONS = {
    "standard": "relu", "gated": "gated", "topk": "topk", "jumprelu": "jumprelu", "transcoder": "relu",
    "skip_transcoder": "relu", "jumprelu_transcoder": "jumprelu", "jumprelu_skip_transcoder": "jumprelu",
    "batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk",
}  # fmt: skip
_OWN = {
    "relu": {"b_enc"}, "topk": {"b_enc"}, "jumprelu": {"b_enc", "threshold"}, "batchtopk": {"b_enc", "topk_threshold"},
    "gated": {"b_gate", "b_mag", "r_mag"},
}  # fmt: skip
# Of a file's metadata, what says how a model has to be run; kept at the top level of the dictionary's own.
_KEPT = (
    "model_name", "hook_name", "hook_name_out", "prepend_bos", "context_size", "dataset_path", "neuronpedia_id",
    "model_from_pretrained_kwargs", "seqpos_slice",
)  # fmt: skip
MODEL_SETTINGS, CENTRED = "model_from_pretrained_kwargs", "center_writing_weights"
_WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed", "pos_embed", "result")
_LAYER_NORM = re.compile(r"gpt-?2|gpt-?neo|gpt-?j|pythia|\bopt-|bloom|stanford|gelu-|solu-|attn-only|tiny-stories")
_RMS_NORM = re.compile(r"llama|gemma|qwen|mi[sx]tral|olmo-?2|smollm|phi-?3|yi-")


def claims(found: Found) -> bool:
    """By the name of its weights."""
    return found.has(WEIGHTS)


def read(found: Found) -> Dictionary:
    """A Dictionary from a SAELens folder.

    Raises FileFormatError naming the file, and the architecture or normalisation that is not read here.
    """
    config = read_config(found.folder / CONFIG, found.json(CONFIG))
    if config.architecture not in ACTIVATIONS:
        raise FileFormatError(
            f"{config.path}: architecture={config.architecture!r} is not read here; what is: "
            f"{', '.join(sorted(ACTIVATIONS))}"
        )
    ignored = found.options.ignore
    found.refuse_settings(config.path, config.raw, COMPUTED | KEPT | TRAINED, "a SAELens dictionary")
    scale = scale_needed(config, found.options.in_scale, found.maybe_json(SCALER))
    dictionary = _dictionary(config, found.weights(WEIGHTS), scale)
    if CENTRED not in ignored:
        dictionary = _centred(config, dictionary)
    # Latents times decoder norms: the same function with rows of unit norm.
    if config.rescaled:
        kept = dictionary.extras  # a training checkpoint's threshold is of latents that were multiplied already
        dictionary = replace(latents_times(dictionary, dictionary.W_dec.norm(dim=1)), extras=kept)
    return dictionary


def _dictionary(config: SaelensConfig, weights: Weights, scale: float) -> Dictionary:
    encoder = weights.take("W_enc", "d_in", "latent")
    d_in, n = encoder.shape
    # A config beside the weights of another dictionary is found out by its sizes.
    check_sizes(config.path, config.raw, d_in=d_in, d_sae=n)
    decoder = weights.take("W_dec", n, "d_out")
    check_sizes(config.path, config.raw, d_out=decoder.shape[1])
    d_out, transcodes = decoder.shape[1], "transcoder" in config.architecture
    if not transcodes and d_out != d_in:
        raise FileFormatError(
            f"{weights.path}: W_dec reconstructs {d_out} numbers from {d_in}; only a transcoder may do that"
        )
    if transcodes and (config.row_norm != "none" or scale != 1.0):
        raise FileFormatError(
            f"{config.path}: normalize_activations={config.normalize!r} of a transcoder is not read here"
        )
    activation = ACTIVATIONS[config.architecture]
    skip = weights.take("W_skip", d_out, d_in).T.contiguous() if "skip" in config.architecture else None
    b_enc, extras = _vectors(activation, weights, n)
    known = {"W_enc", "W_dec", "b_dec", "scaling_factor", *_OWN[activation]} | (
        {"W_skip"} if skip is not None else set()
    )
    weights.refuse_others(f"a {config.architecture} dictionary of SAELens", known)
    sites = _sites(config, transcodes)
    return built(
        weights.path,
        activation,
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(encoder,),
        decoders=(_finetuned(config, weights, decoder),),
        b_enc=b_enc,
        b_dec=(weights.take("b_dec", d_out),),
        extras=extras,
        k=config.k if activation == "topk" else None,
        skip=skip,
        row_norm=config.row_norm,
        in_scale=(scale,),
        out_scale=(scale if not transcodes else 1.0,),
        groups=config.groups,
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        metadata=_metadata(config),
    )


def _centred(config: SaelensConfig, dictionary: Dictionary) -> Dictionary:
    """A dictionary of a model whose writing weights were centred, where that makes a difference.

    TransformerLens then takes from every row of the stream, and from what is added to it, its mean; only of models with
    LayerNorm, to which it means nothing. Raises FileFormatError where it cannot be told whether the model is one.
    """
    if not flag(config.path, config.model_settings, CENTRED, False):
        return dictionary
    ends, model = {*dictionary.in_sites, *dictionary.out_sites}, str(config.metadata.get("model_name") or "")
    written = {site for site in ends if site.kind in _WRITTEN or is_unknown(site)}
    if not written or _RMS_NORM.search(model.lower()):
        return dictionary
    if len(ends) == 1 and written == ends and _LAYER_NORM.search(model.lower()):
        if dictionary.row_norm == "none":
            return replace(dictionary, row_norm="centred")
        if dictionary.row_norm == "layer_norm":
            return dictionary  # which takes the mean off as well
    raise FileFormatError(
        f"{config.path} says {CENTRED}=True: it is of rows less their mean, if {model or 'the model'} has LayerNorm. "
        f"Read here is that of dictionaries of one site, of a model known by its name to have LayerNorm. "
        f"load(..., ignore=[{CENTRED!r}]) takes rows as they are"
    )


def _vectors(activation: str, weights: Weights, n: int) -> tuple[Tensor, dict[str, Tensor]]:
    if activation == "gated":
        return weights.take("b_gate", n), {name: weights.take(name, n) for name in ("r_mag", "b_mag")}
    b_enc = weights.take("b_enc", n)
    if activation == "jumprelu":
        return b_enc, {"threshold": weights.take("threshold", n)}
    return b_enc, {"threshold": weights.take("topk_threshold")} if activation == "batchtopk" else {}


def _finetuned(config: SaelensConfig, weights: Weights, decoder: Tensor) -> Tensor:
    factor = weights.maybe("scaling_factor", decoder.shape[0])
    if factor is None or bool(torch.allclose(factor, torch.ones_like(factor))):
        return decoder
    if not config.finetuned:
        raise FileFormatError(f"{weights.path} holds a scaling_factor, and {config.path} does not say that it is used")
    return decoder * factor[:, None]


def _sites(config: SaelensConfig, transcodes: bool) -> tuple[Site, Site]:
    read_at = _site(config, "hook_name", "hook_head_index", "hf_hook_name")
    if not transcodes:
        return read_at, read_at
    return two_sites(read_at, _site(config, "hook_name_out", "hook_head_index_out", "hf_hook_name_out"))


def _site(config: SaelensConfig, hook: str, head: str, module: str) -> Site:
    said = config.metadata
    name, index, model = said.get(hook), said.get(head), str(said.get("model_name") or "")
    if said.get(module):
        return from_module_end(str(said[module]), model)
    if said.get("model_class_name") == "AutoModelForCausalLM" and isinstance(name, str):
        return from_module(name, model)
    return from_hook(name if isinstance(name, str) else None, index if isinstance(index, int) else None, model)


def _metadata(config: SaelensConfig) -> dict[str, Any]:
    kept = {name: config.metadata[name] for name in _KEPT if config.metadata.get(name) is not None}
    return {"format": "saelens", **kept, "cfg": dict(config.raw)}
