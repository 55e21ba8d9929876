"""What is wrong with a command is told before anything heavy is imported; --n draws from the user's own pairs."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from test_cli import FAST, Done, jsonl, rows_for, separate
from test_cli import model as model
from test_cli import pairs as pairs
from test_cli import run as run
from vesalius import report
from vesalius.circuits.hybrid import SAMPLED, SHORTLIST
from vesalius.circuits.search import SMALLEST
from vesalius.cli import checks
from vesalius.data import tables, texts
from vesalius.data.manifest import DTYPES, NAME
from vesalius.dictionaries import config
from vesalius.model.products import COMPUTE
from vesalius.studies.study import FEWEST_SETS

SITE = ("--site", "layers.0.mlp_out")
EARLY = {
    "study nothing.jsonl": "there is no file",
    "study questoin": "unknown question 'questoin'; known: by-design, capitals",
    "study .": "is a directory; give the .jsonl, .json, .csv or .tsv file in it",
    "study notes.txt": "ends in '.txt'; pairs are read from",
    "study pairs.pkl": "pickled files can run code",
    "study ioi --model nobody/nothing": "the hub cannot be reached",
    "study ioi --model ./nothing": "there is no model at",
    "study ioi --model notes.txt": "is not a .gguf file",
    "study ioi --model .": "holds no config.json",
    "study ioi --out notes.txt/deep": "cannot write to notes.txt/deep",
    "study ioi --control none": "unknown control 'none'; known: random-weights",
    "study ioi --n 0": "--n must be at least 1; got 0",
    "study ioi --seed -1": "--seed must lie between 0 and 2**63 - 1; got -1",
    "study ioi --random-sets 3": "--random-sets must be at least 4; got 3",
    "sites ./nothing": "there is no model at",
    "harvest nothing.txt --site embed --out out": "there is no file or folder",
    "harvest pairs.pkl --site embed --out out": "pickled files can run code",
    "harvest notes.txt --site embd --out out": "unknown site 'embd'",
    "harvest notes.txt --site blocks.1.hook_mlp_in --out out": "write layers.1.resid_mid",
    "harvest notes.txt --site embed --out out --dtype int8": "unknown --dtype 'int8'",
    "harvest notes.txt --site embed --out out --compute int8": "unknown --compute 'int8'",
    "harvest notes.txt --site embed --out out --tokens 0": "--tokens must be at least 1; got 0",
    "harvest notes.txt --site embed --out notes.txt": "cannot write to notes.txt",
    "harvest notes.txt --site embed --out out --model base=./nothing": "there is no model at",
    "train nothing --out out": "is no activation store: there is nothing of that name",
    "train . --out out": "is no activation store: there is no manifest.json in it",
    "train --site embed --kind vae": "unknown kind of dictionary 'vae'; known: batchtopk, gated",
    "train --site embed --precision fp8": "unknown precision 'fp8'",
    "train --site embed --coder vae": "unknown coder 'vae'",
    "train --site embed --device gpu": "unknown device 'gpu'; known: cpu, cuda",
    "train --site embed --texts nothing.txt": "there is no file or folder",
    "train --site embed --model ./nothing": "there is no model at",
    "quality nothing nothing": "there is no file or folder",
    "quality . nothing": "is no activation store",
    "calibrate --json notes.txt/figures.json": "give another --json",
    "ledger show nothing.sqlite": "there is no ledger",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "pairs.pkl").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vesalius.model.loading.lookup._hub_answers", lambda: False)
    return tmp_path


@pytest.mark.parametrize("command", EARLY)
def test_bad_input_is_told_and_nothing_is_left_behind(command: str, run: Callable[..., Done], place: Path) -> None:
    done = run(*command.split())
    assert done.code == 2
    assert EARLY[command] in done.words
    assert sorted(path.name for path in place.iterdir()) == ["notes.txt", "pairs.pkl"]


def test_nothing_heavy_is_imported_for_any_of_them(place: Path) -> None:
    """In one process of its own: what one command imported stays, so that the end tells of all."""
    code = f"""
