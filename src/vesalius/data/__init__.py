"""Inputs to study: built-in tasks, the user's own files, named positions; activations as rows to train on."""

from __future__ import annotations

from vesalius.data.files import load_pairs
from vesalius.data.positions import landmarks
from vesalius.data.source import Source, TensorSource, as_source
from vesalius.data.tasks import (
    TASKS,
    Row,
    Task,
    beginning_token,
    build_pairs,
    capitals,
    gendered_pronoun,
    induction,
    ioi,
    sva,
    task,
)

__all__ = [
    "TASKS",
    "Row",
    "Source",
    "Task",
    "TensorSource",
    "as_source",
    "beginning_token",
    "build_pairs",
    "capitals",
    "gendered_pronoun",
    "induction",
    "ioi",
    "landmarks",
    "load_pairs",
    "sva",
    "task",
]
