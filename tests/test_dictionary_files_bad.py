"""Files that are broken, unsafe or not understood: each is refused with its name and what to do, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import format_files as files
from format_files import D, M, Written, normal, rows
from vesalius.dictionaries import load
from vesalius.dictionaries.formats import dictionary_learning
from vesalius.errors import FileFormatError, InputError

WEIGHTS: dict[str, tuple[Callable[[Path], Written], str]] = {
    "saelens": (files.saelens, "sae_weights.safetensors"), "sparsify": (files.sparsify, "sae.safetensors"),
    "crosscoder": (files.crosscoder, "model.safetensors"), "gemma_scope_2": (files.gemma_scope_2, "params.safetensors"),
    "circuit_tracer": (files.circuit_tracer, "layer_3.safetensors"), "clt": (files.cross_layer, "W_enc_1.safetensors"),
    "clt decoder": (files.cross_layer, "W_dec_1.safetensors"),
    "gemma_clt": (lambda path: files.cross_layer(path, "gemma_scope_2"), "params_layer_1.safetensors"),
    "gemma_scope": (files.gemma_scope, "params.npz"),
}  # fmt: skip


class Bomb:
    """Says so when it is unpickled in the ordinary way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("EXPLODED",)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.98])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, kept: float) -> None:
    made, weights = WEIGHTS[name]
    path = made(tmp_path).path / weights
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(FileFormatError, match=f"{weights}.*(Download or copy it again|should have shape)"):
        load(tmp_path)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pickle_under_another_name_is_not_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = WEIGHTS[name]
    monkeypatch.chdir(tmp_path)
    path = made(tmp_path / "sae").path / weights
    for dump in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save({"W_enc": Bomb()}, path)):
        dump()
        with pytest.raises(FileFormatError, match=weights):
            load(tmp_path / "sae")
        assert not (tmp_path / "EXPLODED").exists()
    if not weights.endswith("npz"):
        with pytest.raises(FileFormatError, match="is a pickle and not a safetensors file"):
            load(tmp_path / "sae")


@pytest.mark.parametrize("name", ["dictionary_learning", "openai"])
def test_what_is_more_than_tensors_is_not_run_even_when_unpickling(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = (
        files.openai(tmp_path / "6.pt") if name == "openai" else files.dictionary_learning(tmp_path, "BatchTopKSAE")
    )
    path = written.path if name == "openai" else written.path / "ae.pt"
    torch.save({"encoder.weight": Bomb()}, path)
    with (
        pytest.warns(UserWarning, match="is a pickle"),
        pytest.raises(FileFormatError, match="does not hold plain tensors"),
    ):
        load(written.path, unpickle=True)
    path.write_bytes(b"\x80\x02hello")
    with pytest.warns(UserWarning, match="is a pickle"), pytest.raises(FileFormatError, match="or is truncated"):
        load(written.path, unpickle=True)
    assert not (tmp_path / "EXPLODED").exists()
    torch.save({"W_enc": Bomb()}, path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "EXPLODED").exists()  # the trap works


def test_arrays_of_objects_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    with pytest.raises(FileFormatError, match=r"params\.npz cannot be read as \.npz arrays without pickle"):
        load(tmp_path)
    assert not (tmp_path / "EXPLODED").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, name: str, bad: float) -> None:
    made, weights = WEIGHTS[name]
    path = made(tmp_path).path / weights
    if weights.endswith("npz"):
        arrays = dict(np.load(path))
        arrays["W_dec"][3, 2] = bad
        np.savez(path, **arrays)
    else:
        tensors = load_file(path)
        decoder = next(
            t for key, t in tensors.items() if key.lower().startswith(("w_dec", "decoder.weight", "w_enc_1"))
        )
        decoder[1, -1] = bad
        save_file(tensors, path)
    wide = 2 if name == "crosscoder" else 3 if "clt" in name else 1
    x = rows(wide * D)
    with pytest.raises(FileFormatError, match=rf"{weights}.*holds NaN or infinity"):  # a stored layer's when it is used
        load(tmp_path).reconstruct(x if wide == 1 else list(x.chunk(wide, dim=1)))


