"""Files from strangers: nothing hangs, runs or swells, and what is wrong is said in an error of this package."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fuzz
import vesalius as vs
from fuzz_mutations import SCHEMAS
from fuzz_readers import KINDS, claim, ledger_file, rechained, seeds_of
from tiny_folder import change_config, tiny_folder
from vesalius.errors import FileFormatError, InputError, TamperedError, VesaliusError
from vesalius.jobs import Blocks, untrusted
from vesalius.jobs.untrusted import UnreadableError
from vesalius.protocol import store as store_of_records
from vesalius.protocol.ledger import Ledger
from vesalius.report import schema

HOSTILE = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "deep without an end": "[" * 100_000,
    "digits": '{"a": ' + "9" * 5_000 + "}",
    "half a pair": '{"a": "\\ud800"}',
    "half a pair as a key": '{"\\udfff": 1}',
    "a key twice": '{"a": 1, "a": []}',
    "many lists": "[" + "[]," * 300_000 + "[]]",
    "many numbers": "[" + "1," * 900_000 + "1]",
}
NUMBERS = {
    "1e200": "[1e200]",
    "1e400": "[-1e400]",
    "400 digits": f"[{'7' * 400}]",
    "NaN": "[NaN]",
    "inf": "[-Infinity]",
}


# JSON


@pytest.mark.parametrize("text", [*HOSTILE.values(), *NUMBERS, "", "[1", '"', "\ufeff[]"])
def test_json_that_cannot_be_trusted_is_refused_at_once(text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UnreadableError):
        untrusted.parse_json(text)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "value",
    [
        None, [], {}, {"a": [1, 2.5, -3e-9, 1e149, True, None]}, 2**64, 10**149, "😀 \\ud800 is text",
        json.loads("[" * 100 + "]" * 100), {"brackets": "[" * 5_000 + '\\"' * 99}, 5e-324,
    ],
)  # fmt: skip
def test_what_json_writes_is_read_as_python_reads_it(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert untrusted.parse_json(text) == json.loads(text) == value


def test_numbers_of_any_size_are_read_where_that_is_asked_for() -> None:
    assert untrusted.parse_json("[1e200, Infinity]", finite=False) == [1e200, float("inf")]
    with pytest.raises(UnreadableError, match="whole number of 5,000 digits"):
        untrusted.parse_json(HOSTILE["digits"], finite=False)


def test_a_pipe_is_not_waited_for_and_a_large_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UnreadableError, match="it is a pipe or device"):
        untrusted.read_json(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableError, match="such a file has at most"):
        untrusted.read_json(tmp_path / "large.json")


# npz

ARRAYS = {
    "float": np.linspace(0, 1, 7), "whole": np.arange(6, dtype=np.int16).reshape(2, 3), "none": np.zeros((0, 5)),
    "number": np.array(3.5), "text": np.array(["a", "längste"]),
    "columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)), "flags": np.array([True, False]), 
    "half": np.ones(4, np.float16), "complex": np.ones(2, complex), "bytes": np.array(b"ab"),
}  # fmt: skip


def npz(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def npy(shape: str, descr: str = "'<f8'", data: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "x.npz", **ARRAYS)
    found = untrusted.read_npz(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as wanted:
        assert sorted(found) == sorted(wanted.files)
        for name in wanted.files:
            np.testing.assert_array_equal(found[name], wanted[name])
            assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape)


@pytest.mark.parametrize(
    "members",
    [
        {"a.npy": npy("(1000000000,)")}, {"a.npy": npy("(99999999999999999999,)")}, {"a.npy": npy("(-1,)")},
        {"a.npy": npy("(0, 10000000000000000000000)")}, {"a.npy": npy("(1,)", "'|O'", b"12345678")},
        {"a.npy": npy("(1,)", "'<U500000000'")}, {"a.npy": npy("(" * 3000)},
        {"a.npy": npy("(True,)", data=b"12345678")},
        {"a.npy": npy("(1,)", "[('a', '<f8')]", b"12345678")}, {"a.npy": npy("().__class__")}, {"a.npy": b"\x93NUMPY"},
        {"a.npy": npy("(3,)", data=b"1" * 16)}, {"a.npy": npy("(1,)", data=b"1" * 16)}, {"a.txt": b"text"},
        {".npy": b""}, {f"{n}.npy": npy("(0,)") for n in range(5_000)},
    ],
)  # fmt: skip
def test_archives_that_are_no_arrays_are_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(UnreadableError):
        untrusted.read_npz(npz(tmp_path / "x.npz", members))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_ask_for_memory_are_refused(tmp_path: Path, method: int) -> None:
    with pytest.raises(UnreadableError, match="no array as NumPy writes it"):
        untrusted.read_npz(npz(tmp_path / "x.npz", {"a.npy": npy("(1,)", data=b"12345678")}, method))


def test_a_bomb_is_refused_and_what_compresses_well_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", a=np.zeros(10**7))
    assert (tmp_path / "bomb.npz").stat().st_size < 200_000
    with pytest.raises(UnreadableError, match="would become 80,000"):
        untrusted.read_npz(tmp_path / "bomb.npz")
    np.savez_compressed(tmp_path / "well.npz", a=np.zeros(10**6))
    assert untrusted.read_npz(tmp_path / "well.npz")["a"].sum() == 0


def test_a_byte_changed_in_an_array_is_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(100.0))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(bytes(content))
    with pytest.raises(UnreadableError, match="CRC"):
        untrusted.read_npz(tmp_path / "x.npz")


# safetensors


def safetensors(path: Path, header: str, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header.encode() + data)
    return path


def test_a_header_says_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64)
    tensors = {str(kind): torch.ones(2, 3).to(kind) for kind in kinds} | {
        "none": torch.zeros(0, 4),
        "one": torch.ones(()),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = untrusted.safetensors_header(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as stored:
        wanted = {
            name: (stored.get_slice(name).get_dtype(), tuple(stored.get_slice(name).get_shape())) for name in tensors
        }
    assert {name: (one.dtype, one.shape) for name, one in header.items()} == wanted
    found = untrusted.read_safetensors(tmp_path / "x.safetensors", without={"none"})
    assert {*found} == {*tensors} - {"none"} and all(torch.equal(found[name], tensors[name]) for name in found)


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ("{}", b"", 2**63), ("{}", b"", 3), ("[]", b"", None), (HOSTILE["deep"], b"", None),
        ('{"a": {"dtype": "F32", "shape": [1000000000], "data_offsets": [0, 4]}}', b"1234", None),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}', b"1234", None),
        ('{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}', b"1234", None),
        ('{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', b"1234", None),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', b"1234", None),
        ('{"a": {"dtype": "F32", "shape": [0, 99999999999999999999], "data_offsets": [0, 0]}}', b"", None),
    ],
)  # fmt: skip
def test_headers_that_promise_what_is_not_there_are_refused(
    tmp_path: Path, header: str, data: bytes, length: int | None
) -> None:
    with pytest.raises(UnreadableError):
        untrusted.read_safetensors(safetensors(tmp_path / "x.safetensors", header, data, length))


# Every reader


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Good files of every reader."""
    root = tmp_path_factory.mktemp("seeds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: list(seeds_of(kind, root / name)) for name, kind in KINDS.items()}


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


JSON_READERS = (
    "own-dictionary",
    "foreign-dictionary",
    "entities",
    "summary",
    "model",
    "store",
    "blocks",
    "edits",
    "pairs",
)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", JSON_READERS)
def test_no_reader_breaks_on_hostile_json(name: str, seeds: dict[str, list[Path]], tmp_path: Path) -> None:
    kind = KINDS[name]
    for seed in seeds[name][:3]:
        for file in kind.files(seed):
            if file.suffix not in (".json", ".jsonl"):
                continue
            for text in (*HOSTILE.values(), "null", "[]", "{}", "7", '"a"', "[[1]]", "", "\0"):
                folder = tmp_path / "x"
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(seed, folder)
                (folder / file.relative_to(seed)).write_text(text)
                assert fuzz.attempt(kind, folder) in ("read", "refused"), (file, text[:60])


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", KINDS)
def test_a_few_mutations_of_every_reader(name: str, seeds: dict[str, list[Path]], tmp_path: Path) -> None:
    """As `make fuzz`, which does many more."""
    found = {number: fuzz.one(KINDS[name], name, seeds[name], tmp_path, 1, number) for number in range(60)}
    assert {number: line for number, line in found.items() if "!" in line} == {}


FOUND = {
    "ledger": (536, 2308, 2733, 3687, 3771, 6605, 12232), "gguf": (5407,), "model": (300, 382, 2180),
    "own-dictionary": (12, 13, 61, 68, 75, 120, 165, 188, 190), "blocks": (2, 10, 20, 36, 271, 613),
    "edits": (1, 12, 36, 123), "store": (9756, 12141, 13108),
}  # fmt: skip
"""Numbers of mutations, of seed 0, at which a reader once broke."""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzzer_found_stays_mended(name: str, seeds: dict[str, list[Path]], tmp_path: Path) -> None:
    lines = [fuzz.one(KINDS[name], name, seeds[name], tmp_path, 0, number) for number in FOUND[name]]
    assert [line for line in lines if "!" in line] == []


def test_the_fuzzer_finds_a_reader_that_breaks_hangs_or_swells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 3)
    (tmp_path / "a.json").write_text("{}")

    def swelling(_: Path) -> None:
        np.ones(2**24)

    for read, word in (
        (lambda _: {}["a"], "KeyError"),
        (lambda _: time.sleep(9), "more than 3 s"),
        (swelling, "MB beyond"),
    ):
        kind = fuzz.Kind(lambda _: None, read)
        assert word in fuzz.attempt(kind, tmp_path)
    assert fuzz.attempt(fuzz.Kind(lambda _: None, lambda _: None), tmp_path) == "read"


