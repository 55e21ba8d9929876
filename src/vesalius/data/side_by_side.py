"""Two batches side by side: on the CPU each goes through the models on half of the threads.

Inside a batch threads wait for each other after every operation; between two batches they don't, which saves a
twentieth of the processor's time. The numbers are the same. Hooks belong to a module, so the second batch goes through
copies of the models: copies of the trees of modules around the very same weights.
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
    copies = _copies(models) if len(batches) > 1 else (models,)
    paired = len(batches) // len(copies) * len(copies)
    # Whoever is free takes the next batch, so that no model is in two passes at once.
    free: SimpleQueue[Models] = SimpleQueue()
    for each in copies:
        free.put(each)

    def run(batch: T) -> R:
        own = free.get()
        try:
            return fn(own, batch)
        finally:
            free.put(own)

    with Workers(len(copies), inside=torch.get_num_threads() // len(copies)) as workers:
        yield from workers.each(run, batches[:paired])
    yield from (fn(models, batch) for batch in batches[paired:])


def _copies(models: Models) -> tuple[Models, ...]:
    """The models and a copy of them; without the copy where there can be none."""
    # Autocast is set for one thread, and would not be in ours.
    if torch.get_num_threads() % 2 or torch.is_autocast_enabled("cpu") or not all(map(_can_copy, models.values())):
        return (models,)
    try:
        return models, {tag: _copy(model) for tag, model in models.items()}
    except (RuntimeError, TypeError):  # it holds what cannot be copied, such as a lock, or a tensor with a graph
        return (models,)


def _can_copy(model: Model) -> bool:
    """Whether the model is of a known family, on the CPU, and without hooks that somebody expects to be called."""
    weights = chain(model.module.parameters(), model.module.buffers())
    return (
        model.adapter is not None
        and all(weight.device.type == "cpu" for weight in weights)
        and not any(_changed(module) for module in model.module.modules())
    )


def _changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _copy(model: Model) -> Model:
    # A deep copy that finds the weights in its memo keeps them as they are and copies only the modules around them.
    shared = {id(weight): weight for weight in chain(model.module.parameters(), model.module.buffers())}
    module = copy.deepcopy(model.module, shared)
    return Model(module, model.tokenizer, model.adapter, model.name, model.note)