@pytest.mark.parametrize(
    ("made", "weights", "change", "message"),
    [
        (
            files.saelens,
            "sae_weights.safetensors",
            {"W_dec": normal(D, M)},
            r"W_dec should have shape \[20, d_out\] .* \(6, 20\)",
        ),
        (
            files.saelens,
            "sae_weights.safetensors",
            {"W_enc": normal(M, D)},
            r"says d_in=6, and the weights beside it have 20",
        ),
        (
            files.saelens,
            "sae_weights.safetensors",
            {"W_dec": normal(M, 5)},
            r"W_dec reconstructs 5 numbers from 6; only a transcoder",
        ),
        (
            files.saelens,
            "sae_weights.safetensors",
            {"b_enc": None},
            r"holds no tensor 'b_enc'; it holds W_dec, W_enc, b_dec",
        ),
        (
            files.saelens,
            "sae_weights.safetensors",
            {"W_skip": normal(D, D)},
            r"holds W_skip, which a standard dictionary of SAELens",
        ),
        (files.sparsify, "sae.safetensors", {"W_dec": normal(D, M)}, r"W_dec should have shape \[20, 6\]"),
        (
            files.sparsify,
            "sae.safetensors",
            {"W_skip": normal(D, D)},
            r"holds W_skip, which a coder without skip_connection",
        ),
        (
            files.crosscoder,
            "model.safetensors",
            {"decoder.bias": normal(3, D)},
            r"decoder\.bias should have shape \[2, 6\]",
        ),
        (
            files.crosscoder,
            "model.safetensors",
            {"code_normalization_id": torch.tensor(5)},
            "DECOUPLED is not read here",
        ),
        (files.gemma_scope_2, "params.safetensors", {"threshold": normal(3)}, r"threshold should have shape \[20\]"),
        (files.circuit_tracer, "layer_3.safetensors", {"b_dec": normal(5)}, r"b_dec should have shape \[6\]"),
        (
            files.circuit_tracer,
            "layer_3.safetensors",
            {"log_thresholds": normal(M)},
            "holds log_thresholds, which circuit-tracer",
        ),
        (
            files.circuit_tracer,
            "layer_3.safetensors",
            {"activation_function.threshold": -normal(M).abs()},
            "20 thresholds are below zero",
        ),
        (
            files.cross_layer,
            "W_dec_1.safetensors",
            {"W_dec_1": normal(M, 3, D)},
            r"W_dec_1 should have shape \[20, 2, 6\], it has \(20, 3, 6\)",
        ),
        (
            files.cross_layer,
            "W_enc_2.safetensors",
            {"W_enc_2": normal(M + 1, D)},
            r"W_enc_2 should have shape \[20, d\]",
        ),
        (
            lambda path: files.cross_layer(path, "gemma_scope_2"),
            "params_layer_2.safetensors",
            {"w_dec": normal(M, 2, D)},
            "do not fit 20 latents, 3",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, made: Callable[[Path], Written], weights: str, change: dict[str, Tensor | None], message: str
) -> None:
    path = made(tmp_path).path / weights
    tensors = {name: tensor for name, tensor in {**load_file(path), **change}.items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("made", "config", "change", "message"),
    [
        (
            files.saelens,
            "cfg.json",
            {"architecture": "temporal"},
            r"architecture='temporal' is not read here; what is: batchtopk, gated",
        ),
        (
            files.saelens,
            "cfg.json",
            {"architecture": "matching_pursuit"},
            "architecture='matching_pursuit' is not read here",
        ),
        (files.saelens, "cfg.json", {"architecture": "abstopk"}, "architecture='abstopk' is not read here"),
        (
            files.saelens,
            "cfg.json",
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations='covariance_whitening' is not read",
        ),
        (files.saelens, "cfg.json", {"architecture": "topk"}, r"says topk and gives k=None"),
        (files.saelens, "cfg.json", {"architecture": "topk", "k": 99}, r"needs k between 1 and that; got 99"),
        (files.saelens, "cfg.json", {"metadata": "gpt2"}, "metadata should be an object"),
        (
            files.saelens,
            "cfg.json",
            {"metadata": {}, "activation_fn": "tanh-relu"},
            "activation_fn='tanh-relu' is not read here",
        ),
        (
            files.saelens,
            "cfg.json",
            {"metadata": {}, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "signed": True}},
            "a signed topk",
        ),
        (files.sparsify, "cfg.json", {"activation": "groupmax"}, "activation='groupmax' is not read here"),
        (files.sparsify, "cfg.json", {"signed": True}, "signed=true is not read here"),
        (files.sparsify, "cfg.json", {"k": 21}, "k=21 of 20 latents cannot be"),
        (files.sparsify, "cfg.json", {"d_in": 7}, "says d_in=7, and the weights beside it have 6"),
        (
            files.sparsify,
            "cfg.json",
            {"vesalius": {"in_site": "here!"}},
            "under `vesalius`: 'here!' is not a site name",
        ),
        (files.gemma_scope_2, "config.json", {"architecture": "topk"}, "architecture='topk' is not read here"),
        (
            files.saelens,
            "cfg.json",
            {"metadata": {"sae_lens_version": "6", "training_architecture_details": {"matryoshka_widths": 3}}},
            "is not understood",
        ),
    ],
)
def test_settings_that_are_not_read_are_named(
    tmp_path: Path, made: Callable[[Path], Written], config: str, change: dict[str, Any], message: str
) -> None:
    path = made(tmp_path).path / config
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **change}))
    with pytest.raises(FileFormatError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("made", "config"), [(files.saelens, "cfg.json"), (files.sparsify, "cfg.json")])