# Ledgers


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return ledger_file(tmp_path / "ledger.sqlite")


def read_all(path: Path) -> int:
    with Ledger(path, create=False) as found:
        for family in found.families():
            found.verdicts(family)
        return found.verify().records


@pytest.mark.parametrize(
    "statements", [text for text in SCHEMAS if "user_version" not in text and "journal" not in text]
)
def test_a_ledger_with_a_schema_that_is_not_ours_is_not_read(ledger: Path, statements: str) -> None:
    connection = sqlite3.connect(ledger)
    connection.executescript(statements)
    connection.close()
    begun = time.monotonic()
    with pytest.raises((TamperedError, FileFormatError)):
        Ledger(ledger, create=False)
    assert time.monotonic() - begun < 5


def test_every_ledger_command_refuses_an_endless_view_with_exit_code_2(ledger: Path, tmp_path: Path) -> None:
    connection = sqlite3.connect(ledger)
    connection.executescript(SCHEMAS[0])
    connection.close()
    for command in (["show"], ["verify"], ["export"]):
        more = [str(tmp_path / "all.json")] if command == ["export"] else []
        arguments = ["vesalius", "ledger", *command, str(ledger), *more]
        code = f"import sys; sys.argv = {arguments!r}; from vesalius.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "'records', which keeps records unchanged, was altered or removed" in " ".join(done.stderr.split())


