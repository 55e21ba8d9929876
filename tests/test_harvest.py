"""Harvest: what is stored is what the model computes, every row can be traced, and nothing is lost to a kill."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import harvest_memory
import killed_harvest
import tiny
import vesalius as vs
from tiny_folder import tiny_folder
from vesalius.data import ActivationStore
from vesalius.data.outliers import outliers
from vesalius.errors import FileFormatError, InputError, TokenizerError, UnknownNameError, VesaliusError
from vesalius.jobs import Event

TEXTS = ["the cat", "", "12 hens <|end|> and the fox " * 12, "a", "the the the\n\n" * 9, "", "z" * 61]
SITES = ["layers.1.resid_post", "layers.0.z"]
CONTEXT = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model")))


def harvest(model: Any, out: Path, texts: Any = TEXTS, **options: Any) -> ActivationStore:
    return vs.data.harvest(model, texts, **{"sites": SITES, "out": out, "context": CONTEXT, **options})


def refused(error: type[VesaliusError], *given: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        harvest(*given, **options)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# --- what is stored


def expected(model: vs.Model, texts: list[str], site: str) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Rows and (document, number of token, token) by the plain way: each piece of a text run on its own."""
    rows, where = [], []
    for number, text in enumerate(texts):
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), CONTEXT - 1):
            piece = [1, *ids[start : start + CONTEXT - 1]]
            run = model.run(vs.Tokens(torch.tensor([piece])), capture=[site])
            for at, token in enumerate(piece):
                if at and token not in (0, 1, 2):
                    rows.append(run[site][0, at].flatten())
                    where.append((number, start + at - 1, token))
    return torch.stack(rows), where


def test_every_row_is_that_of_its_document_run_alone_and_is_traced_to_it(model: vs.Model, tmp_path: Path) -> None:
    store = harvest(model, tmp_path / "acts", shard_bytes=20_000)
    assert len(store.manifest.shards) > 4
    found = [rows for _, rows in store.in_order(50)]
    for number, site in enumerate(SITES):
        rows, where = expected(model, TEXTS, site)
        torch.testing.assert_close(torch.cat([batch[number] for batch in found]), rows, rtol=1e-4, atol=1e-5)
    assert store.tokens.tolist() == [token for _, _, token in where]
    for row, (document, token, given) in enumerate(where):
        origin = store.trace(row)
        assert (origin.document, origin.token, origin.ids[origin.at]) == (document, token, given)
        ids = model.tokenizer.encode(TEXTS[document], add_special_tokens=False)
        start = token - origin.at + 1
        assert list(origin.ids) == [1, *ids[start : start + CONTEXT - 1]]
    before, token_text, after = store.trace(3).text(model.tokenizer)
    assert (before + token_text + after) == "<|start|>the cat"


def test_the_files_can_be_read_without_us(model: vs.Model, tmp_path: Path) -> None:
    store = harvest(model, tmp_path, sites=["layers.1.resid_post"], dtype=torch.bfloat16)
    (name,) = [path.name for path in tmp_path.glob("*.safetensors")]
    plain = load_file(tmp_path / name)
    assert plain["layers.1.resid_post"].dtype == torch.bfloat16
    assert torch.equal(plain["layers.1.resid_post"].float(), torch.cat([rows[0] for _, rows in store.in_order(999)]))
    assert torch.equal(plain["rows.token"], store.tokens)