def test_weights_without_their_description_are_not_guessed(
    tmp_path: Path, made: Callable[[Path], Written], config: str
) -> None:
    made(tmp_path)
    for text, message in (("[]", "should hold a JSON object"), ("{", "cannot be read as JSON"), ("\xff", "JSON")):
        (tmp_path / config).write_bytes(text.encode("latin1"))
        with pytest.raises(FileFormatError, match=message):
            load(tmp_path)
    (tmp_path / config).unlink()
    with pytest.raises(FileFormatError, match=rf"{config} is missing: without it the weights"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("made", "config", "change", "message"),
    [
        (files.saelens, "cfg.json", {"clip": 3.0}, r"says clip=3.0, which is not known .*ignore=\['clip'\]"),
        (files.saelens, "cfg.json", {"tied": False, "clip": 0}, r"says clip=0, tied=False, which"),
        (files.saelens, "cfg.json", {"apply_b_dec_to_input": "no"}, "should be true or false, it is 'no'"),
        (files.saelens, "cfg.json", {"reshape_activations": "hook_q"}, "reshape_activations='hook_q' is not read"),
        (files.saelens, "cfg.json", {"rescale_acts_by_decoder_norm": True}, "which architecture='standard' has not"),
        (
            files.saelens,
            "cfg.json",
            {"metadata": {}, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "postact": "tanh"}},
            "activation_fn_kwargs={'postact': 'tanh'} of topk are not read",
        ),
        (files.sparsify, "cfg.json", {"input_scale": 2.0}, "says input_scale=2.0, which is not known"),
        (files.sparsify, "cfg.json", {"num_latents": 7}, "says num_latents=7, and the weights beside it have 20"),
        (files.sparsify, "cfg.json", {"transcode": 1}, "transcode should be true or false, it is 1"),
        (files.gemma_scope_2, "config.json", {"input_norm": 9.5}, "says input_norm=9.5, which is not known"),
        (files.gemma_scope_2, "config.json", {"affine_connection": True}, "have no affine_skip_connection"),
        (files.gemma_scope_2, "config.json", {"width": 9}, "says width=9, and the weights beside it have 20"),
        (files.crosscoder, "config.json", {"latent_scale": 2.0}, "says latent_scale=2.0, which is not known"),
        (files.crosscoder, "config.json", {"code_normalization": "SAE"}, "has the code normalisation CROSSCODER, and"),
    ],
)
def test_every_setting_is_taken_into_account_or_refused(
    tmp_path: Path, made: Callable[[Path], Written], config: str, change: dict[str, Any], message: str
) -> None:
    path = made(tmp_path).path / config
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **change}))
    with pytest.raises(FileFormatError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    unknown = [name for name in change if "not known" in str(caught.value)]
    if unknown:
        load(tmp_path, ignore=unknown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation: topk\nk: 0\n", "says topk and gives k=0"),
        ("k: 3\ndtype: float32\n", "says dtype='float32', which is not known"),
        ("activation: jumprelu\n", "has no activation_function.threshold"),
        ("activation: relu\nk: 3\n", "says activation='relu', and there is a k beside it"),
    ],
)
def test_every_line_of_a_transcoder_s_description_is_taken_into_account(
    tmp_path: Path, text: str, message: str
) -> None:
    files.circuit_tracer(tmp_path)
    (tmp_path / "config.yaml").write_text(files.HOOKS + text)
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path)


STRANGE = torch.ones(D)


def _with_state(path: Path) -> None:
    torch.save({**torch.load(path), "strange": STRANGE}, path)


def _with_safetensors(path: Path) -> None:
    save_file({**load_file(path), "strange": STRANGE}, path)


def _with_array(path: Path) -> None:
    with np.load(path) as stored:
        np.savez(path, **{**stored, "strange": STRANGE.numpy()})


