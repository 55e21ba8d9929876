"""circuit-tracer's transcoders, per layer and cross-layer; config.yaml names the hooks that layers read and write.

Per layer, layer_<number>.safetensors: W_enc [latent, d], W_dec [latent, d], b_enc, b_dec;
activation_function.threshold makes it jumprelu; W_skip [d_out, d_in]; k makes it topk, unless config.yaml says so.

Cross-layer, W_enc_<layer>.safetensors has W_enc_<layer> [latent, d], b_enc_<layer>, b_dec_<layer> and, of jumprelu,
threshold_<layer>; W_dec_<layer>.safetensors has W_dec_<layer> [latent, layers from this on, d].
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.flat_yaml import flat_yaml, read_flat_yaml
from vesalius.dictionaries.formats.folding import (
    needs_activation,
    one_site,
    refuse,
    thresholds,
    without_input_bias,
    without_scales,
)
from vesalius.dictionaries.formats.names import from_hook, to_hook, two_sites
from vesalius.dictionaries.formats.reading import Weights, partly, shapes
from vesalius.dictionaries.formats.writing import write_safetensors
from vesalius.dictionaries.stored_layer import StoredLayer, StoredTensor
from vesalius.dictionaries.unknown_sites import is_unknown, name_of, unknown_site
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import write_atomic
from vesalius.site import Site

CONFIG, NAME = "config.yaml", "circuit-tracer"
THRESHOLD = "activation_function.threshold"
_FILE = re.compile(r"(?:.*_)?(\d+)\.safetensors")
_SETTINGS = {
    "activation", "feature_input_hook", "feature_output_hook", "k", "model_kind", "model_name", "repo_id", "revision",
    "scan", "subfolder", "transcoders",
}  # fmt: skip
_NEEDED = {"W_enc", "W_dec", "b_enc", "b_dec"}
_DEFAULTS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
"""Of cross-layer transcoders whose config.yaml does not say."""


def claims(found: Found) -> bool:
    """A file with the tensors of one transcoder, or a folder of files named after layers."""
    if found.given:
        return found.given.endswith(".safetensors") and set(shapes(found.path)) >= _NEEDED
    return bool(_files(found.path))


def _files(folder: Path) -> dict[int, Path]:
    return {
        int(match[1]): path
        for path in folder.glob("layer_*.safetensors")
        if (match := re.fullmatch(r"layer_(\d+)\.safetensors", path.name))
    }


def read(found: Found) -> Dictionary:
    """One layer's transcoder as a Dictionary: the file that was given, or layer= of a folder.

    Raises InputError when the folder holds several layers and none was chosen.
    """
    path, layer = _chosen(found)
    config = _read_config(found.folder)
    found.refuse_settings(found.folder / CONFIG, config, _SETTINGS, NAME)
    weights = found.weights(path.name)
    encoder = weights.take("W_enc", "latent", "d_in")
    n, d_in = encoder.shape
    decoder = weights.take("W_dec", n, "d_out")
    skip = weights.maybe("W_skip", decoder.shape[1], d_in)
    weights.refuse_others(NAME, {*_NEEDED, "W_skip", THRESHOLD, "k"})
    activation, k, extras = _activation(weights, config, n)
    sites = _sites(config, layer)
    return built(
        weights.path,
        activation,
        in_sites=(sites[0],),
        out_sites=(sites[1],),
        encoders=(encoder.T.contiguous(),),
        decoders=(decoder,),
        b_enc=weights.take("b_enc", n),
        b_dec=(weights.take("b_dec", decoder.shape[1]),),
        k=k,
        extras=extras,
        skip=None if skip is None else skip.T.contiguous(),
        metadata=_metadata(config),
    )


def _chosen(found: Found) -> tuple[Path, int | None]:
    if found.given:
        match = _FILE.fullmatch(found.given)
        return found.path, int(match[1]) if match else None
    files = _files(found.path)
    layer = found.options.layer if found.options.layer is not None else next(iter(files)) if len(files) == 1 else None
    if layer not in files:
        raise InputError(
            f"{found.path} holds transcoders of {len(files)} layers "
            f"({', '.join(map(str, sorted(files)))}): say which with layer="
        )
    return files[layer], layer


def _read_config(folder: Path) -> dict[str, Any]:
    """config.yaml, or nothing where there is none."""
    return read_flat_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
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
    if said == "topk" or (said is None and ("k" in weights or config.get("k") is not None)):
        k = config.get("k")
        if k is None:
            k = int(weights.take("k")) if "k" in weights else None
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
            raise FileFormatError(f"{weights.path.parent / CONFIG} says topk and gives k={k!r} of {n} latents")
        return "topk", k, {}
    if "k" in weights or config.get("k") is not None:
        raise FileFormatError(f"{weights.path.parent / CONFIG} says activation={said!r}, and there is a k beside it")
    # Files of both kinds hold thresholds; config.yaml decides where it speaks of the activation.
    if THRESHOLD in weights and said != "relu":
        return "jumprelu", None, {"threshold": _non_negative(weights.path, weights.take(THRESHOLD, n))}
    if said in ("jumprelu", "jump_relu"):
        raise FileFormatError(
            f"{weights.path.parent / CONFIG} says activation={said!r}, and {weights.path} has no {THRESHOLD}"
        )
    return "relu", None, {}


def _non_negative(path: Path, threshold: Tensor) -> Tensor:
    """The thresholds. Raises FileFormatError for one below zero, which lets negative latents through."""
    if bool((threshold < 0).any()):
        raise FileFormatError(
            f"{path}: {int((threshold < 0).sum())} thresholds are below zero; {NAME} lets negative "
            "latents through them, which no dictionary here has"
        )
    return threshold


def _sites(config: dict[str, Any], layer: int | None) -> tuple[Site, Site]:
    if layer is None or "feature_input_hook" not in config:
        return two_sites(unknown_site(None), unknown_site(None))
    return _site_of(config, "feature_input_hook", layer), _site_of(config, "feature_output_hook", layer)


def _site_of(config: dict[str, Any], hook: str, layer: int) -> Site:
    """Where a layer reads or writes."""
    return from_hook(f"blocks.{layer}.{config.get(hook)}", model=str(config.get("model_name") or ""))


def write(given: Any, folder: Path) -> None:
    """layer_<number>.safetensors and config.yaml; further layers may be written to the same folder. Of a cross-layer
    transcoder two files a layer.

    Raises InputError for gated, for several sites, for sites without layer, and for a folder with other hooks.
    """
    if isinstance(given, CrossLayerTranscoder):
        _write_cross_layer(given, folder)
        return
    dictionary = without_scales(one_site(given, NAME))
    needs_activation(dictionary, NAME, ("relu", "jumprelu", "batchtopk", "topk"))
    refuse(dictionary, NAME, row_norm="none", groups=())
    dictionary = without_input_bias(dictionary)
    layer, names = _hooks(dictionary.in_sites[0], dictionary.out_sites[0])
    topk = {"activation": "topk", "k": dictionary.k} if dictionary.activation == "topk" else {}
    model = dictionary.metadata.get("model_name")
    config: dict[str, Any] = {"model_name": model, "model_kind": "transcoder_set", **names, **topk}
    _same_config(folder, config)
    write_safetensors(folder / f"layer_{layer}.safetensors", _tensors(dictionary))
    write_atomic(folder / CONFIG, flat_yaml(config))


def _hooks(read_at: Site, written: Site) -> tuple[int, dict[str, str]]:
    """Layer and hook names of both sites. Raises InputError for sites that are not in one layer."""
    names = []
    for site in (read_at, written):
        hook = name_of(site) if is_unknown(site) else to_hook(site)
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
        if match is None or site.index is not None:
            raise InputError(f"{NAME} names sites by a layer and a hook in it, which {site} has not")
        names.append((int(match[1]), match[2]))
    if names[0][0] != names[1][0]:
        raise InputError(f"{NAME} holds transcoders within one layer, not from {read_at} to {written}")
    return names[0][0], {"feature_input_hook": names[0][1], "feature_output_hook": names[1][1]}


def _same_config(folder: Path, config: dict[str, Any]) -> None:
    old = _read_config(folder)
    for name in ("feature_input_hook", "feature_output_hook", "activation", "k"):
        if old and old.get(name) != config.get(name):
            raise InputError(
                f"{folder / CONFIG} has {name}={old.get(name)!r} for every layer, this has "
                f"{config.get(name)!r}; choose another folder"
            )


def _tensors(given: Dictionary) -> dict[str, Tensor]:
    own = {"W_enc": given.W_enc.T, "W_dec": given.W_dec, "b_enc": given.b_enc, "b_dec": given.b_dec[0]}
    if given.activation in ("jumprelu", "batchtopk"):
        own[THRESHOLD] = thresholds(given)
    return own if given.skip is None else {**own, "W_skip": given.skip.T}


# Cross-layer


def claims_cross_layer(found: Found) -> bool:
    """By the first layer's encoder."""
    return not found.given and found.has("W_enc_0.safetensors")


