"""`vesalius explain-input` and `vesalius neuron`: one input, and one channel of a network that sees; study `curves`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.options import DeviceOption, command_line
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.paths import check_file, check_writable
from vesalius.model.loading import DEMO

if TYPE_CHECKING:
    from vesalius.attribution import Question

NETWORK = "efficientnet-lite0"
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
ESTIMATORS = ("logistic", "forest", "boosting")
METHODS = {
    "image": ("grad_cam", "gradient", "smoothgrad", "integrated_gradients", "guided_backprop", "occlusion", "random"),
    "tokens": ("integrated_gradients", "gradient_x_input", "occlusion", "kernel_shap", "attention_rollout", "random"),
    "row": ("kernel_shap", "occlusion", "lime", "random"),
}
# Rows of a table that a row is compared with.
_BACKGROUND = 50
_ROW = re.compile(r"^(?P<table>.+\.csv):(?P<row>\d+)$")


def explain_input(
    what: Annotated[
        str, typer.Argument(help="An image file; a row of a table, table.csv:12 (from 0); or a text, in quotes.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help=f"Images: {NETWORK} or a folder with a ViT; texts: as for study; rows: "
                     f"{', '.join(ESTIMATORS)}, fitted to the table's other rows."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="As for vs.explain; repeatable.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Class by number or name, or the next token; default the likeliest.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="What is absent looks like: zero, mean, blur; of a text mean, zero, pad.")
    ] = None,
    patch: Annotated[int, typer.Option(help="Side of an image's features, in pixels.")] = 32,
    label: Annotated[str | None, typer.Option(help="Of a table: the column that the model tells.")] = None,
    orders: Annotated[int, typer.Option(help="Random orders that each explanation is compared with.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
) -> None:  # fmt: skip
    """Why a model says this of one image, text or row: several methods side by side, each tested."""
    request = Inquiry(what, model, tuple(method or ()), target, baseline, patch, label, orders, seed, device)
    request.check()
    check_writable(out)
    question, scaling, name = request.question()
    chosen = request.methods or METHODS[question.kind]
    given, tried = [], []
    with bars() as progress:
        task = progress.add_task("explain and test", total=len(chosen), message="")
        for one in chosen:
            progress.update(task, message=one)
            given.append(vs.attribution.explained(question, one, **request.options(question, one)))
            tried.append(vs.attribution.examine(given[-1], orders=orders, seed=seed))
            progress.advance(task)
    command = command_line()
    summary = vs.report.summarise_input(given, tried, model=name, command=command, seed=seed)
    path = vs.report.write_input(summary, given, out, scaling)
    say(f"The {question.target} is {question.value:.3g}; with every feature absent {question.at_baseline:.3g}.")
    for trials in tried:
        say(f"{trials.explanation.method}: {'; '.join(trials.problems) or 'stood every test'}.")
    say(str(path))


@dataclass(frozen=True)
class Inquiry:
    """The arguments of `explain-input`."""

    what: str
    model: str | None
    methods: tuple[str, ...]
    target: str | None
    baseline: str | None
    patch: int
    label: str | None
    orders: int
    seed: int
    device: str | None

    @property
    def kind(self) -> str:
        """image, row or tokens."""
        if Path(self.what).suffix.lower() in IMAGES:
            return "image"
        return "row" if _ROW.match(self.what) else "tokens"

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        checks.at_least("--orders", self.orders, 1)
        checks.at_least("--patch", self.patch, 1)
        checks.at_least("--seed", self.seed, 0)
        checks.device(self.device)
        if self.kind == "image":
            check_file(Path(self.what), IMAGES, "an image")
        if self.kind == "row":
            check_file(Path(_ROW.match(self.what)["table"]), (".csv",), "a table")  # type: ignore[index]
            checks.one_of("--model", [self.model or ESTIMATORS[0]], ESTIMATORS)
            if self.label is None:
                raise InputError("a row is explained of a model of one column: give --label COLUMN")

    def question(self) -> tuple[Question, Any, str]:
        """The question, how images are scaled, and the model's name."""
        device, target = checks.chosen_device(self.device), self.target
        number: Any = int(target) if target is not None and target.isdigit() else target
        of = vs.attribution.question_of
        if self.kind == "image":
            network = vs.images.open_network(self.model or NETWORK, device)
            image = vs.images.read_picture(self.what, network.scaling)
            asked = of(network.model, image, number, baseline=self.baseline, features=self.patch)
            return asked, network.scaling, network.model.name
        if self.kind == "row":
            return (*self._of_table(number), self.model or ESTIMATORS[0])
        model = vs.load(self.model or DEMO, device=device)
        return of(model, self.what, number, baseline=self.baseline), None, model.name

    def _of_table(self, target: Any) -> tuple[Question, None]:
        found = _ROW.match(self.what)
        assert found is not None and self.label is not None
        table, labels, names = read_table(Path(found["table"]), self.label)
        row = int(found["row"])
        if row >= len(table):
            raise InputError(f"{found['table']} has {len(table)} rows, numbered from 0; got {row}")
        others = [number for number in range(len(table)) if number != row]
        estimator = fitted(self.model or ESTIMATORS[0], table[others], [labels[n] for n in others], self.seed)
        step = max(1, len(others) // _BACKGROUND)
        background = table[others[::step]]
        return vs.attribution.question_of(estimator, table[row], target, baseline=background, names=names), None

    def options(self, question: Question, method: str) -> dict[str, Any]:
        """Of a method, by its name: what the seed is, and fewer samples where each is a run of a network."""
        if "." in method or method not in vs.attribution.METHODS:
            return {}
        known = vs.attribution.METHODS[method].options
        found = {"seed": self.seed} if "seed" in known else {}
        few = question.kind != "row" and "samples" in known
        return {**found, **({"samples": max(256, 4 * len(question))} if few else {})}


def read_table(path: Path, label: str) -> tuple[Any, list[str], list[str]]:
    """Numbers [row, column], labels and names of the columns. Raises FileFormatError for text that is no number."""
    import csv

    import numpy as np

    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileFormatError(f"{path} cannot be read as a table: {error}") from error
    if not rows or label not in rows[0]:
        raise InputError(f"{path} has no column {label!r}; its columns: {', '.join(rows[0]) if rows else 'none'}")
    names = [name for name in rows[0] if name != label]
    try:
        table = np.array([[float(row[name]) for name in names] for row in rows])
    except (TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} holds what is no number; only columns of numbers are explained: {error}"
        ) from error
    return table, [row[label] for row in rows], names


