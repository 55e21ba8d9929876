"""circuit-tracer's per-layer transcoders: layer_<number>.safetensors and config.yaml.

W_enc [latent, d], W_dec [latent, d], b_enc, b_dec; activation_function.threshold makes it jumprelu; W_skip [d_out,
d_in]; k makes it topk, unless config.yaml says so. config.yaml names the hooks that are read and written in every
layer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, made
from vesalius.dictionaries.formats.flat_yaml import flat_yaml, read_flat_yaml
from vesalius.dictionaries.formats.folding import (
    needs_activation,
    one_site,
    refuse,
    thresholds,
    without_input_bias,
    without_scales,
)
from vesalius.dictionaries.formats.names import ends, from_hook, to_hook
from vesalius.dictionaries.formats.opened import shapes
from vesalius.dictionaries.formats.weights import Weights
from vesalius.dictionaries.formats.writing import write_safetensors
from vesalius.dictionaries.places import is_unknown, name_of, unknown_place
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import write_atomic
from vesalius.site import Site

CONFIG, NAME = "config.yaml", "circuit-tracer"
THRESHOLD = "activation_function.threshold"
_FILE = re.compile(r"(?:.*_)?(\d+)\.safetensors")
_NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}


def claims(found: Found) -> bool:
    """A file with the tensors of one transcoder, or a folder of files named after layers."""
    if found.given:
        return found.given.endswith(".safetensors") and set(shapes(found.path)) >= _NEEDED
    return bool(_files(found.path))


def _files(folder: Path) -> dict[int, Path]:
    return {int(match[1]): path for path in folder.glob("layer_*.safetensors")
            if (match := re.fullmatch(r"layer_(\d+)\.safetensors", path.name))}  # fmt: skip


def read(found: Found) -> Dictionary:
    """One layer's transcoder as a Dictionary: the file that was given, or layer= of a folder.

    Raises InputError when the folder holds several layers and none was chosen.
    """
    path, layer = _chosen(found)
    config = read_config(found.folder)
    weights = found.weights(path.name)
    encoder = weights.take("W_enc", "latent", "d_in")
    n, d_in = encoder.shape
    decoder = weights.take("W_dec", n, "d_out")
    skip = weights.maybe("W_skip", decoder.shape[1], d_in)
    weights.refuse_others(NAME, {*_NEEDED, "W_skip", THRESHOLD, "k"})
    activation, k, extras = _activation(weights, config, n)
    sites = _sites(config, layer)
    return made(
        weights.path, activation, in_sites=(sites[0],), out_sites=(sites[1],), encoders=(encoder.T.contiguous(),),
        decoders=(decoder,), b_enc=weights.take("b_enc", n), b_dec=(weights.take("b_dec", decoder.shape[1]),), k=k,
        extras=extras, skip=None if skip is None else skip.T.contiguous(), about=about(config),
    )  # fmt: skip


def _chosen(found: Found) -> tuple[Path, int | None]:
    if found.given:
        match = _FILE.fullmatch(found.given)
        return found.path, int(match[1]) if match else None
    files = _files(found.path)
    layer = found.order.layer if found.order.layer is not None else next(iter(files)) if len(files) == 1 else None
    if layer not in files:
        raise InputError(
            f"{found.path} holds transcoders of {len(files)} layers "
            f"({', '.join(map(str, sorted(files)))}): say which with layer="
        )
    return files[layer], layer


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml, or nothing where there is none."""
    return read_flat_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def about(config: dict[str, Any]) -> dict[str, Any]:
    """What is kept of config.yaml."""
    model = {"model_name": config["model_name"]} if config.get("model_name") else {}
    return {"format": "circuit_tracer", **model, "config": config}


