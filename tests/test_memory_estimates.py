"""What a command says it will need is what it takes: within a quarter of the peak, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.demo_model]
UNITS = {"MB": 1e6, "GB": 1e9}
SITE = ["--site", "layers.15.resid_post"]
SMALL = ["--tokens", "30000", "--steps", "30"]
COMMANDS = {
    "harvest": ["harvest", "stdlib", *SITE, "--tokens", "60000", "--out", "acts"],
    "train": ["train", *SITE, *SMALL, "--latents", "8192", "-k", "32", "--out", "sae"],
    "study": ["study", "ioi", "--n", "16", "--random-sets", "9", "--out", "ioi"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_the_memory_that_it_announced(name: str, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [Path(sys.executable).with_name("vesalius"), *COMMANDS[name]],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert running.stderr is not None
    said = running.stderr.read().decode()
    _, status, usage = os.wait4(running.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said
    announced = [float(size) * UNITS[unit] for size, unit in re.findall(r"([\d.]+) (MB|GB) of memory", said)]
    # The most of what was announced, step by step.
    assert max(announced) == pytest.approx(usage.ru_maxrss * 1024, rel=0.25), said
