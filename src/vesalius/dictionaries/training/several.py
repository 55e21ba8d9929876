"""Several trainings on one store, some at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vesalius import errors
from vesalius.data import ActivationStore, as_source
from vesalius.dictionaries import folder
from vesalius.dictionaries.coder import SparseCoder
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.training.loop import train
from vesalius.errors import InputError, VesaliusError
from vesalius.jobs import Event, Sink
from vesalius.jobs.progress import shown
from vesalius.protocol.canonical import plain

_CHILD = "from vesalius.dictionaries.training.several import child; child()"


def train_all(
    data: Any,
    configs: Mapping[str, TrainConfig] | Iterable[TrainConfig],
    out: str | Path,
    *,
    jobs: int = 1,
    device: torch.device | str = "cpu",
    tensorboard: bool = False,
    sink: Sink | None = None,
) -> dict[str, SparseCoder]:
    """Train a dictionary per config on the same activations, each in a folder of its own in `out`, by name.

    configs: by name, or unnamed: then names say in what they differ (`k16-seed1`). jobs: processes at a time, which
    share the cores; more than one needs a store, which each opens for itself. The weights do not depend on it.

    What was finished or begun is gone on with, as in `train`. When one fails the others are finished all the same, and
    then its error is raised. Raises as `train`, and InputError for no or equal configs, jobs under 1, and for several
    jobs without a store.
    """
    named = dict(configs) if isinstance(configs, Mapping) else names(list(configs))
    if not named or jobs < 1:
        raise InputError(f"at least one config and one job are needed; got {len(named)} configs and jobs={jobs}")
    source = as_source(data)
    if jobs > 1 and not isinstance(source, ActivationStore):
        raise InputError(f"several jobs train from a store, which each can open; got a {type(source).__name__}: jobs=1")
    where = Path(out).expanduser()
    with shown(sink) as progress:
        if not isinstance(source, ActivationStore) or jobs == 1:
            options: dict[str, Any] = {"device": device, "tensorboard": tensorboard}
            return {
                name: train(data, config, where / name, **options, sink=_named(progress, name))
                for name, config in named.items()
            }
        wanted = [_Job(name, source, config, where / name, str(device), tensorboard) for name, config in named.items()]
        _run(wanted, jobs, progress)
    return {name: folder.read(where / name) for name in named}


def names(configs: Sequence[TrainConfig]) -> dict[str, TrainConfig]:
    """Configs by what they differ in, as in "k16-seed1". Raises InputError when two are the same."""
    plains = [plain(config) for config in configs]
    differing = [name for name in (plains[0] if plains else {}) if len({str(one[name]) for one in plains}) > 1]
    found = {
        "-".join(_part(name, one[name]) for name in differing) or "dictionary": config
        for one, config in zip(plains, configs, strict=True)
    }
    if len(found) < len(configs):
        raise InputError(f"{len(configs)} configs were given, and only {len(found)} differ; give each once")
    return found


def _part(name: str, value: Any) -> str:
    """The field and its value; text says itself what it is. Characters that folders do not have become dashes."""
    text = str(value) if isinstance(value, str) else f"{name}{value}"
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)


def _named(sink: Sink, name: str) -> Sink:
    """Events of one training, which say which."""

    def renamed(event: Event) -> None:
        message = f"{name}: {event.message}" if event.kind == "note" else event.message
        sink(replace(event, task=f"{event.task} {name}", message=message))

    return renamed


@dataclass(frozen=True, eq=False)
class _Job:
    """One training, for another process."""

    name: str
    source: ActivationStore
    config: TrainConfig
    out: Path
    device: str
    tensorboard: bool

    def to_json(self) -> dict[str, Any]:
        source = self.source
        return {
            "store": str(source.folder),
            "sites": [str(site) for site in source.sites],
            "pool_rows": source.pool_rows,
            "dtype": str(source.dtype).removeprefix("torch."),
            "rows": [source.rows.start, source.rows.stop],
            "config": plain(self.config),
            "out": str(self.out),
            "device": self.device,
            "tensorboard": self.tensorboard,
        }


@dataclass(eq=False)
class _Running:
    """The processes at work, and a lock for the threads that pass on their events."""

    sink: Sink
    threads: int
    stopped: bool = False
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> subprocess.Popen[str] | None:
        """A process, unless all are to stop. Ctrl-C reaches it through `stop` alone, once."""
        # Whatever this process can import the other can too, such as a package that is not installed.
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.threads)}
        with self.lock:
            if self.stopped:
                return None
            process = subprocess.Popen(  # noqa: S603 - this interpreter, and a constant program
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                start_new_session=True,
            )
            self.processes.add(process)
        return process

    def pass_on(self, name: str, event: Event) -> None:
        """An event of one of the processes."""
        with self.lock:
            _named(self.sink, name)(event)

    def stop(self) -> None:
        """Ask all to write a checkpoint and end."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)


def _run(wanted: Sequence[_Job], jobs: int, sink: Sink) -> None:
    running = _Running(sink, max(1, torch.get_num_threads() // jobs))
    with ThreadPoolExecutor(jobs, "train") as pool:
        futures = [pool.submit(_in_process, job, running) for job in wanted]
        try:
            # Waited for one after the other, so that an error of one does not keep the others from finishing.
            failed = [error for future in futures if (error := future.exception()) is not None]
        except KeyboardInterrupt:
            running.stop()
            raise
    if failed:
        raise failed[0]


def _in_process(job: _Job, running: _Running) -> None:
    """Train in another process and pass on its events. Raises what it raised."""
    process = running.start()
    if process is None:
        return
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(job.to_json()))
    process.stdin.close()
    failure: VesaliusError | None = None
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            failure = _error(message["error"], f"{job.name}: {message['message']}")
        else:
            running.pass_on(job.name, Event(**message))
    process.stdout.close()
    code = process.wait()
    if failure is not None:
        raise failure
    # Killed by the system, for example for want of memory: then it could not say so itself.
    if code and not running.stopped:
        raise InputError(f"{job.name}: its process ended with code {code}; the same call goes on from its checkpoint")


def _error(kind: str, message: str) -> VesaliusError:
    """The error of another process, by the name of its class; some classes word their own messages."""
    known = getattr(errors, kind)
    # Some classes word their own messages from arguments that are not known here.
    found: VesaliusError = known.__new__(known, message)
    return found


def child() -> None:
    """The other process: reads what to train, writes events, one JSON object a line."""
    job = json.load(sys.stdin)
    # Standard output carries the events; whatever else prints goes to standard error.
    out, sys.stdout = sys.stdout, sys.stderr

    def write(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        store = ActivationStore.open(
            job["store"], sites=job["sites"], dtype=getattr(torch, job["dtype"]), pool_rows=job["pool_rows"]
        )
        part = ActivationStore(
            store.folder, store.manifest, store.sites, store.dtype, store.pool_rows, range(*job["rows"])
        )
        options = {"device": job["device"], "tensorboard": job["tensorboard"]}
        train(part, TrainConfig(**job["config"]), job["out"], **options, sink=lambda event: write(vars(event)))
    except VesaliusError as error:
        write({"error": type(error).__name__, "message": str(error)})
    except KeyboardInterrupt:
        raise SystemExit(130) from None