def test_the_manifest_says_what_the_rows_are(model: vs.Model, tmp_path: Path) -> None:
    store = harvest(model, tmp_path, tokens=90, shard_bytes=20_000)
    told = manifest(tmp_path)
    plan = told["plan"]
    assert plan["models"] == [{"tag": "", "name": "tiny", "sha256": model.content_hash}]
    assert plan["sites"] == [{"site": "layers.1.resid_post", "width": 64}, {"site": "layers.0.z", "width": 64}]
    assert (plan["dtype"], plan["context"], plan["tokens"]) == ("float32", CONTEXT, 90)
    assert plan["bos"] == {"token": "<|start|>", "id": 1, "kept": False}
    assert plan["text"]["kind"] == "texts"
    assert len(plan["tokenizer_sha256"]) == 64
    assert [shard["file"] for shard in told["shards"]] == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sum(shard["rows"] for shard in told["shards"]) == told["counts"]["rows"] == store.n_rows == 90
    assert told["counts"]["texts"] == 3
    assert told["counts"]["empty_texts"] == 1


def test_empty_texts_are_counted_and_told_and_nothing_is_deduplicated(model: vs.Model, tmp_path: Path) -> None:
    events: list[Event] = []
    store = harvest(model, tmp_path, ["the cat", "", "the cat"], sink=events.append)
    assert store.n_rows == 2 * len(model.tokenizer.encode("the cat", add_special_tokens=False))
    notes = [event.message for event in events if event.kind == "note"]
    assert "1 of 3 texts are empty and give no activations" in notes
    assert notes[0] == "bos token <|start|>, its activations dropped; special tokens in the text give no rows"
    assert notes[1].startswith("expected cost: about 0 s, 2 forward passes, ")
    done = [(event.done, event.total) for event in events if event.kind in ("start", "advance", "end")]
    assert done[0][0] == 0
    assert done[-1][0] == store.n_rows
    assert done == sorted(done)


def test_the_bos_can_be_kept_changed_or_left_out(model: vs.Model, tmp_path: Path) -> None:
    kept = harvest(model, tmp_path / "kept", ["the cat"], keep_bos=True)
    assert (kept.tokens[0], kept.trace(0).token, kept.trace(1).token) == (1, -1, 0)
    none = harvest(model, tmp_path / "none", ["the cat"], bos="none")
    assert (none.n_rows, none.trace(0).token, none.trace(0).at) == (kept.n_rows - 2, 1, 1)
    other = harvest(model, tmp_path / "other", ["the cat"], bos="<|end|>")
    assert other.trace(0).ids[0] == 0
    assert other.n_rows == kept.n_rows - 1
    rows = [next(store.in_order(99))[1][0] for store in (kept, other)]
    assert float((rows[0][1:] - rows[1]).abs().max()) > 1e-2


def test_a_reader_that_counts_on_another_bos_gets_an_error(model: vs.Model, tmp_path: Path) -> None:
    harvest(model, tmp_path, ["the cat"])
    assert ActivationStore.open(tmp_path, bos="<|start|>", keep_bos=False).n_rows > 0
    with pytest.raises(InputError, match=r"made with bos token '<\|start\|>', and 'none' is asked for"):
        ActivationStore.open(tmp_path, bos="none")
    with pytest.raises(InputError, match="first position dropped, and they are asked to be kept; harvest again"):
        ActivationStore.open(tmp_path, keep_bos=True)


def test_two_models_are_read_in_one_pass_over_the_text(tmp_path: Path) -> None:
    one, two = tiny.model("llama", 0), tiny.model("llama", 1)
    documents = [list(range(2, 40)), [5, 6]]
    reads = 0

    class Once:
        def __iter__(self) -> Iterator[list[int]]:
            nonlocal reads
            reads += 1
            return iter(documents)

    store = vs.data.harvest([one, two], Once(), sites=["layers.1.resid_post"], out=tmp_path / "both", context=9)
    assert reads == 1
    assert [str(site) for site in store.sites] == ["a/layers.1.resid_post", "b/layers.1.resid_post"]
    ((_, both),) = store.in_order(99)
    for model, rows, name in zip((one, two), both, "ab", strict=True):
        alone = vs.data.harvest(model, documents, sites=["layers.1.resid_post"], out=tmp_path / name, context=9)
        assert torch.equal(next(alone.in_order(99))[1][0], rows)
    assert ActivationStore.open(tmp_path / "both", sites=["b/*"]).widths == (48,)


