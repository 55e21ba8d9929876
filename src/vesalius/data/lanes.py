"""Lanes: on the CPU two batches go through models side by side, each on half of the threads.

Inside a batch threads wait for each other after every operation; beside each other they don't, which saves a twentieth
of the processor's time. The numbers are the same. Hooks belong to a module, so the second lane has twins of the models:
copies of the trees of modules around the very same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import chain
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

from vesalius.jobs.workers import Workers
from vesalius.model import Model

Models = Mapping[str, Model]
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(fn: Callable[[Models, T], R], models: Models, batches: Sequence[T]) -> Generator[R, None, None]:
    """fn of the models and each batch, in the order of the batches, two at a time where that is possible.

    A batch without a partner is run on all threads.
    """
    lanes = _lanes(models) if len(batches) > 1 else (models,)
    paired = len(batches) // len(lanes) * len(lanes)
    free: SimpleQueue[Models] = SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def run(batch: T) -> R:
        lane = free.get()
        try:
            return fn(lane, batch)
        finally:
            free.put(lane)

    with Workers(len(lanes), inside=torch.get_num_threads() // len(lanes)) as workers:
        yield from workers.each(run, batches[:paired])
    yield from (fn(models, batch) for batch in batches[paired:])


def _lanes(models: Models) -> tuple[Models, ...]:
    # Autocast holds for one thread, and would not hold in ours.
    if torch.get_num_threads() % 2 or torch.is_autocast_enabled("cpu") or not all(map(_has_twin, models.values())):
        return (models,)
    try:
        return models, {tag: _twin(model) for tag, model in models.items()}
    except (RuntimeError, TypeError):  # it holds what cannot be copied, such as a lock, or a tensor with a graph
        return (models,)


def _has_twin(model: Model) -> bool:
    """Whether the model is one we know, on the CPU, and nobody has hung anything on it that expects to be called."""
    weights = chain(model.module.parameters(), model.module.buffers())
    return (
        model.adapter is not None
        and all(weight.device.type == "cpu" for weight in weights)
        and not any(_changed(module) for module in model.module.modules())
    )


def _changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _twin(model: Model) -> Model:
    shared = {id(weight): weight for weight in chain(model.module.parameters(), model.module.buffers())}
    module = copy.deepcopy(model.module, shared)
    return Model(module, model.tokenizer, model.adapter, model.name, model.note)
