"""`train`: the one loop, from activations to a dictionary on disk; interrupted, it goes on where it was."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vesalius import __version__
from vesalius.data import Source, as_source
from vesalius.dictionaries import folder
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.held_out import for_training, models_of, trained_on
from vesalius.dictionaries.training.fitter import Fitter, make_fitter
from vesalius.dictionaries.training.layout import Layout, layout_of
from vesalius.dictionaries.training.run import Processes, Run
from vesalius.dictionaries.training.run_files import Checkpoints, Metrics
from vesalius.errors import InputError
from vesalius.jobs import Estimate, Event, Sink, silent
from vesalius.jobs.progress import resident, shown
from vesalius.jobs.workers import Workers
from vesalius.protocol import content_hash
from vesalius.protocol.canonical import plain

TASK = "train"
MANY_PASSES = 100
"""Passes over the same rows beyond which it is said aloud."""
_TIMED = 3
"""Steps after which it is said how long the rest will take."""


@torch.no_grad()
def train(
    data: Any,
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    tensorboard: bool = False,
    sink: Sink | None = None,
) -> SparseCoder:
    """A dictionary trained on activations: a Source (a store, a stream), a tensor [n, d_in], or a tuple (x, y).

    Of a whole store the last documents are held out (`TrainConfig.held_out`), so that there are rows to evaluate on.

    out: folder for the dictionary, its history and, on the way, checkpoints. A run that was interrupted goes on from
    the last checkpoint, to the same weights bit for bit (on the same machine); a finished one is loaded. Under torchrun
    (an initialised `torch.distributed`) every process trains on its share of each batch. sink: hears the cost after
    some steps, and progress; None shows both on standard error. metrics.jsonl in the folder holds a line per step; with
    tensorboard, a file for TensorBoard is written too.

    Returns a `Dictionary`, or a `CrossLayerTranscoder`. Raises InputError for data and configs that don't fit and for a
    folder that holds another run, NotFiniteError for NaN in the data, for a loss that is NaN or infinite, and for a
    run that diverges.
    """
    with shown(sink if sink is not None or Processes.current().is_main else silent) as progress:
        where = None if out is None else Path(out)
        return _trained(data, config or TrainConfig(), where, torch.device(device), tensorboard, progress)


def _trained(
    data: Any, config: TrainConfig, where: Path | None, device: torch.device, tensorboard: bool, sink: Sink
) -> SparseCoder:
    """A dictionary, from its folder, its checkpoints or the start."""
    given = as_source(data)
    source = for_training(given, config.held_out)
    layout = layout_of(source, config, paired=isinstance(data, tuple | list))
    metadata = _metadata(source, config, layout)
    if where is not None and (where / folder.CONFIG).exists():
        return _finished(where, metadata["plan"], sink)
    # Said aloud, because it is a surprise to whoever compares numbers of rows.
    if source is not given:
        left_out = (given.n_rows or 0) - (source.n_rows or 0)
        message = f"the last documents, {left_out:,} rows, are held out, to evaluate on (held_out)"
        sink(Event("note", TASK, message=message))
    _say_passes(source, config, sink)
    processes = Processes.current()
    with Workers(device=device) as workers:
        fitter = make_fitter(source, config, layout, workers, processes, device)
        checkpoints = Checkpoints(where, metadata["plan"], sink)
        # Scales and means are sampled again first: they follow from the seed, and are in no checkpoint.
        checkpoints.resume(fitter)
        with Metrics(where if processes.is_main else None, config.batch_size, tensorboard) as metrics:
            metrics.begin(fitter.history)
            _run(fitter, source, checkpoints, metrics, sink)
        coder = fitter.fitted(metadata)
    if where is not None and processes.is_main:
        # Checkpoints go only after the dictionary is there: killed in between, the next call finds a finished run.
        folder.save(coder, where)
        checkpoints.remove()
    processes.wait()
    return coder


def _say_passes(source: Source, config: TrainConfig, sink: Sink) -> None:
    """Says so when the rows will be gone through so often that they can only be learned by heart."""
    rows = source.n_rows
    if rows and config.steps * config.batch_size > MANY_PASSES * rows:
        passes = config.steps * config.batch_size / rows
        message = (
            f"{config.steps:,} steps of {config.batch_size:,} rows go {passes:,.0f} times through the {rows:,} rows "
            "there are, and a dictionary then learns them by heart: fewer steps (steps), or more text"
        )
        sink(Event("note", TASK, message=message))


def _metadata(source: Source, config: TrainConfig, layout: Layout) -> dict[str, Any]:
    """Where the dictionary comes from; `plan` says what has to be the same for a run to go on."""
    inputs = {"config": plain(config), "data": source.content_hash, "coder": layout.coder}
    known = {**models_of(source), **trained_on(source)}
    return {**inputs, **known, "plan": content_hash(inputs), "version": __version__}


def _finished(where: Path, plan: str, sink: Sink) -> SparseCoder:
    coder = folder.read(where)
    if coder.metadata.get("plan") != plan:
        raise InputError(f"{where} holds another dictionary; choose another folder, or delete this one")
    sink(Event("note", TASK, message=f"{where} holds this dictionary already"))
    return coder


def _run(fitter: Fitter, source: Source, checkpoints: Checkpoints, metrics: Metrics, sink: Sink) -> None:
    """All steps that are left. Raises KeyboardInterrupt after a checkpoint when interrupted."""
    config, first = fitter.run.config, fitter.steps
    batches = source.batches(config.batch_size, seed=config.seed, start=first)
    began = time.perf_counter()
    sink(Event("start", TASK, first, config.steps))
    try:
        with _interruption() as interrupted:
            for batch in islice(batches, config.steps - first):
                fitter.step(batch)
                fitter.resample(source)
                sink(Event("advance", TASK, fitter.steps, config.steps, metrics.add(fitter.steps, fitter.history[-1])))
                if fitter.steps == first + _TIMED:
                    seconds = (time.perf_counter() - began) / _TIMED * (config.steps - fitter.steps)
                    sink(Event("note", TASK, message=f"{_estimate(fitter.run, seconds).describe()} from here"))
                # Asked of all processes, so that they stop after the same step.
                stop = fitter.run.processes.any(interrupted.is_set())
                if stop or (fitter.steps % config.checkpoint_every == 0 and fitter.steps < config.steps):
                    _save(fitter, checkpoints)
                if stop:
                    raise KeyboardInterrupt
    finally:
        sink(Event("end", TASK, fitter.steps, config.steps))


def _save(fitter: Fitter, checkpoints: Checkpoints) -> None:
    if fitter.run.processes.is_main:
        checkpoints.save(fitter)
    fitter.run.processes.wait()


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that ctrl-C sets, so that a step is never left half done; a second ctrl-C interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@torch.no_grad()
def estimate(data: Any, config: TrainConfig | None = None, *, device: torch.device | str = "cpu") -> Estimate:
    """What training would cost, from two steps of it that are thrown away. Raises as `train`."""
    config, device = config or TrainConfig(), torch.device(device)
    source = as_source(data)
    layout = layout_of(source, config, paired=isinstance(data, tuple | list))
    with Workers(device=device) as workers:
        fitter = make_fitter(source, config, layout, workers, Processes.current(), device)
        first, second = islice(source.batches(config.batch_size, seed=config.seed), 2)
        fitter.step(first)
        began = time.perf_counter()
        fitter.step(second)
        return _estimate(fitter.run, (time.perf_counter() - began) * config.steps)


def _estimate(run: Run, seconds: float) -> Estimate:
    """From a process that has made steps: all it holds is there by now, but for a checkpoint on its way to the disk."""
    blocks = run.layout.blocks
    widths = [(some.reads.stop - some.reads.start) + (some.writes.stop - some.writes.start) for some in blocks]
    weights = 4 * run.config.n_latents * sum(widths)
    # On disk: the weights, and two checkpoints with both moments.
    return Estimate(seconds, memory_bytes=resident() + 3 * weights, disk_bytes=(1 + 2 * 3) * weights)
