"""The door for bytes from outside: JSON, .npz and safetensors files that nobody here has written, or that have changed.

What a file promises is compared with its size before anything is made for it, so that a small file cannot ask for much
memory or time, and nothing in it is run. Whatever is wrong with a file is an `UnreadableError`. SQLite files have a
door of their own in `protocol.store`.
"""

from __future__ import annotations

from vesalius.jobs.untrusted.arrays import read_npz
from vesalius.jobs.untrusted.tensors import Stored, opened_safetensors, read_safetensors, safetensors_header
from vesalius.jobs.untrusted.text import LARGEST, check_depth, decode_at, parse_json, read_json, read_text
from vesalius.jobs.untrusted.unreadable import WRONG, UnreadableError, reason_of, understood

__all__ = [
    "LARGEST", "WRONG", "Stored", "UnreadableError", "check_depth", "decode_at", "opened_safetensors", "parse_json",
    "read_json", "read_npz", "read_safetensors", "read_text", "reason_of", "safetensors_header", "understood",
]  # fmt: skip