def test_a_row_that_is_no_record_is_refused(ledger: Path) -> None:
    connection = sqlite3.connect(ledger)
    (text,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'records_no_update'").fetchone()
    connection.execute("DROP TRIGGER records_no_update")
    connection.execute("UPDATE records SET payload = x'ff00' WHERE seq = 3")
    connection.execute(text)
    connection.commit()
    connection.close()
    with Ledger(ledger) as found, pytest.raises(TamperedError, match="the row after record 2 is no record"):
        found.verify()


def test_a_schema_in_no_known_encoding_is_damage(ledger: Path) -> None:
    """SQLite quotes what it finds there, and Python's module cannot decode the quotation."""
    content = ledger.read_bytes()
    ledger.write_bytes(content.replace(b"CREATE TABLE records", b"CREATE TABLE rec\xc5rd(", 1))
    with pytest.raises((FileFormatError, TamperedError)):
        Ledger(ledger, create=False)


def test_a_forged_name_that_is_no_text_is_refused(ledger: Path) -> None:
    def change(seq: int, record: dict[str, Any]) -> None:
        if record["kind"] == "opening":
            record["payload"] = json.dumps({**json.loads(record["payload"]), "data_hash": 7})
        if record["kind"] == "data":
            record["payload"] = json.dumps({**json.loads(record["payload"]), "data_hash": None})

    rechained(ledger, change)
    with Ledger(ledger) as found, pytest.raises(TamperedError):
        found.verify()


@pytest.mark.parametrize(
    "value", [1e200, 10**200, 10**5000, "\ud800", json.loads("[" * 200 + "]" * 200)], ids=lambda v: str(type(v))
)
def test_what_could_not_be_read_again_is_refused_on_the_way_in(ledger: Path, value: Any) -> None:
    before = read_all(ledger)
    sealed = vs.Claim.from_json({**claim(7).to_json(), "study": "other"})
    object.__setattr__(sealed, "parameters", {"x": value})
    with Ledger(ledger) as found, pytest.raises(InputError):
        found._store.append("family", "x", {"family": sealed.to_json()}, None)
    assert read_all(ledger) == before


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process sees of a medium that cannot be written."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: mode != os.W_OK and real(path, mode, **rest))


def test_a_ledger_on_a_read_only_medium_is_read_and_not_touched(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, content, names = read_all(ledger), ledger.read_bytes(), sorted(ledger.parent.iterdir())
    read_only(monkeypatch)
    assert read_all(ledger) == records == 7
    with Ledger(ledger) as found, pytest.raises(InputError, match="opened for reading only"):
        found.register([vs.Claim.from_json({**claim(5).to_json(), "study": "t"})])
    assert ledger.read_bytes() == content and sorted(ledger.parent.iterdir()) == names


def test_records_that_are_still_beside_the_file_are_read_from_a_read_only_medium(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "medium"
    copy.mkdir()
    with Ledger(ledger) as writing:
        writing.register([vs.Claim.from_json({**claim(5).to_json(), "study": "t"})])
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            shutil.copy(ledger.with_name(name), copy / name)
    names = sorted(copy.iterdir())
    read_only(monkeypatch)
    assert read_all(copy / "ledger.sqlite") == 8
    assert sorted(copy.iterdir()) == names
    (copy / "ledger.sqlite-wal").unlink()
    assert read_all(copy / "ledger.sqlite") == 7  # the test has teeth: the last record was only beside the file


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and rights of POSIX")
def test_a_folder_without_the_right_to_write_is_read_by_another_user() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        path = ledger_file(folder / "ledger.sqlite")
        path.chmod(0o444)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                os._exit(0 if read_all(path) == 7 else 1)
            except BaseException:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_full_disk_missing_rights_and_damage_are_told_apart(
    ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger(ledger) as found:
        pages = found._store._connection.execute("PRAGMA page_count").fetchone()[0]
        found._store._connection.execute(f"PRAGMA max_page_count = {pages}")
        many = [vs.Claim.from_json({**claim(n).to_json(), "study": "t"}) for n in range(40)]
        with pytest.raises(InputError, match=r"no space left to write .*; nothing was recorded"):
            found.register(many)
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(ledger.read_bytes()[:6000])
    with pytest.raises(FileFormatError, match=r"damaged"):
        Ledger(damaged, create=False)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **rest: mode != os.R_OK and real(path, mode, **rest))
    with pytest.raises(InputError, match="you have no right to read"):
        Ledger(ledger, create=False)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("SQLITE_FULL", InputError, "no space left"), ("SQLITE_READONLY_DIRECTORY", InputError, "no right"),
        ("SQLITE_CANTOPEN", InputError, "no right"), ("SQLITE_IOERR_WRITE", InputError, "the disk failed"),
        ("SQLITE_CORRUPT", FileFormatError, "damaged"), ("SQLITE_IOERR_SHORT_READ", FileFormatError, "damaged"),
        ("SQLITE_INTERRUPT", FileFormatError, "does not end"),
    ],
)  # fmt: skip
def test_errors_of_sqlite_in_words(name: str, error: type[Exception], words: str) -> None:
    failed = sqlite3.OperationalError("it failed")
    failed.sqlite_errorname = name  # type: ignore[misc]
    made = store_of_records._translated(Path("x.sqlite"), failed)
    assert type(made) is error and words in str(made)


# Plans


def started(folder: Path, plans: tuple[str, str]) -> list[str]:
    """What becomes of two jobs that begin in one folder at the same instant."""
    barrier, outcomes = threading.Barrier(2), ["", ""]

    def start(number: int) -> None:
        barrier.wait()
        try:
            Blocks(folder, plans[number]).get("key", lambda: {"a": np.zeros(2)})
            outcomes[number] = "works"
        except InputError as error:
            assert "holds blocks of plan" in str(error)
            outcomes[number] = "refused"

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_of_two_plans_in_one_folder_at_the_same_instant_one_is_refused(tmp_path: Path) -> None:
    for number in range(40):
        assert sorted(started(tmp_path / str(number), ("one", "two"))) == ["refused", "works"]
        assert started(tmp_path / f"same {number}", ("one", "one")) == ["works", "works"]


def test_a_plan_is_claimed_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise PermissionError("this file system has no links")

    monkeypatch.setattr(os, "link", none)
    Blocks(tmp_path / "x", "one")
    Blocks(tmp_path / "x", "one")
    with pytest.raises(InputError, match="holds blocks of plan one"):
        Blocks(tmp_path / "x", "two")
    assert list((tmp_path / "x").iterdir()) == [tmp_path / "x" / "plan.json"]


# Models and summaries


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 10**8}, {"hidden_size": 10**9}, {"num_hidden_layers": 10**6}, {"num_labels": 10**8},
        {"intermediate_size": 10**8}, {"head_dim": 10**9}, {"num_hidden_layers": 1_000}, {"num_attention_heads": 10**7},
        {"model_type": []}, {"num_hidden_layers": 10**200},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_promises_what_the_weights_lack_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tiny_folder(tmp_path)
    change_config(folder, **changes)
    before, begun = fuzz._status("VmHWM"), time.process_time()
    with pytest.raises(VesaliusError):
        vs.load(folder, sink=vs.silent)
    assert time.process_time() - begun < 10
    assert fuzz._status("VmHWM") - before < 60 * 2**20


