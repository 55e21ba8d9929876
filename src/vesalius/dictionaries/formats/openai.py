"""OpenAI's sparse autoencoders of GPT-2 small (Gao et al. 2024): one pickled state dict a file.

pre_bias, latent_bias, encoder.weight [latent, d], decoder.weight [d, latent], activation and its state. Those with
activation TopK normalise each row. The path of the file says which site it is of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.formats.reading import Weights
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError
from vesalius.site import Site

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LOCATIONS = {
    "mlp_post_act": "mlp_post", "resid_delta_attn": "attn_out", "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out", "resid_post_mlp": "resid_post",
}  # fmt: skip


def claims(found: Found) -> bool:
    """Any pickled file that was given by name; what is in it is looked at only when that is allowed."""
    return found.given.endswith(_SUFFIXES)


def read(found: Found) -> Dictionary:
    """A Dictionary from a state dict (with unpickle=True).

    Raises FileFormatError when the file is not such a state dict, or for an activation that is not read here.
    """
    stored = found.pickled(found.given)
    name = str(stored.get("activation", "ReLU"))
    weights = Weights(found.path, {key: t for key, t in stored.items() if isinstance(t, Tensor)}, found.options.dtype)
    encoder = weights.take("encoder.weight", "latent", "d")
    n, d = encoder.shape
    k = _k(found.path, name, stored.get("activation_state_dict", {}))
    site = _site(found.path)
    return built(
        weights.path,
        "topk" if k else "relu",
        in_sites=(site,),
        out_sites=(site,),
        encoders=(encoder.T.contiguous(),),
        decoders=(weights.take("decoder.weight", d, n).T.contiguous(),),
        b_enc=weights.take("latent_bias", n),
        b_dec=(weights.take("pre_bias", d),),
        k=k,
        apply_b_dec_to_input=True,
        row_norm="layer_norm" if k else "none",
        metadata={"format": "openai", "activation": name, "model_name": "gpt2"},
    )


def _k(path: Path, name: str, state: Mapping[str, Any]) -> int | None:
    if name == "ReLU":
        return None
    after = state.get("postact_fn", "ReLU") if isinstance(state, Mapping) else None
    if name != "TopK" or after != "ReLU" or not isinstance(state.get("k"), int):
        raise FileFormatError(
            f"{path}: activation={name!r} with {dict(state)} is not read here; what is: ReLU, and TopK with k and ReLU "
            "after it"
        )
    return int(state["k"])


def _site(path: Path) -> Site:
    """From a path like resid_post_mlp_v5_32k/autoencoders/6.pt."""
    for part in path.parts:
        for location, kind in _LOCATIONS.items():
            if re.fullmatch(rf"{location}(_v\d+\w*)?", part) and path.stem.isdigit():
                return Site(kind, layer=int(path.stem))
    return unknown_site(None)
