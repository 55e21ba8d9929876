"""A store gives the same shuffled batches for the same seed, from any batch on, and finds every damaged byte."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.data import ActivationStore, Source
from vesalius.data.source import Rows
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.protocol import content_hash

SITES = ["layers.0.resid_post", "layers.0.mlp_post"]
TOKENS = 700


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 700 rows in several shards, with blocks of 16 rows."""
    folder = tmp_path_factory.mktemp("store") / "acts"
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, tiny.VOCAB, (30,), generator=draw).tolist() for _ in range(40)]
    wide = vs.Model(tiny.llama(hidden_size=1536, intermediate_size=2560, num_attention_heads=6, layers=1))
    vs.data.harvest(wide, documents, sites=SITES, out=folder, context=31, tokens=TOKENS, shard_bytes=3_000_000)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "acts")


def take(store: Source, count: int, batch_size: int, seed: int = 0, start: int = 0) -> list[Rows]:
    return list(islice(store.batches(batch_size, seed=seed, start=start), count))


def numbers(store: ActivationStore, batches: list[Rows]) -> list[int]:
    """Row numbers of shuffled rows, found by their values."""
    whole = torch.cat([rows[0] for _, rows in store.in_order(999)])
    known = {tuple(row[:4].tolist()): number for number, row in enumerate(whole)}
    assert len(known) == len(whole)
    return [known[tuple(row[:4].tolist())] for batch in batches for row in batch[0]]


def test_a_store_is_a_source(made: Path) -> None:
    store = ActivationStore.open(made)
    assert isinstance(store, Source)
    assert ([str(site) for site in store.sites], store.widths, store.n_rows) == (SITES, (1536, 2560), TOKENS)
    assert len(store.manifest.shards) > 3
    assert store.manifest.block_rows == 16
    assert "700 rows of layers.0.resid_post [1536], layers.0.mlp_post [2560]" in repr(store)


