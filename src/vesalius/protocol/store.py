"""An append-only chain of records in one SQLite file: who writes what when is no matter, nothing is ever changed.

Every record carries the hash of the one before it. Triggers refuse UPDATE, DELETE and out-of-order INSERT; whoever
drops the triggers is found by the hashes.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError, InputError, LedgerError, TamperedError
from vesalius.protocol import canonical_json, content_hash

GENESIS = "0" * 64
_APPLICATION_ID = 0x56455341
_WAIT_SECONDS = 60.0
_SCHEMA = {
    "records": "CREATE TABLE records (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL, "
    "payload TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)",
    "records_no_update": "CREATE TRIGGER records_no_update BEFORE UPDATE ON records BEGIN "
    "SELECT RAISE(ABORT, 'the ledger is append-only: a record cannot be changed'); END",
    "records_no_delete": "CREATE TRIGGER records_no_delete BEFORE DELETE ON records BEGIN "
    "SELECT RAISE(ABORT, 'the ledger is append-only: a record cannot be deleted'); END",
    # INSERT OR REPLACE deletes without firing delete triggers; this one stops it.
    "records_in_order": "CREATE TRIGGER records_in_order BEFORE INSERT ON records "
    "WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM records) BEGIN "
    "SELECT RAISE(ABORT, 'the ledger is append-only: a record can only follow the last'); END",
}
_TRUNCATED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_PERM")


@dataclass(frozen=True)
class Record:
    """One link of the chain; `payload` is canonical JSON, `hash` covers everything else."""

    seq: int
    kind: str
    id: str
    payload: str
    previous: str
    hash: str

    @property
    def data(self) -> Any:
        return json.loads(self.payload)

    def check(self, previous: str) -> None:
        """Raises TamperedError unless the record is what was written, right after the record hashed `previous`."""
        name = f"record {self.seq} ({self.kind} {self.id[:12]})"
        if self.hash != _hash(self.seq, self.kind, self.id, self.payload, self.previous):
            raise TamperedError(f"{name} does not match its hash: its content was changed after it was written")
        if self.previous != previous:
            raise TamperedError(f"{name} does not follow the record before it: a record was removed or put in")


class Store:
    """The SQLite file. Raises FileFormatError for a file that is no ledger, is damaged or cannot be opened."""

    def __init__(self, path: Path, create: bool = True) -> None:
        self.path = path
        _check_path(path, create)
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)
            # A flipped byte may break the encoding; it must reach the hash check, not fail before.
            self._connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        self._connection.close()

    def read(self, after: int = 0) -> list[Record]:
        """The records with a larger sequence number, in order, unchecked."""
        with self._errors():
            rows = self._connection.execute(
                "SELECT seq, kind, id, payload, previous, hash FROM records WHERE seq > ? ORDER BY seq", (after,)
            )
            return [Record(*row) for row in rows]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together or not at all; other processes wait for their turn."""
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def append(self, kind: str, identity: str, data: Any, last: Record | None) -> Record:
        """Adds a record after `last`, inside a transaction."""
        seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
        payload = canonical_json(data)
        record = Record(seq, kind, identity, payload, previous, _hash(seq, kind, identity, payload, previous))
        self._connection.execute(
            "INSERT INTO records (seq, kind, id, payload, previous, hash) VALUES (?, ?, ?, ?, ?, ?)",
            (seq, kind, identity, payload, previous, record.hash),
        )
        return record

    def check_integrity(self) -> None:
        """Raises TamperedError when SQLite finds the file damaged, or the table or a trigger was altered."""
        with self._errors():
            found = [str(row[0]) for row in self._connection.execute("PRAGMA integrity_check(3)")]
            if found != ["ok"]:
                raise TamperedError(f"{self.path} is damaged: {'; '.join(found)}")
            for name, text in _SCHEMA.items():
                row = self._connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
                if row is None or row[0] != text:
                    raise TamperedError(f"{self.path}: {name!r}, which keeps records unchanged, was altered or removed")

    def _prepare(self) -> None:
        execute = self._connection.execute
        if execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            self._create()
        found = [str(row[0]) for row in execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise FileFormatError(f"{self.path} is damaged or truncated ({found[0]}); restore it from a copy")
        _use_wal(self._connection)
        execute("PRAGMA synchronous = FULL")

    def _create(self) -> None:
        execute = self._connection.execute
        _use_wal(self._connection)
        with self.transaction():
            # Another process may have made the tables while this one waited.
            if execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
                return
            if execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise FileFormatError(
                    f"{self.path} is an SQLite file of something else, not a ledger; give another path"
                )
            for statement in _SCHEMA.values():
                execute(statement)
            execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise LedgerError(f"cannot use the ledger {self.path}: {error}") from error
        except sqlite3.IntegrityError as error:
            raise TamperedError(f"{self.path}: {error}; the file was changed while it was open") from error
        except sqlite3.DatabaseError as error:
            raise _translated(self.path, error) from error


def _translated(path: Path, error: sqlite3.DatabaseError) -> Exception:
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_BUSY"):
        return LedgerError(f"{path} was locked by another process for more than {_WAIT_SECONDS:.0f} s; try again")
    if name.startswith("SQLITE_FULL"):
        return InputError(f"no space left to write {path}; nothing was recorded")
    if name.startswith(_TRUNCATED):
        return FileFormatError(f"{path} cannot be used as a ledger ({error}): not SQLite, damaged, or not writable")
    return LedgerError(f"{path}: {error}")


def _use_wal(connection: sqlite3.Connection) -> None:
    # SQLite does not wait when two processes change the journal mode at once, so we do.
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _check_path(path: Path, create: bool) -> None:
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder; a ledger is one file, such as {path / 'ledger.sqlite'}")
    if not path.parent.is_dir():
        raise FileFormatError(f"the folder {path.parent} of the ledger does not exist; create it first")
    if not create and not path.exists():
        raise FileFormatError(f"there is no ledger at {path}")


def _hash(seq: int, kind: str, identity: str, payload: str, previous: str) -> str:
    return content_hash([seq, kind, identity, payload, previous])
