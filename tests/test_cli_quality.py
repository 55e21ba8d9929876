"""`vesalius quality`: it writes a page and the figures, says the answer, and refuses bad input in one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder

SITE = "layers.1.resid_post"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, activations, and dictionaries of two seeds."""
    folder = tmp_path_factory.mktemp("quality")
    model = vs.load(str(tiny_folder(folder)))
    texts = [f"the hens and the fox said {number} " * 6 for number in range(24)]
    store = vs.data.harvest(model, texts, sites=[SITE], out=folder / "acts", context=64)
    for seed in (0, 1):
        config = vs.TrainConfig(n_latents=48, k=4, steps=20, batch_size=64, seed=seed, held_out=0.3)
        vs.dictionaries.train(store, config, folder / f"sae{seed}")
    return folder


def test_figures_and_page_are_written_and_the_answer_is_said(
    run: Callable[..., Done], made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page"
    done = run("quality", made / "sae0", made / "acts", "--model", made / "tiny", "--other", made / "sae1",
               "--rows", 400, "--contexts", 8, "--out", out)  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((out / "quality.json").read_text())
    vs.report.quality_schema.check(found)
    assert found["data"]["seen"] is False
    assert [len(found["seeds"]), len(found["baselines"])] == [1, 4]
    lines = done.out.splitlines()
    assert [*lines[:-2], lines[-1]] == [*vs.report.quality_answer(found), str(out / "quality.html")]
    shares = [name for name in ("loss_recovered_mean", "loss_recovered") if name in found["figures"]]
    for name in ("fvu", "ce_increase", *shares):
        one = found["figures"][name]
        assert f"{name} {one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]" in lines[-2]
    assert lines[-2].endswith(f"(95 % over {found['data']['groups']} documents)")
    assert "those trained on were 0 to" in done.words
    assert "vesalius quality" in (out / "quality.html").read_text()


def test_concepts_are_probed_with_all_the_seeds(run: Callable[..., Done], made: Path, tmp_path: Path) -> None:
    rows = [
        f"the {'hens' if n % 2 else 'fox'} said {n},{'birds' if n % 2 else 'beasts'},{n % 3 > 0:d}" for n in range(96)
    ]
    (tmp_path / "animals.csv").write_text("sentence,kind,odd\n" + "\n".join(rows))
    words = ("--model", made / "tiny", "--concepts", tmp_path / "animals.csv", "--text", "sentence", "--label", "kind")
    done = run("quality", made / "sae0", made / "acts", "--other", made / "sae1", *words, "--mark", "odd",
               "--contexts", 2, "--rows", 100, "--out", tmp_path / "page")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "page" / "quality.json").read_text())["concepts"]
    assert [scores["metric"] for scores in found] == ["sparse probing", "absorption", "spurious-correlation removal"]
    assert all(len(line["values"]) == 2 for line in found[0]["lines"] if line["method"] == "latents")
    page = (tmp_path / "page" / "quality.html").read_text()
    assert "Sparse probing on animals" in page and "2605.18229" in page
    missing = run("quality", made / "sae0", made / "acts", *words[:4], "--out", tmp_path / "none")
    assert missing.code == 2 and "animals.csv lacks text, label" in missing.words
    alone = run("quality", made / "sae0", made / "acts", *words[2:], "--out", tmp_path / "none")
    assert alone.code == 2 and "give --model as well" in alone.words


def test_without_a_model_it_says_what_is_missing(run: Callable[..., Done], made: Path, tmp_path: Path) -> None:
    done = run("quality", made / "sae0", made / "acts", "--out", tmp_path / "page", "--seed", 3)
    assert done.code == 0, done.err
    assert "--model measures what the model loses" in done.words
    found = json.loads((tmp_path / "page" / "quality.json").read_text())
    assert (found["model"], found["data"]["seed"]) == (None, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "acts"], "there is no file or folder"),
        (["sae0", "sae1"], "is no activation store"),
        (["sae0", "acts", "--rows", "0"], "--rows must be at least 1; got 0"),
        (["sae0", "acts", "--contexts", "0"], "--contexts must be at least 1"),
        (["sae0", "acts", "--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_input_is_told_in_one_message(
    run: Callable[..., Done], made: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    paths: list[Any] = [made / argument for argument in arguments[:2]]
    done = run("quality", *paths, *arguments[2:], "--out", tmp_path / "page")
    assert done.code == 2
    assert words in done.words
    assert not (tmp_path / "page").exists()