def read_cross_layer(found: Found) -> CrossLayerTranscoder:
    """A CrossLayerTranscoder whose layers stay on disk. Raises FileFormatError for a layer that is missing."""
    config = _read_config(found.path)
    found.refuse_settings(found.path / CONFIG, config, _SETTINGS - {"k"}, NAME)
    if config.get("activation") not in (None, "relu", "jumprelu", "jump_relu"):
        raise FileFormatError(
            f"{found.path / CONFIG}: activation={config['activation']!r} of a cross-layer transcoder is not read here; "
            "what is: relu and, by a threshold in the files, jumprelu"
        )
    config = {**_DEFAULTS, **config}
    numbers = sorted(
        int(m[1]) for p in found.path.iterdir() if (m := re.fullmatch(r"W_enc_(\d+)\.safetensors", p.name))
    )
    if numbers != list(range(len(numbers))):
        raise FileFormatError(
            f"{found.path} holds the layers {numbers} of a cross-layer transcoder; it needs all from 0"
        )
    sites = [
        two_sites(_site_of(config, "feature_input_hook", number), _site_of(config, "feature_output_hook", number))
        for number in numbers
    ]
    outs = tuple(out for _, out in sites)
    layers, biases = zip(*(_layer(found, number, sites[number][0], outs[number:]) for number in numbers), strict=True)
    return CrossLayerTranscoder(layers, biases, _metadata(config))


