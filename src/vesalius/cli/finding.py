"""`vesalius find`: from a concept, given by words or by labelled texts, to the parts that stand for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks, foreign
from vesalius.cli.explaining import chosen_parts, sites_named
from vesalius.cli.foreign import Said
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs import write_atomic
from vesalius.jobs.paths import check_file, check_writable
from vesalius.model.loading import DEMO, look_up

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    words: str | None
    corpus: str | None
    column: str
    table: Path | None
    text: str
    label: str
    value: str | None
    test: Path | None
    test_value: str | None
    dictionary: Path | None
    parts: Sequence[str]
    model: str
    out: Path
    best: int
    context: int
    seed: int
    device: str | None
    said: Said
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        checks.at_least("--best", self.best, 1)
        checks.device(self.device)
        if bool(self.parts) == (self.dictionary is not None):
            raise InputError("give --dictionary, or --part layers.2.mlp_post[0:1536] for neurons; one or the other")
        if (self.words is None) == (self.table is None):
            raise InputError(
                'give words to look for in --corpus, such as "madrid, barcelona", or --table with labelled texts and '
                "--value, the label that is looked for; one or the other"
            )
        if self.words is not None and self.corpus is None:
            raise InputError("words are looked for in a --corpus; give one, such as stdlib or texts.jsonl")
        if self.table is not None:
            check_file(self.table, checks.TABLES, "labelled texts")
            if self.value is None:
                raise InputError("--value is needed: the label in --table that is looked for")
        if self.test is not None:
            check_file(self.test, checks.TABLES, "labelled texts")
            if self.value is None and self.test_value is None:
                raise InputError("--test-value is needed: the label in --test that is looked for")
        if self.corpus is not None:
            checks.texts(self.corpus)
        for name in self.parts:
            sites_named(name)
        if self.dictionary is not None:
            checks.dictionary(self.dictionary)
            self.said.validate()
        check_writable(self.out)
        look_up(self.model)

    @property
    def what(self) -> str:
        """The concept, in words."""
        return str(self.words if self.words is not None else self.value)

    def sides(self) -> tuple[list[str], list[str]]:
        """Texts about it, and others."""
        if self.table is None:
            return vs.studies.texts_with(self.corpus, str(self.words).split(","), column=self.column)
        return self._labelled(self.table, str(self.value))

    def fresh(self) -> tuple[list[str], list[str]] | None:
        """The same, of the table to test on; None without one."""
        return None if self.test is None else self._labelled(self.test, str(self.test_value or self.value))

    def _labelled(self, table: Path, value: str) -> tuple[list[str], list[str]]:
        found = vs.data.load_labelled(table, text=self.text, label=self.label)
        if value not in found.classes:
            raise InputError(f"no text in {table} has the label {value!r}; there are {list(found.classes)}")
        sides: tuple[list[str], list[str]] = ([], [])
        for text, label in zip(found.texts, found.labels, strict=True):
            sides[0 if label == value else 1].append(text)
        return sides


def find(
    out: Annotated[Path, typer.Option(help="Folder for summary.json and ledger.sqlite.")],
    words: Annotated[
        str | None,
        typer.Argument(
            help='Words or phrases, "madrid, barcelona": texts that hold one are those about it. No language model is '
            "asked: words stand for themselves. Or give --table."
        ),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Texts to look for the words in, as for explain.")] = None,
    column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files with the text.")] = "text",
    table: Annotated[Path | None, typer.Option(help="Texts with labels instead of words: .jsonl, .csv.")] = None,
    text: Annotated[str, typer.Option(help="Column of --table that holds the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column of --table that holds the label.")] = "label",
    value: Annotated[str | None, typer.Option(help="The label that is looked for.")] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Labelled texts to test on, in another wording or language; all others are to discover on."),
    ] = None,
    test_value: Annotated[str | None, typer.Option(help="The label in --test, if it is another word there.")] = None,
    dictionary: Annotated[Path | None, typer.Option(help="Folder of a dictionary, whose latents are ranked.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Or parts, layers.2.mlp_post[0:1536]; repeatable.")] = None,
    model: ModelOption = DEMO,
    best: Annotated[int, typer.Option(help="How many of the best are tested on fresh texts.")] = 10,
    context: Annotated[int, typer.Option(help="Tokens of each text, at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
    site: foreign.SiteOption = None,
    layer: foreign.LayerOption = None,
    unpickle: foreign.UnpickleOption = False,
    k: foreign.KOption = None,
) -> None:
    """From a concept to the latents or neurons that stand for it: ranked on half of the texts, tested on the others."""
    said = Said(site=site, layer=layer, unpickle=unpickle, k=k)
    run(
        Request(
            words, corpus, column, table, text, label, value, test, test_value, dictionary, part or [], model, out,
            best, context, seed, device, said, command_line(),
        )
    )  # fmt: skip


def run(request: Request) -> None:
    """Rank, test, write the summary, say the answer."""
    request.check()
    device = checks.chosen_device(request.device)
    coder = None if request.dictionary is None else request.said.load(request.dictionary, device)
    positive, negative = request.sides()
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, device=device, sink=screen)
        asked = vs.studies.finding(
            model,
            chosen_parts(request.parts, coder, None),
            request.what,
            positive,
            negative,
            fresh=request.fresh(),
            best=request.best,
            context=request.context,
            seed=request.seed,
        )
        done = vs.studies.find(model, asked, out=request.out, sink=screen)
    summary = vs.studies.summarise_found(done, command=request.command, timings=screen.timings())
    vs.report.study_schemas.check(summary)
    content = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path = write_atomic(request.out / SUMMARY, content)
    for row in summary["claims"]:
        say(line(row))
    for sentence in done.answer:
        say(sentence)
    say(str(path))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))


def line(row: dict[str, Any]) -> str:
    """A part, its AUROC on discovery and on fresh texts, and the verdict."""
    found = f"{row['component']}: AUROC {row['discovery'] + 0.5:.2f} on discovery"
    if row["estimate"] is None:
        return f"{found}, not measured"
    interval = "" if row["interval"] is None else f" [{row['low'] + 0.5:.2f}, {row['high'] + 0.5:.2f}]"
    return f"{found}, {row['estimate'] + 0.5:.2f}{interval} on {row['n']} fresh texts: {row['verdict']}"
