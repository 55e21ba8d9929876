"""circuit-tracer's cross-layer transcoders: W_enc_<layer>.safetensors, W_dec_<layer>.safetensors and config.yaml.

The first has W_enc_<layer> [latent, d], b_enc_<layer>, b_dec_<layer> and, of jumprelu, threshold_<layer>; the second
W_dec_<layer> [latent, layers from this on, d].
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found
from vesalius.dictionaries.formats.circuit_tracer import CONFIG, NAME, about, hooks, non_negative, read_config, site_of
from vesalius.dictionaries.formats.flat_yaml import flat_yaml
from vesalius.dictionaries.formats.folding import thresholds, without_input_bias
from vesalius.dictionaries.formats.names import ends
from vesalius.dictionaries.formats.opened import partly, shapes
from vesalius.dictionaries.formats.weights import Weights
from vesalius.dictionaries.formats.writing import write_safetensors
from vesalius.dictionaries.stored import Stored
from vesalius.dictionaries.stored_layer import StoredLayer
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import write_atomic
from vesalius.site import Site

_DEFAULTS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def claims(found: Found) -> bool:
    """By the first layer's encoder."""
    return not found.given and found.has("W_enc_0.safetensors")


def read(found: Found) -> CrossLayerTranscoder:
    """A CrossLayerTranscoder whose layers stay on disk. Raises FileFormatError for a layer that is missing."""
    config = {**_DEFAULTS, **read_config(found.path)}
    numbers = sorted(
        int(m[1]) for p in found.path.iterdir() if (m := re.fullmatch(r"W_enc_(\d+)\.safetensors", p.name))
    )
    if numbers != list(range(len(numbers))):
        raise FileFormatError(
            f"{found.path} holds the layers {numbers} of a cross-layer transcoder; it needs all from 0"
        )
    sites = [ends(site_of(config, "feature_input_hook", number), site_of(config, "feature_output_hook", number))
             for number in numbers]  # fmt: skip
    outs = tuple(out for _, out in sites)
    layers, biases = zip(*(_layer(found, number, sites[number][0], outs[number:]) for number in numbers), strict=True)
    return CrossLayerTranscoder(layers, biases, about(config))


def _layer(found: Found, number: int, site: Site, outs: tuple[Site, ...]) -> tuple[StoredLayer, Tensor]:
    first, second = (found.path / f"{name}_{number}.safetensors" for name in ("W_enc", "W_dec"))
    encoder, decoder = f"W_enc_{number}", f"W_dec_{number}"
    weights = Weights(first, partly(first, {encoder}), found.order.dtype)
    n, d = weights.take(f"b_enc_{number}", "latent").shape[0], weights.take(f"b_dec_{number}", "d").shape[0]
    read, written = shapes(first).get(encoder), shapes(second).get(decoder)
    if read is None or len(read) != 2 or read[0] != n:
        raise FileFormatError(f"{first}: {encoder} should have shape [{n}, d], it has {read}")
    if written != (n, len(outs), d):
        raise FileFormatError(f"{second}: {decoder} should have shape [{n}, {len(outs)}, {d}], it has {written}")
    threshold = weights.maybe(f"threshold_{number}", n)
    weights.refuse_others(NAME, {f"{name}_{number}" for name in ("b_enc", "b_dec", "threshold")})
    layer = StoredLayer(
        "relu" if threshold is None else "jumprelu", in_sites=(site,), out_sites=outs, in_widths=(read[1],),
        out_widths=(d,) * len(outs), encoder=Stored(first.absolute(), encoder),
        decoder=Stored(second.absolute(), decoder),
        b_enc=weights.take(f"b_enc_{number}", n),
        extras={} if threshold is None else {"threshold": non_negative(first, threshold)},
    )  # fmt: skip
    return layer, weights.take(f"b_dec_{number}", d)


def write(given: CrossLayerTranscoder, folder: Path) -> None:
    """Two files a layer and config.yaml; one layer is in memory at a time.

    Raises InputError for gated and topk, for a skip, for layers of different kinds, widths or numbers of latents.
    """
    coder = given.folded()
    found = [hooks(read_at, written) for read_at, written in zip(coder.in_sites, coder.out_sites, strict=True)]
    if [layer for layer, _ in found] != list(range(len(found))) or any(names != found[0][1] for _, names in found):
        raise InputError(f"{NAME} holds cross-layer transcoders of all layers from 0 with the same hook in each; this "
                         f"reads {', '.join(map(str, coder.in_sites))}")  # fmt: skip
    kinds = {(layer.activation, layer.in_widths, layer.n_latents) for layer in coder.layers}
    if len(kinds) != 1 or {*coder.layers[0].in_widths} != {bias.shape[0] for bias in coder.b_dec}:
        raise InputError(
            f"{NAME} holds layers of one activation, width and number of latents; these are {sorted(kinds)}"
        )
    for number, layer in enumerate(coder.layers):
        whole = layer if isinstance(layer, Dictionary) else layer.whole() if isinstance(layer, StoredLayer) else None
        assert whole is not None
        _write_layer(folder, number, without_input_bias(whole), coder.b_dec[number])
    config = {"model_name": coder.about.get("model_name"), "model_kind": "cross_layer_transcoder", **found[0][1]}
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
