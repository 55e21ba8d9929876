"""Options that several commands have."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Demo alias, local folder, .gguf file, or transformers id.")
]

DeviceOption = Annotated[
    str | None, typer.Option(help="Device of the tensors, such as cpu or cuda; default cuda where there is one.")
]


def command_line() -> str:
    """What was typed, for a reader who wants to run it again."""
    return shlex.join(["vesalius", *sys.argv[1:]])
