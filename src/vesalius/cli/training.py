"""`vesalius train`: sparse dictionaries from activations, or all the way from a model to a page about each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import vesalius as vs
from vesalius.cli import evaluating, harvesting
from vesalius.cli.screen import Screen, bars, note, say
from vesalius.errors import InputError
from vesalius.jobs import Sink, silent

PASSES, BATCH = 10, 2048
"""Passes over a model's rows, and rows a step, when nothing else is said and there is no store yet."""
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Request:
    """What was asked on the command line. fields: of TrainConfig, with a list for each that has several values; None is
    the default. store: None means that activations of the sites are made first, and dictionaries evaluated at the end.
    """

    store: Path | None
    out: Path | None
    device: str
    """Where the dictionary is trained; the model's is the harvest's."""
    fields: Mapping[str, Any]
    harvest: harvesting.Request
    jobs: int
    tensorboard: bool
    command: str

    def check(self) -> None:
        """Refuse what cannot be done before a model is loaded."""
        if self.jobs < 1:
            raise InputError(f"--jobs must be at least 1; got {self.jobs}")
        if self.store is not None and self.harvest.sites:
            raise InputError("give a folder of activations, or --site to make them; of a folder's sites use --in-site")
        if self.store is not None:
            if self.out is None:
                raise InputError("--out is needed: the folder for the dictionary")
            return
        if not self.harvest.sites:
            raise InputError("give a folder of activations (made by harvest), or --site to make them of a model")
        if _several_processes():
            raise InputError("torchrun trains from a folder of activations; harvest first")
        self.harvest.check()

    @property
    def configs(self) -> list[vs.TrainConfig]:
        """One per combination of values. Raises InputError for values out of range."""
        given = {name: value for name, value in self.fields.items() if value not in (None, [])}
        lists = {name: value if name in GRID else [value] for name, value in given.items()}
        return [vs.TrainConfig(**dict(zip(lists, values, strict=True))) for values in product(*lists.values())]

    @property
    def folder(self) -> Path:
        first = self.configs[0]
        return self.out or Path("runs") / f"{first.kind}-{first.n_latents}-{harvesting.plain_name(self.harvest.sites)}"


GRID = ("kind", "n_latents", "k", "lr", "sparsity", "seed")
"""Fields that may be given several times: every combination is trained."""


def train(request: Request) -> None:
    """Train with progress bars, and say what came out; without a store harvest before, and evaluate after."""
    request.check()
    configs, folder = request.configs, request.folder
    with _process_group(request.device), bars() as progress:
        # Under torchrun one process speaks for all.
        leads = os.environ.get("RANK", "0") == "0"
        sink: Sink = Screen(progress) if leads else silent
        if request.store is None:
            vs.data.texts_from(
                request.harvest.texts
            )  # so that what is wrong with them is said before a model is loaded
        model = None if request.store else harvesting.loaded(request.harvest.models, request.device, sink)
        store = _activations(request, folder, model, sink)
        # How many steps make ten passes is known only when the rows are there.
        configs = configs if request.store else [_scaled(config, request, store) for config in configs]
        coders = _trained(request, configs, store, folder, sink)
        pages = {}
        for name, coder in coders.items() if model is not None else ():
            where = _folder_of(folder, name)
            try:
                pages[name] = evaluating.page(coder, store, model, _seeds(coders, name), where, request.command, sink)
            except InputError as error:  # of one document there may be no rows left to measure on
                note(f"{where} is trained and saved, but not evaluated: {error}")
    if leads:
        _say(coders, pages, folder)


def _activations(request: Request, folder: Path, model: Any, sink: Sink) -> vs.data.ActivationStore:
    if request.store is not None:
        return vs.data.ActivationStore.open(request.store)
    store = harvesting.harvested(request.harvest, model, folder / ACTIVATIONS, sink)
    note(f"{store.n_rows:,} activations are in {store.folder}, to train from again without a model")
    return store


def _scaled(config: vs.TrainConfig, request: Request, store: vs.data.ActivationStore) -> vs.TrainConfig:
    """As much training as there are rows for, where nothing else is said."""
    batch = request.fields["batch_size"] or min(BATCH, max(2, store.n_rows // 4))
    steps = request.fields["steps"] or max(1, round(PASSES * store.n_rows / batch))
    return vs.TrainConfig(**{**vars(config), "batch_size": batch, "steps": steps})


def _trained(
    request: Request, configs: Sequence[vs.TrainConfig], store: vs.data.ActivationStore, folder: Path, sink: Sink
) -> dict[str, Any]:
    """Dictionaries by name; a single one has none, and lies in the folder itself."""
    how: dict[str, Any] = {"device": request.device, "tensorboard": request.tensorboard, "sink": sink}
    if len(configs) == 1:
        return {"": vs.dictionaries.train(store, configs[0], folder, **how)}
    return vs.dictionaries.train_all(store, configs, folder, jobs=request.jobs, **how)


def _folder_of(folder: Path, name: str) -> Path:
    return folder / name if name else folder


def _seeds(coders: Mapping[str, Any], name: str) -> list[Any]:
    """The others that differ from one in nothing but the seed."""
    unseeded = lambda coder: {**coder.metadata["config"], "seed": None}  # noqa: E731
    return [coder for other, coder in coders.items() if other != name and unseeded(coder) == unseeded(coders[name])]


def _say(coders: Mapping[str, Any], pages: Mapping[str, evaluating.Page], folder: Path) -> None:
    for name, coder in coders.items():
        first, *rest = summary(coder)
        for line in (f"{name}: {first}" if name else first, *rest):
            say(line)
        if name in pages:
            for sentence in pages[name].answer:
                say(sentence)
            say(str(pages[name].path))
    say(str(folder))


def summary(coder: Any) -> list[str]:
    """What was trained and how well, line by line."""
    ends = coder.history.last()
    after, rows = coder.metadata["config"]["dead_after"], coder.metadata["summary"]["tokens"]
    # Nothing can be dead before so many rows; what never fired is said as what it is.
    dead = "dead" if rows >= after else f"in none of the {rows:,.0f} rows active"
    figures = f"fvu {ends['fvu']:.4f}, l0 {ends['l0']:.1f}, {dead} {ends['dead']:.1%}"
    return [repr(coder), f"{len(coder.history):,} steps; over the last 50 of them {figures}"]


def _several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def _process_group(device: str) -> Iterator[None]:
    """The processes that torchrun started, when it did."""
    if not _several_processes():
        yield
        return
    # Late and at this one edge: other commands, such as `ledger`, start without torch.
    import torch.distributed

    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
