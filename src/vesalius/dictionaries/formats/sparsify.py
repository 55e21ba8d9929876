"""sparsify (EleutherAI): a folder per module with cfg.json and sae.safetensors.

encoder.weight [latent, d], encoder.bias, W_dec [latent, d], b_dec; W_skip [d, d] maps inputs to outputs from the left.
b_dec is subtracted from inputs unless the coder transcodes. The folder's name is the module's. SAELens' own reader of
these files transposes W_dec and subtracts b_dec by another rule; this one follows the library that wrote them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built, own_sites
from vesalius.dictionaries.formats.folding import (
    needs_activation,
    one_site,
    refuse,
    with_input_bias,
    without_input_bias,
    without_scales,
)
from vesalius.dictionaries.formats.names import from_module, two_sites
from vesalius.dictionaries.formats.reading import check_sizes, flag
from vesalius.dictionaries.formats.writing import write_new, write_safetensors
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.untrusted import read_json
from vesalius.site import Site

CONFIG, WEIGHTS, RUN, NAME = "cfg.json", "sae.safetensors", "config.json", "sparsify"
_SETTINGS = {
    "activation", "d_in", "expansion_factor", "k", "multi_topk", "normalize_decoder", "num_latents", "signed",
    "skip_connection", "transcode", "vesalius",
}  # fmt: skip
_TENSORS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip"}


def claims(found: Found) -> bool:
    """By the name of its weights."""
    return found.has(WEIGHTS)


def read(found: Found) -> Dictionary:
    """A Dictionary from a folder of sparsify. Raises FileFormatError for groupmax and signed latents, naming them."""
    config, weights = found.json(CONFIG), found.weights(WEIGHTS)
    encoder = weights.take("encoder.weight", "latent", "d")
    n, d = encoder.shape
    path = found.folder / CONFIG
    found.refuse_settings(path, config, _SETTINGS, "a coder of sparsify")
    k, transcodes = _checked(path, config, n, d), flag(path, config, "transcode", False)
    skips = flag(path, config, "skip_connection", False)
    skip = weights.take("W_skip", d, d).T.contiguous() if skips else None
    weights.refuse_others(
        "a coder without skip_connection" if skip is None else "sparsify",
        _TENSORS - {"W_skip"} if skip is None else _TENSORS,
    )
    run = _run(found.folder)
    sites = _sites(found.folder / CONFIG, config, str(run.get("model") or ""), transcodes)
    return built(
        weights.path,
        "topk",
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(encoder.T.contiguous(),),
        decoders=(weights.take("W_dec", n, d),),
        b_enc=weights.take("encoder.bias", n),
        b_dec=(weights.take("b_dec", d),),
        k=k,
        skip=skip,
        apply_b_dec_to_input=not transcodes,
        metadata={
            "format": NAME,
            "hookpoint": found.folder.name,
            "cfg": config,
            **({"model_name": run["model"]} if "model" in run else {}),
        },
    )


def _checked(path: Path, config: dict[str, Any], n: int, d: int) -> int:
    activation = config.get("activation", "topk")
    if activation != "topk" or flag(path, config, "signed", False):
        what = "signed=true" if activation == "topk" else f"activation={activation!r}"
        raise FileFormatError(f"{path}: {what} is not read here; what is: activation='topk' without signed")
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise FileFormatError(f"{path}: k={k!r} of {n} latents cannot be")
    # 0 latents stand for a multiple of the width.
    check_sizes(path, config, d_in=d, **({"num_latents": n} if config.get("num_latents") else {}))
    return k


def _run(folder: Path) -> dict[str, Any]:
    """The run's config.json, in the folder above, which says the model; nothing when it is not there or unreadable."""
    try:
        found = read_json(folder.parent / RUN)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sites(path: Path, config: dict[str, Any], model: str, transcodes: bool) -> tuple[Site, Site]:
    if isinstance(config.get("vesalius"), dict):
        return own_sites(path, config["vesalius"])
    name = path.parent.name
    out = _module(name, model, "out")
    return two_sites(_module(name, model, "in"), out) if transcodes else (out, out)


def _module(name: str, model: str, side: str) -> Site:
    """A module as sparsify names it, within the model's body; a folder of another name says nothing."""
    # A renamed folder would otherwise be taken for a module path.
    if not re.fullmatch(r"(layers|h)\.\d+(\..+)?|embed_tokens|wte|embed_in", name):
        return unknown_site(name)
    site = from_module(name, model, side)
    if site.kind != "module":
        return site
    body = "transformer" if name.startswith(("h.", "wte")) else "gpt_neox" if "pythia" in model.lower() else "model"
    return Site("module", module=f"{body}.{name}", side=side)


def write(given: Any, folder: Path) -> None:
    """cfg.json and sae.safetensors, with our site names under `vesalius`, which sparsify drops.

    Raises InputError for what is not topk, for several sites, and for inputs and outputs of different widths.
    """
    dictionary = without_scales(one_site(given, NAME))
    needs_activation(dictionary, NAME, ("topk",))
    refuse(dictionary, NAME, row_norm="none", groups=())
    if dictionary.in_widths != dictionary.out_widths:
        raise InputError(
            f"{NAME} cannot express an input of width {dictionary.in_widths[0]} and an output of width "
            f"{dictionary.out_widths[0]}"
        )
    transcodes = dictionary.in_sites != dictionary.out_sites
    plain = without_input_bias(dictionary) if transcodes else with_input_bias(dictionary)
    tensors = {
        "encoder.weight": plain.W_enc.T,
        "encoder.bias": plain.b_enc,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_dec[0],
    }
    write_safetensors(folder / WEIGHTS, tensors if plain.skip is None else {**tensors, "W_skip": plain.skip.T})
    write_new(folder / CONFIG, json.dumps(_config(plain, transcodes), indent=1) + "\n")


def _config(given: Dictionary, transcodes: bool) -> dict[str, Any]:
    norms = given.W_dec.norm(dim=1)
    return {
        "activation": "topk",
        "expansion_factor": max(1, given.n_latents // given.in_widths[0]),
        "normalize_decoder": bool((norms - 1).abs().max() < 1e-3),
        "num_latents": given.n_latents,
        "k": given.k,
        "multi_topk": False,
        "skip_connection": given.skip is not None,
        "transcode": transcodes,
        "d_in": given.in_widths[0],
        "vesalius": {"in_site": str(given.in_sites[0]), "out_site": str(given.out_sites[0])},
    }
