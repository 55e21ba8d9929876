"""Changes to files: of bytes, and of what JSON, npz, safetensors and SQLite files hold."""

from __future__ import annotations

import io
import json
import random
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_readers import rechained

Change = Callable[[bytes, random.Random], bytes]

# Written in place of a marker, because Python cannot write them itself.
_MARKS = {
    '"@deep@"': "[" * 100_000 + "]" * 100_000,
    '"@deep-object@"': '{"a":' * 5_000 + "1" + "}" * 5_000,
    '"@long@"': "9" * 5_000,
    '"@digits@"': "7" * 400,
    '"@1e400@"': "1e400",
    '"@half@"': '"\\ud800"',
}
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e200, -1e200, 1e38, 1e-320, float("nan"), float("inf"), 10**9,
    2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**200, "", "a", "\0", "None", "0", "layers.0.z",
    "../../x", "x" * 5_000, "é\u2028", [], {}, [[]], [None], [0], [1, "a"], {"a": 1}, {"": None}, [[1, 2], [3, 4]],
    *_MARKS,
)  # fmt: skip
_NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    65535,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def changed(file: Path, others: list[Path], generator: random.Random) -> None:
    """One to three changes of a file. others: files that pieces are taken from."""
    if file.suffix == ".sqlite" and generator.random() < 0.6:
        _sqlite(file, generator)
        return
    content = file.read_bytes()
    structured = _STRUCTURED.get(file.suffix)
    if structured is not None and generator.random() < 0.7:
        try:
            file.write_bytes(structured(content, generator))
            return
        except (ValueError, KeyError, IndexError, TypeError, RecursionError, zipfile.BadZipFile, struct.error):
            pass
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        kind = generator.choice(_BYTES)
        if kind is _splice:
            content = _splice(content, generator, generator.choice(others).read_bytes())
        else:
            content = kind(content, generator)
    file.write_bytes(content)


# Bytes


def _at(content: bytes, generator: random.Random) -> int:
    """A place in the file: mostly where headers and tables are."""
    size = max(len(content), 1)
    where = generator.random()
    if where < 0.5:
        return generator.randrange(min(size, 512))
    return size - 1 - generator.randrange(min(size, 256)) if where < 0.65 else generator.randrange(size)


def _flip(content: bytes, generator: random.Random) -> bytes:
    found = bytearray(content or b"\0")
    for _ in range(generator.choice((1, 1, 2, 8))):
        found[_at(found, generator)] ^= 1 << generator.randrange(8)
    return bytes(found)


def _byte(content: bytes, generator: random.Random) -> bytes:
    found = bytearray(content or b"\0")
    found[_at(found, generator)] = generator.choice((0, 1, 0x22, 0x5B, 0x7B, 0x5C, 0x7F, 0x80, 0xFF, 0x0A))
    return bytes(found)


def _cut(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content) + 1)]


def _removed(content: bytes, generator: random.Random) -> bytes:
    at = _at(content, generator)
    return content[:at] + content[at + generator.choice((1, 2, 4, 8, 100, 1000)) :]


def _repeated(content: bytes, generator: random.Random) -> bytes:
    at, size = _at(content, generator), generator.choice((1, 4, 16, 64, 1024))
    return content[: at + size] + content[at : at + size] * generator.choice((1, 2, 50)) + content[at + size :]


def _number(content: bytes, generator: random.Random) -> bytes:
    width = generator.choice((1, 2, 4, 8))
    raw = (generator.choice(_NUMBERS) % 2 ** (8 * width)).to_bytes(width, generator.choice(("little", "big")))
    at = _at(content, generator)
    at -= at % generator.choice((1, width))
    return content[:at] + raw + content[at + width :]


def _splice(content: bytes, generator: random.Random, other: bytes = b"") -> bytes:
    begin, at = generator.randrange(len(other) + 1), _at(content, generator)
    piece = other[begin : begin + generator.choice((1, 8, 64, 1024))]
    return content[:at] + piece + content[at + generator.choice((0, len(piece))) :]


_BYTES = (_flip, _byte, _cut, _removed, _repeated, _number, _splice)


# JSON


def json_text(value: Any) -> str:
    text = json.dumps(value)
    for mark, written in _MARKS.items():
        text = text.replace(mark, written)
    return text


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside, at most a few thousand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if len(found) < 4_000:
            found.append((value, key))
            _places(inner, found)
    return found


def _value(generator: random.Random) -> Any:
    value = generator.choice(_VALUES)
    return value.strip('"') if isinstance(value, str) and value in _MARKS else value


def changed_value(value: Any, generator: random.Random) -> Any:
    """A JSON value with one to three changes; markers stand for what Python cannot write."""
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        places = _places(value, [])
        if not places or generator.random() < 0.02:
            return _value(generator)
        # Few containers hold most of the values; each gets its turn.
        containers = {id(container): container for container, _ in places}
        container = generator.choice(list(containers.values()))
        key = generator.choice(list(container) if isinstance(container, dict) else range(len(container)))
        kind = generator.random()
        if kind < 0.6:
            container[key] = _value(generator)
        elif kind < 0.75:
            del container[key]
        elif kind < 0.85:
            other, place = generator.choice(places)
            try:
                container[key] = json.loads(json.dumps(other[place]))
            except (KeyError, IndexError):
                continue
        elif isinstance(container, dict):
            container[generator.choice(("", "extra", "a.b", "0", *container))] = container.pop(key)
        else:
            container.insert(generator.randrange(len(container) + 1), container[key])
    return value


