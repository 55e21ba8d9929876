"""StoredLayer: one layer of a cross-layer transcoder whose encoder and decoder stay on disk.

A published cross-layer transcoder has tens of gigabytes of decoder. To encode, only the layer's encoder is read; to
decode, only the rows of the latents that are active.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.coder import SiteTensors
from vesalius.dictionaries.coder import Reconstruction
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.latent import Latent
from vesalius.dictionaries.rows import CHUNK, aligned_rows, check_latents, shaped, site_number
from vesalius.directions import Direction
from vesalius.errors import FileFormatError, InputError
from vesalius.intervention import digest
from vesalius.jobs.untrusted import opened_safetensors
from vesalius.protocol import content_hash
from vesalius.site import Site


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, whose rows are read when they are used and checked when they are read."""

    path: Path
    name: str
    latent_first: bool = True
    """Whether its first axis counts latents; else its last does."""

    def whole(self, like: Tensor) -> Tensor:
        """All of it, with dtype and device of `like`, latents on the axis they are stored on.

        Raises FileFormatError naming a file that is gone, truncated, or holds NaN or infinity.
        """
        return self._read(lambda part: part[:], like)

    def of_latents(self, latents: Sequence[int], like: Tensor) -> Tensor:
        """The part of these latents, which are numbered without repetition. Raises as `whole`."""
        wanted = list(latents)
        return self._read(lambda part: part[wanted] if self.latent_first else part[:, wanted], like)

    def _read(self, cut: Callable[[Any], Tensor], like: Tensor) -> Tensor:
        try:
            with opened_safetensors(self.path) as stored:
                found = cut(stored.get_slice(self.name)).to(like)
        except (OSError, ValueError) as error:
            raise FileFormatError(
                f"{self.path} can no longer be read ({error}): its weights are read when they are used"
            ) from error
        if not bool(torch.isfinite(found).all()):
            raise FileFormatError(f"{self.path}: {self.name} holds NaN or infinity. Download or copy it again.")
        return found


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """Latents that read one site and write several, as a Dictionary without b_dec, from files.

    Every method raises FileFormatError naming a file that is gone or altered when it is read.
    """

    activation: str
    """`relu` or `jumprelu`."""
    in_sites: tuple[Site, ...]
    out_sites: tuple[Site, ...]
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    """All the same."""
    encoder: StoredTensor
    """[latent, d_in], or [d_in, latent]."""
    decoder: StoredTensor
    """[latent, site, d_out]."""
    b_enc: Float[Tensor, " latent"]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    skip: Float[Tensor, "d_in d_out"] | None = None
    """To the first site that is written."""
    first: int = 0
    """How many sites of the decoder come before the first that is written; there it is zero."""

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.b_enc.shape[0]

    @property
    def row_norm(self) -> str:
        """None."""
        return "none"

    @property
    def decodes_alone(self) -> bool:
        """Whether reconstruct(x) is decode(encode(x)): there is no skip."""
        return self.skip is None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, read from disk, as a Dictionary has them."""
        return self.whole().tensors

    @property
    def settings(self) -> dict[str, Any]:
        """As of a Dictionary."""
        return {
            "activation": self.activation,
            "in_sites": [str(site) for site in self.in_sites],
            "out_sites": [str(site) for site in self.out_sites],
            "k": None,
            "apply_b_dec_to_input": False,
            "in_scale": [1.0],
            "out_scale": [1.0] * len(self.out_sites),
            "groups": [],
        }

    @cached_property
    def content_hash(self) -> str:
        """As of the Dictionary with the same tensors; all of them are read once for it, some rows at a time."""
        return content_hash({**self.settings, "tensors": self.digests})

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every tensor by name, as of the Dictionary."""
        small = self._encoding(None).tensors | ({} if self.skip is None else {"W_skip": self.skip})
        zero = digest(self.b_enc.new_zeros(self.out_widths[0]))
        # Hashed a few rows at a time: the decoder of a published one does not fit in memory.
        found = {name: digest(tensor) for name, tensor in small.items() if name != "W_dec.0"}
        hashes = [hashlib.sha256() for _ in self.out_sites]
        for start in range(0, self.n_latents, CHUNK):
            rows = self._rows(torch.arange(start, min(start + CHUNK, self.n_latents))).cpu()
            for number, hashed in enumerate(hashes):
                hashed.update(rows[:, number].contiguous().view(torch.uint8).numpy().data)
        decoders = {f"W_dec.{number}": hashed.hexdigest() for number, hashed in enumerate(hashes)}
        return found | decoders | {f"b_dec.{number}": zero for number in range(len(hashes))}

    def encode(self, x: SiteTensors, latents: Sequence[int] | None = None) -> Float[Tensor, "... latent"]:
        """As `Dictionary.encode`; only the encoder is read, or the given latents' part of it."""
        return self._encoding(latents).encode(x)

    def encode_sparse(self, x: SiteTensors) -> tuple[Tensor, Tensor]:
        """As `Dictionary.encode_sparse`; only the encoder is read."""
        return self._encoding(None).encode_sparse(x)

    def decode(self, latents: Float[Tensor, "... latent"]) -> Reconstruction:
        """As `Dictionary.decode`; only rows of latents that are active anywhere are read."""
        if latents.shape[-1] != self.n_latents:
            raise InputError(f"{latents.shape[-1]} latents were given to decode; this layer has {self.n_latents}")
        flat = latents.reshape(-1, self.n_latents)
        # The rows of latents that are silent everywhere are never read.
        active = flat.any(0).nonzero()[:, 0]
        rows = self._rows(active)
        return self._split(flat[:, active].to(rows) @ rows.flatten(1), latents.shape[:-1])

    def decode_sparse(self, indices: Tensor, values: Tensor) -> Reconstruction:
        """As `Dictionary.decode_sparse`; only rows of the latents named are read."""
        lead, width = indices.shape[:-1], indices.shape[-1]
        active = indices[values != 0].unique()
        if not len(active):
            return self._split(self.b_enc.new_zeros(lead.numel(), sum(self.out_widths)), lead)
        rows = self._rows(active).flatten(1)
        at = torch.searchsorted(active, indices.reshape(-1, width)).clamp(max=len(active) - 1)
        weights = values.reshape(-1, width).to(rows)
        return self._split(torch.nn.functional.embedding_bag(at, rows, per_sample_weights=weights, mode="sum"), lead)

    def reconstruct(self, x: SiteTensors) -> Reconstruction:
        """decode(encode(x)), plus the skip where there is one."""
        decoded = self.decode_sparse(*self.encode_sparse(x))
        if self.skip is None:
            return decoded
        rows, lead = aligned_rows(x, self.in_sites, self.in_widths, self.b_enc)
        parts = (decoded,) if isinstance(decoded, Tensor) else decoded
        skipped = (parts[0] + shaped(rows[0] @ self.skip, lead), *parts[1:])
        return skipped[0] if len(skipped) == 1 else skipped

    def latent(self, index: int) -> Latent:
        """Latent `index` as a Part. Raises InputError for one that does not exist."""
        return Latent(self, check_latents([index], self.n_latents)[0])

    def direction(self, index: int, site: Site | str | None = None) -> Direction:
        """Unit vector that latent `index` writes at an output site (default: the first)."""
        at = self.out_sites[0] if site is None else Site.parse(site)
        return Direction(at, self.written(index, at), label=f"latent {index}")

    def written(self, index: int, site: Site | str | None = None) -> Float[Tensor, " d_out"]:
        """What one unit of latent `index` adds at an output site (default: the first)."""
        number = 0 if site is None else site_number(site, self.out_sites)
        return self._rows(torch.tensor(check_latents([index], self.n_latents)))[0, number]

    def decoder_rows(self, site: Site | str | None = None) -> Float[Tensor, "latent d_out"]:
        """`written` of every latent; the whole decoder is read for it."""
        number = 0 if site is None else site_number(site, self.out_sites)
        return self._rows(torch.arange(self.n_latents))[:, number]

    def folded(self) -> StoredLayer:
        """Itself: it has no scales."""
        return self

    def whole(self) -> Dictionary:
        """The same with everything in memory."""
        decoder = self.decoder.whole(self.b_enc)[:, self.first :]
        numbers = range(len(self.out_sites))
        return replace(
            self._encoding(None),
            out_sites=self.out_sites,
            skip=self.skip,
            out_scale=(),
            decoders=tuple(decoder[:, number].contiguous() for number in numbers),
            b_dec=tuple(decoder.new_zeros(decoder.shape[2]) for _ in numbers),
        )

    def to(self, where: torch.device | torch.dtype | str) -> StoredLayer:
        """A copy that computes on a device, or with another floating-point type."""
        extras = {name: tensor.to(where) for name, tensor in self.extras.items()}
        skip = None if self.skip is None else self.skip.to(where)
        return replace(self, b_enc=self.b_enc.to(where), extras=extras, skip=skip)

    def _encoding(self, latents: Sequence[int] | None) -> Dictionary:
        """The encoder of all latents or some, as a Dictionary that writes nothing."""
        wanted = None if latents is None else check_latents(latents, self.n_latents)
        read = self.encoder.whole(self.b_enc) if wanted is None else self.encoder.of_latents(wanted, self.b_enc)
        encoder = read.T.contiguous() if self.encoder.latent_first else read
        b_enc = self.b_enc if wanted is None else self.b_enc[wanted]
        extras = {name: t if wanted is None or not t.ndim else t[wanted] for name, t in self.extras.items()}
        return Dictionary(
            self.activation,
            in_sites=self.in_sites,
            out_sites=self.out_sites[:1],
            encoders=(encoder,),
            decoders=(encoder.new_zeros(len(b_enc), 0),),
            b_enc=b_enc,
            b_dec=(encoder.new_zeros(0),),
            extras=extras,
        )

    def _rows(self, latents: Tensor) -> Float[Tensor, "latent site d_out"]:
        if not len(latents):
            return self.b_enc.new_zeros(0, len(self.out_sites), self.out_widths[0])
        return self.decoder.of_latents(latents.tolist(), self.b_enc)[:, self.first :]

    def _split(self, outputs: Float[Tensor, "n sites_d_out"], lead: torch.Size) -> Reconstruction:
        """One tensor per site of outputs [n, site * d_out]."""
        parts = tuple(shaped(part, lead) for part in outputs.split(self.out_widths[0], dim=1))
        return parts[0] if len(parts) == 1 else parts

    def __repr__(self) -> str:
        return (
            f"StoredLayer({self.activation}, {self.n_latents} latents, {self.in_sites[0]}, in {self.encoder.path.name})"
        )
