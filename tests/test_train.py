"""`train`: interrupted or not, the same weights bit for bit; files that were damaged are found; data are checked."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vesalius as vs
from vesalius.cli.training import summary
from vesalius.data import TensorSource
from vesalius.dictionaries import Coder, CrossLayerTranscoder, Dictionary, TrainConfig, estimate, load, train
from vesalius.errors import InputError, NotFiniteError, UnknownNameError
from vesalius.jobs import Event

D, N = 12, 900
KINDS = ["relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(N, D) * torch.linspace(0.2, 2.0, D) + 0.3
Y = X @ normal(D, 7, seed=5)


def config_of(kind: str = "topk", **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "kind": kind, "n_latents": 32, "k": 4, "batch_size": 128, "steps": 12, "checkpoint_every": 4, "seed": 3,
        "dead_after": 300,
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


def same(one: Coder, other: Coder) -> bool:
    assert isinstance(one, Dictionary | CrossLayerTranscoder)
    assert isinstance(other, Dictionary | CrossLayerTranscoder)
    assert one.history is not None
    assert other.history is not None
    curves = all((one.history[name] == other.history[name]).all() for name in ("loss", "fvu", "l0", "dead", "lr"))
    return curves and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def interrupting(at: int) -> Callable[[Event], None]:
    """A sink that presses ctrl-C after a step."""

    def sink(event: Event) -> None:
        if event.kind == "advance" and event.done == at:
            os.kill(os.getpid(), signal.SIGINT)

    return sink


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, kind: str) -> None:
    config = config_of(kind, dead="resample" if kind == "relu" else None, resample_every=5)
    whole = train(X, config)
    for at in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            train(X, config, tmp_path / "run", sink=interrupting(at))
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()][-1:] != []
        assert not (tmp_path / "run" / "config.json").exists()
    notes: list[str] = []
    resumed = train(X, config, tmp_path / "run", sink=lambda event: notes.append(event.message))
    assert any("going on after step 8" in note for note in notes)
    assert same(resumed, whole)
    assert same(load(tmp_path / "run"), whole)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_is_loaded_and_another_is_refused(tmp_path: Path) -> None:
    first = train(X, config_of(), tmp_path)
    notes: list[str] = []
    again = train(X, config_of(), tmp_path, sink=lambda event: notes.append(event.message))
    assert same(first, again)
    assert notes == [f"{tmp_path} holds this dictionary already"]
    for data, config in ((X, config_of(seed=4)), (X + 1, config_of())):
        with pytest.raises(InputError, match="holds another dictionary"):
            train(data, config, tmp_path)


KILLED = """
import os, signal, sys, torch
sys.path[:0] = {path}
torch.set_num_threads(1)
from test_train import X, config_of
from vesalius.dictionaries import train
def sink(event):
    if event.kind == "advance" and event.done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(X, config_of("batchtopk"), sys.argv[1], sink=sink)