@pytest.mark.parametrize(
    ("made", "weights", "changed"),
    [
        (files.saelens, "sae_weights.safetensors", _with_safetensors),
        (files.sparsify, "sae.safetensors", _with_safetensors),
        *(
            (partial(files.dictionary_learning, name=name), "ae.pt", _with_state)
            for name in sorted(dictionary_learning.CLASSES)
        ),
        (files.crosscoder, "model.safetensors", _with_safetensors),
        (files.gemma_scope, "params.npz", _with_array),
        (files.gemma_scope_2, "params.safetensors", _with_safetensors),
        (partial(files.cross_layer, style="gemma_scope_2"), "params_layer_1.safetensors", _with_safetensors),
        (files.circuit_tracer, "layer_3.safetensors", _with_safetensors),
        (files.cross_layer, "W_enc_1.safetensors", _with_safetensors),
        (lambda folder: files.openai(folder / "3.pt"), "3.pt", _with_state),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_every_tensor_is_taken_into_account_or_refused(
    tmp_path: Path, made: Callable[[Path], Written], weights: str, changed: Callable[[Path], None]
) -> None:
    written = made(tmp_path)
    changed(tmp_path / weights)
    with pytest.raises(FileFormatError, match=r"holds strange, which .* has no use for"):
        load(written.path, unpickle=True)
    load(written.path, unpickle=True, ignore=["strange"])


def test_a_class_of_dictionary_learning_that_is_not_read_is_named(tmp_path: Path) -> None:
    files.dictionary_learning(tmp_path, "AutoEncoder")
    (tmp_path / "config.json").write_text('{"trainer": {"dict_class": "IdentityDict"}}')
    with pytest.raises(FileFormatError, match=r"dict_class='IdentityDict' is not read here; what is: AutoEncoder, "):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="no `trainer` that says which class"):
        load(tmp_path)


def test_an_activation_of_openai_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = files.openai(tmp_path / "6.pt").path
    state = torch.load(path, weights_only=True)
    torch.save({**state, "activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, path)
    with pytest.warns(UserWarning, match="pickle"), pytest.raises(FileFormatError, match="activation='TopK' with"):
        load(path, unpickle=True)
    torch.save([1], path)
    with pytest.warns(UserWarning, match="pickle"), pytest.raises(FileFormatError, match="it holds a list"):
        load(path, unpickle=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation: gelu\n", "activation='gelu' is not read here"),
        ("activation: topk\n", "says topk and gives k=None of 20"),
        ("a:\n  b: 3\n", "line 2: only `key: value` and lists of words are read"),
        ("a: {b: 3}\n", "only plain values"),
        ("a: !!python/object:os.system x\n", "only plain values"),
        ("just words\n", "line 1"),
    ],
)
def test_descriptions_in_yaml_that_hold_more_are_refused(tmp_path: Path, text: str, message: str) -> None:
    files.circuit_tracer(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path)


def test_a_layer_that_is_missing_is_noticed(tmp_path: Path) -> None:
    for style, name in (("circuit_tracer", "W_enc_1.safetensors"), ("gemma_scope_2", "params_layer_1.safetensors")):
        folder = files.cross_layer(tmp_path / style, style).path
        (folder / name).unlink()
        with pytest.raises(FileFormatError, match=r"holds the layers \[0, 2\] of a cross-layer transcoder"):
            load(folder)
    folder = files.cross_layer(tmp_path / "a").path
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"W_dec_1\.safetensors is missing"):
        load(folder)


def test_folders_without_a_dictionary_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="It holds nothing"):
        load(tmp_path)
    with pytest.raises(FileFormatError, match="there is no file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        FileFormatError, match=r"nor hyperparams.*; cfg\.json and sae_weights\.safetensors; .* It holds notes\.txt"
    ):
        load(tmp_path)
    with pytest.raises(FileFormatError, match="is no file of a dictionary that is known here"):
        load(tmp_path / "notes.txt")
    for layer in range(8):
        files.sparsify(tmp_path / f"layers.{layer}")
    with pytest.raises(FileFormatError, match=r"holds folders with a dictionary each \(layers\.0, .* and 2 more\)"):
        load(tmp_path)


def test_layers_that_are_not_there_are_named(tmp_path: Path) -> None:
    files.circuit_tracer(tmp_path)
    with pytest.raises(InputError, match=r"transcoders of 1 layers \(3\): say which with layer="):
        load(tmp_path, layer=4)


def test_whatever_bytes_are_changed_only_errors_of_ours_come(tmp_path: Path) -> None:
    dice = random.Random(0)
    for name, (made, weights) in WEIGHTS.items():
        path = made(tmp_path / name).path / weights
        whole = path.read_bytes()
        for _ in range(15):
            broken = bytearray(whole)
            for _ in range(dice.randint(1, 4)):
                broken[dice.randrange(min(len(broken), 400))] = dice.randrange(256)
            path.write_bytes(broken)
            try:
                coder = load(tmp_path / name)
            except InputError as error:
                assert str(tmp_path) in str(error)
            else:
                assert coder.n_latents > 0
