"""What channels of a map respond to: values on many images, the pixels that a unit sees, and exciting images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.data.forward import captured
from vesalius.errors import InputError, UnknownNameError
from vesalius.images.pictures import Pictures
from vesalius.inputs import Raw
from vesalius.jobs import Sink, silent, track
from vesalius.model import Model
from vesalius.parts import Channel
from vesalius.site import Site

POOLED = ("max", "mean")
TOGETHER = 32
TOP, QUANTILES = 8, (1.0, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25)
Box = tuple[int, int, int, int]
"""First and last row, first and last column."""


def map_at(model: Model, site: Site | str, images: Float[Tensor, "image channel row column"]) -> Tensor:
    """The map [image, channel, row, column] at a module's output, from a pass that ends there.

    Raises InputError where there is no such map.
    """
    place = Site.parse(site)
    if place.kind != "module":
        raise InputError(f"channels are at a module's output, such as module:features.3|out; got {place}")
    with torch.no_grad():
        found = captured(model, Raw(images), [place])[place]
    if found.ndim != 4:
        raise InputError(f"{place} is {list(found.shape)}, and no map [image, channel, row, column]")
    return found


@dataclass(frozen=True, eq=False)
class Responses:
    """values: [image, channel], of the map's rows and columns the largest (or mean). place: [image, channel] row and
    column of the largest, as row * columns + column. shape: rows and columns of the map."""

    site: Site
    values: Float[Tensor, "image channel"]
    place: Int[Tensor, "image channel"]
    shape: tuple[int, int]


def responses(
    model: Model,
    pictures: Pictures | Tensor,
    site: Site | str,
    at: str = "max",
    batch: int = TOGETHER,
    sink: Sink = silent,
) -> Responses:
    """Every channel's response to every image. Raises InputError for a site without a map."""
    if at not in POOLED:
        raise UnknownNameError("place to read an image's value at", at, POOLED)
    images = pictures.values if isinstance(pictures, Pictures) else pictures
    values, places, shape = [], [], (0, 0)
    for some in track(images.split(batch), f"respond at {site}", sink=sink):
        found = map_at(model, site, some)
        shape = (int(found.shape[2]), int(found.shape[3]))
        largest, place = found.flatten(2).max(2)
        values.append((largest if at == "max" else found.flatten(2).mean(2)).float().cpu())
        places.append(place.cpu())
    return Responses(Site.parse(site), torch.cat(values), torch.cat(places), shape)


def rows_of(
    model: Model, pictures: Pictures | Tensor, site: Site | str, batch: int = TOGETHER, sink: Sink = silent
) -> Float[Tensor, "row width"]:
    """What a dictionary is trained on: the channels at every row and column of a map, or a ViT's stream at every patch.

    Of a ViT the class token's rows are among them. Raises InputError for a site that is neither.
    """
    images, place = pictures.values if isinstance(pictures, Pictures) else pictures, Site.parse(site)
    found = []
    for some in track(images.split(batch), f"read {place}", sink=sink):
        with torch.no_grad():
            whole = captured(model, Raw(some), [place])[place]
        if whole.ndim == 4 and place.kind == "module":
            whole = whole.permute(0, 2, 3, 1)
        elif whole.ndim != 3:
            raise InputError(f"{place} is {list(whole.shape)}; rows are of a map, or of [image, patch, width]")
        found.append(whole.flatten(0, -2).float().cpu())
    return torch.cat(found)


def box_of(model: Model, channel: Channel, image: Float[Tensor, "channel row column"], row: int, column: int) -> Box:
    """The pixels that a channel at one place of its map depends on, of this image: where its gradient is not zero.

    A unit that is off has no gradient; then the whole image is given.
    """
    pixels = image[None].detach().clone().requires_grad_()
    with torch.enable_grad():
        found = captured(model, Raw(pixels), [channel.site], grad=True)[channel.site]
        (slope,) = torch.autograd.grad(found[0, channel.index, row, column], pixels, allow_unused=True)
    seen = torch.zeros(image.shape[1:]) if slope is None else slope[0].abs().amax(0)
    rows, columns = (seen > 0).any(1).nonzero()[:, 0], (seen > 0).any(0).nonzero()[:, 0]
    if not len(rows):
        return 0, image.shape[1] - 1, 0, image.shape[2] - 1
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


