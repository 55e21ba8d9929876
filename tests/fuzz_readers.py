"""What the fuzzer reads: for every reader of files from outside, good files to start from and the call that reads them.

A `Kind` writes its files into a folder once; the fuzzer then changes one file at a time and calls `read`. `repair` is
called after a change and may put checksums right again, so that what lies behind them is reached too.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import format_files
import summaries
import vesalius as vs
from tiny_folder import tiny_folder
from tiny_gguf import tiny_llama, write_gguf
from vesalius.concepts.entities import load_ravel
from vesalius.data.labelled import load_labelled
from vesalius.data.texts import texts_from
from vesalius.errors import VesaliusError
from vesalius.intervention import stored
from vesalius.jobs import Blocks
from vesalius.model.gguf import convert_gguf
from vesalius.protocol import content_hash, unmeasured
from vesalius.protocol.ledger import Ledger

SITE = "layers.1.resid_post"


@dataclass(frozen=True)
class Kind:
    """make: writes folders (one a seed) below the one given; read: reads one of them."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    names: tuple[str, ...] = ("*.*",)
    """Patterns of the files that are changed."""
    repair: Callable[[Path, Path, random.Random], None] = lambda _folder, _file, _random: None

    def files(self, folder: Path) -> list[Path]:
        """The files of a folder that are changed."""
        return sorted({path for name in self.names for path in folder.rglob(name) if path.is_file()})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Dictionaries


def _own(out: Path) -> None:
    rows = normal(64, 6)
    quick = {"n_latents": 8, "batch_size": 16, "steps": 4}
    for kind in ("topk", "gated", "jumprelu"):
        vs.dictionaries.train(rows, vs.TrainConfig(kind=kind, k=2, **quick), out / kind, sink=vs.silent)
    sites = [f"layers.{layer}.{name}" for name in ("mlp_in", "mlp_out") for layer in (0, 1)]
    source = vs.data.TensorSource(*(normal(64, 6, seed=seed) for seed in range(4)), sites=sites)
    config = vs.TrainConfig(kind="relu", coder="cross_layer", in_sites=sites[:2], out_sites=sites[2:], **quick)
    vs.dictionaries.train(source, config, out / "cross_layer", sink=vs.silent)


