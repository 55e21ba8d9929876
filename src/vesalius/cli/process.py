"""How the process of a command uses memory and threads. A library must not decide that; a program may."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt, and its largest threshold.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 32 << 20
_KEPT = 512 << 20


def settle() -> None:
    """To be called first, before PyTorch is imported.

    Freed memory is kept for the next run: glibc would return large blocks to the system and ask for them again page by
    page, which costs an edited run a quarter of its time. Waiting threads sleep instead of spinning, which costs little
    on an idle machine and saves half the time on a busy one. Environment variables that are already set win.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