def _activation(weights: Weights, config: dict[str, Any], n: int) -> tuple[str, int | None, dict[str, Tensor]]:
    said = config.get("activation")
    if said not in (None, "relu", "topk", "jumprelu", "jump_relu"):
        raise FileFormatError(
            f"{weights.path.parent / CONFIG}: activation={said!r} is not read here; what is: relu, topk and, by a "
            "threshold in the file, jumprelu"
        )
    if said == "topk" or (said is None and "k" in weights):
        k = config.get("k") or (int(weights.take("k")) if "k" in weights else None)
        if not isinstance(k, int) or not 1 <= k <= n:
            raise FileFormatError(f"{weights.path.parent / CONFIG} says topk and gives k={k!r} of {n} latents")
        return "topk", k, {}
    if THRESHOLD in weights and said != "relu":
        return "jumprelu", None, {"threshold": non_negative(weights.path, weights.take(THRESHOLD, n))}
    return "relu", None, {}


def non_negative(path: Path, threshold: Tensor) -> Tensor:
    """The thresholds. Raises FileFormatError for one below zero, which lets negative latents through."""
    if bool((threshold < 0).any()):
        raise FileFormatError(f"{path}: {int((threshold < 0).sum())} thresholds are below zero; {NAME} lets negative "
                              "latents through them, which no dictionary here has")  # fmt: skip
    return threshold


def _sites(config: dict[str, Any], layer: int | None) -> tuple[Site, Site]:
    if layer is None or "feature_input_hook" not in config:
        return ends(unknown_place(None), unknown_place(None))
    return site_of(config, "feature_input_hook", layer), site_of(config, "feature_output_hook", layer)


def site_of(config: dict[str, Any], hook: str, layer: int) -> Site:
    """Where a layer reads or writes."""
    return from_hook(f"blocks.{layer}.{config.get(hook)}", model=str(config.get("model_name") or ""))


def write(given: Any, folder: Path) -> None:
    """layer_<number>.safetensors and config.yaml; further layers may be written to the same folder.

    Raises InputError for gated, for several sites, for places without layer, and for a folder with other hooks.
    """
    dictionary = without_scales(one_site(given, NAME))
    needs_activation(dictionary, NAME, ("relu", "jumprelu", "batchtopk", "topk"))
    refuse(dictionary, NAME, row_norm="none", groups=())
    dictionary = without_input_bias(dictionary)
    layer, names = hooks(dictionary.in_sites[0], dictionary.out_sites[0])
    topk = {"activation": "topk", "k": dictionary.k} if dictionary.activation == "topk" else {}
    model = dictionary.about.get("model_name")
    config: dict[str, Any] = {"model_name": model, "model_kind": "transcoder_set", **names, **topk}
    _same_config(folder, config)
    write_safetensors(folder / f"layer_{layer}.safetensors", _tensors(dictionary))
    write_atomic(folder / CONFIG, flat_yaml(config))


def hooks(read_at: Site, written: Site) -> tuple[int, dict[str, str]]:
    """Layer and hook names of both ends. Raises InputError for places that are not in one layer."""
    names = []
    for site in (read_at, written):
        hook = name_of(site) if is_unknown(site) else to_hook(site)
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
        if match is None or site.index is not None:
            raise InputError(f"{NAME} names places by a layer and a hook in it, which {site} has not")
        names.append((int(match[1]), match[2]))
    if names[0][0] != names[1][0]:
        raise InputError(f"{NAME} holds transcoders within one layer, not from {read_at} to {written}")
    return names[0][0], {"feature_input_hook": names[0][1], "feature_output_hook": names[1][1]}


def _same_config(folder: Path, config: dict[str, Any]) -> None:
    old = read_config(folder)
    for name in ("feature_input_hook", "feature_output_hook", "activation", "k"):
        if old and old.get(name) != config.get(name):
            raise InputError(f"{folder / CONFIG} has {name}={old.get(name)!r} for every layer, this has "
                             f"{config.get(name)!r}; choose another folder")  # fmt: skip


def _tensors(given: Dictionary) -> dict[str, Tensor]:
    own = {"W_enc": given.W_enc.T, "W_dec": given.W_dec, "b_enc": given.b_enc, "b_dec": given.b_dec[0]}
    if given.activation in ("jumprelu", "batchtopk"):
        own[THRESHOLD] = thresholds(given)
    return own if given.skip is None else {**own, "W_skip": given.skip.T}
