"""Texts: documents to run a model on, from files, a folder, the standard library's documentation, or any iterable.

Documents come in a fixed order and are numbered from 0, empty ones and rows that hold null too, which give nothing and
are counted. Nothing is left out or changed.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.jobs.cache import file_sha256
from vesalius.jobs.untrusted import parse_json

Document = str | Sequence[int]
"""Text, or token ids for a model without tokenizer."""

NULL: Document = ()
"""In the place of a row whose text is null."""
NULLS = ("skip", "error")
STDLIB = "stdlib"
SUFFIXES = (".txt", ".jsonl", ".parquet")
# Not documentation, or large and machine-made.
_NOT_READ = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "site-packages"}


@dataclass(frozen=True, eq=False)
class Texts:
    """Documents, and what they are.

    read: gives the documents from the first one on, at every call if `rereadable`. description: what a store's manifest
    says of them, with sha256 where that is known of all that will be read. size: characters, about; None when not
    known.
    """

    read: Callable[[], Iterator[Document]]
    description: Mapping[str, Any]
    size: int | None = None
    rereadable: bool = True
    left_out: tuple[str, ...] = ()
    """Names of files that are no texts."""


def texts_from(given: Any, column: str = "text", nulls: str = "skip") -> Texts:
    """Texts from what a user gives.

    given: "stdlib" (the documentation in Python's standard library); a .txt (one document), .jsonl or .parquet file
    (one document a row, in `column`), or a folder of such; Tokens or a tokenizer's output; or any iterable of texts,
    of token ids, or of rows with `column`, such as a dataset of the `datasets` package, streaming or not. A row holds
    text or token ids. nulls: rows that hold null are left out and counted (`skip`), or are an `error`.

    Raises InputError or FileFormatError for what cannot be read; some of it only when the documents are read.
    """
    if isinstance(given, Texts):
        return given
    if nulls not in NULLS:
        raise UnknownNameError("way with rows that hold null", nulls, NULLS)
    cells = _Cells(column, nulls == "error")
    if isinstance(given, str | Path):
        return _stdlib() if given == STDLIB else _from_path(Path(given).expanduser(), cells)
    if isinstance(given, Tokens):
        given = [row[real].tolist() for row, real in zip(given.ids, given.real, strict=True)]
    if isinstance(given, Mapping):
        if "input_ids" in given:
            return texts_from(Tokens.from_encoding(given), column, nulls)
        listed = ", ".join(map(str, given))
        raise InputError(f"texts must be one list or data set; give one entry of this {type(given).__name__}: {listed}")
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InputError(
            f"texts must be {STDLIB!r}, a path, or an iterable of texts such as a list; got {type(given).__name__}"
        )
    if isinstance(given, list | tuple) and all(isinstance(item, str) for item in given):
        return _listed(given, {"kind": "texts"})
    return _from_iterable(given, cells)


@dataclass(frozen=True)
class _Cells:
    """Which column of a row is its document, and whether null is an error."""

    column: str
    strict: bool

    def of(self, row: Mapping[str, Any], where: str) -> Document:
        """The document of a row. Raises InputError naming where it stands."""
        if self.column not in row:
            hint = "Name the column that holds the text."
            raise UnknownNameError(f"column ({where})", self.column, map(str, row), hint)
        return self.document(row[self.column], where, f"{self.column} ")

    def document(self, value: Any, where: str, name: str = "") -> Document:
        """A value as a document: text, token ids, or null."""
        if isinstance(value, str):
            return value
        if value is None and not self.strict:
            return NULL
        # Lists from files, arrays and tensors from data sets.
        ids = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(ids, list | tuple) and all(type(number) is int and number >= 0 for number in ids):
            return list(ids)
        what = "null, which nulls='skip' (--nulls skip) leaves out" if value is None else type(value).__name__
        raise InputError(f"{where}: {name}must be text or token ids, got {what}")


def _listed(documents: Sequence[str], description: Mapping[str, Any]) -> Texts:
    digest = hashlib.sha256()
    for text in documents:
        # Half a surrogate pair is found later, with the number of its text; the hash must not fail before.
        raw = text.encode("utf-8", "surrogatepass")
        # With the length, so that texts divided at other places have another hash.
        digest.update(len(raw).to_bytes(8, "little") + raw)
    known = {**description, "texts": len(documents), "sha256": digest.hexdigest()}
    return Texts(lambda: iter(documents), known, sum(map(len, documents)))


def _from_iterable(given: Iterable[Any], cells: _Cells) -> Texts:
    description = {"kind": "iterable", "type": f"{type(given).__module__}.{type(given).__qualname__}"}

    def read() -> Iterator[Document]:
        return (_item(item, number, cells) for number, item in enumerate(given))

    return Texts(read, description, rereadable=not isinstance(given, Iterator))


def _item(item: Any, number: int, cells: _Cells) -> Document:
    """One document of an iterable: text, token ids, or a row of a table."""
    if isinstance(item, Mapping):
        return cells.of(item, f"row {number}")
    if item is None:
        return cells.document(item, f"text {number}")
    if isinstance(item, str) or (hasattr(item, "__len__") and not isinstance(item, bytes)):
        return item
    raise InputError(
        f"text {number} is a {type(item).__name__}; texts are str, token ids, or rows with {cells.column!r}"
    )


# --- the standard library's documentation


def _stdlib() -> Texts:
    return _listed(_documentation(), {"kind": STDLIB, "python": sys.version.split()[0]})


@cache
def _documentation() -> tuple[str, ...]:
    """The language reference's topics, then the docstrings of each module, read without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = (path for path in sorted(root.rglob("*.py")) if _is_documented(path.relative_to(root)))
    return (*topics.topics.values(), *filter(None, map(_docstrings, modules)))


def _is_documented(path: Path) -> bool:
    return path.parts[0].removesuffix(".py") in sys.stdlib_module_names and _NOT_READ.isdisjoint(path.parts)


def _docstrings(path: Path) -> str:
    """All docstrings of a module, in the order in which they stand; empty when it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree) if isinstance(node, owners)]
    found.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, map(ast.get_docstring, found)))


# --- files


def _from_path(path: Path, cells: _Cells) -> Texts:
    files = _files(path)
    chosen = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not chosen:
        raise FileFormatError(
            f"{path.absolute()} holds no texts: {len(files)} files, none of which ends in {', '.join(SUFFIXES)}"
            if path.is_dir()
            else f"{path.absolute()} ends in {path.suffix or 'nothing'!r}; texts are read from {', '.join(SUFFIXES)}"
        )
    if any(file.suffix.lower() == ".parquet" for file in chosen):
        parquet_library()
    root = path if path.is_dir() else path.parent
    described = [_described(file, root) for file in chosen]
    description = {"kind": "files", "files": described, "column": cells.column, "sha256": _joined(described)}
    sized = all(file.suffix.lower() != ".parquet" for file in chosen)
    size = sum(file["bytes"] for file in described) if sized else None
    left_out = tuple(str(file.relative_to(root)) for file in files if file not in chosen)
    return Texts(lambda: _documents(chosen, cells), description, size, left_out=left_out)


def _files(path: Path) -> list[Path]:
    """The file, or all files of the folder that are not hidden, in the order of their names."""
    if path.is_dir():
        return sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
    if not path.exists():
        raise FileFormatError(
            f"there is no file or folder {path.absolute()}; texts are {STDLIB!r} (a built-in corpus), a path, or an "
            "iterable of texts such as a list"
        )
    return [path]


def _described(file: Path, root: Path) -> dict[str, Any]:
    return {"name": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _joined(files: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256("".join(f"{file['name']}\0{file['sha256']}\0" for file in files).encode()).hexdigest()


def _documents(files: Sequence[Path], cells: _Cells) -> Iterator[Document]:
    for file in files:
        suffix = file.suffix.lower()
        if suffix == ".txt":
            yield _text(file)
        else:
            yield from (_json_rows if suffix == ".jsonl" else _parquet_rows)(file, cells)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(file.absolute()), error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> FileFormatError:
    return FileFormatError(f"{where} is not UTF-8 text ({error.reason}); save it as UTF-8")


def _json_rows(file: Path, cells: _Cells) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(where, error) from error
            if line.strip():
                yield _json_row(line, where, cells)


def _json_row(line: str, where: str, cells: _Cells) -> Document:
    try:
        row = parse_json(line, finite=False)
    except ValueError as error:
        raise FileFormatError(f"{where} is not JSON ({error}): {line[:60]!r}") from error
    if row is None or isinstance(row, str | list):
        return cells.document(row, where)
    if not isinstance(row, dict):
        raise FileFormatError(f"{where} is neither a text nor a JSON object with {cells.column!r}: {line[:60]!r}")
    return cells.of(row, where)


def parquet_library() -> Any:
    """pyarrow.parquet. Late: it is optional, and needed for one kind of file only."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            ".parquet files take pyarrow, which is not installed: pip install pyarrow. Texts may also be .jsonl"
        ) from error
    return parquet


def _parquet_rows(file: Path, cells: _Cells) -> Iterator[Document]:
    try:
        table = parquet_library().ParquetFile(file)
        names = table.schema_arrow.names
        if cells.column not in names:
            raise UnknownNameError(f"column ({file})", cells.column, names, "Name the column that holds the text.")
        number = 0
        for batch in table.iter_batches(columns=[cells.column], batch_size=1024):
            for value in batch.column(0).to_pylist():
                yield cells.of({cells.column: value}, f"{file}, row {number}")
                number += 1
    except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file
        raise FileFormatError(f"{file.absolute()} cannot be read as parquet: {error}") from error
