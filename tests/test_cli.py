"""The command line: it does what it says, and every kind of bad input gets one message and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vesalius as vs
from solvable import timeless
from tiny_folder import change_config, tiny_folder
from tiny_gguf import tiny_llama, write_gguf
from vesalius import report
from vesalius.cli import main
from vesalius.cli.ledgers import STYLES, _cells
from vesalius.protocol.ledger import Ledger
from vesalius.quantities import Runs

FAST = ("--random-sets", "4", "--bos", "none")
LETTERS = "abcdefgijklmnopqrsuvwxyz"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        return " ".join(self.err.split())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs `vesalius ...` in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["vesalius", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, shown.out, shown.err)

    return call


def separate(*arguments: object, code: str = "") -> Done:
    """Runs `vesalius ...`, or Python code, in a process of its own."""
    start = code or "from vesalius.cli import main; main()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def rows_for(model: Path, right: bool = True, n: int = 16) -> list[dict[str, str]]:
    """Pairs whose answers the model gives, or (right=False) never gives."""
    loaded = vs.load(model)
    texts = [f"{a}{b}{i % 10}={b}{a};" for i, (a, b) in enumerate(zip(LETTERS * 2, LETTERS[5:] * 3, strict=False))][:n]
    ids = [loaded.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in LETTERS]
    rows = []
    for number, text in enumerate(texts):
        favour = loaded.run(text).logits[0, -1, ids]
        best, worst = LETTERS[int(favour.argmax())], LETTERS[int(favour.argmin())]
        answer, distractor = (best, worst) if right else (worst, best)
        rows.append({"clean": text, "corrupted": text[1] + text[0] + text[2:], "answer": answer,
                     "distractor": distractor, "template": f"t{number % 8}"})  # fmt: skip
    return rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl(tmp_path_factory.mktemp("pairs") / "mine.jsonl", rows_for(model))


@pytest.fixture(scope="module")
def finished(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    before = sys.argv
    sys.argv = ["vesalius", "study", str(pairs), "--model", str(model), "--out", str(out), *FAST]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == 0
    return out


def summary_in(folder: Path) -> dict[str, Any]:
    return timeless(json.loads((folder / "summary.json").read_text()))


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- a study


def test_a_study_writes_report_summary_and_ledger_and_prints_its_answer(
    run: Callable[..., Done], finished: Path, model: Path, pairs: Path
) -> None:
    done = run("study", pairs, "--model", model, "--out", finished, *FAST)
    assert done.code == 0
    summary = json.loads((finished / "summary.json").read_text())
    report.schema.check(summary)
    assert done.out.splitlines() == [*summary["answer"], str(finished / "report.html")]
    assert {"report.html", "summary.json", "ledger.sqlite", "blocks"} <= {path.name for path in finished.iterdir()}
    assert summary["timings"]["peak_memory_bytes"] > 1e7
    assert [step["name"] for step in summary["timings"]["steps"]] == ["patching", "circuit", "describe", "validate"]
    assert f"vesalius ledger verify --head: {summary['timings']['ledger_head']}" in done.words
    assert "8 + 8 prompt pairs, bos none" in done.words
    assert "expected cost: about" in done.words


def test_the_summary_says_how_to_run_it_again(
    run: Callable[..., Done], finished: Path, model: Path, pairs: Path
) -> None:
    run("study", pairs, "--model", model, "--out", finished, *FAST)
    command = json.loads((finished / "summary.json").read_text())["reproduce"]["command"]
    assert command == f"vesalius study {pairs} --model {model} --out {finished} {' '.join(FAST)}"


def test_a_model_that_cannot_do_the_task_ends_with_code_1_and_a_report(
    run: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    wrong, out = jsonl(tmp_path / "wrong.jsonl", rows_for(model, right=False)), tmp_path / "out"
    done = run("study", wrong, "--model", model, "--out", out, *FAST)
    assert done.code == 1
    assert "prefers the answer to the distractor in 0% of" in done.out
    assert "does not do this task well enough" in (out / "report.html").read_text()
    assert json.loads((out / "summary.json").read_text())["stopped"] in done.out
    assert not (out / "ledger.sqlite").exists()
    assert run("study", wrong, "--model", model, "--out", out, "--past-gate", *FAST).code == 0
    assert (out / "ledger.sqlite").exists()


def test_the_control_tests_the_trained_claims_on_random_weights(
    run: Callable[..., Done], finished: Path, model: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "control"
    done = run("study", pairs, "--model", model, "--out", out, "--control", "random-weights", *FAST)
    assert done.code == 0
    summary = json.loads((out / "summary.json").read_text())
    report.schema.check(summary)
    assert summary["control"] == "random-weights"
    trained = json.loads((out / "trained" / "summary.json").read_text())
    assert [row["id"] for row in summary["trained_claims_on_control"]] == [row["id"] for row in trained["claims"]]
    assert trained["claims"] == json.loads((finished / "summary.json").read_text())["claims"]
    assert [step["name"] for step in summary["timings"]["steps"]] == ["patching", "circuit", "describe", "validate"]


def test_a_control_of_a_model_that_cannot_do_the_task_says_so(
    run: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    wrong = jsonl(tmp_path / "wrong.jsonl", rows_for(model, right=False))
    done = run("study", wrong, "--model", model, "--out", tmp_path / "o", "--control", "random-weights", *FAST)
    assert done.code == 1
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["control"] == "random-weights"


def test_the_default_folder_is_named_after_the_question(
    run: Callable[..., Done], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "wrong.jsonl", rows_for(model, right=False))
    done = run("study", "wrong.jsonl", "--model", model, *FAST)
    assert done.out.splitlines()[-1] == "runs/wrong/report.html"
    assert Path("runs/wrong/report.html").is_file()


def test_interrupted_by_ctrl_c_it_says_so_and_goes_on_from_there(
    run: Callable[..., Done], finished: Path, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = Runs.evaluate, [0]

    def interrupted(self: Runs, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return evaluate(self, *given, **named)

    out = tmp_path / "out"
    monkeypatch.setattr(Runs, "evaluate", interrupted)
    done = run("study", pairs, "--model", model, "--out", out, *FAST)
    assert done.code == 130
    assert "Interrupted. Finished work is kept; the same command goes on from there." in done.words
    assert not (out / "report.html").exists()
    assert run("study", pairs, "--model", model, "--out", out, *FAST).code == 0
    mine, whole = (summary_in(folder) for folder in (out, finished))
    assert {k: v for k, v in mine.items() if k != "reproduce"} == {k: v for k, v in whole.items() if k != "reproduce"}


def test_missing_groups_are_warned_of(run: Callable[..., Done], model: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "template"} for row in rows_for(model, right=False)]
    path = jsonl(tmp_path / "bare.jsonl", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        done = run("study", path, "--model", model, "--out", tmp_path / "out", *FAST)
        assert warnings.showwarning is shown
    assert "warning: bare.jsonl has no group columns" in done.words
    assert "intervals will assume independent prompts" in done.words


# --- bad input: what was given, what to do, exit code 2, nothing written

Given = Callable[[Path, Path, Path], list[object]]


def edited(model: Path, tmp: Path, change: Callable[[Path], object]) -> Path:
    """A copy of the model's folder, changed."""
    copy = shutil.copytree(model, tmp / "model")
    change(copy)
    return copy


