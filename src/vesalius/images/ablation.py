"""Channel sweeps: what every channel of a map does to the output, from runs that start at the map.

What comes before the map is run once. A channel that already has the value it would be given changes nothing in that
image, which is then not run again: after a ReLU, where it is off everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.errors import InputError, NotFiniteError, SelfCheckError, UnknownNameError
from vesalius.inputs import Raw
from vesalius.intervention import Patch
from vesalius.jobs import Sink, silent, track
from vesalius.model import Model
from vesalius.model.calls import logits_of
from vesalius.model.resuming import Resumable, record_to
from vesalius.parts import Channel
from vesalius.patching.plan import Cost
from vesalius.seeds import generator_for
from vesalius.site import Site

MODES = ("zero", "mean")
TOLERANCE, CHECKED = 1e-4, 2
TOGETHER = 64


@dataclass(frozen=True, eq=False, repr=False)
class ChannelEffects:
    """values: [channel, image] the number with the channel ablated; base: [image] as it is. off_distribution: [channel]
    how far the ablation moves the map, as a share of its norm. error: largest difference from plain hooked runs."""

    site: Site
    channels: tuple[int, ...]
    values: Float[Tensor, "channel image"]
    base: Float[Tensor, " image"]
    off_distribution: Float[Tensor, " channel"]
    cost: Cost
    error: float

    @property
    def effects(self) -> Float[Tensor, "channel image"]:
        """What each image's number loses without the channel."""
        return self.base - self.values

    def __repr__(self) -> str:
        return f"ChannelEffects({len(self.channels)} channels of {self.site} on {len(self.base)} images; {self.cost})"


def ablate_channels(
    model: Model,
    images: Float[Tensor, "image channel row column"],
    site: Site | str,
    channels: Sequence[int] | None = None,
    *,
    target: int | None = None,
    mode: str = "zero",
    batch: int = TOGETHER,
    seed: int = 0,
    sink: Sink = silent,
) -> ChannelEffects:
    """The logit of a class with each channel of a map ablated alone.

    site: a module's output, called once in a run. channels: default all. target: a class; default each image's
    likeliest. mode: "zero", or each channel's "mean" over images, rows and columns. batch: images run together; the
    values do not depend on it but for rounding. Raises InputError for a site that is no map, a channel or class that
    does not exist; SelfCheckError when random cells differ from plain hooked runs.
    """
    place = Site.parse(site)
    if place.kind != "module" or place.side != "out":
        raise InputError(f"a channel sweep is at a module's output, module:<path>|out; got {place}")
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    model.check_evaluating()
    module = submodule(model.module, place.module)
    parts = []
    for some in images.split(batch):
        args, kwargs, _ = model.called_with(Raw(some))
        parts.append(record_to(model.module, module, args, kwargs))
    maps = torch.cat([part.tensor for part in parts])
    if maps.ndim != 4:
        raise InputError(f"{place} is {list(maps.shape)}, and no map [image, channel, row, column]")
    listed = tuple(range(maps.shape[1])) if channels is None else tuple(map(int, channels))
    if not listed or min(listed) < 0 or max(listed) >= maps.shape[1]:
        raise InputError(f"{place} has {maps.shape[1]} channels, numbered from 0; got {list(listed)[:9]}")
    logits = torch.cat([logits_of(part.result) for part in parts])
    if target is not None and not 0 <= target < logits.shape[1]:
        raise InputError(f"there is no class {target}: the model has {logits.shape[1]}, numbered from 0")
    classes = logits.argmax(1) if target is None else torch.full((len(images),), target, device=logits.device)
    base = logits.gather(1, classes[:, None])[:, 0]
    fill = torch.zeros(maps.shape[1]).to(maps) if mode == "zero" else maps.mean((0, 2, 3))
    values, ran = _swept(model, images, parts, listed, fill, classes, base, sink)
    if not bool(torch.isfinite(values).all()):
        raise NotFiniteError("the logits are not finite with some channels ablated")
    error = _checked(model, images, place, maps.shape[2:], listed, fill, classes, values, seed)
    moved = torch.stack([(maps[:, one] - fill[one]).flatten().norm() for one in listed]) / maps.flatten().norm()
    # Recording is one run; an edited one is priced as a whole, though it only starts at the map.
    cost = Cost(float(ran + len(images)), float(len(listed) * len(images)), len(listed) * len(images) - ran)
    return ChannelEffects(place, listed, values.cpu(), base.cpu(), moved.cpu(), cost, error)


def _swept(
    model: Model,
    images: Tensor,
    parts: Sequence[Resumable],
    listed: Sequence[int],
    fill: Tensor,
    classes: Tensor,
    base: Tensor,
    sink: Sink,
) -> tuple[Float[Tensor, "channel image"], int]:
    """Values of every cell, and how many were run."""
    values, ran = base.repeat(len(listed), 1), 0
    for row, channel in enumerate(track(listed, "ablate channels", sink=sink)):
        first = 0
        for part in parts:
            size = len(part.tensor)
            live = (part.tensor[:, channel] != fill[channel]).flatten(1).any(1).nonzero()[:, 0]
            if len(live):
                found = _resumed(model, part, images[first : first + size], live, channel, fill)
                at = first + live
                values[row, at] = found.gather(1, classes[at][:, None])[:, 0]
                ran += len(live)
            first += size
    return values, ran


def _resumed(
    model: Model, part: Resumable, images: Tensor, live: Tensor, channel: int, fill: Tensor
) -> Float[Tensor, "image class"]:
    """Logits of some images of a recorded run, with a channel ablated."""
    whole = len(live) == len(part.tensor)
    some = part if whole else part.taken(live)
    edited = some.tensor.clone()
    edited[:, channel] = fill[channel]
    args, kwargs, _ = model.called_with(Raw(images if whole else images[live.to(images.device)]))
    with torch.no_grad(), some.standing_in(edited):
        return logits_of(model.module(*args, **kwargs))


def _checked(
    model: Model,
    images: Tensor,
    place: Site,
    shape: torch.Size,
    listed: Sequence[int],
    fill: Tensor,
    classes: Tensor,
    values: Tensor,
    seed: int,
) -> float:
    """Random cells again, as plain runs with hooks; the largest difference. Raises SelfCheckError."""
    draw, worst = generator_for("channel sweep", seed), 0.0
    for _ in range(CHECKED):
        row, image = (int(torch.randint(size, (), generator=draw)) for size in (len(listed), len(images)))
        part = Channel(place, listed[row])
        given = fill[listed[row]].expand(1, *shape)
        plain = model.run(Raw(images[image : image + 1]), interventions=[Patch(part, source=given)])
        found = float(plain.logits[0, classes[image]])
        worst = max(worst, abs(found - float(values[row, image])))
    if worst > TOLERANCE * max(1.0, float(values.abs().max())):
        raise SelfCheckError(f"a run from {place} on differs by {worst:.2g} from a plain one with hooks")
    return worst
