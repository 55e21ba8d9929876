"""`vesalius steer`: it does what it says, and every kind of bad input gets one message and exit code 2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vesalius as vs
from pages import Page
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("the hens\nhe said\n\nthe fox\n")
    (folder / "up.txt").write_text("the hens and the fox\nhe said 12\n")
    (folder / "down.txt").write_text("12 12 12\nfox fox\n")
    (folder / "empty.txt").write_text("\n")
    rows = [{"text": "the hens and the fox said 12 and he said"}] * 3
    (folder / "plain.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def call(run: Callable[..., Done], model: Path, files: Path, out: Path, *more: object) -> Done:
    plain = ("--plain-texts", 2, "--context", 8, "--plain", files / "plain.jsonl")
    return run("steer", files / "prompts.txt", "--model", model, "--out", out, *plain, *more)


def contrast(files: Path) -> tuple[object, ...]:
    return ("--positive", files / "up.txt", "--negative", files / "down.txt", "--site", "layers.0.resid_post")


def test_a_contrastive_vector_gives_a_page_figures_and_sentences(
    run: Callable[..., Done], model: Path, files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "steered"
    done = call(run, model, files, out, *contrast(files), "--scale", 1, "--scale", "-2", "--new-tokens", 3)
    assert done.code == 0, done.err
    assert "expected cost: about" in done.words
    lines = done.out.splitlines()
    assert re.match(
        r"x \d+\.?\d*: KL\(unsteered \|\| steered\) \S+ \[.*\] nats, random directions .*, p 0?\.\d+; perp", lines[0]
    )
    assert lines[-1] == str(out / "steering.html")
    found = json.loads((out / "steering.json").read_text())
    assert [one["scale"] > 0 for one in found["scales"]] == [True, False]
    assert [one["multiple"] for one in found["scales"]] == [1.0, -2.0]
    assert lines[-3].startswith("x 1: ") and found["prompts"]
    assert found["scales"][1]["scale"] == pytest.approx(-2 * found["scales"][0]["scale"])
    assert len(found["scales"][0]["random_means"]) == 19
    assert len(found["scales"][0]["effect"]["values"]) == 3
    assert found["scales"][0]["off_distribution"][0][0]["norm_ratio"] > 0
    loaded = vs.load(model)
    sides = [(files / name).read_text().splitlines() for name in ("up.txt", "down.txt")]
    size = vs.describe.contrast_vector(loaded, "layers.0.resid_post", *sides).size
    assert found["scales"][0]["scale"] == pytest.approx(size)
    page = Page((out / "steering.html").read_text())
    assert (page.badly_closed, page.open) == ([], [])
    assert "up - down" in page.text
    assert page.count("circle", "random") == 2 * 19
    assert not page.scripts
    assert found["instead"] is None
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.npz")}
    assert call(run, model, files, out, *contrast(files), "--scale", 1, "--scale", "-2", "--new-tokens", 3).code == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.npz")} == kept


def test_asking_instead_stands_beside_steering(
    run: Callable[..., Done], model: Path, files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "asked"
    asked = ("--scale", 1, "--new-tokens", 2, "--plain-texts", 0, "--instead", "the cat ")
    done = call(run, model, files, out, *contrast(files), *asked)
    assert done.code == 0, done.err
    assert "Asked instead, “the cat” before the prompts: " in done.out
    found = json.loads((out / "steering.json").read_text())
    loaded = vs.load(model)
    prompts = found["prompts"]
    both = [loaded.tokens(texts) for texts in (prompts, ["the cat " + text for text in prompts])]
    last = [loaded.run(one).logits[torch.arange(len(one)), one.lengths - 1].log_softmax(-1) for one in both]
    expected = (last[0].exp() * (last[0] - last[1])).sum(-1)
    assert found["instead"]["effect"]["values"] == pytest.approx(expected.tolist(), abs=1e-4)
    page = Page((out / "steering.html").read_text())
    assert (page.badly_closed, page.open) == ([], [])
    assert page.count("line", "asked") == 1 and "asked instead" in page.text
    refused = run("steer", "ioi", "--model", model, "--out", out, *contrast(files), "--instead", "x")
    assert refused.code == 2 and "--instead is put before texts" in refused.err


def test_a_neuron_towards_a_token_without_plain_text(
    run: Callable[..., Done], model: Path, files: Path, tmp_path: Path
) -> None:
    done = call(run, model, files, tmp_path / "out", "--part", "layers.0.mlp_post[3]", "--scale", 4, "--towards", "x",
                "--plain-texts", 0)  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "steering.json").read_text())
    assert found["metric"] == "log-probability of 'x'"
    assert found["scales"][0]["price"] is None
    assert "perplexity" not in done.out


BAD: dict[str, tuple[list[Any], str]] = {
    "nothing to steer by": ([], "say what to steer by: --positive FILE --negative FILE --site SITE"),
    "two ways": (["--part", "layers.0.mlp_post[3]", "--site", "layers.0.resid_post"], "say what to steer by"),
    "half a contrast": (["--positive", "{files}/up.txt"], "say what to steer by"),
    "no latent": (["--dictionary", "{files}"], "say what to steer by"),
    "missing file": (["--positive", "{files}/no.txt", "--negative", "{files}/up.txt", "--site", "layers.0.resid_post"],
                     "there is no file .*no.txt"),
    "no prompts": (["--positive", "{files}/empty.txt", "--negative", "{files}/up.txt", "--site", "layers.0.resid_post"],
                   "holds no prompts; write one a line"),
    "no such site": (["--part", "layers.9.mlp_post[3]"], "layers.9.mlp_post\\[3\\]: tiny has 2 layers"),
    "no number": (["--part", "layers.0.mlp_out"], "needs vector=, or a part with one number per position"),
    "few random": (["--part", "layers.0.mlp_post[3]", "--random", 3], "--random must be at least 19; got 3"),
    "long context": (["--part", "layers.0.mlp_post[3]", "--context", 100], "has 0 texts of 100 tokens; at least 2"),
    "scale": (["--part", "layers.0.mlp_post[3]", "--scale", "nan"], "scales are different finite numbers"),
    "device": (["--part", "layers.0.mlp_post[3]", "--device", "abacus"], "unknown device 'abacus'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_message_and_code_2(
    run: Callable[..., Done], model: Path, files: Path, tmp_path: Path, what: str
) -> None:
    arguments, message = BAD[what]
    done = call(run, model, files, tmp_path / "out", *(str(one).format(files=files) for one in arguments))
    assert done.code == 2
    assert re.search(message, done.words), done.words
    assert not (tmp_path / "out" / "steering.html").exists()


def test_prompts_of_another_kind_are_refused(
    run: Callable[..., Done], model: Path, files: Path, tmp_path: Path
) -> None:
    done = run("steer", tmp_path / "x.pkl", "--model", model, "--part", "layers.0.mlp_post[3]", "--out", tmp_path / "o")
    assert done.code == 2
    assert "there is no file" in done.words
    done = run("steer", "ioi", "--model", model, "--part", "layers.0.mlp_post[3]", "--towards", "x", "--out", tmp_path)
    assert done.code == 2
    assert "--towards is for prompts without answers" in done.words
