"""`vesalius explain`: what parts fire on, tested on fresh texts, as pages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks, foreign
from vesalius.cli.foreign import Said
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.paths import check_writable
from vesalius.jobs.untrusted import read_json
from vesalius.model.loading import DEMO, look_up
from vesalius.site import Site

if TYPE_CHECKING:
    from vesalius.parts import Part

QUALITY = ("quality.html", "quality.json")
MOST_NAMED = 1_000_000
_SEVERAL = re.compile(r"^(?P<site>.+)\[(?P<which>[\d:,\s]+)\]$")


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    parts: Sequence[str]
    dictionary: Path | None
    latents: str | None
    model: str
    corpus: str
    out: Path
    tokens: int
    context: int
    bos: str
    column: str
    baseline: str | None
    challenge: bool
    seed: int
    device: str | None
    said: Said
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before anything heavy is loaded."""
        checks.one_of("baseline", [] if self.baseline is None else [self.baseline], checks.BASELINES)
        checks.at_least("--tokens", self.tokens, 1)
        checks.at_least("--seed", self.seed, 0)
        checks.device(self.device)
        if bool(self.parts) == (self.dictionary is not None):
            raise InputError(
                "name parts, such as layers.2.mlp_post[0:200], or give --dictionary for its latents; one or the other"
            )
        if self.latents is not None and self.dictionary is None:
            raise InputError("--latents are those of a --dictionary")
        for name in self.parts:
            sites_named(name)
        if self.latents is not None:
            numbers(self.latents)
        if self.dictionary is not None:
            checks.dictionary(self.dictionary)
            self.said.validate()
        checks.texts(self.corpus)
        check_writable(self.out)
        look_up(self.model)


def explain(
    corpus: Annotated[
        str, typer.Option(help="stdlib (a built-in corpus), or a .txt, .jsonl or .parquet file, or a folder of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html, a page for each part, summary.json, the ledger.")],
    parts: Annotated[
        list[str] | None, typer.Argument(help="Parts: layers.2.mlp_post[90], or a range, layers.2.mlp_post[0:200].")
    ] = None,
    dictionary: Annotated[
        Path | None, typer.Option(help="Folder of a dictionary, whose latents are the parts; made by train or others.")
    ] = None,
    latents: Annotated[str | None, typer.Option(help="Which of its latents: 0:200, or 3,5,9; default all.")] = None,
    model: ModelOption = DEMO,
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most, half of them to test on.")] = 200_000,
    context: Annotated[int, typer.Option(help="Tokens run together, the bos token included.")] = 256,
    bos: Annotated[str, typer.Option(help="Token before every context: auto, tokenizer, none, its text.")] = "auto",
    column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files: text or token ids.")] = "text",
    baseline: Annotated[
        str | None,
        typer.Option(
            help="random-directions: one in the place of each part; random-network: the same parts of the model with "
            "random weights; untrained-dictionary: latents of one that was never trained. What is supported there is "
            "what descriptions of nothing reach."
        ),
    ] = None,
    challenge: Annotated[
        bool, typer.Option("--challenge", help="Make inputs that break a rule, and revise it, before it is claimed.")
    ] = False,
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
) -> None:
    """What neurons or latents fire on: descriptions made on half of the documents, and tested on the other half."""
    request = Request(
        parts=parts or [],
        dictionary=dictionary,
        latents=latents,
        model=model,
        corpus=corpus,
        out=out,
        tokens=tokens,
        context=context,
        bos=bos,
        column=column,
        baseline=baseline,
        challenge=challenge,
        seed=seed,
        device=device,
        said=Said(site, out_site, layer, unpickle, in_scale, k, row_norm, ignore),
        command=command_line(),
    )
    run(request)