import sys
from vesalius.cli import main
from vesalius.model.loading import lookup
lookup._hub_answers = lambda: False
for command in {list(EARLY)}:
    sys.argv = ["vesalius", *command.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, command
    assert "torch" not in sys.modules and "transformers" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_device_that_is_not_here_is_told_before_a_harvest(run: Callable[..., Done], place: Path) -> None:
    done = run("train", *SITE, "--device", "mps:7")
    assert done.code == 2
    assert "device 'mps:7' cannot be used here" in done.words


def test_the_names_are_those_of_the_rooms() -> None:
    assert tuple(sorted(vs.data.TASKS)) == checks.QUESTIONS
    assert checks.TABLES == tables.SUFFIXES
    assert (checks.STDLIB, checks.TEXTS, checks.NULLS) == (texts.STDLIB, texts.SUFFIXES, texts.NULLS)
    assert tuple(config.KINDS) == checks.KINDS
    assert (checks.CODERS, checks.PRECISIONS) == (config.CODERS, config.PRECISIONS)
    assert checks.FEWEST_SETS == FEWEST_SETS
    assert (tuple(vs.circuits.METHODS), vs.circuits.ABLATIONS) == (checks.CIRCUIT_METHODS, checks.ABLATIONS)
    assert checks.BASELINES == vs.studies.BASELINES
    assert (checks.SHORTLIST, checks.SAMPLED, checks.SMALLEST) == (SHORTLIST, SAMPLED, SMALLEST)
    assert (tuple(DTYPES), COMPUTE, NAME) == (checks.DTYPES, checks.COMPUTE, checks.MANIFEST)


# --- some of the user's own pairs, and a study that goes on past its gate


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_n_draws_from_the_users_own_pairs(run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path) -> None:
    done = run("study", pairs, "--model", model, "--out", tmp_path / "some", "--n", 5, *FAST)
    assert done.code == 0, done.err
    assert "5 + 5 prompt pairs" in done.words
    done = run("study", pairs, "--model", model, "--out", tmp_path / "more", "--n", 9, *FAST)
    assert done.code == 2
    assert "split has only 8 pairs; give a smaller n" in done.words
    assert not (tmp_path / "more").exists()


@pytest.mark.slow
def test_past_the_gate_a_stopped_study_goes_on_in_its_folder(
    run: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    wrong = jsonl(tmp_path / "wrong.jsonl", rows_for(model, right=False))
    again, fresh = tmp_path / "again", tmp_path / "fresh"
    assert run("study", wrong, "--model", model, "--out", again, *FAST).code == 1
    assert summary(again)["stopped"]
    assert run("study", wrong, "--model", model, "--out", again, "--past-gate", *FAST).code == 0
    assert run("study", wrong, "--model", model, "--out", fresh, "--past-gate", *FAST).code == 0
    assert not summary(again)["stopped"]
    assert summary(again)["claims"] == summary(fresh)["claims"]
    verified = separate("ledger", "verify", again / "ledger.sqlite")
    assert verified.code == 0, verified.err
    # Without the option the folder is one of a study that went on, and goes on again.
    done = run("study", wrong, "--model", model, "--out", again, *FAST)
    assert done.code == 1


# --- tables of every kind, and what is said about them beforehand


def table(rows: list[dict[str, str]], delimiter: str) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


TABLES: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "semicolons.csv": lambda rows: table(rows, ";"),
    "tabs.csv": lambda rows: table(rows, "\t"),
    "tabs.tsv": lambda rows: table(rows, "\t"),
    "array.json": lambda rows: json.dumps(rows, indent=1),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_study_takes_tables_of_every_kind(name: str, run: Callable[..., Done], model: Path, tmp_path: Path) -> None:
    rows = rows_for(model, right=False)
    (tmp_path / name).write_text(TABLES[name](rows))
    plain = jsonl(tmp_path / "plain.jsonl", rows)
    told = [
        run("study", path, "--model", model, "--out", tmp_path / path.stem / path.suffix, *FAST)
        for path in (tmp_path / name, plain)
    ]
    assert [done.code for done in told] == [1, 1]  # it does not do the task, so that nothing is measured
    gates = [summary(tmp_path / path.stem / path.suffix)["gate"] for path in (tmp_path / name, plain)]
    assert gates[0] == gates[1]


def test_all_bad_pairs_are_told_at_once_the_first_ten_in_words(
    run: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    rows = [{**row, "answer": ""} if number % 4 else row for number, row in enumerate(rows_for(model))]
    (tmp_path / "bad.csv").write_text(table(rows, ";"))
    done = run("study", tmp_path / "bad.csv", "--model", model, "--out", tmp_path / "out", *FAST)
    assert done.code == 2
    assert "bad.csv: 12 of 16 pairs cannot be used" in done.words
    assert len(re.findall(r"bad\.csv, line \d+", done.words)) == 10
    assert "... and 2 more" in done.words


def test_too_few_templates_are_told_with_the_number_that_would_decide(
    run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path
) -> None:
    done = run("study", pairs, "--model", model, "--out", tmp_path / "out", *FAST)
    assert done.code == 0
    told = re.search(r"the validation split has (\d+) templates; about (\d+) decide a typical claim", done.words)
    assert told is not None
    assert f"Give prompts of {int(told[2]) - int(told[1])} more templates" in done.words
    assert done.words.index("decide a typical claim") < done.words.index("patching")


def test_answers_of_several_tokens_are_studied(run: Callable[..., Done], model: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "answer": row["answer"] + ("xy" if number % 2 else ""), "distractor": row["distractor"] + "z"}
        for number, row in enumerate(rows_for(model))
    ]
    path = jsonl(tmp_path / "long.jsonl", rows)
    done = run("study", path, "--model", model, "--out", tmp_path / "out", "--past-gate", *FAST)
    assert done.code == 0, done.err
    found = summary(tmp_path / "out")
    report.schema.check(found)
    # A write onto one token's logit is no part of such a claim.
    assert {row["quantity"] for row in found["claims"]} <= {
        "attends",
        "total_effect",
        "effect_at",
        "faithfulness",
        "completeness",
    }
    assert found["question"]["prompts"]["distractor"].endswith("z")
