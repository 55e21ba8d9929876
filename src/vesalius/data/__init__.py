"""Inputs to study: built-in tasks, the user's own files, named positions; activations as rows to train on."""

from __future__ import annotations

from vesalius.data.files import load_pairs
from vesalius.data.harvest import harvest
from vesalius.data.labelled import Labelled, load_labelled
from vesalius.data.manifest import DTYPES
from vesalius.data.positions import named_positions
from vesalius.data.rows import Encoding, builtin_table, encoding_of, load_rows, table_from_frame
from vesalius.data.shards import Origin
from vesalius.data.source import Source, TensorSource, as_source
from vesalius.data.store import ActivationStore
from vesalius.data.stream import Stream, stream
from vesalius.data.tasks import (
    TASKS,
    Row,
    Task,
    bos_token,
    build_pairs,
    capitals,
    gendered_pronoun,
    greater_than,
    induction,
    insecure_code,
    ioi,
    sva,
    task,
    translation,
)
from vesalius.data.texts import Texts, texts_from

__all__ = [
    "DTYPES",
    "TASKS",
    "ActivationStore",
    "Encoding",
    "Labelled",
    "Origin",
    "Row",
    "Source",
    "Stream",
    "Task",
    "TensorSource",
    "Texts",
    "as_source",
    "bos_token",
    "build_pairs",
    "builtin_table",
    "capitals",
    "encoding_of",
    "gendered_pronoun",
    "greater_than",
    "harvest",
    "induction",
    "insecure_code",
    "ioi",
    "load_labelled",
    "load_pairs",
    "load_rows",
    "named_positions",
    "stream",
    "sva",
    "table_from_frame",
    "task",
    "texts_from",
    "translation",
]
