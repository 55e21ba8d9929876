"""`vesalius study | circuit | sites | harvest | train | quality | explain | heads | find | probe | steer | calibrate |
ledger`, and `explain-input | neuron` for single inputs and networks that see.

Exit codes: 0 done, 1 the study stopped at its gate, 2 something given cannot be used (the message says what, and what
to do), 130 interrupted; finished work is kept, and the same command goes on from there.

Every command first checks what it can without importing torch, so that a wrong path is answered at once.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from vesalius.cli import (
    calibrating,
    checks,
    circuiting,
    evaluating,
    explaining,
    finding,
    harvesting,
    heads,
    ledgers,
    probing,
    seeing,
    sites,
    steering,
    studying,
    tabular,
    training,
)
from vesalius.cli.options import DeviceOption, ModelOption, command_line
from vesalius.cli.process import settle
from vesalius.cli.screen import console, fail, warn
from vesalius.errors import VesaliusError
from vesalius.jobs.paths import check_writable
from vesalius.model.loading import DEMO, look_up

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take a trained network apart, say what each part does, and test every statement.",
)
app.add_typer(ledgers.app, name="ledger")

USAGE, INTERRUPTED = 2, 130


def main() -> None:
    """Entry point: turns errors into one message and an exit code."""
    settle()
    before, warnings.showwarning = warnings.showwarning, warn  # type: ignore[assignment]
    try:
        raise SystemExit(_run())
    finally:
        warnings.showwarning = before


def _run() -> int:
    """The exit code of a command; an error that is not a bug becomes one message."""
    try:
        code = app(prog_name="vesalius", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except VesaliusError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except Exception as error:
        # typer's own usage errors have a method for their message; anything else is a bug and keeps its traceback.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # Without arguments typer has shown the help, and its message is empty.
        return fail(message()) if message() else USAGE
    # Some versions of typer turn ctrl-C into this code themselves.
    if code == INTERRUPTED:
        console.print("[yellow]Interrupted.[/] Finished work is kept; the same command goes on from there.")
    return code


@app.command()
def study(
    question: Annotated[
        str,
        typer.Argument(
            help="ioi, sva, capitals, induction, gendered_pronoun, greater_than, translation, insecure_code, or your "
            "own pairs: a .jsonl, .json, .csv, .tsv file. Of networks that see: curves. Of tables, with models of "
            "their own: shortcut, by-design."
        ),
    ],
    model: ModelOption = DEMO,
    n: Annotated[
        int | None,
        typer.Option("--n", help="Prompt pairs to search on; default 32, of your own pairs all that each split has."),
    ] = None,
    n_validation: Annotated[
        int | None, typer.Option("--n-validation", help="Prompt pairs to test on; default half as many again as --n.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, summary.json and ledger.sqlite; default runs/<question>."),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="random-weights: the same study on the re-initialised model. Of shortcut: no-mark."),
    ] = None,
    past_gate: Annotated[
        bool, typer.Option("--past-gate", help="Go on although the model does not do the task.")
    ] = False,
    bos: Annotated[str, typer.Option(help="Token before every prompt: auto, tokenizer, none, or its text.")] = "auto",
    random_sets: Annotated[
        int, typer.Option(help="Random sets the circuit is compared with; p is at least 1 / (sets + 1).")
    ] = 99,
    site: Annotated[
        str | None, typer.Option(help="Of curves: the module whose channels are looked at, module:<path>|out.")
    ] = None,
    device: DeviceOption = None,
) -> int:
    """From a question to tested claims: circuit, descriptions, verdicts on fresh data, and a report."""
    if question == "curves":
        network = seeing.NETWORK if model == DEMO else model
        return seeing.curves(network, out or Path("runs") / question, site, seed, device)
    if question in checks.TABLE_STUDIES:
        return tabular.study(tabular.Request(question, seed, out, control, command_line()))
    request = studying.Request(
        question=question,
        model=model,
        n=n,
        n_validation=n_validation,
        seed=seed,
        out=out,
        control=control,
        past_gate=past_gate,
        bos=bos,
        random_sets=random_sets,
        device=device,
        command=command_line(),
    )
    return studying.study(request)


@app.command(name="sites")
def list_sites(
    model: Annotated[str, typer.Argument(help="Demo alias, local folder, .gguf file, or transformers id.")] = DEMO,
) -> None:
    """The model's sites with their shapes: what can be read and edited."""
    look_up(model)
    sites.show(model)


