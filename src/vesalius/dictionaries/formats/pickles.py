"""Single pickled state dicts (.pt): whose they are is told by their tensors, and by the file's name and neighbours.

OpenAI's have a reader of their own. Read here are Goodfire's (encoder_linear, decoder_linear: ReLU, no bias on inputs),
those of Kissane et al. 2024 for attention (W_enc [d, latent], b_dec subtracted from inputs; <name>_cfg.json beside) and
Qwen Scope's (layer<n>.sae.pt: W_enc [latent, d], TopK, no bias on inputs; k is in the name of its folder).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats import crosscoder_learning, openai
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.dictionary_learning import state_of
from vesalius.dictionaries.formats.names import from_hook
from vesalius.dictionaries.formats.reading import Weights, check_sizes, read_json
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError
from vesalius.site import Site

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
HOLDS = "a .pt file of OpenAI, Goodfire, Qwen Scope (layer<n>.sae.pt) or Kissane et al. (<name>_cfg.json beside)"
_FOUR = {"W_enc", "W_dec", "b_enc", "b_dec"}
_GOODFIRE = {f"{side}_linear.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")}
_QWEN_FILE, _QWEN_FOLDER = re.compile(r"layer(\d+)\.sae\.pt"), re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")
_GOODFIRE_FILE = re.compile(r"(Llama-[\w.-]+?-Instruct)-SAE-l(\d+)")


def claims(found: Found) -> bool:
    """Any pickled file that was given by name; what is in it is looked at only when that is allowed."""
    return found.given.endswith(SUFFIXES)


def read(found: Found) -> SparseCoder:
    """A Dictionary from a state dict (with unpickle=True).

    Raises FileFormatError naming what the file holds, where it is none of these.
    """
    stored = found.pickled(found.given)
    if set(stored) >= openai.NEEDED:
        return openai.read_state(found, stored)
    weights = found.of(found.path, state_of(found.path, _unwrapped(found, stored)))
    reader = next((reader for needed, reader in _READERS if needed(found, weights)), None)
    if reader is None:
        raise FileFormatError(_unknown(found, weights))
    return reader(found, weights)


def _unwrapped(found: Found, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(stored.get("sae"), Mapping) and "version" in stored:
        raise FileFormatError(
            f"{found.path} is a checkpoint of OpenMOSS's library (lm-saes, llamascopium) as a pickle; read here is "
            "what it writes as sae_weights.safetensors, with config.json beside"
        )
    return stored


def _unknown(found: Found, weights: Weights) -> str:
    names = set(weights.tensors)
    what = f"holds {', '.join(sorted(names)[:12])}: no dictionary that is known here. Known are: {HOLDS}"
    if {"W_Q", "W_K", "W_V", "W_O"} <= names:
        what = "is low-rank sparse attention (Lorsa), whose latents read several positions; no dictionary here does"
    elif names >= _FOUR:
        what = (
            "holds W_enc, W_dec, b_enc and b_dec, which several libraries write with different axes and activations; "
            f"its name and what lies beside it do not say whose it is. Known are: {HOLDS}"
        )
    elif {"encoder.weight", "decoder.weight"} <= names:
        what = (
            "holds what dictionary_learning writes as ae.pt or ae_<step>.pt; the class it is of is in the config.json "
            "of its run. Put both into one folder, by these names, and load that"
        )
    return f"{found.path} {what}"


def _built(weights: Weights, activation: str, site: Site, metadata: dict[str, Any], **fields: Any) -> Dictionary:
    tensors = {name: fields.pop(name).contiguous() for name in ("encoder", "decoder")}
    return built(
        weights.path,
        activation,
        in_sites=(site,),
        out_sites=(site,),
        encoders=(tensors["encoder"],),
        decoders=(tensors["decoder"],),
        b_dec=(fields.pop("b_dec"),),
        metadata=metadata,
        **fields,
    )


def _goodfire(found: Found, weights: Weights) -> Dictionary:
    weights.refuse_others("a dictionary of Goodfire", _GOODFIRE)
    encoder = weights.take("encoder_linear.weight", "latent", "d")
    n, d = encoder.shape
    named = _GOODFIRE_FILE.search(found.path.as_posix())
    return _built(
        weights,
        "relu",
        Site("resid_post", layer=int(named[2])) if named else unknown_site(None),
        {"format": "goodfire", **({"model_name": f"meta-llama/{named[1]}"} if named else {})},
        encoder=encoder.T,
        decoder=weights.take("decoder_linear.weight", d, n).T,
        b_enc=weights.take("encoder_linear.bias", n),
        b_dec=weights.take("decoder_linear.bias", d),
    )


def _kissane_config(found: Found) -> Path:
    return found.path.with_name(f"{found.path.stem}_cfg.json")


def _kissane(found: Found, weights: Weights) -> Dictionary:
    """What its class computes is fixed; of the config only sizes and the place say something."""
    weights.refuse_others("a dictionary of Kissane et al.", _FOUR)
    path = _kissane_config(found)
    config = read_json(path)
    encoder = weights.take("W_enc", "d", "latent")
    d, n = encoder.shape
    check_sizes(path, config, act_size=d, dict_size=n)
    hook, head, model = config.get("act_name"), config.get("head"), str(config.get("model_name") or "")
    return _built(
        weights,
        "relu",
        # All heads side by side are called "cat".
        from_hook(str(hook) if hook else None, head if isinstance(head, int) else None, model),
        {"format": "kissane", "model_name": model, "cfg": config},
        encoder=encoder,
        decoder=weights.take("W_dec", n, d),
        b_enc=weights.take("b_enc", n),
        b_dec=weights.take("b_dec", d),
        apply_b_dec_to_input=True,
    )


def _qwen(found: Found, weights: Weights) -> Dictionary:
    weights.refuse_others("a dictionary of Qwen Scope", _FOUR)
    encoder = weights.take("W_enc", "latent", "d")
    n, d = encoder.shape
    layer, folder = _QWEN_FILE.fullmatch(found.given), _QWEN_FOLDER.search(found.path.resolve().as_posix())
    k = found.options.k or (int(folder[2]) if folder else None)
    if k is None:
        raise FileFormatError(
            f"{found.path}: how many latents are active stands in the name of the folder that Qwen publishes it in "
            "(SAE-Res-...-L0_<k>), and this is in another. Give it as k=, or --k on the command line"
        )
    assert layer is not None
    return _built(
        weights,
        "topk",
        Site("resid_post", layer=int(layer[1])),
        {"format": "qwen_scope", **({"model_name": f"Qwen/{folder[1]}"} if folder else {})},
        encoder=encoder.T,
        decoder=weights.take("W_dec", d, n).T,
        b_enc=weights.take("b_enc", n),
        b_dec=weights.take("b_dec", d),
        k=k,
    )


def _crosscoder(found: Found, weights: Weights) -> Dictionary:
    return crosscoder_learning.read_weights(found, found.maybe_json(crosscoder_learning.CONFIG), weights)


def _is_crosscoder(_found: Found, weights: Weights) -> bool:
    return isinstance(encoder := weights.tensors.get("encoder.weight"), Tensor) and encoder.ndim == 3


_READERS: tuple[tuple[Callable[[Found, Weights], bool], Callable[[Found, Weights], Dictionary]], ...] = (
    (lambda _, weights: set(weights.tensors) >= _GOODFIRE, _goodfire),
    (lambda found, weights: set(weights.tensors) >= _FOUR and bool(_QWEN_FILE.fullmatch(found.given)), _qwen),
    (lambda found, weights: set(weights.tensors) >= _FOUR and _kissane_config(found).is_file(), _kissane),
    (_is_crosscoder, _crosscoder),
)