def with_model(change: Callable[[Path], object]) -> Given:
    return lambda model, pairs, tmp: [pairs, "--model", edited(model, tmp, change)]


def with_rows(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], name: str = "bad.jsonl") -> Given:
    def given(model: Path, pairs: Path, tmp: Path) -> list[object]:
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        return [jsonl(tmp / name, change(rows)), "--model", model]

    return given


def with_text(text: str | bytes, name: str = "bad.jsonl") -> Given:
    def given(model: Path, pairs: Path, tmp: Path) -> list[object]:
        (tmp / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return [tmp / name, "--model", model]

    return given


def with_options(*options: object) -> Given:
    return lambda model, pairs, tmp: [pairs, "--model", model, *options]


def changed(number: int, **fields: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda rows: [{**row, **fields} if at == number else row for at, row in enumerate(rows)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def poison(folder: Path) -> None:
    """One weight becomes NaN."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def other_tokenizer(folder: Path) -> None:
    """The tokenizer of a model with more tokens: "q" has an id that this one lacks."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["q"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(data))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def broken_gguf(model: Path, pairs: Path, tmp: Path) -> list[object]:
    truncate(write_gguf(tmp / "broken.gguf", tiny_llama()))
    return [pairs, "--model", tmp / "broken.gguf"]


def no_gguf(model: Path, pairs: Path, tmp: Path) -> list[object]:
    (tmp / "text.gguf").write_text("hello")
    return [pairs, "--model", tmp / "text.gguf"]


def not_there(model: Path, pairs: Path, tmp: Path) -> list[object]:
    return [tmp / "missing.jsonl", "--model", model]


def no_model(model: Path, pairs: Path, tmp: Path) -> list[object]:
    (tmp / "my-model").mkdir()
    return [pairs, "--model", tmp / "my-modle"]


def bare_folder(model: Path, pairs: Path, tmp: Path) -> list[object]:
    return [pairs, "--model", tmp]


def folder_of_pairs(model: Path, pairs: Path, tmp: Path) -> list[object]:
    return [tmp, "--model", model]


BAD: dict[str, tuple[Given, str]] = {
    "question": (lambda m, p, t: ["iio", "--model", m], r"unknown question 'iio'; known: by-design, capitals, .*ioi"),
    "pairs path": (not_there, r"there is no file .*missing\.jsonl"),
    "pairs folder": (folder_of_pairs, r"is a directory; give the \.jsonl, \.json, \.csv or \.tsv file in it"),
    "model path": (no_model, r"there is no model at .*my-modle .*near matches: my-model"),
    "model alias": (lambda m, p, t: [p, "--model", "smollm2-135m"],
                    r"'smollm2-135m' is not on this machine.*demo model is 'smollm2"),
    "empty folder": (bare_folder, r"holds no config\.json"),
    "architecture": (with_model(lambda f: change_config(f, model_type="martian")),
                     r"model_type 'martian' is no causal language model"),
    "stranger's code": (with_model(lambda f: change_config(f, auto_map={"AutoModel": "x.Y"})),
                        r"never run here"),
    "truncated safetensors": (with_model(lambda f: truncate(f / "model.safetensors")),
                              r"model\.safetensors is truncated or corrupt"),
    "corrupt safetensors": (with_model(lambda f: (f / "model.safetensors").write_bytes(b"x" * 999)),
                            r"truncated or corrupt"),
    "NaN weights": (with_model(poison), r"holds NaN or infinity"),
    "pickled weights": (with_model(pickled), r"pytorch_model\.bin is a pickle, which can run any program.*safetensors"),
    "corrupt config": (with_model(lambda f: (f / "config.json").write_text("{")),
                       r"config\.json cannot be read as JSON"),
    "truncated gguf": (broken_gguf, r"broken\.gguf"),
    "no gguf": (no_gguf, r"text\.gguf"),
    "no tokenizer": (with_model(without_tokenizer), r"has no tokenizer, and text needs one"),
    "another tokenizer": (with_model(other_tokenizer),
                          r"token id 5000, but model has a vocabulary of \d+; is this its tokenizer\?"),
    "built-in task": (lambda m, p, t: ["ioi", "--model", m],
                      r"this built-in task does not fit it\. Give your own pairs"),
    "long answer": (with_rows(changed(3, answer="xyz" * 9)), r"bad\.jsonl, line 4.*'xyzxyz.*'.*give 1 to \d+ tokens"),
    "misaligned": (with_rows(changed(5, corrupted="abc")), r"bad\.jsonl, line 6"),
    "no difference": (with_rows(lambda rows: [{**row, "corrupted": row["clean"]} for row in rows]),
                      r"16 of 16 pairs cannot be used bad\.jsonl, line 1: .* identical.*line 10: .* and 6 more"),
    "NaN in pairs": (with_rows(changed(2, answer=float("nan"))), r"line 3: answer must be text, got nan"),
    "missing column": (with_rows(lambda rows: [{"clean": row["clean"]} for row in rows]),
                       r"lacks corrupted, answer, distractor"),
    "unknown split": (with_rows(lambda rows: [{**row, "split": "train"} for row in rows[:1]]),
                      r"unknown split \(bad\.jsonl, line 1\) 'train'; known: discovery, validation"),
    "too few": (with_rows(lambda rows: rows[:2]), r"2 pairs"),
    "shared names": (with_rows(lambda rows: [{**row, "names": "Anna"} for row in rows]),
                     r"names 'Anna' occurs in the discovery and in the validation split.*leave the names column out"),
    "empty file": (with_text(""), r"bad\.jsonl is empty"),
    "no JSON": (with_text("hello\n"), r"bad\.jsonl, line 1 is not JSON"),
    "no text": (with_text(b"\xff\xfe\x00\x01"), r"is not UTF-8 text"),
    "pickled pairs": (with_text("x", "bad.pkl"), r"pickled files can run code.*save as \.jsonl"),
    "other ending": (with_text("x", "bad.xlsx"), r"pairs are read from \.jsonl, \.json, \.csv or \.tsv"),
    "control": (with_options("--control", "noise"), r"unknown control 'noise'; known: random-weights"),
    "n": (with_options("--n", 0), r"--n must be at least 1; got 0"),
    "n a word": (with_options("--n", "many"), r"Invalid value for '--n'.*integer"),
    "seed": (with_options("--seed", -1), r"--seed must lie between 0 and .*; got -1"),
    "random sets": (with_options("--random-sets", 2), r"--random-sets must be at least 4; got 2"),
    "bos": (with_options("--bos", "<start>"), r"'<start>'"),
    "unknown option": (with_options("--layers", 3), r"No such option: --layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_message_and_nothing_is_written(
    case: str, run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vesalius.model.loading.lookup._hub_answers", lambda: False)
    given, message = BAD[case]
    arguments, out = given(model, pairs, tmp_path), tmp_path / "out"
    random_sets = () if "--random-sets" in arguments else FAST[:2]
    bos = () if "--bos" in arguments else FAST[2:]
    done = run("study", *arguments, "--out", out, *random_sets, *bos)
    assert done.code == 2
    assert done.words.count("error: ") == 1
    assert re.search(message, done.words, re.IGNORECASE), done.words
    assert "Traceback" not in done.err
    assert not out.exists()


def test_bad_input_in_a_process_of_its_own_has_no_traceback(model: Path, tmp_path: Path) -> None:
    done = separate("study", "iio", "--model", model, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith("error: unknown question 'iio'")
    assert done.out == ""


@pytest.mark.parametrize("place", ["a file", "under a file", "/proc/nothing"])
def test_a_folder_that_cannot_be_written_is_named(
    place: str, run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out = {"a file": tmp_path / "file", "under a file": tmp_path / "file" / "deep" / "out"}.get(place, Path(place))
    done = run("study", pairs, "--model", model, "--out", out, *FAST)
    assert done.code == 2
    assert str(out) in done.words
    assert "cannot write" in done.words
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_another_study_is_refused_and_left_alone(
    run: Callable[..., Done], finished: Path, model: Path, pairs: Path
) -> None:
    before = files(finished)
    done = run("study", pairs, "--model", model, "--out", finished, "--seed", 3, *FAST)
    assert done.code == 2
    assert f"{finished} holds another study" in done.words
    assert "choose another folder, or delete" in done.words
    assert files(finished) == before


def test_a_full_disk_names_the_path_and_leaves_no_half_file(
    run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(os, "fsync", full)
    done = run("study", pairs, "--model", model, "--out", out, *FAST)
    assert done.code == 2
    assert f"no space to write {out}/blocks/plan.json" in done.words
    assert "free some, or choose another folder" in done.words
    assert files(out) == {}


def test_a_disk_that_fills_up_on_the_way_keeps_what_is_finished(
    run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, [0]

    def filling(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    out = tmp_path / "out"
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", filling)
        done = run("study", pairs, "--model", model, "--out", out, *FAST)
    assert done.code == 2
    assert f"no space to write {out}/blocks/" in done.words
    assert not any(name.endswith(".part") for name in files(out))
    assert run("study", pairs, "--model", model, "--out", out, *FAST).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "No such command 'nope'"),
        (("study",), "Missing argument 'QUESTION'"),
        (("ledger", "burn"), "No such command 'burn'"),
        (("ledger", "show"), "Missing argument 'FILE'"),
    ],
)
def test_usage_errors_end_with_code_2(run: Callable[..., Done], arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert message.lower() in done.words.lower()


def test_help_lists_the_commands_and_ends_well(run: Callable[..., Done]) -> None:
    done = run("--help")
    assert done.code == 0
    assert all(name in done.out for name in ("study", "sites", "calibrate", "ledger"))


@pytest.mark.parametrize("arguments", [(), ("ledger",)])
def test_without_arguments_the_help_is_shown(run: Callable[..., Done], arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert "Usage: vesalius" in done.out + done.err
    assert "error" not in done.err


def test_a_bug_keeps_its_traceback(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vesalius.cli.sites.show", broken)
    monkeypatch.setattr(sys, "argv", ["vesalius", "sites"])
    with pytest.raises(RuntimeError, match="a bug"):
        main()


# --- sites


def test_sites_prints_the_tree_with_shapes(run: Callable[..., Done], model: Path) -> None:
    done = run("sites", model)
    assert done.code == 0
    assert "tiny (llama): 2 layers" in done.out
    lines = {line.split()[0]: f"{line} " for line in done.out.splitlines() if line.startswith("layers.*.")}
    assert "batch pos head=4 d_head=16 " in lines["layers.*.z"]
    assert "batch pos kv_head=2 d_head=16 " in lines["layers.*.k"]
    assert "batch pos d_model=64 " in lines["layers.*.resid_post"]
    assert "batch pos d_mlp=96 " in lines["layers.*.mlp_post"]
    assert " mlp.hook_post " in lines["layers.*.mlp_post"]
    assert "For reading only, since no module makes it: layers.*.result. Edit z instead." in done.out


def test_sites_of_no_model_is_refused(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("sites", tmp_path / "nothing")
    assert done.code == 2
    assert "there is no model at" in done.words


# --- ledgers


def test_a_ledger_is_shown_with_a_verdict_for_every_claim(run: Callable[..., Done], finished: Path) -> None:
    done = run("ledger", "show", finished / "ledger.sqlite")
    claims = summary_in(finished)["claims"]
    assert done.code == 0
    assert f"{len(claims)} claims" in done.out
    for outcome in ("SUPPORTED", "REFUTED", "INCONCLUSIVE"):
        shown = sum(line.split("│")[1].strip().startswith(outcome[:6]) for line in done.out.splitlines() if "│" in line)
        assert shown == sum(row["verdict"] == outcome for row in claims)


@pytest.mark.parametrize("outcome", ["SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE", "SOMETHING NEW"])
def test_an_outcome_is_shown_in_its_colour_with_its_reason_and_its_p(outcome: str, finished: Path) -> None:
    with Ledger(finished / "ledger.sqlite", create=False) as ledger:
        (family,) = ledger.families()
        verdict = replace(ledger.verdicts(family)[0], p_supported_holm=0.25, p_refuted_holm=0.125)
    object.__setattr__(verdict, "outcome", outcome)
    object.__setattr__(verdict, "reason", "n_too_small")
    shown, *_, p = _cells(family.claims[0], verdict)
    assert shown == f"[{STYLES.get(outcome, 'bold')}]{outcome}[/]\nn too small"
    assert p == ("0.12" if outcome in ("REFUTED", "NOT SPECIFIC") else "0.25")


def test_a_whole_ledger_verifies(run: Callable[..., Done], finished: Path) -> None:
    done = run("ledger", "verify", finished / "ledger.sqlite")
    assert done.code == 0
    assert "records are as they were written" in done.out
    assert f"{len(summary_in(finished)['claims'])} claims" in done.out
    head = json.loads((finished / "summary.json").read_text())["timings"]["ledger_head"]
    assert "summary.json says the same." in done.out and f"Head (hash of the last record): {head}" in done.out
    assert head in (finished / "report.html").read_text()
    given = run("ledger", "verify", finished / "ledger.sqlite", "--head", head)
    assert (given.code, "The record with the given head is there; it is the last." in given.out) == (0, True)


def test_a_ledger_is_exported_with_records_and_verdicts(
    run: Callable[..., Done], finished: Path, tmp_path: Path
) -> None:
    done = run("ledger", "export", finished / "ledger.sqlite", tmp_path / "all.json")
    assert (done.code, done.out.strip()) == (0, str(tmp_path / "all.json"))
    found = json.loads((tmp_path / "all.json").read_text())
    assert {row["outcome"] for row in found["verdicts"]} == {row["verdict"] for row in summary_in(finished)["claims"]}


def test_a_ledger_cannot_be_exported_onto_itself(run: Callable[..., Done], finished: Path) -> None:
    path = finished / "ledger.sqlite"
    before = path.read_bytes()
    done = run("ledger", "export", path, path)
    assert done.code == 2
    assert "is the ledger itself and would be overwritten" in done.words
    assert path.read_bytes() == before


def tampered(path: Path) -> None:
    """A digit of the evidence is changed by someone who knows SQL."""
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER records_no_update")
        connection.execute("UPDATE records SET payload = replace(payload, '0.1', '0.9') WHERE kind = 'evidence'")
    connection.close()


def cut(path: Path) -> None:
    """Whole pages are missing at the end."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "there is no ledger at"),
    "empty": (lambda path: path.write_bytes(b""), "is empty, so it is no ledger"),
    "no SQLite": (lambda path: path.write_text("notes " * 99), "cannot be used as a ledger"),
    "truncated": (cut, "ledger.sqlite"),
    "tampered": (tampered, "was changed after it was written|altered or removed"),
}


@pytest.mark.parametrize("command", ["show", "verify", "export"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_ledger_that_is_not_whole_is_refused(
    damage: str, command: str, run: Callable[..., Done], finished: Path, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(finished / "ledger.sqlite") as source, sqlite3.connect(path) as copy:
        source.backup(copy)
    source.close()
    copy.close()
    change, message = DAMAGE[damage]
    change(path)
    done = run("ledger", command, path, *([tmp_path / "all.json"] if command == "export" else []))
    assert done.code == 2
    assert re.search(message, done.words, re.IGNORECASE), done.words
    assert not (tmp_path / "all.json").exists()


def test_ledger_commands_need_neither_torch_nor_transformers(finished: Path, tmp_path: Path) -> None:
    code = """
import sys
from vesalius.cli import main
ledger, out = sys.argv[1:]
for rest in (["show", ledger], ["verify", ledger], ["export", ledger, out]):
    sys.argv = ["vesalius", "ledger", *rest]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, end.code
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    done = separate(finished / "ledger.sqlite", tmp_path / "all.json", code=code)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "[]"