@dataclass(frozen=True)
class Seen:
    """One image. kind: top, quantile, near miss. number: its row among the pictures. box: what the unit saw of it."""

    kind: str
    number: int
    name: str
    value: float
    box: Box


@dataclass(frozen=True, eq=False)
class Exciting:
    """What excites one channel. values: its response to every picture."""

    channel: Channel
    pictures: Pictures
    values: Float[Tensor, " image"]
    seen: tuple[Seen, ...]

    def of(self, kind: str) -> tuple[Seen, ...]:
        """top, quantile, or near miss."""
        return tuple(one for one in self.seen if one.kind == kind)

    def crop(self, seen: Seen) -> Float[Tensor, "channel row column"]:
        """What the unit saw."""
        top, bottom, left, right = seen.box
        return self.pictures.values[seen.number][:, top : bottom + 1, left : right + 1]


def exciting(
    model: Model,
    channels: Sequence[Channel],
    pictures: Pictures,
    top: int = TOP,
    quantiles: Sequence[float] = QUANTILES,
    sink: Sink = silent,
) -> list[Exciting]:
    """Of each channel the images that excite it most, one at each quantile, and near misses.

    Near misses look to the rest of the map like the most exciting images (cosine of the other channels' responses, from
    their means), and excite the channel no more than the median does. Channels of several sites are read site by site.
    Raises InputError for no channels or images.
    """
    if not channels or not len(pictures) or top < 1:
        raise InputError(f"{len(channels)} channels, {len(pictures)} images and top={top}: at least one of each")
    found: dict[Site, Responses] = {}
    for channel in channels:
        if channel.site not in found:
            found[channel.site] = responses(model, pictures, channel.site, sink=sink)
    return [_exciting(model, channel, pictures, found[channel.site], top, quantiles) for channel in channels]


def _exciting(
    model: Model, channel: Channel, pictures: Pictures, all_of: Responses, top: int, quantiles: Sequence[float]
) -> Exciting:
    if channel.index >= all_of.values.shape[1]:
        raise InputError(f"{channel}: there are {all_of.values.shape[1]} channels at {channel.site}, numbered from 0")
    values, order = all_of.values[:, channel.index], all_of.values[:, channel.index].argsort(descending=True)
    most = order[:top].tolist()
    chosen = [("top", number) for number in most]
    at = [round((1 - quantile) * (len(values) - 1)) for quantile in quantiles]
    chosen += [("quantile", int(order[place])) for place in at]
    chosen += [("near miss", number) for number in _near_misses(all_of.values, channel.index, most)]
    seen = []
    for kind, number in chosen:
        place = divmod(int(all_of.place[number, channel.index]), all_of.shape[1])
        box = box_of(model, channel, pictures.values[number].to(model.device), *place)
        seen.append(Seen(kind, number, pictures.names[number], float(values[number]), box))
    return Exciting(channel, pictures, values, tuple(seen))


def _near_misses(values: Float[Tensor, "image channel"], index: int, most: Sequence[int]) -> list[int]:
    others = torch.cat([values[:, :index], values[:, index + 1 :]], 1)
    others = others - others.mean(0)
    alike = torch.nn.functional.cosine_similarity(others, others[list(most)].mean(0)[None], dim=1)
    low = values[:, index] <= values[:, index].median()
    found = alike.masked_fill(~low, float("-inf")).argsort(descending=True)[: len(most)]
    return [int(number) for number in found if bool(low[number])]
