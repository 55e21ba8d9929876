"""What the command line can say about a dictionary's file where the file itself does not: the arguments of `load`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.errors import InputError

SiteOption = Annotated[
    list[str] | None, typer.Option("--site", help="Where it reads, if its file does not say; once per site.")
]
OutSiteOption = Annotated[list[str] | None, typer.Option("--out-site", help="Where it writes; default as --site.")]
LayerOption = Annotated[int | None, typer.Option(help="Which of a folder of transcoders.")]
UnpickleOption = Annotated[bool, typer.Option("--unpickle", help="Read the tensors of a .pt file, if you trust it.")]
InScaleOption = Annotated[float | None, typer.Option(help="Factor on inputs, if it is not in the folder.")]
KOption = Annotated[int | None, typer.Option("-k", "--k", help="Active latents, if no file says how many.")]
RowNormOption = Annotated[str | None, typer.Option(help="How OpenAI's normalise rows: none or layer_norm.")]
IgnoreOption = Annotated[
    list[str] | None, typer.Option(help="Tensor or setting of the file that does not matter; can be repeated.")
]
CheckOption = Annotated[
    bool, typer.Option(help="With --model, first check that another library's file is read as it was written.")
]


@dataclass(frozen=True)
class Said:
    """What was said of the files of dictionaries. check: whether `verify` comes first."""

    site: Sequence[str] | None = None
    out_site: Sequence[str] | None = None
    layer: int | None = None
    unpickle: bool = False
    in_scale: float | None = None
    k: int | None = None
    row_norm: str | None = None
    ignore: Sequence[str] | None = None
    check: bool = True

    def validate(self) -> None:
        """Refuse what cannot be before anything is loaded."""
        checks.sites([*(self.site or ()), *(self.out_site or ())])
        checks.at_least("--layer", self.layer, 0)
        checks.at_least("--k", self.k, 1)
        if self.in_scale is not None and not self.in_scale > 0:
            raise InputError(f"--in-scale must be above 0; got {self.in_scale}")

    def load(self, path: Path, device: str) -> Any:
        """The dictionary in a file or folder."""
        return vs.dictionaries.load(
            path,
            site=self.site or None,
            out_site=self.out_site or None,
            layer=self.layer,
            unpickle=self.unpickle,
            in_scale=self.in_scale,
            k=self.k,
            row_norm=self.row_norm,
            ignore=tuple(self.ignore or ()),
            device=device,
        )
