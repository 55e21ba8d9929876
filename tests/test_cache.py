from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vesalius.errors import FileFormatError, InputError
from vesalius.jobs import Event
from vesalius.jobs.cache import MANIFEST, cache_root, file_sha256, flaw, made_folder


class Filler:
    """Writes two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, out: Path) -> None:
        self.times += 1
        (out / "a.bin").write_bytes(b"alpha" * 1000)
        (out / "b.txt").write_text("beta")


def make(folder: Path, fill: Callable[[Path], None], events: list[Event] | None = None) -> Path:
    return made_folder(folder, fill, origin="test", sink=(events if events is not None else []).append)


def test_folder_is_made_once_and_then_only_checked(tmp_path: Path) -> None:
    fill, events = Filler(), []
    for _ in range(3):
        assert make(tmp_path / "deep" / "key", fill, events) == tmp_path / "deep" / "key"
    assert fill.times == 1
    assert events == []
    assert not flaw(tmp_path / "deep" / "key")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [".lock", "key"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: flip(f / "a.bin"), "a.bin changed"),
        (lambda f: (f / "a.bin").write_bytes(b"short"), "a.bin changed"),
        (lambda f: (f / "b.txt").unlink(), "added or removed"),
        (lambda f: (f / "extra.json").write_text("{}"), "added or removed"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest is missing or unusable"),
        (lambda f: (f / MANIFEST).write_text('{"files": []}'), "added or removed"),
        (lambda f: (f / MANIFEST).unlink(), "manifest is missing or unusable"),
    ],
)
def test_harmed_folder_is_made_again_with_a_note(tmp_path: Path, harm: Callable[[Path], object], words: str) -> None:
    fill, events, folder = Filler(), [], tmp_path / "key"
    make(folder, fill)
    harm(folder)
    assert words in flaw(folder)
    make(folder, fill, events)
    assert fill.times == 2
    assert [event.kind for event in events] == ["note"]
    assert words in events[0].message
    assert str(folder) in events[0].message
    assert not flaw(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "key"]


def test_hidden_file_of_a_file_browser_does_no_harm(tmp_path: Path) -> None:
    fill = Filler()
    (make(tmp_path / "key", fill) / ".DS_Store").write_bytes(b"x")
    make(tmp_path / "key", fill)
    assert fill.times == 1


def test_a_file_in_the_way_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("not a folder")
    assert not flaw(make(tmp_path / "key", Filler()))


def test_failing_fill_leaves_nothing(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        (out / "half").write_text("half")
        raise FileFormatError("bad input")

    with pytest.raises(FileFormatError, match="bad input"):
        make(tmp_path / "key", fill)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_keyboard_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        (out / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "key", fill)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write the cache at .*file.*VESALIUS_CACHE"):
        make(tmp_path / "file" / "key", Filler())


def test_readable_folder_is_used_without_writing_anything(tmp_path: Path) -> None:
    fill, folder = Filler(), tmp_path / "key"
    make(folder, fill)
    (tmp_path / ".lock").unlink()
    make(folder, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


SLOW = """
import sys, time
from pathlib import Path
from vesalius.jobs.cache import made_folder
def fill(out):
    (out / "a.bin").write_bytes(b"alpha" * 1000)
    Path(sys.argv[2]).open("a").write("filling\\n")
    time.sleep(float(sys.argv[3]))
    (out / "b.txt").write_text("beta")
made_folder(Path(sys.argv[1]), fill, origin="test", sink=lambda e: print(e.message))
"""


def start(folder: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SLOW, str(folder), str(log), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file locks of POSIX")
def test_two_processes_at_once_make_it_once_and_both_end_well(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "key", tmp_path / "log"
    first = start(folder, log, 3.0)
    wait_for(log)
    second = start(folder, log, 0.0)
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert log.read_text().count("filling") == 1
    assert "waiting for another process" in outputs[1][0]
    assert not flaw(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_killed_in_the_middle_is_never_taken_for_good_and_is_cleaned_up(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "key", tmp_path / "log"
    process = start(folder, log, 60.0)
    wait_for(log)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    left = [path.name for path in folder.parent.iterdir()]
    assert not folder.exists()
    assert any(name.startswith("key.tmp-") for name in left)  # it was in the middle
    fill = Filler()
    make(folder.parent / "other", fill)  # whatever is made next cleans up
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "other"]
    make(folder, fill)
    assert fill.times == 2


def test_without_locks_the_second_to_finish_takes_what_is_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vesalius.jobs.cache._locked", lambda *_: False)
    inner, folder = Filler(), tmp_path / "key"

    def fill(out: Path) -> None:
        make(folder, inner)  # another process is faster
        inner(out)

    make(folder, fill)
    assert not flaw(folder)
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_root_follows_argument_then_variables_then_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VESALIUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "vesalius"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/vesalius")
    monkeypatch.setenv("VESALIUS_CACHE", "~/own")
    assert cache_root() == tmp_path / "own"
    assert cache_root(Path("/given")) == Path("/given")


def test_file_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
