"""`vesalius probe`: from labelled texts to a verdict on a concept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs.paths import check_file, check_writable
from vesalius.model.loading import DEMO, look_up
from vesalius.site import Site

TABLES = (*checks.TABLES, ".parquet")


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    table: Path
    text: str
    label: str
    group: str | None
    split: str | None
    shifted: tuple[str, ...]
    model: str
    out: Path
    sites: str
    suffix: str
    answers: str | None
    most: int
    random_weights: bool
    seed: int
    device: str | None
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        check_file(self.table, TABLES, "labelled texts")
        for _, path in self.others():
            check_file(path, TABLES, "labelled texts")
        checks.at_least("--most", self.most, 24)
        checks.device(self.device)
        if self.answers is not None and len(self.answers.split("|")) != 2:
            raise InputError(f'--answers are two words, " true| false"; got {self.answers!r}')
        if "*" not in self.sites:
            Site.parse(self.sites)
        check_writable(self.out)
        look_up(self.model)

    def others(self) -> list[tuple[str, Path]]:
        """Names and files of other distributions."""
        found = []
        for given in self.shifted:
            name, sign, path = given.partition("=")
            if not sign:
                raise InputError(f"--shifted takes NAME=FILE, such as negated=neg_cities.csv; got {given!r}")
            found.append((name, Path(path)))
        return found

    def concept(self) -> vs.Concept:
        """The labelled texts, with splits, and other distributions beside them."""
        columns = {"text": self.text, "label": self.label, "group": self.group}
        own = vs.concepts.load_concept(self.table, **columns, split=self.split)  # type: ignore[arg-type]
        if not self.shifted:
            return own
        divided = own if own.splits else own.divided(seed=self.seed)
        others = {name: vs.concepts.load_concept(path, **columns) for name, path in self.others()}  # type: ignore[arg-type]
        return divided.with_shifted(others)


def probe(
    table: Annotated[Path, typer.Argument(help="Labelled texts: .csv, .tsv, .jsonl, .json or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, summary.json and ledger.sqlite.")],
    text: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column that holds the label.")] = "label",
    group: Annotated[
        str | None, typer.Option(help="Column of what texts share (entity, template); default 'group', if it is there.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Column with train, test and other splits; default 'split'; without, halves by group."),
    ] = None,
    shifted: Annotated[
        list[str] | None,
        typer.Option(help="Another distribution, NAME=FILE, same columns; what was seen is left out; repeatable."),
    ] = None,
    model: ModelOption = DEMO,
    sites: Annotated[str, typer.Option("--sites", "-s", help="Sites to probe, at the last token.")] = (
        "layers.*.resid_post"
    ),
    suffix: Annotated[str, typer.Option(help='Put behind each text first, such as " This statement is".')] = "",
    answers: Annotated[
        str | None,
        typer.Option(help='Two answers, one token each: for the second label and against it, " true| false".'),
    ] = None,
    most: Annotated[int, typer.Option(help="Examples of each split, at most.")] = 200,
    random_weights: Annotated[
        bool, typer.Option("--random-weights/--no-random-weights", help="Probe the re-initialised model as well.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Whether a model carries a concept, and whether it uses it: probes with controls, then tested interventions."""
    run(
        Request(
            table, text, label, group, split, tuple(shifted or ()), model, out, sites, suffix, answers, most,
            random_weights, seed, device, command_line(),
        )
    )  # fmt: skip


def run(request: Request) -> None:
    """Read, choose, seal, test, write the report, say the answer."""
    request.check()
    concept = request.concept()
    device = checks.chosen_device(request.device)
    first, _, second = (request.answers or "").partition("|")
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, device=device, sink=screen)
        asked = vs.studies.probing(
            model,
            concept,
            sites=request.sites,
            suffix=request.suffix,
            answers=(first, second) if request.answers else None,
            most=request.most,
            random_weights=request.random_weights,
            seed=request.seed,
        )
        done = vs.studies.probe(model, asked, out=request.out, sink=screen)
    summary = vs.studies.summarise_probed(done, command=request.command, timings=screen.timings())
    path = vs.report.write_probed(summary, request.out)
    for sentence in done.answer:
        say(sentence)
    say(str(path))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))
