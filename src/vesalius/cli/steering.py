"""`vesalius steer`: what adding a direction, latent or neuron does, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import Screen, bars, say
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs.paths import check_file, check_writable
from vesalius.jobs.untrusted import read_text
from vesalius.model.loading import DEMO, look_up
from vesalius.site import Site

FEWEST, TASK_PAIRS = 19, 16


@dataclass(frozen=True)
class Request:
    """What was asked on the command line."""

    prompts: str
    model: str
    positive: Path | None
    negative: Path | None
    site: str | None
    part: str | None
    dictionary: Path | None
    latent: int | None
    scales: Sequence[float]
    towards: Sequence[str]
    plain: str
    plain_texts: int
    context: int
    random: int
    new_tokens: int
    instead: str
    seed: int
    out: Path
    device: str | None
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before a model is loaded."""
        checks.device(self.device)
        contrast = (self.positive, self.negative, self.site)
        ways = [any(given is not None for given in contrast), self.part is not None, self.dictionary is not None]
        if sum(ways) != 1 or (ways[0] and None in contrast) or (ways[2] and self.latent is None):
            raise InputError(
                "say what to steer by: --positive FILE --negative FILE --site SITE (a contrastive vector), --part PART "
                "(a neuron), or --dictionary DIR --latent N"
            )
        for path in (self.positive, self.negative):
            if path is not None:
                check_file(path, (".txt",), "prompts, one a line,")
        if not self.pairs:
            check_file(Path(self.prompts), (".txt", *checks.TABLES), "prompts")
        elif self.prompts not in checks.QUESTIONS:
            check_file(Path(self.prompts), checks.TABLES, "pairs")
        for name in (self.site, self.part):
            if name is not None:
                Site.parse(name)
        if self.dictionary is not None:
            checks.dictionary(self.dictionary)
        checks.at_least("--random", self.random, FEWEST)
        checks.at_least("--latent", self.latent, 0)
        checks.at_least("--new-tokens", self.new_tokens, 0)
        checks.at_least("--context", self.context, 2)
        if self.plain_texts:
            checks.at_least("--plain-texts", self.plain_texts, 2)
            checks.texts(self.plain)
        if self.pairs and self.towards:
            raise InputError("--towards is for prompts without answers; pairs are measured by their logit difference")
        if self.pairs and self.instead:
            raise InputError("--instead is put before texts; pairs have prompts of their own")

    @property
    def pairs(self) -> bool:
        """Whether prompts have answers."""
        return self.prompts in checks.QUESTIONS or Path(self.prompts).suffix in checks.TABLES


def steer(
    prompts: Annotated[
        str,
        typer.Argument(
            help="What is steered: a .txt file, one prompt a line; your own pairs; or a built-in question's (ioi ...)."
        ),
    ],
    model: ModelOption = DEMO,
    positive: Annotated[Path | None, typer.Option(help="Contrastive vector: .txt file, one prompt a line ...")] = None,
    negative: Annotated[Path | None, typer.Option(help="... less the mean of these prompts ...")] = None,
    site: Annotated[str | None, typer.Option("--site", "-s", help="... at this site, by their last tokens.")] = None,
    part: Annotated[str | None, typer.Option(help="Steer by one neuron: layers.5.mlp_post[7].")] = None,
    dictionary: Annotated[Path | None, typer.Option(help="Steer by a latent of this dictionary.")] = None,
    latent: Annotated[int | None, typer.Option(help="Which latent.")] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Of a contrastive vector multiples of it, else added to the value; repeatable (0.5, 1, 2)."),
    ] = None,
    towards: Annotated[
        list[str] | None,
        typer.Option(help="Token whose log-probability is measured, ' happy'; repeatable. Default: the divergence."),
    ] = None,
    plain: Annotated[str, typer.Option(help="Texts whose perplexity is measured: stdlib, a file or a folder.")] = (
        "stdlib"
    ),
    plain_texts: Annotated[int, typer.Option("--plain-texts", help="How many of them; 0 measures none.")] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each.")] = 64,
    random: Annotated[int, typer.Option(help="Random directions of the same norm to compare with.")] = 19,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Also write so many tokens after each prompt.")] = 0,
    instead: Annotated[
        str, typer.Option(help="Text to put before each prompt, unsteered, to compare with: does asking do as much?")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for steering.html and steering.json; an interrupted run goes on from there.")
    ] = Path("runs/steering"),
    device: DeviceOption = None,
) -> None:
    """Steer by a contrastive vector, neuron or latent: effect, price and text by scale, beside random directions."""
    request = Request(
        prompts=prompts,
        model=model,
        positive=positive,
        negative=negative,
        site=site,
        part=part,
        dictionary=dictionary,
        latent=latent,
        scales=scale or [0.5, 1.0, 2.0],
        towards=towards or [],
        plain=plain,
        plain_texts=plain_texts,
        context=context,
        random=random,
        new_tokens=new_tokens,
        instead=instead,
        seed=seed,
        out=out,
        device=device,
        command=command_line(),
    )
    request.check()
    look_up(model)
    check_writable(out)
    _run(request)