def run(request: Request) -> None:
    """Run the study, write its pages, say its answer."""
    request.check()
    device = checks.chosen_device(request.device)
    coder = None if request.dictionary is None else request.said.load(request.dictionary, device)
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, device=device, sink=screen)
        changed, asked = vs.studies.explaining(
            model,
            chosen_parts(request.parts, coder, request.latents),
            request.corpus,
            tokens=request.tokens,
            context=request.context,
            bos=request.bos,
            column=request.column,
            seed=request.seed,
            baseline=request.baseline,
            challenged=request.challenge,
            about=about(coder, request.dictionary, request.out) if coder and request.dictionary else None,
        )
        done = vs.studies.explain(changed, asked, out=request.out, sink=screen)
        path = written(vs.studies.Explanations(done), request.out, request.command, screen)
    if asked.about.get("quality") and request.baseline is None:
        page = request.out / asked.about["quality"]
        vs.report.link_explained(page, os.path.relpath(path, page.parent), " ".join(done.answer))
    for sentence in done.answer:
        say(sentence)
    say(str(path))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))


def written(found: Any, out: Path, command: str, screen: Screen) -> Path:
    """The pages and the summary."""
    pages = vs.report.page_names([str(part) for part in found.asked.parts])
    summary = vs.studies.summarise_explained(found, command=command, timings=screen.timings(), pages=pages)
    return vs.report.write_explained(summary, (one._repr_html_() for one in found), out)


def chosen_parts(names: Sequence[str], coder: Any, latents: str | None) -> list[Part]:
    """Parts by name, or latents by number; all of a dictionary when none are named. Raises InputError."""
    if coder is None:
        return [vs.Unit(site) for name in names for site in sites_named(name)]
    chosen = range(coder.n_latents) if latents is None else numbers(latents)
    beyond = next((number for number in chosen if number >= coder.n_latents), None)
    if beyond is not None:
        raise InputError(f"--latents: there is no latent {beyond}; the dictionary has {coder.n_latents:,}, from 0")
    return [coder.latent(number) for number in chosen]


def sites_named(name: str) -> list[Site]:
    """The sites that a name stands for: `layers.2.mlp_post[90]` is one, `layers.2.mlp_post[0:200]` are 200, and
    `layers.2.mlp_post[1,5,9]` three. Raises InputError for what is none."""
    found = _SEVERAL.match(name.strip())
    if found is None or found["which"].strip().isdigit():
        return [Site.parse(name.strip())]
    whole = Site.parse(found["site"])
    return [whole[index] for index in numbers(found["which"])]


def numbers(text: str) -> list[int]:
    """The numbers that "0:200", "3,5,9" or "0:10,90" stand for, each once. Raises InputError for anything else."""
    listed: dict[int, None] = {}
    for piece in text.split(","):
        first, colon, last = (part.strip() for part in piece.partition(":"))
        if not first.isdigit() or (colon and not last.isdigit()):
            raise InputError(f"{text!r} names no numbers; write 5, 0:200 (0 to 199) or 3,5,9")
        stop = int(last) if colon else int(first) + 1
        if not int(first) < stop <= int(first) + MOST_NAMED:
            raise InputError(f"{piece.strip()!r} names no numbers, or over {MOST_NAMED:,}; 0:200 are 0 to 199")
        listed |= dict.fromkeys(range(int(first), stop))
    return list(listed)


def about(coder: Any, path: Path, out: Path) -> Mapping[str, Any]:
    """What the index says of a dictionary, with the figures of its quality page where there is one."""
    folder = path if path.is_dir() else path.parent
    figures = _figures(folder / QUALITY[1], coder)
    page = os.path.relpath(folder / QUALITY[0], out) if figures and (folder / QUALITY[0]).exists() else None
    value = lambda name: figures.get(name, {}).get("value")  # noqa: E731
    return {
        "name": repr(coder),
        "hash": coder.content_hash,
        "latents": coder.n_latents,
        "quality": page,
        "l0": value("l0"),
        "fvu": value("fvu"),
    }


def _figures(path: Path, coder: Any) -> dict[str, Any]:
    """Of a quality.json that is about this dictionary; {} without one."""
    try:
        found = read_json(path)
        vs.report.quality_schema.check(found)
    except (InputError, FileFormatError, OSError):
        return {}
    return dict(found["figures"]) if found["dictionary"]["hash"] == coder.content_hash else {}
