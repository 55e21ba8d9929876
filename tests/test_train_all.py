"""One command from a model to a page on quality; several dictionaries at a time on one harvest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.dictionaries import Dictionary, load, train, train_all
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.jobs import Event

SITE = "layers.1.resid_post"
QUICK = {"n_latents": 24, "steps": 20, "batch_size": 64, "held_out": 0.3, "checkpoint_every": 5}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, and activations of them."""
    folder = tmp_path_factory.mktemp("made")
    model = vs.load(str(tiny_folder(folder)), sink=vs.silent)
    lines = [json.dumps({"text": f"the hens and the fox said {number} " * 6}) for number in range(24)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    vs.data.harvest(
        model, folder / "texts.jsonl", sites=[SITE], out=folder / "acts", context=64, sink=vs.silent
    )  # fmt: skip
    return folder


def test_one_command_goes_from_a_model_to_a_page(run: Callable[..., Done], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    arguments = ("train", "--site", SITE, "--model", made / "tiny", "--texts", made / "texts.jsonl", "--out", out,
                 "--kind", "topk", "--latents", 48, "-k", 4, "--steps", 20, "--held-out", 0.3,
                 "--context", 64)  # fmt: skip
    done = run(*arguments)
    assert done.code == 0, done.err
    names = {path.name for path in out.iterdir()}
    files = {"config.json", "dictionary.safetensors", "history.npz", "metrics.jsonl", "quality.html", "quality.json"}
    assert names == files | {"activations"}
    coder = load(out)
    assert isinstance(coder, Dictionary)
    assert done.out.splitlines()[0] == repr(coder)
    assert done.out.splitlines()[-2:] == [str(out / "quality.html"), str(out)]
    found = json.loads((out / "quality.json").read_text())
    vs.report.quality_schema.check(found)
    assert found["data"]["seen"] is False and found["model"] is not None
    assert found["figures"]["fvu"]["low"] < found["figures"]["fvu"]["high"]
    again = run(*arguments)
    assert (again.code, again.out) == (0, done.out)
    assert "holds this dictionary already" in again.words


def test_a_dictionary_says_which_model_it_is_of_and_how_training_ended(made: Path, tmp_path: Path) -> None:
    model = vs.load(made / "tiny", sink=vs.silent)
    config = vs.TrainConfig(k=3, **QUICK)  # type: ignore[arg-type]
    for source in (
        vs.data.ActivationStore.open(made / "acts"),
        vs.data.stream(model, made / "texts.jsonl", sites=[SITE], buffer=500, context=64),
    ):
        train(source, config, tmp_path / type(source).__name__, sink=vs.silent)
        metadata = json.loads((tmp_path / type(source).__name__ / "config.json").read_text())["metadata"]
        assert [one["sha256"] for one in metadata["models"]] == [model.content_hash]
        assert (metadata["summary"]["steps"], metadata["summary"]["tokens"]) == (20, 20 * 64)
        assert 0 < metadata["summary"]["fvu"] < 1.5


@pytest.mark.slow
def test_every_combination_is_trained_on_one_harvest_and_seeds_are_compared(
    run: Callable[..., Done], made: Path, tmp_path: Path
) -> None:
    done = run("train", "--site", SITE, "--model", made / "tiny", "--texts", made / "texts.jsonl", "--out", tmp_path,
               "--latents", 24, "-k", 2, "-k", 4, "--seed", 0, "--seed", 1, "--steps", 10, "--held-out", 0.3,
               "--context", 64)  # fmt: skip
    assert done.code == 0, done.err
    names = ["k2-seed0", "k2-seed1", "k4-seed0", "k4-seed1"]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "activations"}
    for name in names:
        found = json.loads((tmp_path / name / "quality.json").read_text())
        assert len(found["seeds"]) == 1
        assert f"{name}: Dictionary(topk, k={name[1]}" in done.out


def test_processes_end_with_the_weights_of_one_after_the_other(made: Path, tmp_path: Path) -> None:
    store = vs.data.ActivationStore.open(made / "acts").split(0.4)[0]
    configs = [vs.TrainConfig(k=k, **QUICK) for k in (2, 5)]  # type: ignore[arg-type]
    told: list[Event] = []
    together = train_all(store, configs, tmp_path / "two", jobs=2, sink=told.append)
    assert list(together) == ["k2", "k5"]
    for name, config in zip(together, configs, strict=True):
        alone = train(store, config, sink=vs.silent)
        assert isinstance(alone, Dictionary)
        assert alone.content_hash == together[name].content_hash
    assert {event.task for event in told if event.kind == "advance"} == {"train k2", "train k5"}
    again = train_all(store, configs, tmp_path / "two", sink=vs.silent)
    assert [coder.content_hash for coder in again.values()] == [coder.content_hash for coder in together.values()]


@pytest.mark.slow
def test_when_one_fails_the_others_are_kept_and_its_error_is_raised(made: Path, tmp_path: Path) -> None:
    store = vs.data.ActivationStore.open(made / "acts")
    wild = vs.TrainConfig(k=2, lr=1e30, clip_norm=None, **QUICK)  # type: ignore[arg-type]
    fine = vs.TrainConfig(k=2, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(NotFiniteError, match=r"wild: the loss at step \d+ is NaN or infinite"):
        train_all(store, {"wild": wild, "fine": fine}, tmp_path, jobs=2, sink=vs.silent)
    assert load(tmp_path / "fine").n_latents == 24
    lost = vs.TrainConfig(k=2, in_sites=("layers.9.z",), **QUICK)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"lost: unknown site 'layers\.9\.z'"):
        train_all(store, {"lost": lost}, tmp_path, jobs=2, sink=vs.silent)


@pytest.mark.slow
def test_ctrl_c_reaches_every_process_once_and_the_same_command_goes_on(made: Path, tmp_path: Path) -> None:
    arguments = ["train", str(made / "acts"), "--out", str(tmp_path), "--latents", "24", "-k", "2", "-k", "4",
                 "--steps", "1000000", "--batch", "64", "--checkpoint-every", "5", "--jobs", "2"]  # fmt: skip
    # Whoever runs the tests in the background has a shell that lets its processes ignore Ctrl-C.
    main = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from vesalius.cli import main; main()"
    names = ("k2", "k4")
    process = subprocess.Popen([sys.executable, "-c", main, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not all(list(tmp_path.glob(f"{k}/checkpoints/*.safetensors")) for k in names):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(told.split())
    for name in names:
        last = max((tmp_path / name / "checkpoints").glob("*.safetensors"))
        steps = [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == int(last.stem)  # a checkpoint at the very step where it ended


@pytest.mark.slow
def test_a_killed_parent_leaves_no_process_behind(made: Path, tmp_path: Path) -> None:
    arguments = ["train", str(made / "acts"), "--out", str(tmp_path), "--latents", "24", "-k", "2", "-k", "4",
                 "--steps", "1000000", "--batch", "64", "--jobs", "2"]  # fmt: skip
    main = "from vesalius.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", main, *arguments], stderr=subprocess.DEVNULL)
    metrics = [tmp_path / name / "metrics.jsonl" for name in ("k2", "k4")]
    while process.poll() is None and not all(path.exists() and path.stat().st_size for path in metrics):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    sizes = [path.stat().st_size for path in metrics]
    time.sleep(0.5)
    assert [path.stat().st_size for path in metrics] == sizes


def test_configs_that_cannot_be_trained_together_are_refused(tmp_path: Path) -> None:
    config, rows = vs.TrainConfig(k=2, **QUICK), torch.randn(99, 8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one config and one job"):
        train_all(rows, [], tmp_path)
    with pytest.raises(InputError, match="2 configs were given, and only 1 differ"):
        train_all(rows, [config, config], tmp_path)
    with pytest.raises(InputError, match="several jobs train from a store"):
        train_all(rows, [config], tmp_path, jobs=2)
    assert list(train_all(rows, {"mine": config}, tmp_path, sink=vs.silent)) == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a folder of activations (made by harvest), or --site"),
        (("ACTS", "--site", SITE, "--out", "OUT"), "give a folder of activations, or --site to make them"),
        (("ACTS",), "--out is needed"),
        (("ACTS", "--out", "OUT", "--jobs", "0"), "--jobs must be at least 1"),
        (("ACTS", "--out", "OUT", "-k", "2", "-k", "2"), "2 configs were given, and only 1 differ"),
        (("--site", SITE, "--out", "OUT", "--latents", "8", "-k", "9"), "TrainConfig.k is 9, more than n_latents (8)"),
        (("--site", SITE, "--out", "OUT", "--texts", "none.txt"), "there is no file or folder"),
        (("--site", SITE, "--out", "OUT", "--texts", "EMPTY"), "no activations: 1 texts, 1 of them empty"),
        (("--site", "layers.9.resid_post", "--out", "OUT", "--texts", "TEXTS"), "tiny has 2 layers, numbered from 0"),
        (("--site", SITE, "--out", "OUT", "--tokens", "0"), "--tokens must be at least 1"),
    ],
)
def test_bad_input_gets_one_message_code_2_and_leaves_nothing(
    run: Callable[..., Done], made: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    stand = {"ACTS": made / "acts", "OUT": tmp_path / "out", "TEXTS": made / "texts.jsonl",
             "EMPTY": tmp_path / "empty.txt"}  # fmt: skip
    told = [stand.get(argument, argument) for argument in arguments]
    done = run("train", *told, *(("--model", made / "tiny", "--context", 64) if "ACTS" not in arguments else ()))
    assert done.code == 2
    assert words in done.words
    assert not (tmp_path / "out").exists()
