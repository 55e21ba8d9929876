"""What goes wrong between text and dictionary is told in one message with exit code 2, and earlier work is kept."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder

SITE = "layers.1.resid_post"
HARVEST = ("--site", SITE, "--context", 64)
QUICK = ("--latents", 24, "-k", 3, "--steps", 20, "--batch", 64, "--held-out", 0.3)
SHORT = vs.TrainConfig(n_latents=24, k=3, steps=3, batch_size=32)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny_folder(folder)
    (folder / "texts").mkdir()
    for number in range(24):
        (folder / "texts" / f"{number:02}.txt").write_text(f"the hens and the fox said {number} " * 6)
    return folder


@pytest.fixture
def made(template: Path, tmp_path: Path, run: Callable[..., Done]) -> Path:
    """Model, texts, and activations in several shards."""
    shutil.copytree(template, tmp_path / "made")
    model = vs.load(tmp_path / "made" / "tiny", sink=vs.silent)
    vs.data.harvest(
        model, tmp_path / "made" / "texts", sites=[SITE], out=tmp_path / "made" / "acts", context=64,
        shard_bytes=40_000, sink=vs.silent,
    )  # fmt: skip
    assert len(list((tmp_path / "made" / "acts").glob("*.safetensors"))) > 2
    return tmp_path / "made"


def change(folder: Path, name: str, value: float) -> None:
    """Set the first row of a weight of the model in a folder."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    (key,) = [key for key in weights if name in key]
    weights[key][0] = value
    save_file(weights, file, metadata={"format": "pt"})


def test_activations_that_are_no_numbers_are_told_with_shard_and_token(
    run: Callable[..., Done], made: Path, tmp_path: Path
) -> None:
    for name in ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"):
        change(made / "tiny", name, 3e30)
    done = run(
        "harvest", made / "texts", "--model", made / "tiny", "--site", SITE, "--out", tmp_path / "new", "--context", 64
    )
    assert done.code == 2
    assert (
        f"shard-00000.safetensors, which is not written: {SITE} holds NaN or infinity, first at position" in done.words
    )
    assert "of document 0, '" in done.words
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_a_model_that_changed_since_the_harvest_is_noticed(
    run: Callable[..., Done], made: Path, tmp_path: Path
) -> None:
    assert run("train", made / "acts", "--out", tmp_path / "sae", *QUICK).code == 0
    change(made / "tiny", "layers.0.mlp.up_proj", 0.5)
    done = run("quality", tmp_path / "sae", made / "acts", "--model", made / "tiny", "--out", tmp_path / "page")
    assert done.code == 2
    assert "the activations are of tiny with other weights than tiny has; give that model" in done.words
    assert not (tmp_path / "page").exists()
    before = (made / "acts" / "manifest.json").read_bytes()
    done = run(
        "harvest", made / "texts", "--model", made / "tiny", "--site", SITE, "--out", made / "acts", "--context", 64
    )
    assert done.code == 2
    assert "holds another harvest (models" in done.words
    assert (made / "acts" / "manifest.json").read_bytes() == before


def test_a_shard_that_was_altered_stops_training_and_quality_and_names_the_file(
    run: Callable[..., Done], made: Path, tmp_path: Path
) -> None:
    assert run("train", made / "acts", "--out", tmp_path / "good", *QUICK).code == 0
    shard = made / "acts" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    for arguments in (
        ("train", made / "acts", "--out", tmp_path / "new", *QUICK, "--seed", 1),
        ("quality", tmp_path / "good", made / "acts", "--out", tmp_path / "new"),
    ):
        done = run(*arguments)
        assert done.code == 2
        assert "shard-00001.safetensors" in done.words and "run the same harvest again" in done.words
        assert not (tmp_path / "new" / "config.json").exists() and not (tmp_path / "new" / "quality.html").exists()


def test_activations_of_another_width_or_site_are_refused(run: Callable[..., Done], made: Path, tmp_path: Path) -> None:
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    source = vs.data.TensorSource(rows, sites=[SITE])
    vs.dictionaries.train(source, SHORT, tmp_path / "sae", sink=vs.silent)
    done = run("quality", tmp_path / "sae", made / "acts", "--out", tmp_path / "page")
    assert done.code == 2
    assert f"{SITE}" in done.words and "12" in done.words and "width" in done.words
    other = vs.data.TensorSource(rows, sites=["layers.0.mlp_in"])
    vs.dictionaries.train(other, SHORT, tmp_path / "o", sink=vs.silent)
    done = run("quality", tmp_path / "o", made / "acts", "--out", tmp_path / "page")
    assert done.code == 2
    assert "the activations have no layers.0.mlp_in" in done.words
    assert not (tmp_path / "page").exists()


def test_a_full_disk_stops_training_and_the_same_command_goes_on(
    run: Callable[..., Done], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("train", made / "acts", *QUICK, "--checkpoint-every", 5)
    assert run(*arguments, "--out", tmp_path / "whole").code == 0
    real, written = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    done = run(*arguments, "--out", tmp_path / "sae")
    assert done.code == 2
    assert "no space to write" in done.words and "free some, or choose another folder" in done.words
    assert (tmp_path / "sae" / "checkpoints").is_dir() and not (tmp_path / "sae" / "config.json").exists()
    monkeypatch.undo()
    (tmp_path / "sae").rename(tmp_path / "moved")
    from_checkpoint = run(*arguments, "--out", tmp_path / "moved")
    assert from_checkpoint.code == 0 and "going on after step" in from_checkpoint.words
    one, other = (vs.dictionaries.load(tmp_path / name) for name in ("whole", "moved"))
    assert one.content_hash == other.content_hash
