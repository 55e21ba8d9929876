"""`vesalius harvest`: it does what it says, and every kind of bad input gets one message and exit code 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import vesalius as vs
from test_cli import Done, files, separate
from test_cli import run as run
from tiny_folder import tiny_folder

SITE = ("--site", "layers.1.resid_post", "--context", "64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("the hens and the fox\n" * 20)
    (folder / "b.jsonl").write_text('{"text": "he said 12", "id": 1}\n{"text": "", "id": 2}\n')
    (folder / "readme.md").write_text("no text")
    return folder


def test_a_harvest_writes_a_store_and_says_what_is_in_it(
    run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "acts"
    arguments = ("harvest", texts, "--model", model, *SITE, "--site", "layers.0.z[1]", "--out", out)
    done = run(*arguments)
    assert done.code == 0, done.err
    store = vs.data.ActivationStore.open(out)
    assert re.match(rf"{store.n_rows} rows from 3 texts \(1 of them empty\), as float32 in 1 shards, ", done.out)
    assert done.out.splitlines()[1:] == [
        "layers.1.resid_post: width 64", "layers.0.z[1]: width 16",
        "bos <|start|>, first position dropped, 0 norm outliers dropped",
        str(out),
    ]  # fmt: skip
    assert "expected cost: about" in done.words
    assert "1 files are not texts and are left out: readme.md" in done.words
    assert "1 of 3 texts are empty and give no activations" in done.words
    before = files(out)
    assert run(*arguments).code == 0
    assert files(out) == before


def test_the_options_reach_the_harvest(run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    done = run("harvest", texts, "--model", model, "--site", "layers.*.mlp_out", "--out", out, "--tokens", 50,
               "--dtype", "float16", "--compute", "bfloat16", "--bos", "<|end|>", "--keep-bos",
               "--context", 20)  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads((out / "manifest.json").read_text())["plan"]
    assert [plan[name] for name in ("dtype", "compute", "tokens", "context")] == [
        "float16",
        "bfloat16 weights",
        50,
        20,
    ]
    assert plan["bos"] == {"token": "<|end|>", "id": 0, "kept": True}
    assert [site["site"] for site in plan["sites"]] == ["layers.0.mlp_out", "layers.1.mlp_out"]
    lines = done.out.splitlines()
    assert re.fullmatch(
        r"layers\.0\.mlp_out: width 64, bfloat16 weights: relative error 0\.0\d+ on the first batch", lines[1]
    )
    assert lines[3] == "bos <|end|>, first position kept, 0 norm outliers dropped"


def test_two_models_are_read_on_the_same_tokens(
    run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path
) -> None:
    arguments = ("harvest", texts, *SITE, "--model", f"base={model}", "--model", f"chat={model}")
    done = run(*arguments, "--out", tmp_path / "acts")
    assert done.code == 0, done.err
    store = vs.data.ActivationStore.open(tmp_path / "acts")
    assert [site.tag for site in store.sites] == ["base", "chat"]
    one, other = store.at(range(store.n_rows))
    assert torch.equal(one, other)
    twice = run("harvest", texts, *SITE, "--model", f"x={model}", "--model", f"x={model}", "--out", tmp_path / "no")
    assert twice.code == 2 and "two models have the tag 'x'" in twice.words


def test_a_column_of_another_name(run: Callable[..., Done], model: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "the hens"}\n')
    done = run("harvest", path, "--model", model, *SITE, "--out", tmp_path / "acts", "--column", "body")
    assert done.code == 0, done.err


BAD: dict[str, tuple[list[Any], str]] = {
    "texts that are not there": (["nowhere.jsonl"], "there is no file or folder .*nowhere.jsonl; texts are 'stdlib'"),
    "no site": ([], "Missing option '--site'"),
    "unknown site": (["--site", "layers.0.nothing"], "unknown site inside a layer 'nothing'; known: attn_out"),
    "malformed site": (["--site", "layers.x"], "'layers.x' is not a site name"),
    "site of another model": (["--site", "layers.9.mlp_out"], "layers.9.mlp_out: tiny has 2 layers"),
    "attention": (["--site", "layers.0.pattern"], "rows are tokens, so a site must be"),
    "no tokens": ([*SITE, "--tokens", 0], "--tokens must be at least 1; got 0"),
    "short context": ([*SITE, "--context", 2], "context must be at least 3 tokens; got 2"),
    "long context": ([*SITE, "--context", 4096], "context 4096 is longer than the 128 positions of tiny"),
    "context that is no number": ([*SITE, "--context", "long"], "Invalid value for '--context'"),
    "dtype": ([*SITE, "--dtype", "int8"], "unknown --dtype 'int8'; known: bfloat16, float16, float32"),
    "compute": ([*SITE, "--compute", "float64"], "unknown --compute 'float64'; known: bfloat16, float32"),
    "max norm": ([*SITE, "--max-norm", 0.5], "must be above 1 \\(or None\\); got 0.5"),
    "bos": ([*SITE, "--bos", "the"], "bos 'the' is not a special token of this tokenizer"),
    "column": ([*SITE, "--column", "body"], r"unknown column \(.*b.jsonl, line 1\) 'body'; known: id, text"),
    "model": ([*SITE, "--model", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_gets_one_message_and_writes_nothing(
    bad: str, run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, message = BAD[bad]
    first = [options[0], *SITE] if bad.startswith("texts") else [texts, *options]
    model_option = [] if bad == "model" else ["--model", model]
    done = run("harvest", *first, *model_option, "--out", tmp_path / "acts")
    assert done.code == 2, done.err
    assert re.search(message, done.words), done.words
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_refused(
    run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path
) -> None:
    done = run("harvest", texts, "--model", model, *SITE, "--out", texts)
    assert done.code == 2
    assert re.search(r"is not empty and no activation store \(it holds a.txt\)", done.words)
    assert run("harvest", texts, "--model", model, *SITE, "--out", tmp_path / "acts").code == 0
    done = run("harvest", texts, "--model", model, *SITE, "--out", tmp_path / "acts", "--context", 99)
    assert done.code == 2
    assert "holds another harvest (context: 64 there, 99 asked for)" in done.words


def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(
    run: Callable[..., Done], model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("harvest", texts, "--model", model, *SITE, "--out", tmp_path / "acts")
    written = 0
    plain = import_module("vesalius.data.harvest").write_shard

    def interrupted(*given: Any) -> Any:
        nonlocal written
        written += 1
        if written == 1:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(import_module("vesalius.data.harvest"), "write_shard", interrupted)
    done = run(*arguments)
    assert done.code == 130
    assert "the same command goes on from there" in done.words
    assert run(*arguments).code == 0


def test_without_torch_nothing_is_loaded_for_help() -> None:
    code = "import sys; from vesalius.cli import main\ntry:\n    sys.argv = ['vesalius', 'harvest', '--help']; main()\n"
    code += "except SystemExit:\n    print('torch' in sys.modules)"
    done = separate(code=code)
    assert done.out.splitlines()[-1] == "False", done.err
    assert "stdlib (a built-in corpus)" in " ".join(done.out.replace("│", " ").split())
