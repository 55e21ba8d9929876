"""Gemma Scope 2: safetensors with JumpReLU dictionaries, transcoders with a linear skip, and cross-layer transcoders.

w_enc [d_in, latent], w_dec [latent, d_out], b_enc, b_dec, threshold [latent], affine_skip_connection [d_in, d_out]. A
cross-layer transcoder is one file a layer, with w_dec [latent, layer, d_out], zero for layers before its own.
config.json, where there is one, says where it stands; else the folder's path does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built, own_sites
from vesalius.dictionaries.formats.folding import refuse, thresholds
from vesalius.dictionaries.formats.gemma_scope import path_metadata, writable
from vesalius.dictionaries.formats.names import from_module_end, two_sites
from vesalius.dictionaries.formats.reading import check_sizes, flag, partly, shapes
from vesalius.dictionaries.formats.writing import write_new, write_safetensors
from vesalius.dictionaries.stored_layer import StoredLayer, StoredTensor
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError
from vesalius.site import Site

WEIGHTS, CONFIG, NAME = "params.safetensors", "config.json", "Gemma Scope 2"
_LAYER = re.compile(r"layer_(\d+)")
_FOLDERS = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out"}
_MODULES = {
    "resid_post": "output", "mlp_in": "pre_feedforward_layernorm.output", "z": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output", "attn_out": "post_attention_layernorm.output",
}  # fmt: skip
_SETTINGS = {
    "affine_connection", "architecture", "hf_hook_point_in", "hf_hook_point_out", "l0", "model_name", "type",
    "vesalius", "width",
}  # fmt: skip
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold", "affine_skip_connection")


def claims(found: Found) -> bool:
    """A safetensors file with `w_enc` and a decoder of one site."""
    name = found.given or WEIGHTS
    return name.endswith(".safetensors") and found.has(name) and len(shapes(found.folder / name).get("w_dec", ())) == 2


def read(found: Found) -> Dictionary:
    """A Dictionary from params.safetensors and, where it is there, config.json."""
    config, weights = _checked(found), found.weights(found.given or WEIGHTS)
    encoder = weights.take("w_enc", "d_in", "latent")
    d_in, n = encoder.shape
    decoder = weights.take("w_dec", n, "d_out")
    skip = weights.maybe("affine_skip_connection", d_in, decoder.shape[1])
    # A tensor that is not understood means that something would be left out of what it computes.
    weights.refuse_others(NAME, _TENSORS)
    check_sizes(found.folder / CONFIG, config, width=n)
    _check_skip(found, config, skip is not None)
    sites = _sites(config, found.folder.resolve(), skip is not None or d_in != decoder.shape[1])
    return built(
        weights.path,
        "jumprelu",
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(encoder,),
        decoders=(decoder,),
        b_enc=weights.take("b_enc", n),
        b_dec=(weights.take("b_dec", decoder.shape[1]),),
        skip=skip,
        extras={"threshold": weights.take("threshold", n)},
        metadata=_metadata(config, found),
    )


def _check_skip(found: Found, config: dict[str, Any], there: bool) -> None:
    path = found.folder / CONFIG
    if flag(path, config, "affine_connection", there) != there:
        raise FileFormatError(
            f"{path} says affine_connection={config['affine_connection']}, and the weights beside it have "
            f"{'an' if there else 'no'} affine_skip_connection"
        )


def _checked(found: Found) -> dict[str, Any]:
    config = found.maybe_json(CONFIG)
    found.refuse_settings(found.folder / CONFIG, config, _SETTINGS, NAME)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FileFormatError(
            f"{found.folder / CONFIG}: architecture={config['architecture']!r} is not read here; what is: jump_relu"
        )
    return config


def _metadata(config: dict[str, Any], found: Found) -> dict[str, Any]:
    model = {"model_name": config["model_name"]} if config.get("model_name") else {}
    return {"format": "gemma_scope_2", **model, "config": config, **path_metadata(found.folder.resolve())}


def _sites(config: dict[str, Any], path: Path, transcodes: bool) -> tuple[Site, Site]:
    """From config.json, or from a path like transcoder/layer_12_width_16k_l0_small_affine."""
    read_at = config.get("hf_hook_point_in")
    if isinstance(config.get("vesalius"), dict):
        return own_sites(path / CONFIG, config["vesalius"])
    if read_at:
        site = from_module_end(str(read_at), "gemma-3")
        written = config.get("hf_hook_point_out")
        return site, from_module_end(str(written), "gemma-3") if written and written != read_at else site
    layer, folder = _LAYER.search(path.as_posix()), path.as_posix()
    kinds = [kind for word, kind in _FOLDERS.items() if f"/{word}" in folder]
    if layer and kinds:
        return (Site(kinds[0], layer=int(layer[1])),) * 2
    if layer and "/transcoder" in folder:
        return Site("mlp_in", layer=int(layer[1])), Site("mlp_out", layer=int(layer[1]))
    return two_sites(unknown_site(None), unknown_site(None)) if transcodes else (unknown_site(None),) * 2


def write(given: Any, folder: Path) -> None:
    """params.safetensors and config.json. Raises InputError for topk and gated, and for several sites."""
    dictionary = writable(given, NAME)
    if dictionary.in_sites == dictionary.out_sites:
        refuse(dictionary, f"{NAME}, where only transcoders have a skip,", skip=None)
    tensors: dict[str, Tensor] = {
        "w_enc": dictionary.W_enc,
        "w_dec": dictionary.W_dec,
        "b_enc": dictionary.b_enc,
        "b_dec": dictionary.b_dec[0],
        "threshold": thresholds(dictionary),
    }
    skip = {} if dictionary.skip is None else {"affine_skip_connection": dictionary.skip}
    write_safetensors(folder / WEIGHTS, tensors | skip)
    config = {
        "architecture": "jump_relu",
        "affine_connection": dictionary.skip is not None,
        "width": dictionary.n_latents,
        "model_name": dictionary.metadata.get("model_name"),
        **_hook_points(dictionary),
        "vesalius": {"in_site": str(dictionary.in_sites[0]), "out_site": str(dictionary.out_sites[0])},
    }
    write_new(folder / CONFIG, json.dumps(config, indent=1) + "\n")


def _hook_points(given: Dictionary) -> dict[str, str]:
    """Where it reads and writes, in the words of Gemma's modules, as far as there are such words."""
    ends = {"hf_hook_point_in": given.in_sites[0], "hf_hook_point_out": given.out_sites[0]}
    return {
        name: f"model.layers.{site.layer}.{_MODULES[site.kind]}"
        for name, site in ends.items()
        if site.kind in _MODULES and site.index is None
    }