def _json(content: bytes, generator: random.Random) -> bytes:
    text = json_text(changed_value(json.loads(content), generator))
    if generator.random() < 0.05:
        # The same key twice.
        text = text.replace("{", '{"format": 0, "format": [], ', 1)
    return text.encode()


def _json_lines(content: bytes, generator: random.Random) -> bytes:
    lines = content.decode().split("\n")
    number = generator.randrange(len(lines))
    lines[number] = json_text(changed_value(json.loads(lines[number]), generator))
    return "\n".join(lines).encode()


# npz and safetensors


def _npz(content: bytes, generator: random.Random) -> bytes:
    """One array's header says something else; or an archive that swells."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = generator.choice(sorted(members))
    kind = generator.random()
    if kind < 0.7:
        members[name] = _npy(members[name], generator)
    elif kind < 0.8:
        members[name] = b"\0" * generator.choice((10**5, 10**6, 10**6, 10**6, 10**8))
    elif kind < 0.9:
        members[generator.choice(("", "../x.npy", "x.npy", "a.txt", "__checksum__.npy"))] = members[name]
    else:
        del members[name]
    out = io.BytesIO()
    method = generator.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(out, "w", method) as archive:
        for member, raw in members.items():
            archive.writestr(member, raw)
    return out.getvalue()


def _npy(raw: bytes, generator: random.Random) -> bytes:
    size = struct.unpack("<H", raw[8:10])[0]
    shape = generator.choice(
        ("()", "(-1,)", "(10**9,)", "(1000000000,)", "(99999999999999999999,)", "(2, 3)", "(0, 10000000000)", "(1.5,)",
         "(True,)", "'a'", "(" * 3_000, "(1," * 60 + "1" + ")" * 60, "(1,) * 9")
    )  # fmt: skip
    descr = generator.choice(
        ("'<f8'", "'<f8'", "'<f8'", "'|O'", "'<U500000000'", "[('a', '<f8')]", "'<f2'", "'|S0'", "'<c16'", "'M8[s]'",
         "[]", "'x'")
    )  # fmt: skip
    header = f"{{'descr': {descr}, 'fortran_order': {generator.choice(('False', 'True', '3'))}, 'shape': {shape}, }}"
    text = header.encode() + b"\n"
    version = generator.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    width = "<H" if version == b"\x01\x00" else "<I"
    return raw[:6] + version + struct.pack(width, len(text)) + text + raw[10 + size :]


def _safetensors(content: bytes, generator: random.Random) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    text = json_text(changed_value(json.loads(content[8 : 8 + size]), generator)).encode()
    said = len(text) if generator.random() < 0.9 else generator.choice(_NUMBERS)
    return struct.pack("<Q", said) + text + content[8 + size :]


_STRUCTURED: dict[str, Change] = {
    ".json": _json, ".jsonl": _json_lines, ".npz": _npz, ".safetensors": _safetensors,
}  # fmt: skip


# SQLite

_RECURSIVE = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT n AS seq, 'a' AS kind, 'b' AS id, "
SCHEMAS = (
    "DROP TABLE records; CREATE VIEW records AS " + _RECURSIVE + "'c' AS payload, 'd' AS previous, 'e' AS hash FROM r;",
    "ALTER TABLE records RENAME TO other; CREATE VIEW records AS SELECT a.* FROM other a, other b, other c, other d;",
    "ALTER TABLE records ADD COLUMN more TEXT GENERATED ALWAYS AS (hex(zeroblob(100000000))) VIRTUAL;",
    "CREATE TABLE more (a); CREATE TRIGGER slow AFTER INSERT ON records BEGIN INSERT INTO more " + _RECURSIVE
    + "1, 2, 3 FROM r; END;",
    "CREATE VIRTUAL TABLE words USING fts5(a);",
    "CREATE VIEW sqlite AS SELECT 1;",
    "DROP TABLE records; CREATE TABLE records (seq INTEGER PRIMARY KEY, kind, id, payload, previous, hash);",
    "DROP TABLE records; CREATE TABLE records (seq INTEGER PRIMARY KEY, kind TEXT);",
    "CREATE INDEX slow ON records (hex(payload) || hex(id));",
    "DROP TABLE records;",
    "PRAGMA user_version = 7;",
    "PRAGMA application_id = 1;",
    "PRAGMA journal_mode = DELETE;",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 1 WHERE name = 'records';",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'CREATE TABLE records (x)' WHERE name = 'records';",
)  # fmt: skip


def _sqlite(file: Path, generator: random.Random) -> None:
    if generator.random() < 0.15:
        connection = sqlite3.connect(file)
        try:
            connection.executescript("DROP TRIGGER records_no_delete; " + generator.choice(SCHEMAS))
        finally:
            connection.close()
        return
    number = generator.randrange(12)

    def change(seq: int, record: dict[str, Any]) -> None:
        if seq != number:
            return
        if generator.random() < 0.8:
            record["payload"] = json_text(changed_value(json.loads(record["payload"]), generator))
            if generator.random() < 0.5:
                _name_put_right(record)
        else:
            record[generator.choice(("kind", "id", "payload"))] = generator.choice(
                ("", "family", "evidence", 7, 1.5, b"\xff\x00", "x" * 100, "null", "\ud7ff")
            )

    rechained(file, change)


def _name_put_right(record: dict[str, Any]) -> None:
    """The id that a forger would compute, where the payload still has one."""
    from vesalius.protocol import Evidence, Family

    try:
        data = json.loads(record["payload"])
        if record["kind"] == "family":
            record["id"] = Family.from_json(data["family"]).id
        elif record["kind"] in ("data", "opening"):
            record["id"] = data["data_hash"]
        else:
            record["id"] = Evidence.from_json(data).id
    except Exception:
        return
