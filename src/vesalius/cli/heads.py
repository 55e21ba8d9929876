"""`vesalius heads`: what every head of a model does in any text, tested on fresh documents, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vesalius as vs
from vesalius.cli import checks
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.screen import KEEP_HEAD, Screen, bars, note, say
from vesalius.jobs.paths import check_writable
from vesalius.model.loading import DEMO, look_up


def heads(
    corpus: Annotated[
        str, typer.Option(help="stdlib (a built-in corpus), or a .txt, .jsonl or .parquet file, or a folder of them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, summary.json and ledger.sqlite.")],
    model: ModelOption = DEMO,
    tokens: Annotated[int, typer.Option(help="Tokens to read, at most, half of them to test on.")] = 20_000,
    context: Annotated[int, typer.Option(help="Tokens run together, the bos token included.")] = 128,
    bos: Annotated[str, typer.Option(help="Token before every context: auto, tokenizer, none, its text.")] = "auto",
    column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files: text or token ids.")] = "text",
    baseline: Annotated[
        str | None, typer.Option(help="random-network: the same heads of the model with random weights.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = None,
) -> None:
    """Where every head looks in any text, and whether it writes what it sees: induction heads, sinks and others."""
    checks.one_of("baseline", [] if baseline is None else [baseline], ("random-network",))
    checks.at_least("--tokens", tokens, 1)
    checks.at_least("--context", context, 8)
    checks.at_least("--seed", seed, 0)
    checks.device(device)
    checks.texts(corpus)
    check_writable(out)
    look_up(model)
    where = checks.chosen_device(device)
    with bars() as progress:
        screen = Screen(progress)
        loaded = vs.load(model, device=where, sink=screen)
        changed, asked = vs.studies.describing_heads(
            loaded,
            corpus,
            tokens=tokens,
            context=context,
            bos=bos,
            column=column,
            baseline=baseline,
            seed=seed,
        )
        done = vs.studies.describe_heads(changed, asked, out=out, sink=screen)
    summary = vs.studies.summarise_heads(done, command=command_line(), timings=screen.timings())
    path = vs.report.write_heads(summary, out)
    for sentence in done.answer:
        say(sentence)
    say(str(path))
    if done.ledger_head:
        note(KEEP_HEAD.format(done.ledger_head))
