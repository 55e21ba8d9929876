"""Whether the tensors of a dictionary fit each other and its activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vesalius.dictionaries.kinds import activation_of
from vesalius.dictionaries.rows import check_row_norm
from vesalius.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from vesalius.dictionaries.dictionary import Dictionary


def check_weights(given: Dictionary) -> None:
    """Raise InputError naming the tensor and both shapes, UnknownNameError for activations and vectors."""
    n = given.b_enc.shape[0] if given.b_enc.ndim == 1 else -1
    if n < 1:
        raise InputError(f"b_enc must be [latent], at least one; got shape {tuple(given.b_enc.shape)}")
    _one_per_site("encoder", given.encoders, given.in_sites)
    _one_per_site("decoder", given.decoders, given.out_sites)
    _one_per_site("b_dec", given.b_dec, given.out_sites)
    _one_per_site("in_scale", given.in_scale, given.in_sites)
    _one_per_site("out_scale", given.out_scale, given.out_sites)
    for site, encoder in zip(given.in_sites, given.encoders, strict=True):
        _shape(f"the encoder of {site}", encoder, (None, n))
    for site, decoder, bias in zip(given.out_sites, given.decoders, given.b_dec, strict=True):
        _shape(f"the decoder of {site}", decoder, (n, None))
        _shape(f"b_dec of {site}", bias, (decoder.shape[1],))
    _check_activation(given, n)
    _check_paths(given)


def _one_per_site(name: str, given: Sequence[object], sites: Sequence[object]) -> None:
    if len(given) != len(sites) or not sites:
        raise InputError(f"{len(given)} of {name} for {len(sites)} site(s); give one each, at least one")


def _shape(name: str, tensor: Tensor, wanted: tuple[int | None, ...]) -> None:
    fits = tensor.ndim == len(wanted) and all(w in (None, size) for w, size in zip(wanted, tensor.shape, strict=True))
    if not fits:
        words = ", ".join("any" if size is None else str(size) for size in wanted)
        raise InputError(f"{name} must have shape [{words}]; got {tuple(tensor.shape)}")


def _check_activation(given: Dictionary, n: int) -> None:
    activation = activation_of(given.activation)
    for name, tensor in given.extras.items():
        if name not in activation.extras:
            raise UnknownNameError(f"vector of a {given.activation} dictionary", name, activation.extras)
        if tensor.ndim:
            _shape(name, tensor, (n,))
    missing = [name for name in activation.extras if name not in given.extras]
    if missing:
        raise InputError(f"a {given.activation} dictionary needs extras with {', '.join(missing)}")
    if given.activation == "topk" and not (given.k and 1 <= given.k <= n):
        raise InputError(f"a topk dictionary with {n} latents needs k between 1 and that; got {given.k}")


def _check_paths(given: Dictionary) -> None:
    widths = [encoder.shape[0] for encoder in given.encoders]
    ends = [decoder.shape[1] for decoder in given.decoders]
    if given.apply_b_dec_to_input and widths != ends:
        raise InputError(f"b_dec {ends} cannot be subtracted from inputs {widths}: the widths differ")
    check_row_norm(given.row_norm)
    if given.row_norm != "none" and given.in_sites != given.out_sites:
        raise InputError("rows are normalised only by dictionaries that rebuild what they read (row_norm)")
    if given.skip is not None:
        if len(widths) != 1:
            raise InputError("a skip is for dictionaries that read one site; it goes to the first that they rebuild")
        _shape("skip", given.skip, (widths[0], ends[0]))