def test_bfloat16_products_are_measured_and_the_error_is_stored_and_told(model: vs.Model, tmp_path: Path) -> None:
    notes: list[str] = []
    fast = harvest(model, tmp_path / "fast", compute=torch.bfloat16, sink=lambda event: notes.append(event.message))
    exact = harvest(model, tmp_path / "exact")
    told = manifest(tmp_path / "fast")
    assert told["plan"]["compute"] == "bfloat16 weights"
    assert manifest(tmp_path / "exact")["relative_error"] == {}
    for number, site in enumerate(SITES):
        a, b = (torch.cat([rows[number] for _, rows in store.in_order(999)]) for store in (fast, exact))
        error = float((a - b).norm() / b.norm())
        assert 1e-4 < told["relative_error"][site] < 0.05
        assert told["relative_error"][site] == pytest.approx(error, rel=0.5)
        assert any(f"{site}: bfloat16 weights, relative error {told['relative_error'][site]:.2g}" in n for n in notes)


class Spiked:
    """The tiny model with one token whose row is a hundred times as long as the others."""

    def __init__(self, token: int, factor: float = 100.0) -> None:
        self.model = tiny.model("llama")
        with torch.no_grad():
            self.model.module.model.embed_tokens.weight[token] *= factor


def test_norm_outliers_are_dropped_counted_and_told(tmp_path: Path) -> None:
    documents = [[5, 9, 6, 7], [8, 6, 9, 9, 4], [9, 5, 6]] * 20
    notes: list[str] = []
    model = Spiked(9).model
    options = {"sites": ["embed"], "context": 9, "keep_bos": True, "shard_bytes": 7_000}
    store = harvest(model, tmp_path / "out", documents, sink=lambda event: notes.append(event.message), **options)
    whole = harvest(model, tmp_path / "whole", documents, max_norm=None, **options)
    assert whole.n_rows == 240
    # At the first position, where outliers are expected, keep_bos decides.
    kept = torch.tensor([token != 9 or whole.trace(row).at == 0 for row, token in enumerate(whole.tokens.tolist())])
    assert store.n_rows == int(kept.sum()) == 180
    rows = [torch.cat([rows for _, (rows,) in one.in_order(99)]) for one in (store, whole)]
    assert torch.equal(rows[0], rows[1][kept])
    assert store.tokens.tolist() == whole.tokens[kept].tolist()
    assert [store.trace(row) for row in range(9)] == [whole.trace(row) for row in kept.nonzero()[:9, 0].tolist()]
    assert "60 of 240 rows are norm outliers, over 10 times the median, and were left out" in notes
    told = manifest(tmp_path / "out")
    assert (told["counts"]["outliers"], told["counts"]["rows"], told["plan"]["max_norm"]) == (60, 180, 10.0)
    assert len(told["shards"]) > 4
    assert sum(shard["outliers"] for shard in told["shards"]) == 60
    assert harvest(model, tmp_path / "wide", documents, max_norm=200.0, **options).n_rows == 240
    for bound in (1.0, 0.0, float("nan")):
        assert "must be above 1" in refused(InputError, model, tmp_path / "bad", documents, max_norm=bound, **options)


def test_an_outlier_at_one_site_drops_the_row_at_all_and_a_site_of_zeros_drops_none(tmp_path: Path) -> None:
    model = Spiked(9).model
    store = harvest(model, tmp_path, [[5, 9, 6, 7] * 9], sites=["layers.1.mlp_out", "embed"])
    assert 9 not in store.tokens.tolist()
    assert store.n_rows == 27 - 2
    zeros = torch.zeros(10, 3)
    zeros[4] = 1
    assert not outliers((zeros,), torch.zeros(10, dtype=torch.bool), 10.0).any()


