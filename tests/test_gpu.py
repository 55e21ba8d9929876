"""What `make gpu` runs on a real GPU; without one, the script itself on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "gpu.py"


def table(*options: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.gpu
def test_every_family_and_entry_point_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert "FAIL" not in table("--device", "cuda")


def test_the_script_for_gpus_holds_on_a_cpu() -> None:
    printed = table("--device", "cpu", "--only", "qwen3_moe")
    assert all(f"ok   qwen3_moe: {check}" in printed for check in ("capture", "edit", "sweep"))
