"""`vesalius train`: it does what it says, in one process or several, and bad input gets a message and exit code 2."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.dictionaries import Dictionary, load

QUICK = ("--latents", "40", "--k", "4", "--steps", "30", "--batch", "64", "--checkpoint-every", "10")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of a tiny model at two sites."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "a.txt").write_text("the hens and the fox\nhe said 12\n" * 40)
    model = vs.load(str(tiny_folder(tmp_path_factory.mktemp("model"))))
    sites = ["layers.0.mlp_in", "layers.0.mlp_out"]
    vs.data.harvest(model, folder / "a.txt", sites=sites, out=folder / "acts", context=32)
    return folder / "acts"


def test_a_dictionary_is_trained_and_told_about(run: Callable[..., Done], store: Path, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    arguments = ("train", store, "--out", out, *QUICK, "--in-site", "layers.0.mlp_out", "--kind", "batchtopk")
    done = run(*arguments)
    assert done.code == 0, done.err
    trained = load(out)
    assert isinstance(trained, Dictionary)
    assert done.out.splitlines()[0] == repr(trained)
    assert done.out.splitlines()[1].startswith("30 steps; over the last 50 of them fvu 0.")
    assert done.out.splitlines()[-1] == str(out)
    assert trained.metadata["config"]["k"] == 4
    again = run(*arguments)
    assert (again.code, again.out) == (0, done.out)
    assert "holds this dictionary already" in again.words


def test_the_options_reach_the_config(run: Callable[..., Done], store: Path, tmp_path: Path) -> None:
    out = tmp_path / "transcoder"
    done = run("train", store, "--out", out, *QUICK, "--in-site", "*.mlp_in", "--out-site", "*.mlp_out", "--kind",
               "jumprelu", "--sparsity", "0.1", "--skip", "--lr", "0.01", "--seed", "3", "--dead-after", "77",
               "--precision", "bf16")  # fmt: skip
    assert done.code == 0, done.err
    trained = load(out)
    assert isinstance(trained, Dictionary)
    assert repr(trained) == "Dictionary(jumprelu, 40 latents, layers.0.mlp_in -> layers.0.mlp_out)"
    names = ("sparsity", "skip", "lr", "seed", "dead_after", "precision", "steps", "batch_size", "checkpoint_every")
    assert [trained.metadata["config"][name] for name in names] == [0.1, True, 0.01, 3, 77, "bf16", 30, 64, 10]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--kind", "vae"), "unknown kind of dictionary 'vae'; known: batchtopk, gated"),
        (("--k", "0"), "TrainConfig.k must be a whole number, at least 1; got 0"),
        (("--latents", "10", "--k", "11"), "TrainConfig.k is 11, more than n_latents (10)"),
        (("--precision", "fp8"), "unknown precision 'fp8'"),
        ((), "the source has 2 sites"),
        (("--in-site", "layers.7.mlp_in"), "unknown site 'layers.7.mlp_in'"),
        (("--steps", "many"), "Invalid value for '--steps'"),
    ],
)
def test_bad_input_gets_one_message_and_code_2(
    run: Callable[..., Done], store: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = run("train", store, "--out", tmp_path / "x", *arguments)
    assert done.code == 2
    assert words in done.words
    assert not (tmp_path / "x").exists()


def test_a_folder_that_is_no_store_gets_code_2(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("train", tmp_path / "none", "--out", tmp_path / "x")
    assert done.code == 2
    assert "none" in done.words


def test_ctrl_c_keeps_what_was_done(store: Path, tmp_path: Path) -> None:
    arguments = ["train", str(store), "--out", str(tmp_path), "--in-site", "layers.0.mlp_in", "--latents", "40", "--k",
                 "4", "--steps", "1000000", "--batch", "64", "--checkpoint-every", "5"]  # fmt: skip
    main = "from vesalius.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", main, *arguments], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((tmp_path / "checkpoints").glob("*.safetensors")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(told.split())
    assert list((tmp_path / "checkpoints").glob("*.safetensors"))


@pytest.mark.slow
def test_torchrun_trains_in_two_processes(store: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    main = "from vesalius.cli import main; main()"
    arguments = ["train", str(store), "--out", str(tmp_path / "two"), *QUICK, "--in-site", "layers.0.mlp_in"]
    command = [sys.executable, "-c", main, *arguments]
    running = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "30 steps" in told[0]
    assert told[1] == ""
    config = vs.TrainConfig(
        n_latents=40, k=4, steps=30, batch_size=64, checkpoint_every=10, in_sites=("layers.0.mlp_in",)
    )
    one = vs.dictionaries.train(vs.data.ActivationStore.open(store), config)
    assert isinstance(one, Dictionary)
    two = load(tmp_path / "two")
    assert isinstance(two, Dictionary)
    assert max(float((tensor - two.tensors[name]).abs().max()) for name, tensor in one.tensors.items()) < 1e-4


def test_what_was_trained_on_one_short_document_is_said_although_it_cannot_be_judged(
    run: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the hens and the fox he said the hens and the fox")
    done = run("train", "--site", "layers.0.mlp_out", "--model", tiny_folder(tmp_path), "--texts", tmp_path / "a.txt",
               "--context", 64, "--latents", 16, "--k", 2, "--steps", 5, "--out", tmp_path / "sae")  # fmt: skip
    assert done.code == 0, done.words
    trained = load(tmp_path / "sae")
    assert repr(trained) in done.out
    assert "is trained and saved, but not evaluated: all rows are of one context" in " ".join(done.words.split())
