"""An append-only chain of records in one SQLite file: who writes what when is no matter, nothing is ever changed.

Every record carries the hash of the one before it. Triggers refuse UPDATE, DELETE and out-of-order INSERT; whoever
drops the triggers is found by the hashes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError, InputError, LedgerError, TamperedError
from vesalius.jobs.untrusted import parse_json
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
_BEGIN = b"SQLite format 3\0"
_CAREFUL = ("PRAGMA trusted_schema = OFF", "PRAGMA cell_size_check = ON", "PRAGMA mmap_size = 0")
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_SHORT_READ", "SQLITE_FORMAT", "SQLITE_TOOBIG")
_NO_RIGHT = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM", "SQLITE_AUTH")
_STEP_SECONDS, _BYTES_PER_SECOND = 8.0, 5e6
"""How long one step may take, which no step on a sound file does."""
_MOST_VALUES, _MOST_CONTAINERS = 5_000_000, 1_000_000
"""Of one record: some hundred thousand examples."""


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
        """Raises FileFormatError for a payload that cannot be read."""
        return parse_json(self.payload, values=_MOST_VALUES, containers=_MOST_CONTAINERS)

    def check(self, previous: str) -> None:
        """Raises TamperedError unless the record is what was written, right after the record hashed `previous`."""
        name = f"record {self.seq} ({self.kind} {self.id[:12]})"
        if self.hash != _hash(self.seq, self.kind, self.id, self.payload, self.previous):
            raise TamperedError(f"{name} does not match its hash: its content was changed after it was written")
        if self.previous != previous:
            raise TamperedError(f"{name} does not follow the record before it: a record was removed or put in")


class Store:
    """The SQLite file. Raises FileFormatError for a file that is no ledger or is damaged, InputError for one that may
    not be opened, TamperedError for one with other tables than a ledger's.

    Before any record is read, the file's schema is: it holds our table and triggers and nothing else, so that reading
    runs no statement of a stranger's. A file that cannot be written is opened for reading.
    """

    def __init__(self, path: Path, create: bool = True) -> None:
        self.path = path
        self.read_only = False
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._deadline = 0.0
        _check_path(path, create)
        with self._errors():
            if _may_be_written(path):
                try:
                    self._use(sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None), create)
                    return
                except sqlite3.OperationalError as error:
                    # Even reading asks for a little space beside the file, and may be done without.
                    if create or not str(error.sqlite_errorname).startswith(
                        (*_NO_RIGHT, "SQLITE_FULL", "SQLITE_IOERR_SHM")
                    ):
                        raise
            self.read_only = True
            self._use(self._reading(), create=False)

    def close(self) -> None:
        self._connection.close()
        if self._copy is not None:
            self._copy.cleanup()

    def read(self, after: int = 0) -> list[Record]:
        """The records with a larger sequence number, in order, unchecked but for their types.

        Raises TamperedError for a row that no ledger has.
        """
        with self._errors():
            rows = self._connection.execute(
                "SELECT seq, kind, id, payload, previous, hash FROM records WHERE seq > ? ORDER BY seq", (after,)
            )
            return list(self._records(rows, after))

    def _records(self, rows: Iterable[tuple[Any, ...]], last: int) -> Iterator[Record]:
        for row in rows:
            # In a damaged file the same pages may be reached again and again.
            if row[0] <= last or not all(isinstance(value, str) for value in row[1:]):
                raise TamperedError(f"{self.path}: the row after record {last} is no record: it was changed or put in")
            last = row[0]
            yield Record(*row)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written together or not at all; other processes wait for their turn."""
        if self.read_only:
            raise InputError(
                f"{self.path} or its folder cannot be written, so it was opened for reading only; copy it to where you "
                "may write, and append there"
            )
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
        """Adds a record after `last`, inside a transaction. Raises InputError for what could not be read again."""
        seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
        payload = _kept(data, kind)
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
            for name in _SCHEMA:
                if not self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone():
                    raise self._altered(name)

    def _reading(self) -> sqlite3.Connection:
        """A connection that writes nothing beside the file."""
        at = self.path.absolute().as_uri()
        beside = [self.path.with_name(self.path.name + end) for end in ("-wal", "-journal")]
        unfinished = [path for path in beside if path.is_file() and path.stat().st_size]
        if not unfinished:
            # Without this SQLite wants to write a file beside one in WAL mode, even to read it.
            return sqlite3.connect(f"{at}?mode=ro&immutable=1", uri=True, isolation_level=None)
        # The last records are still in the file beside it, and only SQLite itself can put the two together.
        self._copy = tempfile.TemporaryDirectory()
        for path in (self.path, *unfinished):
            shutil.copyfile(path, Path(self._copy.name) / path.name)
        return sqlite3.connect(Path(self._copy.name) / self.path.name, isolation_level=None)

    def _use(self, connection: sqlite3.Connection, create: bool) -> None:
        self._connection = connection
        try:
            # A flipped byte may break the encoding; it must reach the hash check, not fail before.
            connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
            connection.set_progress_handler(lambda: time.monotonic() > self._deadline, 100_000)
            for setting in _CAREFUL:
                connection.execute(setting)
            self._prepare(create)
        except BaseException:
            self.close()
            raise

    def _prepare(self, create: bool) -> None:
        execute = self._connection.execute
        if execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            if self.read_only or not create:
                raise self._of_something_else()
            self._create()
        self._check_schema()
        found = [str(row[0]) for row in execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise FileFormatError(f"{self.path} is damaged or truncated ({found[0]}); restore it from a copy")
        if not self.read_only:
            _use_wal(self._connection)
            execute("PRAGMA synchronous = FULL")

    def _check_schema(self) -> None:
        """Raises TamperedError for a table that is not ours, or a view, an index or a trigger in its place."""
        found = self._connection.execute("SELECT name, tbl_name, sql FROM sqlite_master LIMIT ?", (len(_SCHEMA) + 1,))
        names = set()
        for name, table, text in found.fetchall():
            if name not in _SCHEMA:
                raise TamperedError(f"{self.path} holds {str(name)[:60]!r}, which no ledger has; nothing in it is read")
            if (table, text) != ("records", _SCHEMA[name]) or name in names:
                raise self._altered(name)
            names.add(name)
        # That a trigger is missing is for `check_integrity` to say: a forger's other traces are told first.
        if "records" not in names:
            raise self._altered("records")

    def _altered(self, name: str) -> TamperedError:
        return TamperedError(f"{self.path}: {name!r}, which keeps records unchanged, was altered or removed")

    def _of_something_else(self) -> FileFormatError:
        return FileFormatError(f"{self.path} is an SQLite file of something else, not a ledger; give another path")

    def _create(self) -> None:
        execute = self._connection.execute
        _use_wal(self._connection)
        with self.transaction():
            # Another process may have made the tables while this one waited.
            if execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID:
                return
            if execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                raise self._of_something_else()
            for statement in _SCHEMA.values():
                execute(statement)
            execute(f"PRAGMA application_id = {_APPLICATION_ID}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Errors of SQLite as ours, and a limit on the time that one step may take."""
        size = self.path.stat().st_size if self.path.exists() else 0
        self._deadline = time.monotonic() + _STEP_SECONDS + size / _BYTES_PER_SECOND
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise LedgerError(f"cannot use the ledger {self.path}: {error}") from error
        except sqlite3.IntegrityError as error:
            raise TamperedError(f"{self.path}: {error}; the file was changed while it was open") from error
        except UnicodeDecodeError as error:
            # SQLite quotes what it cannot understand, and Python cannot read the quotation.
            raise FileFormatError(f"{self.path} cannot be used as a ledger: it is damaged; restore a copy") from error
        except sqlite3.DatabaseError as error:
            raise _translated(self.path, error) from error


def _translated(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """What went wrong, in words: a lock, the disk, missing rights, or the file itself."""
    name = str(getattr(error, "sqlite_errorname", ""))
    if name.startswith("SQLITE_BUSY"):
        return LedgerError(f"{path} was locked by another process for more than {_WAIT_SECONDS:.0f} s; try again")
    if name.startswith("SQLITE_FULL"):
        return InputError(f"no space left to write {path}; nothing was recorded")
    if name.startswith(_NO_RIGHT):
        return InputError(f"{path} may not be opened ({error}): you have no right to it or to its folder")
    if name == "SQLITE_INTERRUPT":
        return FileFormatError(f"{path} cannot be used as a ledger: reading it does not end, so it is damaged")
    if name.startswith("SQLITE_IOERR") and name != "SQLITE_IOERR_SHORT_READ":
        return InputError(f"the disk failed while {path} was read or written ({error}); it may be full or broken")
    if name.startswith(_DAMAGED):
        return FileFormatError(f"{path} cannot be used as a ledger ({error}): not SQLite, or damaged; restore a copy")
    return LedgerError(f"{path}: {error}")


def _kept(data: Any, kind: str) -> str:
    """The payload of a record, which can be read again."""
    try:
        payload = canonical_json(data)
        parse_json(payload, values=_MOST_VALUES, containers=_MOST_CONTAINERS)
    except ValueError as error:
        # A whole number of thousands of digits cannot even be written.
        raise InputError(f"this {kind} cannot be kept: {error}") from error
    return payload


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
    if not path.exists():
        if not create:
            raise FileFormatError(f"there is no ledger at {path}")
        return
    if not path.is_file():
        raise FileFormatError(f"{path} is a pipe or a device; a ledger is a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"you have no right to read {path}")
    with path.open("rb") as stream:
        start = stream.read(len(_BEGIN))
    # SQLite takes an empty file for a database that is still to be made.
    if not start and not create:
        raise FileFormatError(f"{path} is empty, so it is no ledger; restore it from a copy")
    if start not in (b"", _BEGIN):
        raise FileFormatError(f"{path} cannot be used as a ledger (it does not begin as one): not SQLite")


def _may_be_written(path: Path) -> bool:
    """Whether the file, if it is there, and the folder, where SQLite keeps others beside it, may be written."""
    return (not path.exists() or os.access(path, os.W_OK)) and os.access(path.parent, os.W_OK)


def _hash(seq: int, kind: str, identity: str, payload: str, previous: str) -> str:
    return content_hash([seq, kind, identity, payload, previous])
