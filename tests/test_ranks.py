"""Two processes that share every batch end with the weights of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from test_train import KINDS, X, config_of
from vesalius.dictionaries import Dictionary, load, train
from vesalius.dictionaries.training.run import Processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of all kinds, trained by two processes."""
    out = tmp_path_factory.mktemp("ranks")
    script = str(Path(__file__).parent / "two_processes.py")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, script, str(out), ",".join(KINDS)], env={**os.environ, **common, "RANK": rank}
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_weights_of_one(trained: Path, kind: str) -> None:
    two, one = load(trained / kind), train(X, config_of(kind, dead_after=100))
    assert isinstance(two, Dictionary)
    assert isinstance(one, Dictionary)
    assert max(float((t - two.tensors[name]).abs().max()) for name, t in one.tensors.items()) < 1e-5
    assert one.history is not None
    assert two.history is not None
    for name in ("loss", "fvu", "l0", "dead", "lr"):
        assert two.history[name] == pytest.approx(one.history[name], rel=1e-4, abs=1e-9)


def test_shares_cover_every_row_once() -> None:
    rows = [row for rank in range(3) for row in range(10)[Processes(rank, 3).share(10)]]
    assert rows == list(range(10))


def test_alone_the_kth_largest_is_that_of_the_values() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    assert [float(Processes().kth_largest(values, k)) for k in (1, 2, 3, 9)] == [3.0, 2.0, 1.0, 1.0]
    assert float(Processes().kth_largest(values[:0], 2)) == -float("inf")