@app.command()
def harvest(
    texts: Annotated[
        str, typer.Argument(help="stdlib (a built-in corpus), or a .txt, .jsonl or .parquet file, or a folder of them.")
    ],
    site: Annotated[
        list[str], typer.Option("--site", "-s", help="Site or glob, layers.15.resid_post; can be repeated.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the activations.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for study; several run on the same tokens, with tags: base=NAME."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Activations per site, at most; default all the text.")] = None,
    context: Annotated[int, typer.Option(help="Tokens run together, the bos token included.")] = 256,
    dtype: Annotated[str, typer.Option(help="Stored as float32, bfloat16 or float16.")] = "float32",
    compute: Annotated[
        str, typer.Option(help="float32, or bfloat16: faster on most machines; the error is measured.")
    ] = "float32",
    bos: Annotated[str, typer.Option(help="Token before every context: auto, tokenizer, none, its text.")] = "auto",
    keep_bos: Annotated[
        bool, typer.Option("--keep-bos", help="Keep the first position of each context, a norm outlier.")
    ] = False,
    max_norm: Annotated[
        float, typer.Option("--max-norm", help="Drop rows over this many times the median norm; 0 keeps all.")
    ] = 10.0,
    column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files: text or token ids.")] = "text",
    nulls: Annotated[str, typer.Option(help="Rows that hold null: skip (and count), or error.")] = "skip",
    device: DeviceOption = None,
) -> None:
    """Activations of a model over texts, for training on; the model is run only up to the last site."""
    request = harvesting.Request(
        texts=texts,
        models=model or [DEMO],
        sites=site,
        out=out,
        tokens=tokens,
        context=context,
        dtype=dtype,
        compute=compute,
        bos=bos,
        keep_bos=keep_bos,
        max_norm=max_norm,
        column=column,
        nulls=nulls,
        device=device,
    )
    checks.one_of("--nulls", [nulls], checks.NULLS)
    checks.harvest(texts, request.models, site, dtype, compute, tokens)
    check_writable(out)
    harvesting.harvest(request)


@app.command()
def train(
    store: Annotated[
        Path | None, typer.Argument(help="Folder of activations, made by harvest; or give --site instead.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site", "-s", help="Site or glob of a model: harvest, train and evaluate in one go; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the dictionary; an interrupted run goes on from there.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="relu, gated, jumprelu, topk (default), batchtopk, matryoshka; repeatable."),
    ] = None,
    latents: Annotated[
        list[int] | None,
        typer.Option(help="Number of latents (8192), in a cross-layer coder per layer; repeatable."),
    ] = None,
    k: Annotated[
        list[int] | None,
        typer.Option("--k", "-k", help="Latents active per row (32), where counted; repeatable."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training; default 5000, with --site 10 passes.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows per step of all processes; 4096, with --site 2048.")] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Learning rate; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of everything random (0); repeatable.")] = None,
    coder: Annotated[str, typer.Option(help="auto, sae, transcoder, crosscoder or cross_layer.")] = "auto",
    in_site: Annotated[list[str] | None, typer.Option(help="Site or glob that is read; can be repeated.")] = None,
    out_site: Annotated[
        list[str] | None, typer.Option(help="Site or glob that is reconstructed; can be repeated.")
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Coefficient of the sparsity penalty (relu, gated, jumprelu); repeatable."),
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="A linear map beside the latents (transcoders).")] = False,
    precision: Annotated[
        str, typer.Option(help="fp32; bf16-screen: the same latents, sooner; bf16: mixed precision.")
    ] = "fp32",
    dead_after: Annotated[int | None, typer.Option(help="Rows without firing after which a latent is dead.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of rows, the last documents, left out to evaluate on; default 0.05.")
    ] = None,
    device: DeviceOption = None,
    jobs: Annotated[int, typer.Option(help="Of several dictionaries, how many are trained at a time.")] = 1,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write a file for TensorBoard.")] = False,
    texts: Annotated[str, typer.Option(help="With --site: stdlib, or a file or folder of texts, as for harvest.")] = (
        "stdlib"
    ),
    model: ModelOption = DEMO,
    tokens: Annotated[int, typer.Option(help="With --site: activations at most.")] = 300_000,
    context: Annotated[int, typer.Option(help="With --site: tokens run together.")] = 256,
    compute: Annotated[str, typer.Option(help="With --site: float32, or bfloat16, as for harvest.")] = "float32",
) -> None:
    """Sparse dictionaries: from harvested activations, or with --site from a model, up to a page on their quality.

    Options marked repeatable can be given several times: every combination is trained, on one harvest. Under torchrun
    one dictionary is trained on several processes.
    """
    # Option beside field of TrainConfig.
    fields = {
        "kind": kind, "n_latents": latents, "k": k, "steps": steps, "batch_size": batch, "lr": lr, "seed": seed,
        "coder": coder, "in_sites": in_site, "out_sites": out_site, "sparsity": sparsity, "skip": skip,
        "precision": precision, "dead_after": dead_after, "checkpoint_every": checkpoint_every, "held_out": held_out,
    }  # fmt: skip
    harvest = harvesting.Request(texts, [model], site or [], None, tokens, context, compute=compute)
    checks.training(fields, device)
    check_writable(out or Path("runs"))
    if store is None:
        checks.harvest(texts, [model], harvest.sites, "float32", compute, tokens)
    else:
        checks.store(store)
    where, command = checks.chosen_device(device), command_line()
    training.train(training.Request(store, out, where, fields, harvest, jobs, tensorboard, command))


app.command()(circuiting.circuit)
app.command()(evaluating.quality)
app.command()(explaining.explain)
app.command()(heads.heads)
app.command(name="explain-input")(seeing.explain_input)
app.command()(seeing.neuron)
app.command()(finding.find)
app.command()(probing.probe)
app.command()(steering.steer)


@app.command()
def calibrate(
    quick: Annotated[bool, typer.Option("--quick", help="Few seeds: a smoke test, not a calibration.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    seeds: Annotated[int, typer.Option(help="Random networks; up to 40 planted ones go with them.")] = 100,
    device: DeviceOption = None,
) -> None:
    """How often each validator supports a claim about noise, and how often it finds what is planted."""
    if json is not None:
        check_writable(json.parent, "--json")
    calibrating.run(seeds=seeds, quick=quick, json=json, device=device)