# --- broken off, and gone on with


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_and_the_store_is_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    whole = killed_harvest.harvest(vs.load(folder), tmp_path / "whole")
    assert 15 < len(whole.manifest.shards) < 40
    command = [sys.executable, Path(killed_harvest.__file__), folder, tmp_path / "killed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)
    ended = json.loads(done.stdout)
    assert ended.count(-9) >= 10
    assert set(ended) <= {0, -9}
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    # Two at once: one waits for the other.
    assert ended[-2:] == [0, 0]
    assert files(tmp_path / "two") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_shard_not_by_the_store(tmp_path: Path) -> None:
    command = [sys.executable, harvest_memory.__file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    size, grown = map(int, done.stdout.split())
    assert size > 120e6
    assert grown < 45e6


def stop_at(number: int) -> Any:
    seen = 0

    def sink(_: Event) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise KeyboardInterrupt

    return sink


def test_finished_shards_are_not_made_again(model: vs.Model, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tmp_path, shard_bytes=20_000, sink=stop_at(6))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(before) > 0
    with pytest.raises(FileFormatError, match=r"is unfinished: [\d,]+ rows were written when its harvest was stopped"):
        ActivationStore.open(tmp_path)
    (tmp_path / ".shard-00009.safetensors.x.part").write_bytes(b"left by a kill")
    store = harvest(model, tmp_path, shard_bytes=20_000)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert files(tmp_path).keys() == {
        "manifest.json",
        *(f"shard-{n:05d}.safetensors" for n in range(len(store.manifest.shards))),
    }


def test_a_finished_harvest_runs_no_model(model: vs.Model, tmp_path: Path) -> None:
    harvest(model, tmp_path / "list")
    harvest(model, tmp_path / "once", iter(TEXTS))
    before = files(tmp_path / "list")
    called = 0

    def count(*_: Any) -> None:
        nonlocal called
        called += 1

    hook = model.module.model.layers[0].register_forward_pre_hook(count)
    try:
        assert harvest(model, tmp_path / "list").n_rows > 0
        harvest(model, tmp_path / "once", iter(TEXTS))
    finally:
        hook.remove()
    assert called == 2  # the widths are looked up on two tokens
    assert files(tmp_path / "list") == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_shard_is_made_anew_by_the_same_harvest(damage: str, model: vs.Model, tmp_path: Path) -> None:
    harvest(model, tmp_path, shard_bytes=20_000)
    before = files(tmp_path)
    path = tmp_path / "shard-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:-5])
    if damage == "gone":
        path.unlink()
    notes: list[str] = []
    harvest(model, tmp_path, shard_bytes=20_000, sink=lambda event: notes.append(event.message))
    assert any("shard-00002.safetensors" in note and "writing it again" in note for note in notes)
    assert files(tmp_path) == before


def test_another_harvest_in_the_same_folder_is_refused_and_what_is_there_is_left_alone(
    model: vs.Model, tmp_path: Path
) -> None:
    harvest(model, tmp_path)
    before = files(tmp_path)
    assert "context: 20 there, 21 asked for" in refused(InputError, model, tmp_path, context=21)
    assert 'bos: {"' in refused(InputError, model, tmp_path, keep_bos=True)
    assert "text: " in refused(InputError, model, tmp_path, TEXTS[1:])
    assert "sites: " in refused(InputError, model, tmp_path, sites=["embed"])
    assert files(tmp_path) == before


def test_an_iterable_that_gives_other_texts_than_before_is_found_out(model: vs.Model, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        harvest(model, tmp_path, iter(TEXTS), shard_bytes=20_000, sink=stop_at(8))
    changed = [TEXTS[0], TEXTS[1], "13" + TEXTS[2][2:], *TEXTS[3:]]
    message = refused(InputError, model, tmp_path, iter(changed), shard_bytes=20_000)
    assert "shard-00000.safetensors was made from other texts than those given now" in message
    assert "was made from other texts" in refused(InputError, model, tmp_path, iter(TEXTS[:1]), shard_bytes=20_000)
    assert harvest(model, tmp_path, iter(TEXTS), shard_bytes=20_000).n_rows > 100


def test_a_folder_with_something_else_in_it_is_refused(model: vs.Model, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    assert "is not empty and no activation store (it holds notes.md)" in refused(InputError, model, tmp_path)
    assert "is a file; activations are written to a folder" in refused(InputError, model, tmp_path / "notes.md")
    assert "cannot write to" in refused(InputError, model, tmp_path / "notes.md" / "acts")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.md"]


def test_a_full_disk_is_told_before_and_during(
    model: vs.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "acts"
    real_write = os.fsync
    written = 0

    def full(handle: int) -> None:
        nonlocal written
        written += 1
        if written > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(handle)

    monkeypatch.setattr(os, "fsync", full)
    message = refused(InputError, model, out, shard_bytes=20_000)
    assert "no space to write" in message
    monkeypatch.undo()
    assert not list(out.glob(".*.part"))
    whole = harvest(model, tmp_path / "whole", shard_bytes=20_000)
    assert harvest(model, out, shard_bytes=20_000).content_hash == whole.content_hash
    assert files(out) == files(tmp_path / "whole")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert "no space: about 0.00 GB are to be written" in refused(InputError, model, tmp_path / "more")
    assert not (tmp_path / "more").exists()


# --- what cannot be harvested


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 0}, InputError, "tokens must be at least 1; got 0"),
        ({"context": 1}, InputError, "context must be at least 3 tokens; got 1"),
        ({"context": 1000}, InputError, "context 1000 is longer than the 128 positions of tiny"),
        ({"dtype": torch.float64}, UnknownNameError, "unknown dtype of stored activations 'torch.float64'; known: bf"),
        ({"compute": torch.int8}, InputError, "cannot compute in int8"),
        ({"bos": "the"}, TokenizerError, "'the' is not a special token"),
        ({"sites": []}, InputError, "no sites"),
        ({"sites": ["layers.7.mlp_out"]}, InputError, "has 2 layers"),
        ({"shard_bytes": 0}, InputError, "shard_bytes must be at least 1"),
        ({"texts": []}, InputError, "0 texts, 0 of them empty, give no rows"),
        ({"texts": ["", "<|end|>"]}, InputError, "2 texts, 1 of them empty, give no rows"),
        ({"texts": "nowhere.txt"}, FileFormatError, "there is no file or folder"),
        ({"texts": ["a", 1]}, InputError, "text 1 is a int"),
    ],
)
def test_what_cannot_be_harvested_is_refused_and_nothing_is_written(
    options: dict[str, Any], error: type[VesaliusError], message: str, model: vs.Model, tmp_path: Path
) -> None:
    texts = options.pop("texts", TEXTS)
    assert message in refused(error, model, tmp_path / "acts", texts, **options)
    assert not (tmp_path / "acts").exists()


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_first_position_is_the_norm_outlier_that_is_dropped(demo: vs.Model, tmp_path: Path) -> None:
    texts = ["The library of Alexandria was built early in the third century.", "Two cats slept on the warm roof."]
    for bos in ("auto", "none"):
        store = harvest(demo, tmp_path / bos, texts, sites=["layers.15.resid_post"], bos=bos,
                        keep_bos=True)  # fmt: skip
        ((_, (rows,)),) = store.in_order(100)
        first = torch.tensor([store.trace(row).at == 0 for row in range(store.n_rows)])
        assert first.sum() == 2
        assert float(rows[first].norm(dim=1).min()) > 50 * float(rows[~first].norm(dim=1).max())
        dropped = harvest(demo, tmp_path / f"{bos} dropped", texts, sites=["layers.15.resid_post"],
                          bos=bos)  # fmt: skip
        torch.testing.assert_close(next(dropped.in_order(100))[1][0], rows[~first])
