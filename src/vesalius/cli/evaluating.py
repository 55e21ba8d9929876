"""`vesalius quality`: how good a dictionary is, as figures and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks, foreign
from vesalius.cli.foreign import Said
from vesalius.cli.options import DeviceOption, command_line
from vesalius.cli.screen import Screen, bars, note, say
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Sink
from vesalius.jobs.paths import check_file, check_writable
from vesalius.model.loading import look_up


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


def quality(
    dictionary: Annotated[Path, typer.Argument(help="Folder of a dictionary, made by train or another library.")],
    store: Annotated[Path, typer.Argument(help="Folder of activations, made by harvest.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also splice it into this model: alias, folder, .gguf file, id.")
    ] = None,
    other: Annotated[
        list[Path] | None, typer.Option(help="The same from another seed, to see what they share; can be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for quality.html and quality.json; default runs/quality-<dictionary>.")
    ] = None,
    concepts: Annotated[
        list[Path] | None, typer.Option(help="Texts with labels, .jsonl or .csv, to probe for; can be repeated.")
    ] = None,
    text: Annotated[str, typer.Option(help="Column of --concepts that holds the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column of --concepts that holds the label.")] = "label",
    mark: Annotated[str | None, typer.Option(help="Column of a second label, which may go with the first.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to measure on.")] = 16_384,
    contexts: Annotated[int, typer.Option(help="Contexts to run through the model.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
    site: foreign.SiteOption = None,
    out_site: foreign.OutSiteOption = None,
    layer: foreign.LayerOption = None,
    unpickle: foreign.UnpickleOption = False,
    in_scale: foreign.InScaleOption = None,
    k: foreign.KOption = None,
    row_norm: foreign.RowNormOption = None,
    ignore: foreign.IgnoreOption = None,
    check: foreign.CheckOption = True,
) -> None:
    """How good a dictionary is, on documents it was not trained on, beside what it has to beat."""
    request = Request(
        dictionary=dictionary,
        store=store,
        model=model,
        others=other or [],
        out=out,
        rows=rows,
        contexts=contexts,
        concepts=concepts or [],
        text=text,
        label=label,
        mark=mark,
        seed=seed,
        device=device,
        said=Said(site, out_site, layer, unpickle, in_scale, k, row_norm, ignore, check),
        command=command_line(),
    )
    request.check()
    for path in (dictionary, *request.others):
        checks.dictionary(path)
    checks.store(store)
    if model is not None:
        look_up(model)
    for path in request.concepts:
        check_file(path, checks.TABLES, "labelled texts")
    check_writable(request.folder)
    run(request)


def run(request: Request) -> None:
    """Measure with progress bars, write page and figures, and say the answer."""
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