def _run(request: Request) -> None:
    """Steer with progress bars, write page and figures, and say the answer."""
    with bars() as progress:
        screen = Screen(progress)
        model = vs.load(request.model, device=checks.chosen_device(request.device), sink=screen)
        part, size = _part(request, model)
        prompts = _prompts(request, model)
        found = vs.describe.steer(
            model,
            part,
            prompts,
            scales=[size * scale for scale in request.scales],
            towards=request.towards,
            plain=_plain(request, model),
            random=request.random,
            seed=request.seed,
            new_tokens=request.new_tokens,
            instead=request.instead,
            out=request.out / "runs",
            sink=screen,
        ).to_json()
    about = {"part": str(part), "model": model.name, "weights": model.content_hash, "prompts": request.prompts,
             "random directions": str(request.random), "seed": str(request.seed),
             **({} if request.positive is None else {"size of the vector": f"{size:.4g}"})}  # fmt: skip
    scales = [{**one, "multiple": given} for one, given in zip(found["scales"], request.scales, strict=True)]
    found |= {"scales": scales, "prompts": prompts if isinstance(prompts, list) else []}
    path = vs.report.write_steering(found, about, request.out, request.command)
    for sentence in vs.report.steering_answer(found):
        say(sentence)
    say(str(path))


def _part(request: Request, model: Any) -> tuple[Any, float]:
    """What is steered by, and what one unit of --scale is: of a contrastive vector its size."""
    if request.part is not None:
        site = Site.parse(request.part)
        model.check_site(site)
        return vs.Unit(site), 1.0
    if request.dictionary is not None:
        coder = vs.dictionaries.load(request.dictionary)
        return vs.latent(coder, request.latent or 0), 1.0
    assert request.positive is not None and request.negative is not None
    sides = [_lines(path) for path in (request.positive, request.negative)]
    label = f"{request.positive.stem} - {request.negative.stem}"
    vector = vs.describe.contrast_vector(model, str(request.site), *sides, label=label)
    return vector.direction, vector.size


def _lines(path: Path) -> list[str]:
    """Prompts of a text file, one a line."""
    try:
        found = [line for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as text: {error}") from error
    if not found:
        raise InputError(f"{path} holds no prompts; write one a line")
    return found


def _prompts(request: Request, model: Any) -> Any:
    if not request.pairs:
        return _lines(Path(request.prompts))
    if request.prompts in checks.QUESTIONS:
        return vs.data.task(request.prompts).build(model, n=TASK_PAIRS, seed=request.seed).split("discovery")
    return vs.data.load_pairs(request.prompts, model)


def _plain(request: Request, model: Any) -> Any:
    """The first texts that are long enough, cut to the context."""
    if not request.plain_texts:
        return ()
    texts = vs.data.texts_from(request.plain)
    wanted = (text for text in texts.read() if isinstance(text, str) and text.strip())
    rows = (model.tokens(text).ids[0, : request.context].tolist() for text in wanted)
    kept = list(islice((row for row in rows if len(row) == request.context), request.plain_texts))
    if len(kept) < 2:
        raise InputError(
            f"{request.plain} has {len(kept)} texts of {request.context} tokens; at least 2 are needed: lower --context"
        )
    return vs.Tokens.from_rows(kept)
