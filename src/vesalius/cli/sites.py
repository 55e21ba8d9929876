"""`vesalius sites`: the tree of a model's sites with their shapes."""

from __future__ import annotations

from rich.table import Table

import vesalius as vs
from vesalius.cli.screen import Screen, bars, output


def show(name: str) -> None:
    """Print one row per kind of site; layers are starred out because they are alike."""
    with bars() as progress:
        model = vs.load(name, sink=Screen(progress))
    _, layout = model.described
    widths = {
        "d_model": layout.d_model, "head": layout.n_heads, "kv_head": layout.n_kv_heads, "d_head": layout.d_head,
        "vocab": layout.vocab,
    }  # fmt: skip
    table = Table(title=f"{model.name}: {layout.n_layers} layers", title_justify="left")
    for heading in ("site", "axes", "shape"):
        table.add_column(heading)
    for site in model.sites("*"):
        if site.layer in (None, 0):
            shape = ", ".join(str(widths.get(axis, axis)) for axis in site.axes)
            table.add_row(str(site).replace("layers.0.", "layers.*."), " ".join(site.axes), f"({shape})")
    output.print(table)
