"""Latents that are active on a prompt, as the local replacement model takes them from transcoders.

A transcoder reads what a layer's MLP reads (or the stream before it) and writes that MLP's output, or those of it and
of later ones (cross-layer). While a latent stays active its value is linear in what it reads, whatever the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.dictionaries import CrossLayerTranscoder, SparseCoder
from vesalius.errors import InputError
from vesalius.parts import Part
from vesalius.site import Site

READS = ("mlp_in", "resid_mid")
ROWS_TOGETHER = 512


@dataclass(frozen=True, eq=False)
class LayerLatents:
    """The latents of one layer that are active on the prompt.

    position, index: [active]. value: what each is; slope: what it reads at `read`, [active, d]; value = slope . x +
    constant. writes: site -> [active, d], what one unit of each adds there; bias: what the coder adds there whatever
    it reads. owner: the coder that counts the latents, and the number of this layer's first one there.
    """

    layer: int
    read: Site
    coder: SparseCoder
    owner: tuple[Any, int]
    position: Int[Tensor, " active"]
    index: Int[Tensor, " active"]
    value: Float[Tensor, " active"]
    slope: Float[Tensor, "active d"]
    constant: Float[Tensor, " active"]
    writes: Mapping[Site, Float[Tensor, "active d"]]
    bias: Mapping[Site, Float[Tensor, " d"]]

    def take(self, rows: Tensor) -> LayerLatents:
        """Some of them."""
        own = (self.position, self.index, self.value, self.slope, self.constant)
        position, index, value, slope, constant = (one[rows] for one in own)
        writes = {site: row[rows] for site, row in self.writes.items()}
        return replace(self, position=position, index=index, value=value, slope=slope, constant=constant, writes=writes)

    @property
    def skip(self) -> Tensor | None:
        """A linear way past the latents to the first site that is written, [d_in, d_out]."""
        skip = getattr(self.coder, "skip", None)
        if skip is None:
            return None
        scales = (getattr(self.coder, name, (1.0,))[0] for name in ("in_scale", "out_scale"))
        return (skip * next(scales) / next(scales)).to(self.value)

    def part(self, number: int) -> Part:
        """One of them, as a Part."""
        coder, first = self.owner
        part: Part = coder.latent(first + int(self.index[number]))
        return part


def coders_of(transcoders: object, n_layers: int) -> list[tuple[SparseCoder, tuple[Any, int]]]:
    """One coder for each layer that is read, with its owner and the number of its first latent there.

    Raises InputError for what are no transcoders of MLPs, and for two that read one layer.
    """
    given = [transcoders] if isinstance(transcoders, SparseCoder) else list(transcoders)  # type: ignore[call-overload]
    found: list[tuple[SparseCoder, tuple[Any, int]]] = []
    for one in given:
        if isinstance(one, CrossLayerTranscoder):
            found += [(layer, (one, start)) for layer, start in zip(one.layers, one.starts[:-1], strict=True)]
        elif isinstance(one, SparseCoder):
            found.append((one, (one, 0)))
        else:
            raise InputError(f"transcoders are dictionaries; got {type(one).__name__}")
    for coder, _ in found:
        _check(coder, n_layers)
    read = [coder.in_sites[0].layer for coder, _ in found]
    if len(set(read)) < len(read):
        raise InputError(f"one transcoder for each layer; got layers {', '.join(map(str, sorted(read)))}")  # type: ignore[type-var]
    return found


def _check(coder: SparseCoder, n_layers: int) -> None:
    sites = coder.in_sites
    if len(sites) != 1 or sites[0].kind not in READS or coder.row_norm != "none":
        raise InputError(
            f"{coder!r} is no transcoder: it must read one of {', '.join(READS)}, without normalising rows"
        )
    for site in coder.out_sites:
        _check_site(coder, site, "mlp_out", n_layers)
    first, layer = coder.out_sites[0].layer, sites[0].layer
    assert first is not None and layer is not None
    if first < layer:
        raise InputError(f"{coder!r} writes to a layer before the one that it reads")


def _check_site(coder: object, site: Site, kind: str, n_layers: int) -> None:
    if site.kind != kind or site.index is not None or site.layer is None or site.layer >= n_layers:
        raise InputError(f"{coder!r} is no transcoder of this model: it writes {site}, and not an {kind} of it")


def outer_biases(transcoders: object, n_layers: int, like: Float[Tensor, " d"]) -> list[Tensor]:
    """Per layer what cross-layer transcoders add to an MLP's output beside what their layers write."""
    given = [transcoders] if isinstance(transcoders, SparseCoder) else list(transcoders)  # type: ignore[call-overload]
    found = [torch.zeros_like(like) for _ in range(n_layers)]
    for one in given:
        if isinstance(one, CrossLayerTranscoder):
            for site, bias in zip(one.out_sites, one.b_dec, strict=True):
                assert site.layer is not None
                found[site.layer] = found[site.layer] + bias.to(like)
    return found


def active_latents(coder: SparseCoder, owner: tuple[Any, int], x: Float[Tensor, "pos d"]) -> LayerLatents:
    """The latents of one coder that are active on what it reads."""
    read = coder.in_sites[0]
    assert read.layer is not None
    with torch.no_grad():
        values = coder.encode(x).to(x)
        position, index = values.nonzero(as_tuple=True)
        # Of one latent at zero, for coders whose sparse products need one.
        nothing = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        base = _several(coder.decode_sparse(nothing, torch.zeros_like(x[:1, :1])))
        rows = _several(coder.decode_sparse(index[:, None], torch.ones_like(values[position, index])[:, None]))
    own = zip(coder.out_sites, rows, base, strict=True)
    writes, bias = {}, {}
    for site, row, constant in own:
        writes[site], bias[site] = (row - constant).to(x), constant[0].to(x)
    slope, value = _slopes(coder, x, position, index), values[position, index]
    constant = value - (slope * x[position]).sum(1)
    return LayerLatents(read.layer, read, coder, owner, position, index, value, slope, constant, writes, bias)


def _several(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else made


def _slopes(coder: SparseCoder, x: Tensor, position: Tensor, index: Tensor) -> Float[Tensor, "active d"]:
    """What each active latent reads: its gradient, which is constant while it stays active."""
    found = []
    for rows in torch.arange(len(position), device=x.device).split(ROWS_TOGETHER):
        with torch.enable_grad():
            given = x[position[rows]].detach().requires_grad_()
            own = coder.encode(given).gather(1, index[rows][:, None]).sum()
        found.append(torch.autograd.grad(own, given)[0])
    return torch.cat(found) if found else x.new_zeros(0, x.shape[-1])
