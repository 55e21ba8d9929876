"""Random streams: one for every purpose, from a key of plain values."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*key: object) -> torch.Generator:
    """A generator of its own for every key (task, split, seed, purpose): the same key, the same draws."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
