"""OpenAI's sparse autoencoders (Gao et al. 2024; those of GPT-2 small): one pickled state dict a file.

pre_bias, latent_bias, encoder.weight [latent, d], decoder.weight [d, latent], activation and its state. Whether rows
are normalised stands nowhere; OpenAI's own loader takes it that those with activation TopK do. row_norm= says
otherwise, for one that was trained without. The path of the file says which site it is of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.formats.base import Found, built
from vesalius.dictionaries.unknown_sites import unknown_site
from vesalius.errors import FileFormatError, UnknownNameError
from vesalius.site import Site

NEEDED = {"pre_bias", "latent_bias", "encoder.weight"}
"""By which a state dict is known as one of OpenAI's."""
_OTHERS = {
    "decoder.weight", "activation", "activation_state_dict", "stats_last_nonzero", "latents_activation_frequency",
    "latents_mean_square",
}  # fmt: skip
ROW_NORMS = ("none", "layer_norm")
_LOCATIONS = {
    "mlp_post_act": "mlp_post", "resid_delta_attn": "attn_out", "resid_post_attn": "resid_mid",
    "resid_delta_mlp": "mlp_out", "resid_post_mlp": "resid_post",
}  # fmt: skip


def read_state(found: Found, stored: Mapping[str, Any]) -> Dictionary:
    """A Dictionary from a state dict that has the tensors NEEDED.

    Raises FileFormatError for one that is missing or more, and for an activation that is not read here.
    """
    name = str(stored.get("activation", "ReLU"))
    weights = found.of(found.path, {key: t for key, t in stored.items() if isinstance(t, Tensor)})
    others = sorted(set(stored) - set(weights.tensors) - _OTHERS - set(found.options.ignore))
    if others:
        raise FileFormatError(f"{found.path} holds {', '.join(others)}, which are no tensors and not known of OpenAI's")
    weights.refuse_others("a dictionary of OpenAI", NEEDED | _OTHERS)
    row_norm = found.options.row_norm or ("layer_norm" if name == "TopK" else "none")
    if row_norm not in ROW_NORMS:
        raise UnknownNameError("way in which OpenAI's normalise rows", row_norm, ROW_NORMS)
    encoder = weights.take("encoder.weight", "latent", "d")
    n, d = encoder.shape
    k = _k(found.path, name, stored.get("activation_state_dict", {}))
    site = _site(found.path)
    return built(
        weights.path,
        "relu" if k is None else "topk",
        in_sites=(site,),
        out_sites=(site,),
        encoders=(encoder.T.contiguous(),),
        decoders=(weights.take("decoder.weight", d, n).T.contiguous(),),
        b_enc=weights.take("latent_bias", n),
        b_dec=(weights.take("pre_bias", d),),
        k=k,
        apply_b_dec_to_input=True,
        row_norm=row_norm,
        metadata={"format": "openai", "activation": name, "model_name": "gpt2"},
    )


def _k(path: Path, name: str, state: Mapping[str, Any]) -> int | None:
    if name == "ReLU":
        return None
    after = state.get("postact_fn", "ReLU") if isinstance(state, Mapping) else None
    k = state.get("k") if isinstance(state, Mapping) else None
    if name != "TopK" or after != "ReLU" or not isinstance(k, int) or isinstance(k, bool):
        raise FileFormatError(
            f"{path}: activation={name!r} with {state!r:.80} is not read here; what is: ReLU, and TopK with k and ReLU "
            "after it"
        )
    return k


def _site(path: Path) -> Site:
    """From a path like resid_post_mlp_v5_32k/autoencoders/6.pt."""
    for part in path.parts:
        for location, kind in _LOCATIONS.items():
            if re.fullmatch(rf"{location}(_v\d+\w*)?", part) and path.stem.isdigit():
                return Site(kind, layer=int(path.stem))
    return unknown_site(None)
