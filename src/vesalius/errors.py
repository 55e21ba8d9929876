"""Exceptions. Every message names what was given and what to do about it.

VesaliusError
├── InputError               something the user gave cannot be used (exit code 2 on the command line)
│   ├── UnknownNameError     a site, metric, check, mode ... that does not exist; lists the known ones
│   ├── UnknownArchitectureError
│   ├── TokenizerError       text and tokenizer do not fit (multi-token answer, wrong tokenizer)
│   ├── PairsError           clean and corrupted prompts that are not a pair
│   ├── FileFormatError      missing, corrupt, truncated or unsafe file
│   └── NotFiniteError       NaN or infinity in an input or a result
├── InterventionError        an intervention that did not, or cannot, happen
├── SelfCheckError           a fast path disagreed with the plain one
└── LedgerError
    ├── ProtocolError        a step the protocol of a claim forbids
    └── TamperedError        a stored record does not match its hash
"""

from __future__ import annotations

from collections.abc import Iterable


class VesaliusError(Exception):
    """Root of every exception raised on purpose."""


class InputError(VesaliusError):
    """Something the user gave cannot be used."""


class UnknownNameError(InputError):
    """A name that does not exist, with the list of those that do."""

    def __init__(self, kind: str, given: str, known: Iterable[str], hint: str = "") -> None:
        listed = ", ".join(sorted(known))
        super().__init__(f"unknown {kind} {given!r}; known: {listed}." + (f" {hint}" if hint else ""))


class UnknownArchitectureError(InputError):
    """No adapter for this model class."""


class TokenizerError(InputError):
    """Text and tokenizer do not fit."""


class PairsError(InputError):
    """Clean and corrupted prompts that are not a pair."""


class FileFormatError(InputError):
    """A missing, corrupt, truncated or unsafe file."""


class NotFiniteError(InputError):
    """NaN or infinity where a finite number is needed."""


class InterventionError(VesaliusError):
    """An intervention that did not, or cannot, happen."""


class SelfCheckError(VesaliusError):
    """A fast path disagreed with the plain one."""


class LedgerError(VesaliusError):
    """Something is wrong with the ledger or its use."""


class ProtocolError(LedgerError):
    """A step the protocol of a claim forbids."""


class TamperedError(LedgerError):
    """A stored record does not match its hash."""
