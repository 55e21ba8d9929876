"""Writing a folder that SAELens 6 opens with SAE.load_from_disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.folding import (
    needs_activation,
    one_site,
    refuse,
    thresholds,
    without_input_bias,
    without_scales,
)
from vesalius.dictionaries.formats.names import to_hook
from vesalius.dictionaries.formats.saelens import CENTRED, CONFIG, MODEL_SETTINGS, WEIGHTS
from vesalius.dictionaries.formats.saelens_config import NORMS
from vesalius.dictionaries.formats.writing import dtype_name, same_dtype, write_new, write_safetensors
from vesalius.dictionaries.unknown_sites import is_unknown, name_of
from vesalius.protocol.canonical import plain
from vesalius.site import Site

NAME = "SAELens"
# The version whose cfg.json is written; a reader decides by it which defaults hold.
VERSION = "6.54.12"
_KINDS = {"relu": "standard", "gated": "gated", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}
_TRANSCODERS = {"relu": "", "jumprelu": "jumprelu_", "batchtopk": "jumprelu_"}


def write(given: Any, folder: Path) -> None:
    """cfg.json and sae_weights.safetensors.

    Thresholds of batchtopk and matryoshka are written as jumprelu's, with the kind and the groups in the metadata, as
    SAELens does with its own. Raises InputError for several sites, and for transcoders that are gated or topk.
    """
    dictionary = without_scales(one_site(given, NAME))
    if dictionary.row_norm == "centred" and not (_kept(given).get(MODEL_SETTINGS) or {}).get(CENTRED):
        refuse(dictionary, NAME, row_norm="none")
    transcodes = dictionary.in_sites != dictionary.out_sites
    if transcodes:
        needs_activation(dictionary, f"{NAME}'s transcoders", tuple(_TRANSCODERS))
        dictionary = without_input_bias(dictionary)
    architecture = _architecture(dictionary, transcodes)
    write_safetensors(folder / WEIGHTS, _tensors(dictionary))
    config = _config(dictionary, architecture) | ({"d_out": dictionary.out_widths[0]} if transcodes else {})
    write_new(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def _architecture(given: Dictionary, transcodes: bool) -> str:
    if not transcodes and given.skip is None:
        return _KINDS[given.activation]
    if not transcodes:
        needs_activation(given, f"{NAME}, where only transcoders have a skip,", ())
    return f"{_TRANSCODERS[given.activation]}{'skip_' if given.skip is not None else ''}transcoder"


def _tensors(given: Dictionary) -> dict[str, Tensor]:
    own = {"W_enc": given.W_enc, "W_dec": given.W_dec, "b_dec": given.b_dec[0]}
    if given.skip is not None:
        own["W_skip"] = given.skip.T
    if given.activation == "gated":
        return own | {"b_gate": given.b_enc, "r_mag": given.extras["r_mag"], "b_mag": given.extras["b_mag"]}
    if given.activation in ("jumprelu", "batchtopk"):
        own["threshold"] = thresholds(given)
    return own | {"b_enc": given.b_enc}


def _config(given: Dictionary, architecture: str) -> dict[str, Any]:
    back = {ours: theirs for theirs, ours in NORMS.items()}
    heads = given.in_sites[0].kind in ("z", "q", "k", "v") and given.in_sites[0].index is None
    topk = {"k": given.k, "rescale_acts_by_decoder_norm": False} if given.activation == "topk" else {}
    return {
        "architecture": architecture,
        "d_in": given.in_widths[0],
        "d_sae": given.n_latents,
        "dtype": dtype_name(same_dtype(given)),
        "device": "cpu",
        "apply_b_dec_to_input": given.apply_b_dec_to_input,
        # Rows less their mean are no setting of a dictionary, but of how SAELens loads the model.
        "normalize_activations": "none" if given.row_norm == "centred" else back[given.row_norm],
        "reshape_activations": "hook_z" if heads and given.in_sites[0].kind == "z" else "none",
        **topk,
        "metadata": _metadata(given),
    }


def _kept(given: Dictionary) -> Mapping[str, Any]:
    """The metadata of the SAELens file that it was read from."""
    from_saelens = given.metadata.get("format") == "saelens"
    return dict(given.metadata.get("cfg", {}).get("metadata") or {}) if from_saelens else {}


def _metadata(given: Dictionary) -> dict[str, Any]:
    kept = _kept(given)
    hooks = _hook(given.in_sites[0], "")
    if given.in_sites != given.out_sites:
        hooks |= _hook(given.out_sites[0], "_out")
    own: dict[str, Any] = {"sae_lens_version": VERSION, "written_by": "vesalius"}
    if given.activation == "batchtopk" and "training_architecture" not in kept:
        own["training_architecture"] = "matryoshka_batchtopk" if given.groups else "batchtopk"
    if given.groups:
        own |= {"training_architecture_details": {"matryoshka_widths": list(given.groups)}}
    return {**plain(kept, "metadata"), **own, **_origin(given), **hooks}


def _origin(given: Dictionary) -> dict[str, Any]:
    """What a dictionary that was trained here knows of the text it is for."""
    known = given.metadata
    model = {"model_name": known["models"][0]["name"]} if known.get("models") else {}
    bos, context = known.get("bos"), known.get("context")
    prepends = {"prepend_bos": bos.get("id") is not None} if isinstance(bos, dict) else {}
    summary = {name: known["summary"][name] for name in ("l0", "fvu") if name in known.get("summary", {})}
    return {**model, **prepends, **summary, **({"context_size": context} if context else {})}


def _hook(site: Site, suffix: str) -> dict[str, Any]:
    name = name_of(site) if is_unknown(site) else to_hook(site) or str(site)
    head = {} if site.index is None else {f"hook_head_index{suffix}": site.index}
    return {f"hook_name{suffix}": name or None, **head}
