"""`vesalius circuit`: a circuit of edges, by a method of choice, and what it does alone on fresh prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs.paths import check_writable
from vesalius.model.loading import DEMO, look_up

CIRCUIT = "circuit.json"
FEW = 8
"""Prompt pairs of a built-in question: every edge on the shortlist is a run for each of them."""


def circuit(
    question: Annotated[
        str,
        typer.Argument(
            help="ioi, sva, capitals, induction, gendered_pronoun, greater_than, translation, "
            "insecure_code, or your own pairs."
        ),
    ],
    method: Annotated[str, typer.Option(help=f"How edges are found: {', '.join(checks.CIRCUIT_METHODS)}.")] = "hybrid",
    ablation: Annotated[
        str, typer.Option(help="What cut edges carry in the search: resample, mean or zero.")
    ] = "resample",
    model: ModelOption = DEMO,
    n: Annotated[
        int | None, typer.Option("--n", help=f"Prompt pairs to search on; default {FEW}, or all of your own.")
    ] = None,
    n_validation: Annotated[
        int | None, typer.Option("--n-validation", help="Prompt pairs of a built-in question to test on; default 24.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Edges to keep; default all that have an effect.")] = None,
    smallest: Annotated[
        float, typer.Option(help="Smallest effect of an edge, as a share of the whole effect.")
    ] = checks.SMALLEST,
    shortlist: Annotated[
        int, typer.Option(help="Of hybrid: edges that are cut exactly, one by one.")
    ] = checks.SHORTLIST,
    drawn: Annotated[
        int, typer.Option(help="Random edges that are cut exactly, to check the estimates.")
    ] = checks.SAMPLED,
    describe: Annotated[
        bool, typer.Option("--describe", help="Say what every member does, and test it on the fresh prompts.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for circuit.html, circuit.json, summary.json; default runs/<question>-circuit."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """A circuit of edges found on discovery prompts, and what it does alone on others."""
    checks.one_of("method", [method], checks.CIRCUIT_METHODS)
    checks.one_of("ablation", [ablation], checks.ABLATIONS)
    for name, value in (("--n", n), ("--n-validation", n_validation), ("--size", size), ("--shortlist", shortlist),
                        ("--drawn", drawn)):  # fmt: skip
        checks.at_least(name, value, 1)
    if not 0 < smallest < 1:
        raise InputError(f"--smallest is a share between 0 and 1; got {smallest}")
    checks.device(device)
    checks.question(question)
    folder = out or Path("runs") / f"{Path(question).stem}-circuit"
    check_writable(folder)
    look_up(model)
    sizes = {"n": n or FEW, "n_validation": n_validation or 3 * FEW} if question in checks.QUESTIONS else {}
    how: dict[str, Any] = {
        "kind": ablation, "size": size, "smallest": smallest, "shortlist": shortlist, "drawn": drawn, "seed": seed,
    }  # fmt: skip
    with bars() as progress:
        screen = Screen(progress)
        loaded = vs.load(model, device=checks.chosen_device(device), sink=screen)
        asked = vs.studies.question_for(question, loaded, seed=seed, bos="auto", **sizes)
        summary, path = _searched(loaded, asked, method, n, how, folder, screen, describe)
    for sentence in summary["answer"]:
        say(sentence)
    say(str(path))


def _searched(
    model: Any,
    asked: Any,
    method: str,
    n: int | None,
    how: Mapping[str, Any],
    folder: Path,
    screen: Screen,
    describe: bool,
) -> tuple[Mapping[str, Any], Path]:
    """Search on discovery, try on validation, write the files."""
    discovery, fresh = (asked.corruptions[asked.main].split(name) for name in ("discovery", "validation"))
    if n is not None and n < len(discovery):
        discovery = discovery.subset(range(n))
    note(f"{model.name}: {asked.text} {len(discovery)} + {len(fresh)} prompt pairs, bos {asked.bos}")
    wired = vs.circuits.wiring(model)
    found = vs.circuits.discover(wired, discovery, method, **how, out=folder / "runs", sink=screen)
    members = None
    if describe and found.members:
        # Claims are sealed in a ledger before anything looks at the fresh prompts.
        study = vs.studies.describe_members(asked, model, found, out=folder / "members", sink=screen)
        members = vs.studies.summarise_members(study)
    summary = vs.studies.summarise_edges(
        asked.text,
        wired,
        found,
        fresh,
        searched=len(discovery),
        command=command_line(),
        timings=screen.timings(),
        members=members,
    )
    vs.circuits.save_circuit(found, folder / CIRCUIT)
    return summary, vs.report.write_edges(summary, folder)
