"""`make fuzz`: damaged and hostile files for every reader of files from outside.

Each mutation is made from a number, so that `python fuzz.py --only NUMBER READER` does it again. A reader may read
what it is given or raise an error of this package; anything else is a finding: another exception, more than ten
seconds, more than 60 MB beyond the size of the files, a crash of the process. Exit code 1 when there are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fuzz_mutations import changed
from fuzz_readers import KINDS, Kind, seeds_of
from vesalius.errors import VesaliusError

SECONDS, BEYOND = 10.0, 60 * 2**20
# The machine is to survive a reader that takes all it can get; what counts as too much is measured.
HARD = 2 * 2**30


class Slow(BaseException):
    """Raised by the clock; no reader may catch it."""


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _ring(_number: int, _frame: FrameType | None) -> None:
    raise Slow


def _status(name: str) -> int:
    """A figure of this process in bytes, such as VmHWM, the most memory it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _frame_of(error: BaseException) -> str:
    """The line of the package at which it went wrong."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "vesalius/" in f.filename and "tests" not in f.filename
    ]
    last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename.rpartition('vesalius/')[2]}:{last.name}"


def attempt(kind: Kind, folder: Path) -> str:
    """What reading comes to: "read", "refused", or a finding."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    found = "read"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            kind.read(folder)
    except VesaliusError:
        found = "refused"
    except Slow as error:
        found = f"! more than {SECONDS:.0f} s in {_frame_of(error)}"
    except BaseException as error:
        found = f"! {type(error).__name__} in {_frame_of(error)}: {str(error)[:90]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    beyond = _status("VmHWM") - before - size
    return f"! {beyond / 2**20:.0f} MB beyond the files" if beyond > BEYOND and not found.startswith("!") else found


def one(kind: Kind, name: str, seeds: list[Path], scratch: Path, seed: int, number: int) -> str:
    """Mutation `number` of a reader."""
    generator = random.Random(f"{name} {seed} {number}")
    source = generator.choice(seeds)
    folder = scratch / source.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    file = generator.choice(kind.files(folder))
    others = [other for path in seeds for other in kind.files(path) if other.suffix == file.suffix]
    with contextlib.suppress(Exception):
        changed(file, others, generator)
        kind.repair(folder, file, generator)
    return f"{file.name}\t{attempt(kind, folder)}"


def worker(pipe: Connection, name: str, root: Path, seed: int, numbers: list[int]) -> None:
    """Does the mutations, and says of each what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + HARD, resource.RLIM_INFINITY))
    kind, seeds = KINDS[name], sorted(path for path in root.iterdir() if path.is_dir())
    for path in seeds:
        kind.read(path)
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers:
            pipe.send((number, ""))
            pipe.send((number, one(kind, name, seeds, Path(scratch), seed, number)))
    pipe.send(None)


def results(name: str, root: Path, seed: int, numbers: list[int], jobs: int) -> Iterator[tuple[int, str]]:
    """Number and outcome of every mutation, from `jobs` processes that are replaced when they die or hang."""
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[Any, list[int], float, int]] = {}

    def start(left: list[int]) -> None:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(theirs, name, root, seed, left), daemon=True)
        process.start()
        theirs.close()
        running[mine] = (process, left, time.monotonic(), -1)

    for job in range(jobs):
        if numbers[job::jobs]:
            start(numbers[job::jobs])
    while running:
        ready = wait(list(running), timeout=2.0)
        for pipe in list(running):
            process, left, since, current = running[pipe]
            message, died = None, False
            if pipe in ready:
                try:
                    message = pipe.recv()
                except EOFError:
                    died = True
                if message is None and not died:
                    del running[pipe]
                    process.join()
                    continue
            elif time.monotonic() - since > 3 * SECONDS:
                process.kill()
                died = True
            if died:
                process.join()
                del running[pipe]
                yield current, f"?\t! the process died or hung (exit code {process.exitcode})"
                if remaining := left[left.index(current) + 1 :] if current in left else []:
                    start(remaining)
            elif message is not None:
                number, outcome = message
                running[pipe] = (process, left, time.monotonic(), number)
                if outcome:
                    yield number, outcome


def fuzz(name: str, count: int, seed: int, jobs: int) -> tuple[Counter[str], Counter[str], dict[str, int]]:
    """Outcomes, findings by file and line, and the first number of each finding."""
    outcomes, findings, first = Counter[str](), Counter[str](), dict[str, int]()
    with tempfile.TemporaryDirectory() as root:
        list(seeds_of(KINDS[name], Path(root)))
        for number, line in results(name, Path(root), seed, list(range(count)), jobs):
            file, _, outcome = line.partition("\t")
            outcomes["findings" if outcome.startswith("!") else outcome] += 1
            if outcome.startswith("!"):
                key = f"{file}: {outcome[2:]}" if "MB" not in outcome else f"{file}: memory"
                findings[key] += 1
                first[key] = min(number, first.get(key, number))
    return outcomes, findings, first


def again(name: str, seed: int, number: int) -> None:
    """One mutation in this process, with its traceback; its folder is left to be looked at."""
    kind = KINDS[name]
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    list(seeds_of(kind, root / "seeds"))
    seeds = sorted(path for path in (root / "seeds").iterdir() if path.is_dir())
    say(one(kind, name, seeds, root / "made", seed, number), root / "made")
    for folder in (root / "made").iterdir():
        kind.read(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(KINDS)}; default all")
    parser.add_argument("--count", type=int, default=20_000, help="mutations of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, help="do this one mutation again, with its traceback")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # A ledger is forced to disk at every step; in memory that takes no time.
    if Path("/dev/shm").is_dir():
        tempfile.tempdir = "/dev/shm"
    found = 0
    for name in given.readers or KINDS:
        if given.only is not None:
            again(name, given.seed, given.only)
            continue
        begun = time.monotonic()
        outcomes, findings, first = fuzz(name, given.count, given.seed, given.jobs)
        say(f"{name}: {json.dumps(dict(outcomes))} in {time.monotonic() - begun:.0f} s")
        for key, times in findings.most_common(30):
            say(f"    {times:5} x {key}  (--only {first[key]} {name})")
        found += sum(findings.values())
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
