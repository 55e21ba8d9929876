"""Gemma Scope (Lieberum et al. 2024): params.npz with a JumpReLU dictionary or transcoder of one site.

W_enc [d_in, latent], W_dec [latent, d_out], b_enc, b_dec, threshold [latent]. b_dec is not subtracted from inputs.
Only the path of its folder says which site a dictionary is of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.folding import (
    needs_activation,
    one_site,
    refuse,
    thresholds,
    without_input_bias,
    without_scales,
)
from vesalius.dictionaries.formats.names import from_hook
from vesalius.dictionaries.formats.writing import npz_bytes, write_new
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.site import Site

ARRAYS = "params.npz"
_REPOSITORY = re.compile(r"gemma-scope-\w+-(?:pt|it)-(res|mlp|att|transcoders)")
_LAYER = re.compile(r"layer_(\d+)")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_ACTIVATIONS = ("relu", "jumprelu", "batchtopk")


def claims(found: Found) -> bool:
    """An .npz file that was given, or the one there is."""
    return found.given.endswith(".npz") or found.has(ARRAYS)


def read(found: Found) -> Dictionary:
    """A Dictionary from params.npz."""
    weights = found.arrays(found.given or ARRAYS)
    # Some files name them in lower case.
    upper = {"W_" + name[2:] if name.startswith("w_") else name: tensor for name, tensor in weights.tensors.items()}
    weights = found.of(weights.path, upper)
    encoder = weights.take("W_enc", "d_in", "latent")
    d_in, n = encoder.shape
    decoder = weights.take("W_dec", n, "d_out")
    factor = weights.maybe("scaling_factor", n)
    weights.refuse_others("Gemma Scope", {"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "scaling_factor"})
    if factor is not None and not bool(torch.allclose(factor, torch.ones_like(factor))):
        decoder = decoder * factor[:, None]
    sites = _sites(found.path.resolve())
    # Dictionaries of the embedding were trained on it before Gemma multiplies it with sqrt(d_model).
    scale = d_in**-0.5 if sites[0] == Site("embed") else 1.0
    return built(
        weights.path,
        "jumprelu",
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(encoder,),
        decoders=(decoder,),
        b_enc=weights.take("b_enc", n),
        b_dec=(weights.take("b_dec", decoder.shape[1]),),
        extras={"threshold": weights.take("threshold", n)},
        in_scale=(scale,),
        out_scale=(scale,),
        metadata={"format": "gemma_scope", "prepend_bos": True, **path_metadata(found.path.resolve())},
    )


def path_metadata(path: Path) -> dict[str, Any]:
    """The last folders of the path, which say layer, width and sparsity."""
    folder = path if path.is_dir() else path.parent
    return {"folder": "/".join(folder.parts[-3:])}


def _sites(path: Path) -> tuple[Site, Site]:
    """From a path like gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82."""
    repository, layer = _REPOSITORY.search(str(path)), _LAYER.search(str(path))
    if repository and "/embedding" in path.as_posix():
        return Site("embed"), Site("embed")
    if not repository or not layer:
        return unknown_site(None), unknown_site(None)
    if repository[1] == "transcoders":
        return from_hook(f"blocks.{layer[1]}.ln2.hook_normalized"), from_hook(f"blocks.{layer[1]}.hook_mlp_out")
    site = from_hook(f"blocks.{layer[1]}.{_HOOKS[repository[1]]}")
    return site, site


def writable(given: Any, name: str) -> Dictionary:
    """The same function without scales and without b_dec on inputs. Raises InputError where there is none."""
    dictionary = without_scales(one_site(given, name))
    needs_activation(dictionary, name, _ACTIVATIONS)
    refuse(dictionary, name, row_norm="none", groups=())
    return without_input_bias(dictionary)


def write(given: Any, folder: Path) -> None:
    """params.npz. Raises InputError for topk and gated, for several sites, and for a skip."""
    dictionary = writable(given, "Gemma Scope 1")
    refuse(dictionary, "Gemma Scope 1", skip=None)
    tensors = {
        "W_enc": dictionary.W_enc,
        "W_dec": dictionary.W_dec,
        "b_enc": dictionary.b_enc,
        "b_dec": dictionary.b_dec[0],
        "threshold": thresholds(dictionary),
    }
    write_new(folder / ARRAYS, npz_bytes(tensors))
