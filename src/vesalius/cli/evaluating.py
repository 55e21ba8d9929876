"""`vesalius quality`: how good a dictionary is, as figures and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.foreign import Said
from vesalius.cli.screen import Screen, bars, note, say
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Sink


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    dictionary: Path
    store: Path
    model: str | None
    others: list[Path]
    out: Path | None
    concepts: list[Path]
    text: str
    label: str
    mark: str | None
    rows: int
    contexts: int
    seed: int
    device: str | None
    """None is the GPU where there is one."""
    said: Said
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything is loaded."""
        checks.device(self.device)
        self.said.validate()
        for name, value in (("--rows", self.rows), ("--contexts", self.contexts)):
            if value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.concepts and self.model is None:
            raise InputError("--concepts are texts that a model reads: give --model as well")
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0; got {self.seed}")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"quality-{self.dictionary.resolve().name}"


def quality(request: Request) -> None:
    """Measure with progress bars, write page and figures, and say the answer."""
    request.check()
    device = checks.chosen_device(request.device)
    coder, *others = (request.said.load(path, device) for path in (request.dictionary, *request.others))
    store = vs.data.ActivationStore.open(request.store)
    concepts = [
        vs.data.load_labelled(path, text=request.text, label=request.label, mark=request.mark)
        for path in request.concepts
    ]
    with bars() as progress:
        screen = Screen(progress)
        model = None if request.model is None else vs.load(request.model, device=device, sink=screen)
        if model is not None and request.said.check and "format" in getattr(coder, "metadata", {}):
            _verify(coder, model, screen)
        found = vs.dictionaries.quality(
            coder,
            store,
            model=model,
            others=others,
            concepts=concepts,
            n=request.rows,
            contexts=request.contexts,
            seed=request.seed,
            sink=screen,
        ).to_json()
    path = vs.report.write_quality(found, vs.dictionaries.WORDS, request.folder, request.command)
    note(found["data"]["words"])
    if model is None:
        note("Not spliced into a model: --model measures what the model loses.")
    for sentence in (*vs.report.quality_answer(found), intervals(found)):
        say(sentence)
    say(str(path))


def _verify(coder: Any, model: Any, sink: Sink) -> None:
    """Whether another library's file is read as it was written. Raises FileFormatError."""
    try:
        vs.dictionaries.verify(coder, model, sink=sink)
    except FileFormatError as error:
        raise FileFormatError(f"{error}. Measured all the same with --no-check") from error


def intervals(found: Mapping[str, Any]) -> str:
    """The main figures with their 95 % intervals, in one line."""
    parts = []
    # Where the mean may do no harm there is no share of it, and the harm itself is said.
    mean = "loss_recovered_mean" if "loss_recovered_mean" in found["figures"] else "ce_increase_mean"
    for name in ("fvu", "l0", "ce_increase", mean, "loss_recovered"):
        if name in found["figures"]:
            one = found["figures"][name]
            ends = "" if one["low"] is None else f" [{one['low']:.3g}, {one['high']:.3g}]"
            parts.append(f"{name} {one['value']:.3g}{ends}")
    return f"{', '.join(parts)} (95 % over {found['data']['groups']} {found['data']['unit']})"


@dataclass(frozen=True)
class Page:
    """A page that was written, and its answer in sentences."""

    path: Path
    answer: list[str]


def page(
    coder: Any,
    store: vs.data.ActivationStore,
    model: Any,
    others: Sequence[Any],
    folder: Path,
    command: str,
    sink: Sink,
) -> Page:
    """Measure a dictionary that was just trained, and write its page beside it."""
    found = vs.dictionaries.quality(
        # A model can be spliced at one site only; other coders are measured on rows alone.
        coder if model is None else coder.to(model.device),
        store,
        model=model if len(coder.out_sites) == 1 else None,
        others=others,
        sink=sink,
    ).to_json()
    path = vs.report.write_quality(found, vs.dictionaries.WORDS, folder, command)
    return Page(path, [*vs.report.quality_answer(found), intervals(found)])
