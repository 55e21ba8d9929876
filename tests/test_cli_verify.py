"""`vesalius ledger verify`: a ledger is held against the head that was printed and the summary beside it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

from test_cli import Done
from test_cli import finished as finished
from test_cli import model as model
from test_cli import pairs as pairs
from test_cli import run as run
from vesalius.protocol.ledger import Ledger


def copied(finished: Path, tmp_path: Path) -> Path:
    """The ledger, whole, and the summary in another folder."""
    with sqlite3.connect(finished / "ledger.sqlite") as source, sqlite3.connect(tmp_path / "ledger.sqlite") as copy:
        source.backup(copy)
    source.close()
    copy.close()
    (tmp_path / "summary.json").write_text((finished / "summary.json").read_text())
    return tmp_path / "ledger.sqlite"


def test_a_ledger_whose_tail_was_cut_is_found_by_its_head_and_by_the_summary(
    run: Callable[..., Done], finished: Path, tmp_path: Path
) -> None:
    path = copied(finished, tmp_path)
    assert run("ledger", "verify", path).code == 0  # positive control
    head = json.loads((finished / "summary.json").read_text())["timings"]["ledger_head"]
    with sqlite3.connect(path) as connection:
        trigger = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'records_no_delete'").fetchone()[0]
        connection.execute("DROP TRIGGER records_no_delete")
        connection.execute("DELETE FROM records WHERE seq = (SELECT MAX(seq) FROM records)")
        connection.execute(trigger)
    connection.close()
    done = run("ledger", "verify", path, "--head", head)
    assert (done.code, f"has no record with the hash {head}: it was cut" in done.words) == (2, True)
    done = run("ledger", "verify", path)
    assert (done.code, "summary.json was written from another ledger" in done.words) == (2, True)
    (tmp_path / "summary.json").unlink()
    assert run("ledger", "verify", path).code == 0  # the chain itself is whole: only the head can tell


def test_a_summary_that_says_something_else_is_found(run: Callable[..., Done], finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    row = summary["claims"][0]
    for change in ({"verdict": "NOT SPECIFIC"}, {"estimate": 99.0}, {"p_holm": 0.5}, {"id": "feed" * 16}):
        summary["claims"] = [{**row, **change}, *summary["claims"][1:]]
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        done = run("ledger", "verify", path)
        assert (done.code, "summary.json says of claim" in done.words) == (2, True)
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json cannot be read" in run("ledger", "verify", path).words


def test_a_ledger_without_a_record_is_not_called_whole(run: Callable[..., Done], tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    done = run("ledger", "verify", tmp_path / "ledger.sqlite")
    assert (done.code, "holds no records" in done.words) == (2, True)
