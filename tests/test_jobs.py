"""Laws of interruptible work: files are whole or absent, blocks are never wrong, events tell the truth."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import Blocks, Estimate, Event, silent, track, write_atomic


class Counted:
    """A computation that counts how often it ran."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.runs = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.runs += 1
        return self.arrays


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "räsult.json"
    assert write_atomic(target, "åäö") == target
    write_atomic(target, b"\x00second")
    assert target.read_bytes() == b"\x00second"
    assert list(target.parent.iterdir()) == [target]


def test_an_atomic_file_has_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert write_atomic(tmp_path / "atomic", "x").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file_and_names_path_and_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = write_atomic(tmp_path / "kept.txt", "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(InputError, match=r"no space to write .*kept\.txt \(3 B\): .* free in"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "never", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileFormatError, match=r"cannot write .*file/below"):
        write_atomic(tmp_path / "file" / "below", "x")
    with pytest.raises(FileFormatError, match="cannot write"):
        write_atomic(tmp_path, "a folder is there")


def test_a_block_is_computed_once_and_read_back_bit_by_bit(tmp_path: Path) -> None:
    arrays = {
        "scores": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "scalar": np.array(2.5),
        "empty": np.zeros((0, 3)),
        "names": np.array(["a", "ö"]),
        "strided": np.arange(10)[::2],
    }
    compute = Counted(**arrays)
    Blocks(tmp_path, "plan").get("layer 3/head 1", compute)
    again = Blocks(tmp_path, "plan").get("layer 3/head 1", compute)
    assert compute.runs == 1
    assert again.keys() == arrays.keys()
    for name, array in arrays.items():
        assert again[name].dtype == array.dtype and again[name].shape == array.shape
        np.testing.assert_array_equal(again[name], array)


def test_keys_that_look_alike_have_blocks_of_their_own(tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, "plan")
    keys = ["a/b", "a_b", "a b", "x" * 300, "x" * 301, ""]
    for value, key in enumerate(keys):
        blocks.get(key, Counted(v=np.array(value)))
    assert [int(blocks.get(key, Counted())["v"]) for key in keys] == list(range(6))
    assert "a/b" in blocks and "other" not in blocks


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text", "swap"])
def test_a_damaged_block_is_announced_and_computed_again(tmp_path: Path, damage: str) -> None:
    events: list[Event] = []
    blocks = Blocks(tmp_path, "plan", events.append)
    compute = Counted(v=np.arange(100.0))
    blocks.get("key", compute)
    blocks.get("other", Counted(v=np.zeros(100)))
    path = blocks.path("key")
    content = bytearray(path.read_bytes())
    middle = content.find(np.arange(100.0).tobytes()[400:480])
    content[middle] ^= 1
    damaged = {
        "truncate": bytes(content[: len(content) // 2]),
        "flip": bytes(content),
        "empty": b"",
        "text": b"not a block",
        "swap": blocks.path("other").read_bytes(),
    }
    path.write_bytes(damaged[damage])
    np.testing.assert_array_equal(blocks.get("key", compute)["v"], np.arange(100.0))
    assert compute.runs == 2
    assert [event.kind for event in events] == ["note"]
    assert "block 'key' is damaged" in events[0].message
    blocks.get("key", compute)
    assert compute.runs == 2  # the repaired block is good


def test_a_folder_of_another_plan_is_refused_naming_both(tmp_path: Path) -> None:
    Blocks(tmp_path, "aaa111")
    with pytest.raises(InputError, match=r"plan aaa111, but this job has plan bbb222"):
        Blocks(tmp_path, "bbb222")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(FileFormatError, match="is not a plan of blocks"):
        Blocks(tmp_path, "aaa111")


def test_a_folder_of_other_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=np.zeros(2))
    with pytest.raises(InputError, match=r"holds \.npz files but no plan\.json"):
        Blocks(tmp_path, "plan")


def test_without_a_folder_nothing_is_kept() -> None:
    blocks, compute = Blocks(None, "plan"), Counted(v=np.ones(2))
    blocks.get("key", compute)
    np.testing.assert_array_equal(blocks.get("key", compute)["v"], np.ones(2))
    assert compute.runs == 2 and "key" not in blocks
    with pytest.raises(InputError, match="give Blocks a folder"):
        blocks.path("key")


@pytest.mark.parametrize("arrays", [{"v": np.array([{}])}, {"file": np.zeros(1)}, {"__checksum__": np.zeros(1)}])
def test_what_cannot_be_stored_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(InputError, match="cannot be stored"):
        Blocks(tmp_path, "plan").get("key", Counted(**arrays))


def test_a_failed_computation_stores_nothing(tmp_path: Path) -> None:
    def fails() -> dict[str, np.ndarray]:
        raise RuntimeError("out of luck")

    blocks = Blocks(tmp_path, "plan")
    with pytest.raises(RuntimeError, match="out of luck"):
        blocks.get("key", fails)
    assert "key" not in blocks


def test_tracking_reports_start_each_step_and_end() -> None:
    events: list[Event] = []
    assert list(track("ab", "reading", sink=events.append)) == ["a", "b"]
    assert [(e.kind, e.done, e.total) for e in events] == [
        ("start", 0, 2),
        ("advance", 1, 2),
        ("advance", 2, 2),
        ("end", 2, 2),
    ]
    assert list(track(iter("ab"), "reading", sink=silent)) == ["a", "b"]


def test_tracking_ends_also_when_the_work_fails() -> None:
    events: list[Event] = []
    with pytest.raises(ZeroDivisionError):
        for item in (tracked := track([1, 0], "dividing", sink=events.append)):
            1 / item
    tracked.close()  # type: ignore[attr-defined]
    assert (events[-1].kind, events[-1].done, events[-1].message) == ("end", 1, "stopped after 1 of 2")


def test_an_unknown_kind_of_event_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown kind of event 'begin'; known: advance, end, note, start"):
        Event("begin", "task")


def test_estimates_speak_in_one_line() -> None:
    full = Estimate(700, forwards=8640, memory_bytes=2_100_000_000, disk_bytes=5_000_000)
    assert full.describe() == "about 12 min, 8,640 forward passes, 2.1 GB of memory, 5.0 MB on disk"
    assert Estimate(12).describe() == "about 12 s"
    assert Estimate(9000, memory_bytes=512).describe() == "about 2.5 h, 512 B of memory"


def test_the_ledger_and_what_it_needs_import_without_torch() -> None:
    code = (
        "import sys, vesalius.protocol.ledger, vesalius.jobs, vesalius.stats\n"
        "print([name for name in ('torch', 'scipy.stats') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | path_to_src())
    assert done.stdout.strip() == "[]", done.stderr


def path_to_src() -> dict[str, str]:
    import vesalius

    return {"PYTHONPATH": str(Path(next(iter(vesalius.__path__))).parent)}
