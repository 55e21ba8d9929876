"""Examples of several processes put together, and all of them on disk as Parquet.

parts.parquet     one row per part: name, reference, density, threshold, histogram, values on the background
examples.parquet  one row per example: part, kind (top, sample, near, background), value, token, text, document ...

Both are made for other programs too (pandas, DuckDB), and together hold everything, so that what is loaded is what was
saved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesalius.data.texts import parquet_library
from vesalius.describe.collecting import BINS, COUNTS, KEPT, NOTHING, Collector, Kept, Sizes
from vesalius.describe.examples import ActivatingExamples
from vesalius.describe.read_parts import tokenizer_for
from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import write_atomic
from vesalius.jobs.untrusted import parse_json
from vesalius.model import Model
from vesalius.parts import HasLatents, Part
from vesalius.refs import resolve

PARTS, EXAMPLES = "parts.parquet", "examples.parquet"
_KEY = b"vesalius"


def merge_examples(shards: Sequence[ActivatingExamples]) -> ActivatingExamples:
    """What all shards of one text have found: as one pass over it would, but for which near misses are kept.

    Raises InputError for shards of different calls, and where one is missing or there twice.
    """
    if not shards:
        raise InputError("no shards to merge")
    first, count = shards[0], shards[0].shard[1]
    for one in shards[1:]:
        same = (one.parts, one.model_hash, one.texts, one.shard[1]) == (
            first.parts, first.model_hash, first.texts, count,
        )  # fmt: skip
        mine, theirs = first.collector, one.collector
        if not same or (mine.sizes, mine.seed) != (theirs.sizes, theirs.seed):
            raise InputError("the shards are of different calls: parts, model, texts, sizes and seed must be the same")
        if not torch.equal(mine.threshold, theirs.threshold):
            raise InputError("the shards disagree on what counts as active; were the texts the same?")
    numbers = sorted(one.shard[0] for one in shards)
    if numbers != list(range(count)):
        raise InputError(f"shards {numbers} of {count}: all are needed, each once")
    whole = _copy(first.collector, len(first.parts))
    for one in shards[1:]:
        whole.absorb(one.collector)
    return replace(first, collector=whole, shard=(0, 1))


def _copy(collector: Collector, parts: int) -> Collector:
    fresh = Collector(parts, torch.ones(parts, dtype=torch.bool), collector.sizes, collector.seed)
    fresh.restore(collector.state())
    return fresh


def save_examples(examples: ActivatingExamples, folder: str | Path) -> Path:
    """Two Parquet files in a folder. Raises InputError where pyarrow is not installed."""
    parquet = parquet_library()
    import pyarrow

    folder, state = Path(folder), examples.collector
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "format": 1,
        "model": examples.model_hash,
        "texts": examples.texts,
        "shard": examples.shard,
        "sizes": asdict(state.sizes),
        "seed": state.seed,
        **{name: getattr(state, name) for name in COUNTS},
    }
    parts = {
        "part": [str(part) for part in examples.parts],
        "ref": [json.dumps(part.ref) for part in examples.parts],
        "density": examples.density.numpy(),
        "threshold": state.threshold.numpy(),
        "active": state.active.numpy(),
        "total": state.total.numpy(),
        "histogram": list(state.histogram.numpy()),
        "background": list(state.background_values.T.float().numpy()),
    }
    table = pyarrow.table(parts).replace_schema_metadata({_KEY: json.dumps(about, default=str).encode()})
    kept = [_rows(examples, kind) for kind in KEPT]
    rows = pyarrow.concat_tables([pyarrow.table(some) for some in kept])
    for name, one in ((PARTS, table), (EXAMPLES, rows)):
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(one, sink, compression="zstd")
        write_atomic(folder / name, sink.getvalue().to_pybytes())
    return folder


def _rows(examples: ActivatingExamples, kind: str) -> dict[str, Any]:
    kept: Kept = getattr(examples.collector, kind)
    part, columns = kept.filled()
    place = kept.key.isfinite().nonzero()[:, 1]
    before = examples.collector.sizes.before
    listed = columns["ids"].tolist()
    names = ["" if kind == "background" else str(one) for one in examples.parts]
    return {
        "part": np.array([names[number] for number in part.tolist()], dtype=np.str_),
        "kind": [kind] * len(part),
        "rank": place.int().numpy(),
        "token": [examples.spelled(ids[before]) for ids in listed],
        "text": ["".join(examples.spelled(one) for one in ids if one != NOTHING) for ids in listed],
        "number": np.full(len(part), -1, np.int32) if kind == "background" else part.int().numpy(),
        **{name: columns[name].numpy() for name in ("key", "value", "document", "offset")},
        "ids": list(columns["ids"].numpy()),
        "values": list(columns["values"].float().numpy()),
    }


def load_examples(folder: str | Path, model: Model, *given: HasLatents | Part | Tensor) -> ActivatingExamples:
    """What `save_examples` wrote. given: dictionaries and directions that the parts are of, as for `vs.resolve`.

    Raises InputError for another model's, or where pyarrow is not installed; FileFormatError for files that are not
    what was written.
    """
    parquet, folder = parquet_library(), Path(folder)
    try:
        tables = [parquet.read_table(folder / name) for name in (PARTS, EXAMPLES)]
        about = parse_json((tables[0].schema.metadata or {})[_KEY].decode())
        columns, rows = (table.to_pydict() for table in tables)
        if about["format"] != 1:
            raise FileFormatError(f"{folder.absolute()} holds examples of format {about['format']}; known: 1")
        collector = _collector(about, columns, rows)
        refs = [parse_json(ref) for ref in columns["ref"]]
    except FileNotFoundError as error:
        raise InputError(f"{folder.absolute()} holds no {PARTS} and {EXAMPLES}") from error
    except (OSError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise FileFormatError(f"{folder.absolute()} holds no examples that were saved here: {error}") from error
    if about["model"] != model.content_hash:
        raise InputError(f"the examples in {folder.absolute()} are of another model than {model.name}")
    parts = tuple(resolve(ref, *given) for ref in refs)
    number, count = about["shard"]
    texts = dict(about["texts"])
    return ActivatingExamples(parts, about["model"], texts, collector, tokenizer_for(model, texts), (number, count))


def _collector(about: Any, columns: Any, rows: Any) -> Collector:
    parts, sizes = len(columns["part"]), Sizes(**about["sizes"])
    collector = Collector(parts, torch.ones(parts, dtype=torch.bool), sizes, int(about["seed"]))
    for name in COUNTS:
        setattr(collector, name, int(about[name]))
    for name in ("threshold", "active", "total"):
        setattr(collector, name, torch.tensor(columns[name], dtype=getattr(collector, name).dtype))
    collector.histogram = torch.tensor(columns["histogram"], dtype=torch.int64).view(parts, BINS)
    collector.background_values = (
        torch.tensor(columns["background"]).view(parts, sizes.background).T.half().contiguous()
    )
    kinds = np.array(rows["kind"])
    for kind in KEPT:
        kept: Kept = getattr(collector, kind)
        here = np.flatnonzero(kinds == kind)
        part = torch.tensor([max(rows["number"][row], 0) for row in here], dtype=torch.long)
        place = torch.tensor([rows["rank"][row] for row in here], dtype=torch.long)
        for name, tensor in vars(kept).items() if len(here) else ():
            tensor[part, place] = torch.tensor([rows[name][row] for row in here], dtype=torch.float64).to(tensor.dtype)
    return collector
