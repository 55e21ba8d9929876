"""The same function with other tensors: what a format has no field for is folded into the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.dictionaries.dictionary import Dictionary
from vesalius.errors import InputError

_TINY = 1e-30


def without_input_bias(given: Dictionary) -> Dictionary:
    """b_dec no longer subtracted from inputs: taken off b_enc instead."""
    if not given.apply_b_dec_to_input:
        return given
    b_enc, extras = _moved(given, -1)
    return replace(given, apply_b_dec_to_input=False, b_enc=b_enc, extras=extras)


def with_input_bias(given: Dictionary) -> Dictionary:
    """b_dec subtracted from inputs, and added to b_enc instead."""
    if given.apply_b_dec_to_input:
        return given
    b_enc, extras = _moved(given, 1)
    return replace(given, apply_b_dec_to_input=True, b_enc=b_enc, extras=extras)


def _moved(given: Dictionary, sign: int) -> tuple[Tensor, dict[str, Tensor]]:
    pairs = zip(given.b_dec, given.encoders, strict=True)
    # (x - b_dec) W = x W - b_dec W, so that the bias can be taken on either side.
    shift = torch.stack([sign * (bias @ encoder) for bias, encoder in pairs]).sum(0)
    extras = dict(given.extras)
    if given.activation == "gated":  # its magnitude shares the product of input and encoder, but not b_enc
        extras["b_mag"] = extras["b_mag"] + extras["r_mag"].exp() * shift
    return given.b_enc + shift, extras


def latents_times(given: Dictionary, factor: Tensor) -> Dictionary:
    """Latents multiplied by factor [latent] (above zero) and decoder rows divided by it."""
    safe = factor.clamp(min=_TINY)
    if given.activation == "gated":
        extras = {"r_mag": given.extras["r_mag"], "b_mag": given.extras["b_mag"] * safe}
    else:
        extras = {name: tensor * safe for name, tensor in given.extras.items()}
    return replace(
        given,
        encoders=tuple(encoder * safe for encoder in given.encoders),
        b_enc=given.b_enc * safe,
        extras=extras,
        decoders=tuple(decoder / safe[:, None] for decoder in given.decoders),
    )


def without_scales(given: Dictionary) -> Dictionary:
    """Scales of inputs and outputs folded into the weights."""
    return given.folded() if {*given.in_scale, *given.out_scale} != {1.0} else given


def one_site(given: Dictionary, name: str) -> Dictionary:
    """The same dictionary. Raises InputError when it reads or writes several sites, which the format cannot hold."""
    if len(given.in_sites) != 1 or len(given.out_sites) != 1:
        raise InputError(
            f"{name} holds dictionaries that read one site and write one; this reads "
            f"{', '.join(map(str, given.in_sites))} and writes {', '.join(map(str, given.out_sites))}"
        )
    return given


def refuse(given: Dictionary, name: str, **cannot: object) -> None:
    """Raises InputError naming every property (attribute=value that must hold) that the format cannot express."""
    broken = [
        f"{attribute}={getattr(given, attribute)!r}"
        for attribute, value in cannot.items()
        if getattr(given, attribute) != value
    ]
    if broken:
        raise InputError(f"{name} cannot express {', '.join(broken)}; save it in another format")


def needs_activation(given: Dictionary, name: str, known: tuple[str, ...]) -> None:
    """Raises InputError for an activation that the format does not have."""
    if given.activation not in known:
        raise InputError(
            f"{name} cannot express activation={given.activation!r}; it has {', '.join(known) or 'none'}. Save it in "
            "another format"
        )


def thresholds(given: Dictionary) -> Float[Tensor, " latent"]:
    """Threshold of every latent: zero for relu, the one number of batchtopk for all."""
    if given.activation == "relu":
        return given.b_enc.new_zeros(given.n_latents)
    return given.extras["threshold"].expand(given.n_latents).contiguous()
