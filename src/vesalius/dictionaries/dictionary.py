"""Dictionary: a fitted sparse coder with one set of latents. SAE, transcoder and crosscoder are this noun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.coder import SiteTensors
from vesalius.dictionaries.coder import Reconstruction
from vesalius.dictionaries.history import History
from vesalius.dictionaries.kinds import ACTIVATIONS
from vesalius.dictionaries.latent import Latent
from vesalius.dictionaries.rows import (
    Units,
    aligned_rows,
    check_latents,
    check_one_per_site,
    check_row_norm,
    check_shape,
    chunks_of,
    joined_sparse,
    normalised,
    only_one,
    shaped,
    site_number,
    unscaled,
)
from vesalius.dictionaries.unexplained import Unexplained
from vesalius.directions import Direction
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.intervention import digest
from vesalius.model.products import linear
from vesalius.protocol import content_hash
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Latents that read one or more sites and reconstruct one or more.

    With s over sites: pre = b_enc + sum_s (in_scale_s x_s - [b_dec_s]) W_enc_s, latents = activation(pre), and the
    reconstruction at s is (latents W_dec_s + b_dec_s [+ skip]) / out_scale_s. The b_dec in brackets is there with
    `apply_b_dec_to_input`, the skip (x W_skip, of the scaled input) in transcoders that have one. With `row_norm` each
    row is normalised first, and its reconstruction is brought back to that row's mean and size.

    Raises InputError naming the tensor for shapes that don't fit, NotFiniteError for NaN and infinity.
    """

    activation: str
    """`relu`, `gated`, `jumprelu`, `topk` or `batchtopk`; see `kinds`."""
    in_sites: tuple[Site, ...]
    out_sites: tuple[Site, ...]
    encoders: tuple[Float[Tensor, "_ latent"], ...]
    """One per input site, [d_in, latent]; widths may differ."""
    decoders: tuple[Float[Tensor, "latent _"], ...]
    """One per output site, [latent, d_out]; rows are directions, of any norm."""
    b_enc: Float[Tensor, " latent"]
    b_dec: tuple[Float[Tensor, " _"], ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the activation needs beside b_enc: `threshold` ([latent], or [] for all), `r_mag` and `b_mag`."""
    k: int | None = None
    """Of `topk`."""
    skip: Float[Tensor, "d_in d_out"] | None = None
    """To the first output site."""
    apply_b_dec_to_input: bool = False
    in_scale: tuple[float, ...] = ()
    """Factor on each input before encoding; default 1."""
    out_scale: tuple[float, ...] = ()
    """What each output is divided by after decoding; default 1."""
    row_norm: str = "none"
    """How each row is normalised before encoding: `none`, `layer_norm`, `constant_norm` or `centred`."""
    groups: tuple[int, ...] = ()
    """Sizes of the nested prefixes that were trained to reconstruct on their own (matryoshka)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: plain JSON, such as the training config and the hash of the activations."""
    history: History | None = None
    """Loss, error and sparsity of every training step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "in_scale", tuple(self.in_scale) or (1.0,) * len(self.in_sites))
        object.__setattr__(self, "out_scale", tuple(self.out_scale) or (1.0,) * len(self.out_sites))
        self._check_shapes()
        self._check_options()
        if self.activation not in ACTIVATIONS:
            raise UnknownNameError("activation", self.activation, ACTIVATIONS)
        ACTIVATIONS[self.activation].check(self.extras, self.n_latents, self.k)
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NotFiniteError(f"the dictionary's {name} holds NaN or infinity")

    def _check_shapes(self) -> None:
        n = self.b_enc.shape[0] if self.b_enc.ndim == 1 else -1
        if n < 1:
            raise InputError(f"b_enc must be [latent], at least one; got shape {tuple(self.b_enc.shape)}")
        check_one_per_site(self.in_sites, encoders=self.encoders, in_scale=self.in_scale)
        check_one_per_site(self.out_sites, decoders=self.decoders, b_dec=self.b_dec, out_scale=self.out_scale)
        for site, encoder in zip(self.in_sites, self.encoders, strict=True):
            check_shape(f"the encoder of {site}", encoder, (None, n))
        for site, decoder, bias in zip(self.out_sites, self.decoders, self.b_dec, strict=True):
            check_shape(f"the decoder of {site}", decoder, (n, None))
            check_shape(f"b_dec of {site}", bias, (decoder.shape[1],))

    def _check_options(self) -> None:
        if self.apply_b_dec_to_input and self.in_widths != self.out_widths:
            raise InputError(f"b_dec of widths {self.out_widths} cannot be subtracted from inputs of {self.in_widths}")
        check_row_norm(self.row_norm)
        if self.row_norm != "none" and self.in_sites != self.out_sites:
            raise InputError("rows are normalised only by dictionaries that reconstruct what they read (row_norm)")
        if self.skip is not None:
            if len(self.in_sites) != 1:
                raise InputError("a skip is for dictionaries that read one site; it goes to the first output site")
            check_shape("skip", self.skip, (self.in_widths[0], self.out_widths[0]))

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.b_enc.shape[0]

    @property
    def in_widths(self) -> tuple[int, ...]:
        """Width of each input site."""
        return tuple(encoder.shape[0] for encoder in self.encoders)

    @property
    def out_widths(self) -> tuple[int, ...]:
        """Width of each output site."""
        return tuple(decoder.shape[1] for decoder in self.decoders)

    @property
    def W_enc(self) -> Float[Tensor, "d_in latent"]:  # noqa: N802
        """The encoder of a dictionary that reads one site. Raises InputError when it reads several."""
        return only_one("W_enc", "encoders", self.encoders)

    @property
    def W_dec(self) -> Float[Tensor, "latent d_out"]:  # noqa: N802
        """The decoder of a dictionary that reconstructs one site. Raises InputError when it reconstructs several."""
        return only_one("W_dec", "decoders", self.decoders)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is stored: `W_enc.0`, `W_dec.0`, `b_dec.0`, one number per site, ..."""
        per_site = {"W_enc": self.encoders, "W_dec": self.decoders, "b_dec": self.b_dec}
        named = {f"{name}.{site}": tensor for name, of in per_site.items() for site, tensor in enumerate(of)}
        skip = {} if self.skip is None else {"W_skip": self.skip}
        return named | {"b_enc": self.b_enc} | dict(self.extras) | skip

    @property
    def decodes_alone(self) -> bool:
        """Whether reconstruct(x) is decode(encode(x)): there is no skip, and no row is normalised."""
        return self.skip is None and self.row_norm == "none"

    @cached_property
    def content_hash(self) -> str:
        """Hash of the weights and of everything else that decides what it computes."""
        return content_hash({**self.settings, "tensors": self.digests})

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every tensor by name."""
        return {name: digest(tensor) for name, tensor in self.tensors.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the tensors that decides what it computes, as plain JSON."""
        # Left out where there is none, so that the hashes of dictionaries from before it existed stay the same.
        row_norm = {} if self.row_norm == "none" else {"row_norm": self.row_norm}
        return row_norm | {
            "activation": self.activation,
            "in_sites": [str(site) for site in self.in_sites],
            "out_sites": [str(site) for site in self.out_sites],
            "k": self.k,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
            "in_scale": list(self.in_scale),
            "out_scale": list(self.out_scale),
            "groups": list(self.groups),
        }

    def encode(self, x: SiteTensors, latents: Sequence[int] | None = None) -> Float[Tensor, "... latent"]:
        """Latents [..., latent] of activations [..., d_in], zero where inactive.

        latents: only those with these numbers, in this order. Raises InputError for wrong widths or rows that are not
        aligned, NotFiniteError for NaN and infinity.
        """
        rows, lead, _ = self._rows(x)
        wanted = None if latents is None else torch.tensor(check_latents(latents, self.n_latents), dtype=torch.long)
        return shaped(torch.cat([self._latents(chunk, wanted) for chunk in chunks_of(rows)]), lead)

    def encode_sparse(self, x: SiteTensors) -> tuple[Int[Tensor, "... active"], Float[Tensor, "... active"]]:
        """(indices, values), both [..., active]: the active latents of each row, strongest first.

        Rows with fewer than the most active one are filled with index 0 and value 0. Raises as `encode`.
        """
        rows, lead, _ = self._rows(x)
        sparse, vectors = ACTIVATIONS[self.activation].sparse, {**self.extras, "b_enc": self.b_enc}
        indices, values = joined_sparse([sparse(self._pre(chunk), vectors, self.k or 0) for chunk in chunks_of(rows)])
        return shaped(indices, lead), shaped(values, lead)

    def decode(self, latents: Float[Tensor, "... latent"], of: SiteTensors | None = None) -> Reconstruction:
        """Activations [..., d_out] from latents, without the skip.

        of: the activations that the latents belong to, which a dictionary with `row_norm` needs to know each row's mean
        and size. Raises InputError for another number of latents, or where `of` is missing.
        """
        if latents.shape[-1] != self.n_latents:
            raise InputError(f"{latents.shape[-1]} latents were given to decode; this dictionary has {self.n_latents}")
        return unscaled(self._decoded(latents.to(self.b_enc)), self.out_scale, self._units(of, latents.shape[:-1]))

    def decode_sparse(
        self, indices: Int[Tensor, "... active"], values: Float[Tensor, "... active"], of: SiteTensors | None = None
    ) -> Reconstruction:
        """Activations [..., d_out] from indices and values [..., active], without the skip. of: as for `decode`."""
        lead = indices.shape[:-1]
        # One entry of index 0 and value 0 for rows in which nothing is active, of which there would be no bag.
        filled = [part if part.shape[-1] else part.new_zeros(*lead, 1) for part in (indices, values.to(self.b_enc))]
        flat, weights = (part.reshape(lead.numel(), part.shape[-1]) for part in filled)
        rows = [
            torch.nn.functional.embedding_bag(flat, decoder, per_sample_weights=weights, mode="sum") + bias
            for decoder, bias in zip(self.decoders, self.b_dec, strict=True)
        ]
        return unscaled([shaped(tensor, lead) for tensor in rows], self.out_scale, self._units(of, lead))

    def reconstruct(self, x: SiteTensors) -> Reconstruction:
        """Activations [..., d_out] from activations: decode(encode(x)), plus the skip where there is one."""
        rows, lead, units = self._rows(x)
        chunks = []
        for chunk in chunks_of(rows):
            outputs = self._decoded(self._latents(chunk, None))
            if self.skip is not None:
                outputs[0] = outputs[0] + (chunk[0] * self.in_scale[0]) @ self.skip
            chunks.append(outputs)
        whole = [shaped(torch.cat(pieces), lead) for pieces in zip(*chunks, strict=True)]
        return unscaled(whole, self.out_scale, [unit.reshaped(lead) for unit in units])

    def latent(self, index: int) -> Latent:
        """Latent `index` as a Part. Raises InputError for one that does not exist."""
        return Latent(self, check_latents([index], self.n_latents)[0])

    @property
    def unexplained(self) -> Unexplained:
        """What it leaves over, as a Part. Raises InputError for a dictionary that writes at several sites."""
        return Unexplained(self)

    def direction(self, index: int, site: Site | str | None = None) -> Direction:
        """Unit vector that latent `index` writes at an output site (default: the first).

        Raises InputError for a latent or site that is not there, and for a latent that writes nothing.
        """
        at = self.out_sites[0] if site is None else Site.parse(site)
        return Direction(at, self.written(index, at), label=f"latent {index}")

    def written(self, index: int, site: Site | str | None = None) -> Float[Tensor, " d_out"]:
        """What one unit of latent `index` adds to the activations at an output site (default: the first).

        With `row_norm`, to a row of size 1. Raises InputError for a latent or site that is not there.
        """
        number = 0 if site is None else site_number(site, self.out_sites)
        check_latents([index], self.n_latents)
        return self.decoders[number][index] / self.out_scale[number]

    def decoder_rows(self, site: Site | str | None = None) -> Float[Tensor, "latent d_out"]:
        """`written` of every latent."""
        number = 0 if site is None else site_number(site, self.out_sites)
        return self.decoders[number] / self.out_scale[number]

    def folded(self) -> Dictionary:
        """The same function with all scales 1. With one scale for all sites, latents come in units of the activations
        and rows of the decoder keep their norm; else the decoder takes up each site's own.
        """
        unit = self.out_scale[0]
        if self.apply_b_dec_to_input and self.in_scale != self.out_scale:
            raise InputError("b_dec cannot be subtracted from inputs whose scale differs from the outputs'")
        outputs = list(zip(self.decoders, self.b_dec, self.out_scale, strict=True))
        return replace(
            self,
            encoders=tuple(w * (scale / unit) for w, scale in zip(self.encoders, self.in_scale, strict=True)),
            b_enc=self.b_enc / unit,
            decoders=tuple(w * (unit / scale) for w, _, scale in outputs),
            b_dec=tuple(bias / scale for _, bias, scale in outputs),
            # r_mag is the logarithm of a factor and has no unit.
            extras={name: t if name == "r_mag" else t / unit for name, t in self.extras.items()},
            skip=None if self.skip is None else self.skip * (self.in_scale[0] / unit),
            in_scale=(),
            out_scale=(),
        )

    def to(self, where: torch.device | torch.dtype | str) -> Dictionary:
        """A copy on a device, or with another floating-point type."""
        tuples = ("encoders", "decoders", "b_dec")
        moved: dict[str, Any] = {name: tuple(t.to(where) for t in getattr(self, name)) for name in tuples}
        extras = {name: t.to(where) for name, t in self.extras.items()}
        skip = None if self.skip is None else self.skip.to(where)
        return replace(self, **moved, b_enc=self.b_enc.to(where), extras=extras, skip=skip)

    def _latents(self, rows: Sequence[Tensor], wanted: Tensor | None) -> Tensor:
        """Latents of rows [n, d_in] per site. Only the wanted columns are computed where latents don't compete."""
        activation = ACTIVATIONS[self.activation]
        early = wanted is not None and activation.independent
        vectors = {**self.extras, "b_enc": self.b_enc}
        vectors = {name: t[wanted] if early and t.ndim else t for name, t in vectors.items()}
        latents = activation.dense(self._pre(rows, wanted if early else None), vectors, self.k or 0)
        return latents if early or wanted is None else latents[:, wanted]

    def _pre(self, rows: Sequence[Tensor], wanted: Tensor | None = None) -> Float[Tensor, "n latent"]:
        """Pre-activations of all latents or of those wanted."""
        pick = lambda t: t if wanted is None else t[..., wanted]  # noqa: E731
        pre = pick(self.b_enc)
        for number, encoder in enumerate(self.encoders):
            # The bias goes into the first product, which is one pass over memory less.
            x = rows[number] if self.in_scale[number] == 1.0 else rows[number] * self.in_scale[number]
            x = x - self.b_dec[number] if self.apply_b_dec_to_input else x
            product = linear(x, pick(encoder).T, None if number else pre)
            pre = pre + product if number else product
        return pre

    def _decoded(self, latents: Tensor) -> list[Tensor]:
        return [linear(latents, decoder.T, bias) for decoder, bias in zip(self.decoders, self.b_dec, strict=True)]

    def _rows(self, x: SiteTensors) -> tuple[list[Tensor], torch.Size, list[Units]]:
        """Normalised rows per site, the shape before the width, and per output site what undoes the normalising."""
        rows, lead = aligned_rows(x, self.in_sites, self.in_widths, self.b_enc)
        if self.row_norm == "none":
            return rows, lead, [Units()] * len(self.out_sites)
        pairs = [normalised(tensor, self.row_norm) for tensor in rows]
        return [values for values, _ in pairs], lead, [units for _, units in pairs]

    def _units(self, of: SiteTensors | None, lead: Sequence[int]) -> list[Units]:
        if self.row_norm == "none":
            return [Units()] * len(self.out_sites)
        if of is None:
            raise InputError(f"rows are normalised ({self.row_norm}): decode(latents, of=activations), or reconstruct")
        _, given, units = self._rows(of)
        if tuple(given) != tuple(lead):
            raise InputError(f"latents have rows {tuple(lead)} and the activations they are of {tuple(given)}")
        return [unit.reshaped(lead) for unit in units]

    def __repr__(self) -> str:
        k = f", k={self.k}" if self.k else ""
        sites = ", ".join(map(str, self.in_sites))
        to = "" if self.in_sites == self.out_sites else f" -> {', '.join(map(str, self.out_sites))}"
        return f"Dictionary({self.activation}{k}, {self.n_latents} latents, {sites}{to})"

    def _repr_html_(self) -> str:
        curve = "" if self.history is None else self.history._repr_html_()
        return f"<div><code>{self!r}</code>{curve}</div>"
