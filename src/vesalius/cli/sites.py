"""`vesalius sites`: a model's sites with their shapes, and TransformerLens's names.

Shapes are measured in a run of two tokens, of a model that is built from its config alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import vesalius as vs
from vesalius.cli.screen import Screen, bars, output, say
from vesalius.model import loading
from vesalius.site import RESULTS

if TYPE_CHECKING:
    from vesalius.model import Model
    from vesalius.site import Site

# Their sizes depend on the input, so that the axes are shown by name alone.
_FREE = ("batch", "pos", "query_pos", "key_pos", "source_pos")


def show(name: str) -> None:
    """Print one row per kind of site and shape; a star stands for all layers, where they are alike."""
    with bars() as progress:
        model = loading.without_weights(name, sink=Screen(progress))
    found = rows(measured(model), model)
    # Without a frame the rows fit into 80 columns.
    table = Table(title=_title(model), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("site", no_wrap=True)
    table.add_column("axes and sizes")
    hooks = [vs.Site.parse(_first_layer(label)).hook_name for label, *_ in found]
    if any(hooks):
        table.add_column("TransformerLens", no_wrap=True)
    for (label, axes, shape), hook in zip(found, hooks, strict=True):
        sized = " ".join(axis if axis == size else f"{axis}={size}" for axis, size in zip(axes, shape, strict=True))
        table.add_row(label, sized, *([hook.removeprefix("blocks.0.")] if any(hooks) else []))
    output.print(table)
    results = [label for label, *_ in found if vs.Site.parse(_first_layer(label)).kind in RESULTS]
    if results:
        say(f"For reading only, since no module makes it: {', '.join(results)}. Edit z instead.")
    for line in windows(model):
        say(line)


def _first_layer(label: str) -> str:
    """A label as a site's name: some layer instead of all of them."""
    return re.sub(r"layers\.[\d*,-]+\.", "layers.0.", label)


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
    """(label, axes, shape) in the order of a forward pass through each kind's first layer."""
    grouped: dict[tuple[str, str, tuple[str, ...]], list[Site]] = {}
    for site, shape in shapes.items():
        grouped.setdefault((site.stack, site.kind, shape), []).append(site)
    layout = model.architecture[1]
    found = []
    for (stack, _, shape), sites in grouped.items():
        numbers = [site.layer for site in sites if site.layer is not None]
        every = len(numbers) == layout.layers_of(stack)
        label = str(sites[0])
        if numbers:
            label = label.replace(f"layers.{numbers[0]}.", f"layers.{'*' if every else ranges(numbers)}.")
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
        return f"{model.name} ({adapter.family}): {layout.n_layers} + {layout.n_decoder_layers} layers, from 0"
    return f"{model.name} ({adapter.family}): {layout.n_layers} layers, numbered from 0"


def windows(model: Model) -> list[str]:
    """Which layers have a sliding attention window, where layers differ in that."""
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