def _layer(found: Found, number: int, site: Site, outs: tuple[Site, ...]) -> tuple[StoredLayer, Tensor]:
    first, second = (found.path / f"{name}_{number}.safetensors" for name in ("W_enc", "W_dec"))
    encoder, decoder = f"W_enc_{number}", f"W_dec_{number}"
    weights = found.of(first, partly(first, {encoder}))
    n, d = weights.take(f"b_enc_{number}", "latent").shape[0], weights.take(f"b_dec_{number}", "d").shape[0]
    read, written = shapes(first).get(encoder), shapes(second).get(decoder)
    if read is None or len(read) != 2 or read[0] != n:
        raise FileFormatError(f"{first}: {encoder} should have shape [{n}, d], it has {read}")
    if written != (n, len(outs), d):
        raise FileFormatError(f"{second}: {decoder} should have shape [{n}, {len(outs)}, {d}], it has {written}")
    threshold = weights.maybe(f"threshold_{number}", n)
    found.of(second, partly(second, {decoder})).refuse_others(NAME, ())
    weights.refuse_others(NAME, {f"{name}_{number}" for name in ("b_enc", "b_dec", "threshold")})
    layer = StoredLayer(
        "relu" if threshold is None else "jumprelu",
        in_sites=(site,),
        out_sites=outs,
        in_widths=(read[1],),
        out_widths=(d,) * len(outs),
        encoder=StoredTensor(first.absolute(), encoder),
        decoder=StoredTensor(second.absolute(), decoder),
        b_enc=weights.take(f"b_enc_{number}", n),
        extras={} if threshold is None else {"threshold": _non_negative(first, threshold)},
    )
    return layer, weights.take(f"b_dec_{number}", d)


def _write_cross_layer(given: CrossLayerTranscoder, folder: Path) -> None:
    """Two files a layer and config.yaml; one layer is in memory at a time.

    Raises InputError for gated and topk, for a skip, for layers of different kinds, widths or numbers of latents.
    """
    coder = given.folded()
    found = [_hooks(read_at, written) for read_at, written in zip(coder.in_sites, coder.out_sites, strict=True)]
    if [layer for layer, _ in found] != list(range(len(found))) or any(names != found[0][1] for _, names in found):
        raise InputError(
            f"{NAME} holds cross-layer transcoders of all layers from 0 with the same hook in each; this "
            f"reads {', '.join(map(str, coder.in_sites))}"
        )
    kinds = {(layer.activation, layer.in_widths, layer.n_latents) for layer in coder.layers}
    if len(kinds) != 1 or {*coder.layers[0].in_widths} != {bias.shape[0] for bias in coder.b_dec}:
        raise InputError(
            f"{NAME} holds layers of one activation, width and number of latents; these are {sorted(kinds)}"
        )
    for number, layer in enumerate(coder.layers):
        whole = layer if isinstance(layer, Dictionary) else layer.whole() if isinstance(layer, StoredLayer) else None
        assert whole is not None
        _write_layer(folder, number, without_input_bias(whole), coder.b_dec[number])
    config = {"model_name": coder.metadata.get("model_name"), "model_kind": "cross_layer_transcoder", **found[0][1]}
    write_atomic(folder / CONFIG, flat_yaml(config))


def _write_layer(folder: Path, number: int, layer: Dictionary, b_dec: Tensor) -> None:
    if layer.activation not in ("relu", "jumprelu", "batchtopk") or layer.skip is not None or layer.row_norm != "none":
        what = f"activation={layer.activation!r}" if layer.skip is None else "a skip"
        raise InputError(f"{NAME}'s cross-layer transcoders cannot express {what}; save it in another format")
    own = {f"W_enc_{number}": layer.W_enc.T, f"b_enc_{number}": layer.b_enc, f"b_dec_{number}": b_dec}
    if layer.activation != "relu":
        own[f"threshold_{number}"] = thresholds(layer)
    write_safetensors(folder / f"W_enc_{number}.safetensors", own)
    decoder = torch.stack(list(layer.decoders), 1)
    write_safetensors(folder / f"W_dec_{number}.safetensors", {f"W_dec_{number}": decoder})
