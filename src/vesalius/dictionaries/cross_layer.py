"""CrossLayerTranscoder: latents of each layer, read at its MLP input, that write to all later layers' MLP outputs.

Lindsey et al. 2025 ("Circuit tracing"), section "Architecture". It is a sum of dictionaries, one per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.coder import SiteTensors
from vesalius.dictionaries.coder import Reconstruction, SparseCoder
from vesalius.dictionaries.history import History
from vesalius.dictionaries.kinds.base import strongest
from vesalius.dictionaries.latent import Latent
from vesalius.dictionaries.rows import aligned_rows, check_latents, shaped, site_number
from vesalius.directions import Direction
from vesalius.errors import InputError
from vesalius.intervention import digest
from vesalius.parts import Part
from vesalius.protocol import content_hash
from vesalius.site import Site


class LayerCoder(SparseCoder, Protocol):
    """What one layer offers: a Dictionary in memory, or a StoredLayer on disk."""

    @property
    def activation(self) -> str: ...

    @property
    def in_widths(self) -> tuple[int, ...]: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    @property
    def digests(self) -> dict[str, str]: ...

    def folded(self) -> LayerCoder: ...

    def to(self, where: torch.device | torch.dtype | str) -> LayerCoder: ...


@dataclass(frozen=True, eq=False)
class CrossLayerTranscoder:
    """One coder per layer; layer l reads input l and writes outputs l and later. Their own b_dec are zero.

    A layer's linear skip, where it has one, goes to its own output. Latents are numbered through all layers, layer
    after layer. b_dec: one per output site, in units of the activations. Raises InputError for layers that do not form
    a triangle.
    """

    layers: tuple[LayerCoder, ...]
    b_dec: tuple[Float[Tensor, " _"], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: plain JSON, as of a Dictionary."""
    history: History | None = None

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            if len(layer.in_sites) != 1 or layer.out_sites != self.out_sites[number:] or not layer.out_sites:
                raise InputError(
                    f"layer {number} of a cross-layer transcoder must read one site and write its own and all later"
                )
        if len(self.b_dec) != len(self.layers):
            raise InputError(f"{len(self.b_dec)} of b_dec for {len(self.layers)} layers; give one each")

    @property
    def in_sites(self) -> tuple[Site, ...]:
        """One per layer."""
        return tuple(layer.in_sites[0] for layer in self.layers)

    @property
    def out_sites(self) -> tuple[Site, ...]:
        """One per layer."""
        return self.layers[0].out_sites

    @property
    def n_latents(self) -> int:
        """Of all layers together."""
        return self.starts[-1]

    @property
    def row_norm(self) -> str:
        """None: each layer's rows are of other sites than those it writes to."""
        return "none"

    @property
    def decodes_alone(self) -> bool:
        """Whether reconstruct(x) is decode(encode(x)): no layer has a skip."""
        return all(layer.decodes_alone for layer in self.layers)

    @property
    def starts(self) -> tuple[int, ...]:
        """Number of each layer's first latent, and the number of all."""
        sizes = [layer.n_latents for layer in self.layers]
        return tuple(sum(sizes[:number]) for number in range(len(sizes) + 1))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as it is stored: those of layer 2 begin with `2/`."""
        named = {f"{number}/{name}": t for number, layer in enumerate(self.layers) for name, t in layer.tensors.items()}
        return named | {f"b_dec.{number}": bias for number, bias in enumerate(self.b_dec)}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of each layer."""
        return {"layers": [layer.settings for layer in self.layers]}

    @cached_property
    def content_hash(self) -> str:
        """Hash of the weights and of everything else that decides what it computes."""
        layers = {f"{n}/{name}": found for n, layer in enumerate(self.layers) for name, found in layer.digests.items()}
        own = {f"b_dec.{number}": digest(bias) for number, bias in enumerate(self.b_dec)}
        return content_hash({**self.settings, "tensors": layers | own})

    def encode(self, x: SiteTensors, latents: Sequence[int] | None = None) -> Float[Tensor, "... latent"]:
        """Latents of all layers, one layer after the other; only those with the given numbers when there are some.

        Raises as `Dictionary.encode`.
        """
        rows, lead = self._rows(x)
        if latents is None:
            parts = [layer.encode(row) for layer, row in zip(self.layers, rows, strict=True)]
            return shaped(torch.cat(parts, -1), lead)
        wanted = [self._in_layer(index) for index in check_latents(latents, self.n_latents)]
        columns = [self.layers[layer].encode(rows[layer], latents=[index]) for layer, index in wanted]
        return shaped(torch.cat(columns, -1), lead)

    def encode_sparse(self, x: SiteTensors) -> tuple[Tensor, Tensor]:
        """(indices, values), both [..., active], as `Dictionary.encode_sparse`, over the latents of all layers."""
        rows, lead = self._rows(x)
        parts = []
        for layer, row, start in zip(self.layers, rows, self.starts[:-1], strict=True):
            indices, values = layer.encode_sparse(row)
            parts.append((indices + start, values))
        indices, values = (torch.cat(group, 1) for group in zip(*parts, strict=True))
        # Each layer's entries come strongest first; those of all layers have to be sorted again.
        at, best = strongest(values)
        filled = torch.where(best > 0, indices.gather(1, at), 0)
        return shaped(filled, lead), shaped(best, lead)

    def decode(self, latents: Float[Tensor, "... latent"]) -> Reconstruction:
        """One tensor per output site: what all layers up to it write there."""
        if latents.shape[-1] != self.n_latents:
            raise InputError(f"{latents.shape[-1]} latents were given to decode; this coder has {self.n_latents}")
        pieces = latents.split([layer.n_latents for layer in self.layers], dim=-1)
        return self._summed([layer.decode(piece) for layer, piece in zip(self.layers, pieces, strict=True)])

    def decode_sparse(self, indices: Tensor, values: Tensor) -> Reconstruction:
        """As `decode`, from what `encode_sparse` gives."""
        written = []
        for layer, start in zip(self.layers, self.starts[:-1], strict=True):
            here = (indices >= start) & (indices < start + layer.n_latents)
            written.append(layer.decode_sparse(torch.where(here, indices - start, 0), values * here))
        return self._summed(written)

    def reconstruct(self, x: SiteTensors) -> Reconstruction:
        """decode(encode(x))."""
        rows, lead = self._rows(x)
        outputs = self._summed([layer.reconstruct(row) for layer, row in zip(self.layers, rows, strict=True)])
        return tuple(shaped(rows, lead) for rows in outputs)

    def latent(self, index: int) -> Part:
        """Latent `index` (through all layers) as a Part, read at its layer's input."""
        layer, own = self._in_layer(check_latents([index], self.n_latents)[0])
        return Latent(self.layers[layer], own, owner=(self, index))

    def direction(self, index: int, site: Site | str | None = None) -> Direction:
        """Unit vector that latent `index` writes at an output site of its own layer (the default) or a later one."""
        layer, own = self._in_layer(check_latents([index], self.n_latents)[0])
        return self.layers[layer].direction(own, site)

    def written(self, index: int, site: Site | str | None = None) -> Float[Tensor, " d_out"]:
        """What one unit of latent `index` adds at an output site; zero at sites of earlier layers."""
        layer, own = self._in_layer(check_latents([index], self.n_latents)[0])
        number = layer if site is None else site_number(site, self.out_sites)
        if number < layer:
            return torch.zeros_like(self.b_dec[number])
        return self.layers[layer].written(own, self.out_sites[number])

    def decoder_rows(self, site: Site | str | None = None) -> Float[Tensor, "latent d_out"]:
        """`written` of every latent at one output site, which has to be named."""
        if site is None:
            raise InputError(f"latents of {len(self.layers)} layers write at several sites; say at which: site=")
        number = site_number(site, self.out_sites)
        before = [layer.decoder_rows(self.out_sites[number]) for layer in self.layers[: number + 1]]
        # Latents of later layers cannot write to an earlier site.
        after = self.b_dec[number].new_zeros(self.n_latents - self.starts[number + 1], len(self.b_dec[number]))
        return torch.cat([*before, after])

    def folded(self) -> CrossLayerTranscoder:
        """The same function with all scales 1."""
        return replace(self, layers=tuple(layer.folded() for layer in self.layers))

    def to(self, where: torch.device | torch.dtype | str) -> CrossLayerTranscoder:
        """A copy on a device, or with another floating-point type."""
        layers = tuple(layer.to(where) for layer in self.layers)
        return replace(self, layers=layers, b_dec=tuple(bias.to(where) for bias in self.b_dec))

    def _rows(self, x: SiteTensors) -> tuple[list[Tensor], torch.Size]:
        widths = [layer.in_widths[0] for layer in self.layers]
        return aligned_rows(x, self.in_sites, widths, self.b_dec[0])

    def _in_layer(self, index: int) -> tuple[int, int]:
        """(layer, number in it) of a latent."""
        layer = max(number for number, start in enumerate(self.starts[:-1]) if start <= index)
        return layer, index - self.starts[layer]

    def _summed(self, written: Sequence[Reconstruction]) -> tuple[Tensor, ...]:
        """One tensor per output site, from what each layer writes at its own site and all later ones."""
        each = [(part,) if isinstance(part, Tensor) else part for part in written]
        return tuple(
            torch.stack([each[layer][site - layer] for layer in range(site + 1)]).sum(0) + bias
            for site, bias in enumerate(self.b_dec)
        )

    def __repr__(self) -> str:
        sizes = ", ".join(str(layer.n_latents) for layer in self.layers)
        return f"CrossLayerTranscoder({self.layers[0].activation}, {len(self.layers)} layers of {sizes} latents)"

    def _repr_html_(self) -> str:
        curve = "" if self.history is None else self.history._repr_html_()
        return f"<div><code>{self!r}</code>{curve}</div>"