def layer_files(folder: Path) -> dict[int, Path]:
    """Files of a cross-layer transcoder by layer: safetensors named after one, whose decoder has three axes."""
    named = {path: _LAYER.search(path.name) for path in folder.glob("*.safetensors")}
    found = {int(match[1]): path for path, match in named.items() if match}
    return found if found and len(shapes(found[min(found)]).get("w_dec", ())) == 3 else {}


def claims_cross_layer(found: Found) -> bool:
    """A folder of such files."""
    return not found.given and bool(layer_files(found.path))


def read_cross_layer(found: Found) -> CrossLayerTranscoder:
    """A CrossLayerTranscoder whose layers stay on disk. Raises FileFormatError for a layer that is missing."""
    files, config = layer_files(found.path), _checked(found)
    if sorted(files) != list(range(len(files))):
        raise FileFormatError(
            f"{found.path} holds the layers {sorted(files)} of a cross-layer transcoder; it needs all from 0"
        )
    outs = tuple(Site("mlp_out", layer=number) for number in range(len(files)))
    layers, biases = zip(*(_layer(found, files[number], number, outs) for number in sorted(files)), strict=True)
    return CrossLayerTranscoder(layers, biases, _metadata(config, found))


def _layer(found: Found, path: Path, number: int, outs: tuple[Site, ...]) -> tuple[StoredLayer, Tensor]:
    weights = found.of(path, partly(path, {"w_enc", "w_dec"}))
    weights.refuse_others(NAME, _TENSORS)
    sizes = shapes(path)
    n, d_out = weights.take("b_enc", "latent").shape[0], weights.take("b_dec", "d_out").shape[0]
    if sizes.get("w_dec") != (n, len(outs), d_out) or sizes.get("w_enc", (0,))[1:] != (n,):
        raise FileFormatError(
            f"{path}: w_enc {sizes.get('w_enc')} and w_dec {sizes.get('w_dec')} do not fit {n} latents, {len(outs)} "
            f"layers and outputs of width {d_out}"
        )
    d_in = sizes["w_enc"][0]
    layer = StoredLayer(
        "jumprelu",
        in_sites=(Site("mlp_in", layer=number),),
        out_sites=outs[number:],
        in_widths=(d_in,),
        out_widths=(d_out,) * (len(outs) - number),
        encoder=StoredTensor(path.absolute(), "w_enc", latent_first=False),
        decoder=StoredTensor(path.absolute(), "w_dec"),
        b_enc=weights.take("b_enc", n),
        first=number,
        extras={"threshold": weights.take("threshold", n)},
        skip=weights.maybe("affine_skip_connection", d_in, d_out),
    )
    return layer, weights.take("b_dec", d_out)