@pytest.mark.parametrize("pool_rows", [1, 100, 300, 10_000])
@pytest.mark.parametrize("batch_size", [64, 700, 1000])
def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(batch_size: int, pool_rows: int, made: Path) -> None:
    store = ActivationStore.open(made, sites=SITES[:1], pool_rows=pool_rows)
    found = numbers(store, take(store, 3 * TOKENS // batch_size + 2, batch_size))
    epochs = [found[at : at + TOKENS] for at in (0, TOKENS, 2 * TOKENS)]
    assert all(sorted(epoch) == list(range(TOKENS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_a_run_that_was_broken_off_goes_on_with_the_same_batches(made: Path) -> None:
    store = ActivationStore.open(made, pool_rows=100)
    whole = take(store, 40, 48, seed=3)
    for start in (1, 2, 14, 15, 29, 39):
        again = take(ActivationStore.open(made, pool_rows=100), 40 - start, 48, seed=3, start=start)
        for one, other in zip(again, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_to_begin_late_costs_one_pool(made: Path) -> None:
    store = ActivationStore.open(made, pool_rows=100)
    read: list[int] = []
    plain = store._read
    store._read = lambda blocks, into: (read.append(len(blocks)), plain(blocks, into))[1]  # type: ignore[method-assign]
    next(store.batches(10, seed=0, start=12_345))
    assert len(read) == 1


def test_rows_of_all_sites_stay_together_and_sites_can_be_chosen_in_another_order(made: Path) -> None:
    both, swapped = ActivationStore.open(made), ActivationStore.open(made, sites=SITES[::-1])
    assert swapped.widths == (2560, 1536)
    whole = [torch.cat(parts) for parts in zip(*(rows for _, rows in both.in_order(64)), strict=True)]
    for (x, y), (b, a) in zip(take(both, 5, 64), take(swapped, 5, 64), strict=True):
        index = numbers(both, [(x,)])
        assert torch.equal(x, a)
        assert torch.equal(y, b)
        assert torch.equal(y, whole[1][index])
    assert (
        both.content_hash != swapped.content_hash != ActivationStore.open(made, sites=["layers.0.mlp_*"]).content_hash
    )
    assert take(ActivationStore.open(made, dtype=torch.bfloat16), 1, 4)[0][0].dtype == torch.bfloat16


def test_sites_can_be_chosen_by_transformerlens_s_names(made: Path) -> None:
    ours = ActivationStore.open(made, sites=["layers.0.mlp_post"])
    assert ActivationStore.open(made, sites=["blocks.*.mlp.hook_post"]).sites == ours.sites
    with pytest.raises(UnknownNameError, match="hook_resid_mid"):
        ActivationStore.open(made, sites=["blocks.0.hook_resid_mid"])


def test_the_seed_decides_and_the_pool_mixes_all_shards(made: Path) -> None:
    store = ActivationStore.open(made, pool_rows=320)
    one, other = (numbers(store, take(store, 3, 64, seed=seed)) for seed in (1, 2))
    assert one != other
    assert one == numbers(store, take(ActivationStore.open(made, pool_rows=320), 3, 64, seed=1))
    shard = [store._find(row)[0] for row in one[:64]]
    assert len(set(shard)) == len(store.manifest.shards)
    # Neighbours in the text are no neighbours in a batch.
    assert sum(abs(a - b) == 1 for a, b in pairwise(one)) < 8


def test_a_sample_holds_different_rows_from_all_over(made: Path) -> None:
    store = ActivationStore.open(made)
    sample = store.sample(100, seed=0)
    found = numbers(store, [sample])
    assert len(set(found)) == 100
    assert len({store._find(row)[0] for row in found}) > 2
    assert torch.equal(sample[1], store.sample(100, seed=0)[1])
    assert not torch.equal(sample[1], store.sample(100, seed=1)[1])
    assert sorted(numbers(store, [store.sample(9999, seed=0)])) == list(range(TOKENS))


def test_rows_in_order_are_numbered_and_complete(made: Path) -> None:
    store, at = ActivationStore.open(made), 0
    for first, rows in store.in_order(50):
        assert first == at
        assert len(rows[0]) == len(rows[1]) <= 50
        at += len(rows[0])
    assert at == TOKENS
    origins = [store.trace(row) for row in (0, 29, 30, 699)]
    assert [(origin.document, origin.token, origin.at) for origin in origins] == [
        (0, 1, 1),
        (1, 1, 1),
        (1, 2, 2),
        (24, 4, 4),
    ]


@pytest.mark.parametrize("row", [-1, TOKENS])
def test_a_row_that_is_not_there_is_refused(row: int, made: Path) -> None:
    with pytest.raises(InputError, match=f"row {row} does not exist: this store has rows 0 to 699"):
        ActivationStore.open(made).trace(row)


# --- damage


def read_all(folder: Path) -> None:
    """What training and describing read."""
    store = ActivationStore.open(folder)
    take(store, TOKENS // 50 + 1, 50)
    _ = store.tokens
    for row in range(0, TOKENS, 7):
        store.trace(row)


def tensors_begin(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def test_a_flipped_byte_is_found_and_its_shard_named_wherever_it_is(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    read_all(folder)
    start = tensors_begin(content)
    places = [*range(start, len(content), len(content) // 25), len(content) - 1]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FileFormatError, match=r"shard-00001\.safetensors is damaged: .* checksum"):
            read_all(folder)
        with pytest.raises(FileFormatError, match=r"shard-00001\.safetensors was changed after it was written"):
            ActivationStore.open(folder).verify()
    for place in range(0, start, 13):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FileFormatError, match=r"shard-00001\.safetensors was changed after it was written"):
            ActivationStore.open(folder).verify()
    path.write_bytes(content)
    ActivationStore.open(folder).verify()
    read_all(folder)


def test_damage_is_told_with_its_rows_when_they_are_reached(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : tensors_begin(content)])
    begin = tensors_begin(content) + header[SITES[1]]["data_offsets"][0]
    content[begin + 40 * 2560 * 4] ^= 1
    path.write_bytes(content)
    take(ActivationStore.open(folder, sites=SITES[:1]), 20, 50)
    with pytest.raises(
        FileFormatError, match=r"is damaged: layers\.0\.mlp_post, rows 32 to 47, does not match its check"
    ):
        take(ActivationStore.open(folder), 20, 50)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            r"shard-00001\.safetensors has [\d,]+ bytes and was wri",
        ),
        (lambda path: path.write_bytes(b""), r"shard-00001\.safetensors has 0 bytes"),
        (lambda path: path.unlink(), r"shard-00001\.safetensors is missing"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), r"shard-00001\.safetensors is a pickle, not a safeten"),
        (lambda path: torch.save({"a": torch.ones(2)}, path), r"shard-00001\.safetensors is a pickle, not a safetens"),
        (lambda path: path.write_bytes(b"x" * path.stat().st_size), r"shard-00001\.safetensors is damaged: "),
        (
            lambda path: shutil.copy(path.with_name("shard-00000.safetensors"), path),
            r"is damaged: its checksums are not",
        ),
    ],
)
def test_a_shard_that_is_cut_missing_or_something_else_is_named(
    damage: Callable[[Path], Any], message: str, folder: Path
) -> None:
    damage(folder / "shard-00001.safetensors")
    with pytest.raises(FileFormatError, match=message):
        read_all(folder)
    with pytest.raises(FileFormatError, match=r"shard-00001\.safetensors"):
        ActivationStore.open(folder).verify()


def test_a_manifest_that_is_not_as_it_was_written_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_text()
    for change in (("float32", "float16"), ('"rows": ', '"rows": 1'), ("layers.0.mlp_post", "layers.0.mlp_pre")):
        path.write_text(whole.replace(*change, 1))
        with pytest.raises(
            FileFormatError, match=r"is not a manifest of activations as it was written \(its sha256 does"
        ):
            ActivationStore.open(folder)
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "not a manifest"),
        ("{}", "not a manifest"),
        ('"x"', "not a"),
    ):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=message):
            ActivationStore.open(folder)
    path.unlink()
    with pytest.raises(FileFormatError, match=r"is no activation store: there is no manifest\.json in it"):
        ActivationStore.open(folder)


def test_a_manifest_made_by_a_stranger_cannot_lead_elsewhere(folder: Path) -> None:
    """A right hash does not make the rest right: files are known by number, and shapes are compared."""
    path = folder / "manifest.json"
    whole = json.loads(path.read_text())

    def rewritten(change: Callable[[dict[str, Any]], Any]) -> None:
        body = json.loads(json.dumps({name: value for name, value in whole.items() if name != "sha256"}))
        change(body)
        path.write_text(json.dumps({**body, "sha256": content_hash(body)}))

    rewritten(lambda body: body["shards"][1].update(file="../elsewhere.safetensors"))
    read_all(folder)
    for change, message in [
        (lambda body: body["shards"][1].update(rows=3), "shard-00001.safetensors is damaged: its tensors are not what"),
        (
            lambda body: body["plan"]["sites"][0].update(width=7),
            "is damaged: its tensors are not what the manifest says",
        ),
        (lambda body: body["plan"].update(dtype="bfloat16"), "is damaged: its tensors are not what the manifest says"),
        (lambda body: body["plan"].update(block_rows=64), "is damaged: its tensors are not what the manifest says"),
        (lambda body: body["plan"].update(dtype="object"), "is not a manifest of activations"),
        (lambda body: body["plan"].update(sites=[]), "is not a manifest of activations"),
        (lambda body: body.update(format=2), "its format is 2, and 1 can be read"),
        (lambda body: body["shards"][0].pop("rows"), "is not a manifest of activations"),
        (lambda body: body["shards"][0].update(rows="9"), "is not a manifest of activations"),
        (lambda body: body["shards"][0].update(bytes=-1), "is not a manifest of activations"),
        (lambda body: body["shards"].clear(), "it has no sites or no rows"),
        (lambda body: body["plan"].pop("bos"), "is not a manifest of activations"),
        (lambda body: body["plan"]["bos"].update(id="x"), "its bos token is no id"),
        (lambda body: body["plan"]["bos"].update(token=None), "does not say what contexts begin with"),
    ]:
        rewritten(change)
        with pytest.raises(FileFormatError, match=message):
            read_all(folder)


def test_what_is_no_store_is_refused(tmp_path: Path, made: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "acts.pt")
    with pytest.raises(FileFormatError, match=r"acts\.pt looks like a pickle, which can run code"):
        ActivationStore.open(tmp_path / "acts.pt")
    with pytest.raises(FileFormatError, match="is no activation store"):
        ActivationStore.open(tmp_path / "nowhere")
    with pytest.raises(
        UnknownNameError, match=r"unknown site of this store 'layers\.9\.z'; known: layers\.0\.mlp_post"
    ):
        ActivationStore.open(made, sites=["layers.9.z"])
    with pytest.raises(InputError, match="pool_rows must be at least 1; got -1"):
        ActivationStore.open(made, pool_rows=-1)
