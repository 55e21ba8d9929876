"""`vesalius sites`: the tree of a model's sites with their shapes, measured in a run of two tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

import vesalius as vs
from vesalius.cli.screen import Screen, bars, output, say

if TYPE_CHECKING:
    from vesalius.model import Model
    from vesalius.site import Site

# They depend on the input and are shown by name.
_FREE = ("batch", "pos", "query_pos", "key_pos", "source_pos")


def show(name: str) -> None:
    """Print one row per kind of site and shape; layers that are alike are starred out, others listed."""
    with bars() as progress:
        model = vs.load(name, sink=Screen(progress))
    shapes = measured(model)
    table = Table(title=_title(model), title_justify="left")
    for heading in ("site", "axes", "shape"):
        table.add_column(heading, no_wrap=heading == "site")
    for label, axes, shape in rows(shapes, model):
        table.add_row(label, " ".join(axes), f"({', '.join(shape)})")
    output.print(table)
    for line in windows(model):
        say(line)


def measured(model: Model) -> dict[Site, tuple[str, ...]]:
    """Every site's shape, with a number for each axis that does not depend on the input."""
    run = model.run(_example(model), capture=["*"])
    return {
        site: tuple(axis if axis in _FREE else str(size) for axis, size in zip(site.axes, run[site].shape, strict=True))
        for site in model.sites("*")
    }


def _example(model: Model) -> Any:
    if model.architecture[0].input == "input_ids":
        return vs.Tokens.from_rows([[0, 0]])
    config: Any = model.module.config
    weight = next(model.module.parameters())
    return weight.new_zeros(1, config.num_channels, config.image_size, config.image_size)


def rows(shapes: Mapping[Site, tuple[str, ...]], model: Model) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(label, axes, shape) in forward order of each kind's first layer."""
    grouped: dict[tuple[str, str, tuple[str, ...]], list[Site]] = {}
    for site, shape in shapes.items():
        grouped.setdefault((site.stack, site.kind, shape), []).append(site)
    layout = model.architecture[1]
    found = []
    for (stack, _, shape), sites in grouped.items():
        numbers = [site.layer for site in sites if site.layer is not None]
        every = len(numbers) == layout.layers_of(stack)
        label = str(sites[0]).replace(f"layers.{numbers[0]}.", f"layers.{'*' if every else ranges(numbers)}.") if (
            numbers) else str(sites[0])  # fmt: skip
        found.append((label, sites[0].axes, shape))
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _title(model: Model) -> str:
    adapter, layout = model.architecture
    if adapter.stacks:
        return f"{model.name} ({adapter.family}): {layout.n_layers} + {layout.n_decoder_layers} layers"
    return f"{model.name} ({adapter.family}): {layout.n_layers} layers"


def windows(model: Model) -> list[str]:
    """Which layers' attention looks back only so far, where layers differ in that."""
    config = model.module.config
    kinds = list(getattr(config, "layer_types", None) or [])[: model.architecture[1].n_layers]
    if len(set(kinds)) < 2:
        return []
    window = getattr(config, "sliding_window", None)
    return [
        f"{kind.replace('_', ' ')}{f' ({window} tokens)' if 'sliding' in kind and window else ''}: layers "
        f"{ranges([number for number, own in enumerate(kinds) if own == kind])}"
        for kind in dict.fromkeys(kinds)
    ]