def fitted(kind: str, rows: Any, labels: Sequence[str], seed: int) -> Any:
    """A classifier fitted to some rows. Raises InputError for labels of one class only."""
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(labels)) < 2:
        raise InputError(f"all labels are {labels[0] if labels else 'missing'!r}; a model needs two kinds or more")
    made = {
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "forest": lambda: RandomForestClassifier(200, random_state=seed),
        "boosting": lambda: GradientBoostingClassifier(random_state=seed),
    }
    return made[kind]().fit(rows, list(labels))


def neuron(
    part: Annotated[str, typer.Argument(help="A channel: _blocks.5._bn1[3], of the module's output.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")],
    images: Annotated[Path | None, typer.Option(help="Folder of images; without, made ones are shown.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=f"{NETWORK}, or a folder with a ViT.")] = NETWORK,
    steps: Annotated[int, typer.Option(help="Steps of making images for it; 0 makes none.")] = 96,
    repeats: Annotated[int, typer.Option(help="Made images of every kind.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
) -> None:
    """What excites one channel of a network that sees: images, near misses, made images, a description, its effect."""
    match = re.fullmatch(r"(?:module:)?(?P<path>[\w.]+)(?:\|out)?\[(?P<index>\d+)\]", part)
    if match is None:
        raise InputError(f"{part!r} is no channel; give the module and the number, such as _blocks.5._bn1[3]")
    checks.at_least("--steps", steps, 0)
    checks.at_least("--repeats", repeats, 1)
    checks.device(device)
    check_writable(out)
    site, index = f"module:{match['path']}|out", int(match["index"])
    network = vs.images.open_network(model, checks.chosen_device(device))
    channel, made_images = vs.Channel(vs.Site.parse(site), index), vs.images.stimuli(network.scaling, repeats, seed)
    shown = made_images if images is None else vs.images.read_pictures(images, network.scaling)
    with bars() as progress:
        screen = Screen(progress)
        found = vs.images.exciting(network.model, [channel], shown, sink=screen)[0]
        runs = vs.Runs(network.model, made_images.corpus(), seed=seed, sink=screen)
        description = vs.images.Kinds().describe(vs.describe.Discovery.of(runs, [channel]), channel)
        made = foretold = None
        if steps:
            made = vs.images.synthesise_images(
                network.model, channel, network.scaling, steps=steps, pictures=shown, seed=seed, sink=screen
            )
            fresh = vs.images.stimuli(network.scaling, 1, seed + 1)
            top = [one.number for one in found.of("top")]
            foretold = vs.images.foretells(network.model, channel, made, top, shown, fresh)
    fits = description is not None and description.fits
    sentence = description.sentence if fits and description is not None else "No kind of the made images excites it."
    summary = vs.report.summarise_channel(
        found, sentence=sentence, rivals=description.rivals if fits and description is not None else (), made=made,
        foretold=foretold, effect=None, model=network.model.name, command=command_line(), seed=seed,
    )  # fmt: skip
    say(sentence)
    if made is not None:
        say(made.sentence)
    say(str(vs.report.write_channel(summary, found, made, out, network.scaling)))


def curves(model: str, out: Path, site: str | None, seed: int, device: str | None) -> int:
    """The study `curves`: look, seal, test, write the page, say the answer."""
    checks.at_least("--seed", seed, 0)
    checks.device(device)
    check_writable(out)
    network = vs.images.open_network(model, checks.chosen_device(device))
    place = site or network.site
    if not place:
        raise InputError(f"{network.model.name} has no map that is looked at by default; give --site module:<path>|out")
    with bars() as progress:
        screen = Screen(progress)
        asked = vs.studies.curve_search(network.model, network.scaling, place, seed=seed)
        done = vs.studies.find_curves(network.model, asked, out=out, sink=screen)
    summary = vs.studies.summarise_curves(done, command=command_line(), timings=screen.timings())
    path = vs.report.write_curves(summary, out)
    for sentence in done.answer:
        say(sentence)
    say(str(path))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))
    return 1 if done.stopped else 0