def _hashes_put_right(folder: Path, file: Path, generator: random.Random) -> None:
    path = folder / "config.json"
    if file.name != path.name and generator.random() < 0.6:
        config = json.loads(path.read_text())
        config["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        path.write_text(json.dumps(config))


def _read_own(folder: Path) -> None:
    coder = vs.dictionaries.load(folder)
    coder._repr_html_() if hasattr(coder, "_repr_html_") else repr(coder)
    if getattr(coder, "history", None) is not None:
        coder.history._repr_html_()


def _foreign(out: Path) -> None:
    for name in ("standard", "topk", "gated", "jumprelu", "jumprelu_skip_transcoder"):
        format_files.saelens(out / f"saelens-{name}", name)
    format_files.saelens(out / "saelens-old", old=True)
    format_files.sparsify(out / "sparsify" / "layers.3")
    format_files.dictionary_learning(out / "learning", "MatryoshkaBatchTopKSAE")
    format_files.crosscoder(out / "crosscoder", normalised=True)
    format_files.gemma_scope(out / "scope")
    format_files.gemma_scope_2(out / "scope-2", skip=True, config={"architecture": "jump_relu"})
    format_files.circuit_tracer(out / "tracer", "topk")
    format_files.cross_layer(out / "tracer-cross")
    for layout in (1, 2, 3):
        format_files.openmoss(out / f"openmoss-{layout}", layout)


def _read_foreign(folder: Path) -> None:
    folder = next((f for f in sorted(folder.iterdir()) if f.is_dir()), folder)
    coder = vs.dictionaries.load(folder, unpickle=any(folder.glob("*.pt")))
    repr(coder)


# Ledger


def claim(number: int = 0) -> vs.Claim:
    return vs.Claim(
        statement=f"head {number} attends to the name", subject={"ref": {"kind": "unit", "head": number}}, sign=1,
        quantity="attends", delta=0.1, n=8, kind="predictive", unit="share", control={"parts": ["a"]},
        nulls=(("positions", 0.1),), study="s",
    )  # fmt: skip


def ledger_file(path: Path) -> Path:
    """Two claims, one of them measured, in a ledger as a study writes it."""
    generator = torch.Generator().manual_seed(0)
    size = 16
    clean, corrupted = (torch.randint(5, 60, (size, 6), generator=generator) for _ in range(2))
    answer = torch.randint(2, 60, (size,), generator=generator)
    pairs = vs.Pairs(
        clean=clean, corrupted=corrupted, answer=answer, distractor=(answer + 1) % 60,
        groups={"template": tuple(f"t{n // 2}" for n in range(size))},
        splits=("discovery",) * 8 + ("validation",) * 8,
    )  # fmt: skip
    with Ledger(path) as ledger:
        family = ledger.register([claim(0), claim(1)])
        data = ledger.open(pairs, "validation")
        effects = tuple(0.5 + 0.01 * n for n in range(8))
        ledger.append(
            vs.Evidence(
                claim_id=family.claims[0].id, effects=effects, control=(0.0,) * 8, nulls={"positions": (0.1,) * 8},
                groups=data.groups, example_hashes=data.example_hashes, data_hash=data.content_hash,
                model_hash="m" * 64, plan_hash="p", diagnostics={"other_conditions": {"abc": 0.2}},
                created_at="2025-01-01T00:00:00+00:00",
            )
        )  # fmt: skip
        ledger.append(unmeasured(family.claims[1].id, "out of memory", plan_hash="p"))
    return path


def _ledgers(out: Path) -> None:
    (out / "one").mkdir(parents=True)
    ledger_file(out / "one" / "ledger.sqlite")


def _read_ledger(folder: Path) -> None:
    with Ledger(folder / "ledger.sqlite", create=False) as ledger:
        for family in ledger.families():
            ledger.verdicts(family)
        ledger.verify()
        ledger.export(folder / "export.json")


def rechained(path: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    """Rewrite records as a forger with an editor would, so that every hash is right."""
    connection = sqlite3.connect(path)
    names = ("records_no_update", "records_no_delete", "records_in_order")
    texts = [connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone() for name in names]
    for name in names:
        connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    previous = "0" * 64
    fields = ("seq", "kind", "id", "payload", "previous", "hash")
    for row in connection.execute("SELECT * FROM records ORDER BY seq").fetchall():
        record = dict(zip(fields, row, strict=True))
        seq = record["seq"]
        change(seq, record)
        record["previous"] = previous
        try:
            previous = content_hash([record[name] for name in ("seq", "kind", "id", "payload", "previous")])
        except VesaliusError:
            previous = "f" * 64
        record["hash"] = previous
        connection.execute(
            "UPDATE records SET kind=?, id=?, payload=?, previous=?, hash=? WHERE seq=?",
            (*(record[name] for name in fields[1:]), seq),
        )
    for text in texts:
        if text is not None:
            connection.execute(text[0])
    connection.commit()
    connection.close()


# Tables, texts, summaries


def pair_rows(n: int = 6) -> list[dict[str, str]]:
    return [
        {"clean": f"the hens {n}", "corrupted": f"the hemp {n}", "answer": " the", "distractor": "he",
         "template": f"t{n}", "names": f"a{n}"}
        for n in range(n)
    ]  # fmt: skip


def _pairs(out: Path) -> None:
    rows = pair_rows()
    comma = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    files = {
        "mine.jsonl": "\n".join(map(json.dumps, rows)), "mine.json": json.dumps(rows), "mine.csv": "\n".join(comma),
        "mine.tsv": "\n".join(line.replace(",", "\t") for line in comma),
    }  # fmt: skip
    for name, content in files.items():
        (out / name.replace(".", "-")).mkdir(parents=True)
        (out / name.replace(".", "-") / name).write_text(content)


class _Tokenizer:
    """Loaded once: reading pairs needs a model's tokenizer and nothing else of it."""

    model: Any = None


def tokenizing_model() -> Any:
    if _Tokenizer.model is None:
        with tempfile.TemporaryDirectory() as folder:
            _Tokenizer.model = vs.load(tiny_folder(Path(folder)), sink=vs.silent)
    return _Tokenizer.model


def _read_pairs(folder: Path) -> None:
    (file,) = folder.glob("mine.*")
    pairs = vs.data.load_pairs(file, tokenizing_model())
    pairs.split("discovery").content_hash  # noqa: B018


def _labelled(out: Path) -> None:
    rows = [{"text": f"text {n}", "label": str(n % 2), "group": n // 2} for n in range(16)]
    (out / "one").mkdir(parents=True)
    (out / "one" / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _texts(out: Path) -> None:
    (out / "one").mkdir(parents=True)
    (out / "one" / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the hens {n}"}) for n in range(8)))
    (out / "one" / "b.txt").write_text("the hens and the fox\n" * 4)


def _entities(out: Path) -> None:
    (out / "one").mkdir(parents=True)
    tables = {
        "attribute_to_prompts": {"Country": ["%s is in", "the country of %s is"]},
        "entity_attributes": {"Paris": {"Country": "France"}, "Rome": {"Country": "Italy"}},
        "entity_to_split": {"Paris": "train", "Rome": "test"},
    }
    for name, table in tables.items():
        (out / "one" / f"ravel_city_{name}.json").write_text(json.dumps(table))


def _summaries(out: Path) -> None:
    for name, made in (("tiny", summaries.tiny()), ("stopped", summaries.stopped())):
        (out / name).mkdir(parents=True)
        (out / name / "summary.json").write_text(json.dumps(made))


def _read_summary(folder: Path) -> None:
    from vesalius.report import schema

    path = folder / "summary.json"
    if hasattr(schema, "read"):
        schema.read(path)
    else:
        try:
            found = json.loads(path.read_text())
        except ValueError:
            return
        schema.check(found)


# Models


def _model(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tiny_folder(out)
    torch.manual_seed(0)
    tiny_llama().save_pretrained(out / "shards", max_shard_size="60KB")


def _gguf(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "one").mkdir()
    write_gguf(out / "one" / "tiny.gguf", tiny_llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1))


def _read_gguf(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as made:
        convert_gguf(folder / "tiny.gguf", Path(made))


# Stores, blocks, edits


def _store(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    texts = [f"the hens and the fox said {n} " * 4 for n in range(6)]
    vs.data.harvest(
        tokenizing_model(), texts, sites=[SITE], out=out / "one", context=32, shard_bytes=12_000, sink=vs.silent
    )


def _hash_of_manifest_put_right(folder: Path, file: Path, generator: random.Random) -> None:
    path = folder / "manifest.json"
    if generator.random() < 0.4:
        return
    try:
        body = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
        if file != path:
            (shard,) = [shard for shard in body["shards"] if shard["file"] == file.name]
            shard |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        path.write_text(json.dumps({**body, "sha256": content_hash(body)}))
    except (ValueError, AttributeError, TypeError, RecursionError, VesaliusError):
        return


def _read_store(folder: Path) -> None:
    store = vs.data.ActivationStore.open(folder)
    repr(store)
    next(iter(store.batches(8, seed=0)))
    store.trace(0)
    list(store.contexts())
    store.tokens  # noqa: B018
    store.split(0.2)
    store.verify()


def _blocks(out: Path) -> None:
    for name, arrays in {"one": {"a": np.arange(40.0), "b": np.array("text")}, "two": {"z": np.zeros((9, 9))}}.items():
        Blocks(out / name, "plan").get("key", lambda arrays=arrays: arrays)


def _read_blocks(folder: Path) -> None:
    Blocks(folder, "plan").get("key", lambda: {"a": np.zeros(2)})


def _edits(out: Path) -> None:
    (out / "one").mkdir(parents=True)
    edits = [
        vs.Steer(SITE, scale=2.0, vector=normal(48)), vs.Ablate("layers.0.z[1]", positions=[2]),
        vs.Project(vs.Subspace(vs.Site.parse(SITE), normal(3, 48))),
    ]  # fmt: skip
    stored.save(edits, out / "one" / "edits.json")


KINDS: dict[str, Kind] = {
    "own-dictionary": Kind(_own, _read_own, ("config.json", "*.safetensors", "history.npz"), _hashes_put_right),
    "foreign-dictionary": Kind(_foreign, _read_foreign),
    "ledger": Kind(_ledgers, _read_ledger, ("ledger.sqlite",)),
    "pairs": Kind(_pairs, _read_pairs),
    "labelled": Kind(_labelled, lambda folder: load_labelled(folder / "texts.jsonl")),
    "texts": Kind(_texts, lambda folder: list(texts_from(folder).read())),
    "entities": Kind(_entities, lambda folder: load_ravel(folder, "city")),
    "summary": Kind(_summaries, _read_summary),
    "model": Kind(_model, lambda folder: vs.load(folder, sink=vs.silent)),
    "gguf": Kind(_gguf, _read_gguf),
    "store": Kind(_store, _read_store, repair=_hash_of_manifest_put_right),
    "blocks": Kind(_blocks, _read_blocks),
    "edits": Kind(_edits, lambda folder: stored.load(folder / "edits.json")),
}


def seeds_of(kind: Kind, out: Path) -> Iterator[Path]:
    """Folders with good files, each of which can be read."""
    kind.make(out)
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    for folder in folders:
        kind.read(folder)
        yield folder