@pytest.mark.parametrize("architectures", [[[]], [{}], {}, "a", 7])
def test_architectures_may_be_anything(tmp_path: Path, architectures: Any) -> None:
    """The tokenizers and the model of transformers do without it, or refuse it."""
    folder = tiny_folder(tmp_path)
    change_config(folder, architectures=architectures)
    try:
        assert vs.load(folder, sink=vs.silent).tokenizer is not None
    except FileFormatError as error:
        assert "config" in str(error) or "transformers cannot load it" in str(error)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "x" * 500, "a\0.safetensors", "model.bin"])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FileFormatError, match="which is no safetensors file beside it"):
        vs.load(folder, sink=vs.silent)


def test_a_summary_is_read_from_its_file(seeds: dict[str, list[Path]]) -> None:
    path = seeds["summary"][0] / "summary.json"
    assert schema.read(path) == json.loads(path.read_text())
    with pytest.raises(FileFormatError, match="cannot be read as a summary"):
        schema.read(path.parent)


def test_a_summary_with_a_number_of_any_size_is_judged(seeds: dict[str, list[Path]]) -> None:
    summary = json.loads((seeds["summary"][0] / "summary.json").read_text())
    for value in (10**400, 10**5000, -(10**200), 1e200):
        summary["timings"]["seconds"] = value
        with pytest.raises(InputError, match=r"timings\.seconds is"):
            schema.check(summary)


def test_archives_in_memory_have_no_door_of_their_own() -> None:
    """`read_npz` takes a path: the size of the file is what its promises are held against."""
    with pytest.raises((TypeError, AttributeError)):
        untrusted.read_npz(io.BytesIO())  # type: ignore[arg-type]