"""


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    code = KILLED.format(path=[str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), "6"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000004.safetensors"]
    assert same(train(X, config_of("batchtopk"), tmp_path), train(X, config_of("batchtopk")))


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(X, config_of(), tmp_path, sink=interrupting(9))
    older, newer = sorted((tmp_path / "checkpoints").iterdir())
    data = newer.read_bytes()
    middle = len(data) // 2
    newer.write_bytes(
        data[:middle] if damage == "truncate" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    )
    notes: list[str] = []
    resumed = train(X, config_of(), tmp_path, sink=lambda event: notes.append(event.message))
    assert any(str(newer) in note and "altered" in note for note in notes)
    assert any(str(older) in note and "going on after step 8" in note for note in notes)
    assert same(resumed, train(X, config_of()))


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(X, config_of(), tmp_path, sink=interrupting(9))
    with pytest.raises(InputError, match="belongs to another config or other data"):
        train(X, config_of(seed=9), tmp_path)


def test_training_in_another_thread_works_too() -> None:
    found: list[Coder] = []
    thread = threading.Thread(target=lambda: found.append(train(X, config_of())))
    thread.start()
    thread.join()
    assert same(found[0], train(X, config_of()))


def test_the_number_of_threads_does_not_change_the_weights() -> None:
    config = config_of(batch_size=1100, n_latents=700, steps=3)
    one = train(X, config)
    torch.set_num_threads(2)
    try:
        assert same(train(X, config), one)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated"])
def test_the_number_of_threads_does_not_change_a_skip(kind: str) -> None:
    """Of widths and rows at which PyTorch shares a product among threads."""
    x, y = normal(1200, 160, seed=8), normal(1200, 130, seed=9)
    config = config_of(kind, batch_size=1100, steps=3, skip=True, coder="transcoder")
    one = train((x, y), config)
    torch.set_num_threads(2)
    try:
        assert same(train((x, y), config), one)
    finally:
        torch.set_num_threads(1)


def test_the_seed_decides() -> None:
    assert same(train(X, config_of()), train(X.clone(), config_of()))
    assert not torch.equal(train(X, config_of(seed=4)).encode(X), train(X, config_of()).encode(X))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_every_coder(kind: str, tmp_path: Path) -> None:
    sites = [f"layers.{layer}.{name}" for name in ("mlp_in", "mlp_out") for layer in (0, 1)]
    source = TensorSource(X, X * 2 + 1, Y, Y @ normal(7, 5, seed=6), sites=sites)
    ins, outs = tuple(sites[:2]), tuple(sites[2:])
    coders = {
        "sae": config_of(kind, in_sites=ins[:1], out_sites=ins[:1]),
        "transcoder": config_of(kind, in_sites=ins[:1], out_sites=outs[:1], skip=True),
        "crosscoder": config_of(kind, in_sites=ins, out_sites=ins),
        "cross_layer": config_of(kind, coder="cross_layer", in_sites=("layers.*.mlp_in",), out_sites=outs),
    }  # fmt: skip
    for coder, config in coders.items():
        found = train(source, config, tmp_path / coder)
        assert found.metadata["coder"] == coder  # type: ignore[attr-defined]
        x = tuple(source._tensors[source.sites.index(site)] for site in found.in_sites)
        latents = found.encode(x if len(x) > 1 else x[0])
        assert latents.shape == (N, found.n_latents)
        indices, values = found.encode_sparse(x if len(x) > 1 else x[0])
        torch.testing.assert_close(torch.zeros_like(latents).scatter_add(1, indices, values), latents)
        assert load(tmp_path / coder).content_hash == found.content_hash


def test_a_plain_pair_is_a_transcoder_and_one_tensor_a_sae() -> None:
    sae, transcoder = train(X, config_of()), train((X, Y), config_of())
    assert (sae.metadata["coder"], transcoder.metadata["coder"]) == ("sae", "transcoder")  # type: ignore[attr-defined]
    assert isinstance(sae, Dictionary)
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((D, 32), (32, D))
    assert isinstance(transcoder, Dictionary)
    assert (transcoder.W_enc.shape, transcoder.W_dec.shape) == ((D, 32), (32, 7))
    assert vs.dictionaries.train is train


def test_a_saved_dictionary_reconstructs_the_raw_activations() -> None:
    x = 100 * X
    sae = train(x, config_of(steps=150, k=6))
    assert isinstance(sae, Dictionary)
    error = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert sae.history is not None
    assert float(error) == pytest.approx(float(sae.history["fvu"][-20:].mean()), rel=0.1)
    assert float(error) < 0.3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.in_scale == (1.0,)
    unfolded = train(x, config_of(steps=150, k=6, fold=False))
    assert isinstance(unfolded, Dictionary)
    assert unfolded.in_scale == (pytest.approx(float(D**0.5 / x.norm(dim=1).mean())),)
    torch.testing.assert_close(unfolded.reconstruct(x), sae.reconstruct(x), rtol=1e-3, atol=1e-2)


def test_a_batchtopk_threshold_gives_about_k_latents_per_row() -> None:
    sae = train(X, config_of("batchtopk", steps=200))
    assert float((sae.encode(X) > 0).sum(1).double().mean()) == pytest.approx(4, rel=0.15)


def test_the_history_says_what_happened(tmp_path: Path) -> None:
    sae = train(X, config_of(steps=30), tmp_path)
    assert isinstance(sae, Dictionary)
    assert sae.history is not None
    assert len(sae.history) == 30
    assert sae.history["l0"].tolist() == pytest.approx([4.0] * 30, abs=0.3)
    assert sae.history["fvu"][-1] < sae.history["fvu"][0]
    assert sae.history["lr"].tolist() == [config_of(steps=30).lr_at(step) for step in range(30)]
    assert "<svg" in sae._repr_html_()
    assert (tmp_path / "history.npz").exists()


def test_resampled_latents_are_not_dead_any_more() -> None:
    fields: dict[str, Any] = {"sparsity": 60.0, "sparsity_warmup": 0, "steps": 61, "resample_every": 20, "lr": 3e-2}
    kept = train(X, config_of("relu", dead="none", **fields))
    helped = train(X, config_of("relu", dead="resample", **fields))
    assert isinstance(kept, Dictionary)
    assert isinstance(helped, Dictionary)
    assert kept.history is not None
    assert helped.history is not None
    assert kept.history["dead"][-1] > 0.2
    assert helped.history["dead"][-1] < kept.history["dead"][-1]


def test_events_and_an_estimate_tell_what_it_costs() -> None:
    events: list[Event] = []
    train(X, config_of(), sink=events.append)
    assert [event.kind for event in events][:2] == ["start", "advance"]
    assert [event.done for event in events if event.kind == "advance"] == list(range(1, 13))
    assert any("of memory" in event.message for event in events if event.kind == "note")
    cost = estimate(X, config_of())
    assert 0 < cost.seconds < 60
    assert cost.memory_bytes > 4 * 4 * 2 * D * 32


# What is refused


def test_data_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NotFiniteError, match="tensor 0 holds NaN or infinity, first in row 5"):
        train(torch.where(torch.arange(N)[:, None] == 5, torch.nan, X), config_of())
    with pytest.raises(InputError, match="tensor 1 has 899 rows and tensor 0 has 900"):
        train((X, Y[1:]), config_of())
    with pytest.raises(InputError, match="must be a store, a stream, a tensor"):
        train("acts/", config_of())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"the source has 3 sites .* so it has to be said what is trained"),
        ({"coder": "sae"}, r"a sae coder needs one site, .*; got .* -> "),
        ({"coder": "transcoder"}, r"a transcoder coder needs one site to read and another to reconstruct"),
        ({"coder": "cross_layer"}, r"a cross-layer coder needs as many sites to read as to reconstruct"),
        ({"coder": "crosscoder", "skip": True}, r"TrainConfig\.skip is for transcoders"),
        ({"in_sites": ("embed",), "out_sites": ("layers.0.mlp_out",), "apply_b_dec_to_input": True},
         r"apply_b_dec_to_input is for coders that reconstruct what they read"),
    ],
)  # fmt: skip
def test_sites_that_leave_open_what_is_meant_are_refused(changes: dict[str, Any], words: str) -> None:
    source = TensorSource(X, X, Y, sites=["embed", "layers.0.mlp_in", "layers.0.mlp_out"])
    with pytest.raises(InputError, match=words):
        train(source, config_of(**changes))


def test_sites_that_are_not_there_are_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"site 'layers\.9\.mlp_out'"):
        train(X, config_of(in_sites=("layers.9.mlp_out",)))


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(NotFiniteError, match=r"the loss at step \d+ is NaN or infinite: lower lr"):
        train(X, config_of("relu", lr=1e30, clip_norm=None, warmup=0, steps=50))


def test_latents_that_never_fired_are_counted_before_any_can_be_dead() -> None:
    """dead_after is a million rows, and this run sees a thousand."""
    x = torch.zeros(400, 12)
    x[:, 0] = torch.rand(400, generator=torch.Generator().manual_seed(0)) + 1
    coder: Any = train(x, config_of("topk", k=1, steps=20, dead_after=1_000_000))
    fired = int((coder.encode(x) > 0).any(0).sum())
    assert fired < 0.5 * coder.n_latents
    assert coder.history["dead"][-1] > 0.4
    assert coder.metadata["summary"]["dead"] > 0.4
    shown = summary(coder)[1]
    assert re.search(r"in none of the [\d,]+ rows active \d\d\.\d%", shown), shown


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_a_run_that_diverges_is_no_success(kind: str, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"training diverged: at step \d+ the error is .* Lower lr \(1000000.0\)"):
        train(X, config_of(kind, steps=200, lr=1e6, clip_norm=None, decoder_norm="free"), tmp_path / "x")
    assert not (tmp_path / "x" / "config.json").exists()


def test_few_rows_that_are_gone_through_very_often_are_spoken_of() -> None:
    heard: list[str] = []
    config = config_of("topk", steps=30)
    train(X[:12], config, sink=lambda event: heard.append(event.message or ""))
    passes = 30 * config.batch_size / 12
    assert passes > 100
    assert any(f"go {passes:,.0f} times through the 12 rows there are" in words for words in heard)
    with pytest.raises(InputError, match="not trained on one row"):
        train(X[:1], config)
    with pytest.raises(InputError, match="batch_size must be a whole number, at least 2"):
        config_of("topk", batch_size=1)
