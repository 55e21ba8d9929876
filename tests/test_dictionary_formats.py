"""Other libraries' files: read as those libraries compute them (against files and formulas written by hand), written so
that they read back the same, and refused where a format cannot hold a dictionary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import format_files as files
import vesalius as vs
from format_files import LAYERS, D, K, M, Written, normal, rows
from vesalius.dictionaries import Coder, CrossLayerTranscoder, Dictionary, StoredLayer, load, relative_norms, save
from vesalius.dictionaries.formats import dictionary_learning, saelens
from vesalius.dictionaries.formats.names import post_normed
from vesalius.errors import FileFormatError, InputError, UnknownNameError

RESID, MLP_IN, MLP_OUT = (vs.Site.parse(f"layers.3.{kind}") for kind in ("resid_post", "mlp_in", "mlp_out"))
Made = Callable[[Path], Written]


def read(written: Written, **options: Any) -> Coder:
    if not written.options.get("unpickle"):
        return load(written.path, **options)
    with pytest.warns(UserWarning, match="is a pickle"):
        return load(written.path, **written.options, **options)


def agree(coder: Coder, written: Written) -> None:
    """Latents and reconstructed rows are the library's, and the latents are neither all off nor all on."""
    wide = len(coder.in_sites)
    x = rows(wide * D)
    given: Any = x if wide == 1 else list(x.chunk(wide, dim=1))
    latents = coder.encode(given)
    reconstruction = coder.reconstruct(given)
    torch.testing.assert_close(latents, written.encode(x), atol=1e-5, rtol=1e-5)
    joined = reconstruction if isinstance(reconstruction, Tensor) else torch.cat(reconstruction, 1)
    torch.testing.assert_close(joined, written.reconstruct(x), atol=1e-5, rtol=1e-5)
    assert 0 < int((latents > 0).sum()) < latents.numel()


def metadata(**more: Any) -> dict[str, Any]:
    return {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2-small", **more}


def test_a_stream_that_was_centred_is_read_as_rows_less_their_mean(tmp_path: Path) -> None:
    """As TransformerLens loads a model with LayerNorm; of others, and of what is no stream, it means nothing."""
    said = metadata(model_from_pretrained_kwargs={"center_writing_weights": True, "fold_ln": True})
    written = files.saelens(tmp_path / "sae", metadata=said)
    coder = read(written)
    agree(coder, written)
    x = rows()
    torch.testing.assert_close(coder.encode(x), coder.encode(x + 3.0), atol=1e-5, rtol=1e-5)
    save(coder, tmp_path / "again", format="saelens")
    agree(load(tmp_path / "again"), written)
    with pytest.raises(InputError, match="cannot express row_norm='centred'"):
        save(coder, tmp_path / "other", format="gemma_scope")
    plain = files.saelens(tmp_path / "plain")
    for name, other in (
        ("llama", {"model_name": "meta-llama/Llama-3.1-8B"}),
        ("z", {"hook_name": "blocks.3.attn.hook_z"}),
    ):
        folder = files.saelens(tmp_path / name, metadata={**said, **other}).path
        torch.testing.assert_close(load(folder).encode(x), plain.encode(x), atol=1e-5, rtol=1e-5)
    unknown = files.saelens(tmp_path / "unknown", metadata={**said, "model_name": "mine"}).path
    with pytest.raises(FileFormatError, match=r"center_writing_weights=True: it is of rows less their mean, if mine"):
        load(unknown)
    told = load(unknown, ignore=["center_writing_weights"])
    torch.testing.assert_close(told.encode(x), plain.encode(x), atol=1e-5, rtol=1e-5)


def test_inputs_that_were_centred_and_scaled_are_folded_into_the_weights(tmp_path: Path) -> None:
    agree(read(files.normalised_sae(tmp_path / "sae")), files.normalised_sae(tmp_path / "sae"))
    state = torch.load(tmp_path / "sae" / "ae.pt")
    del state["activation_std"]
    torch.save(state, tmp_path / "sae" / "ae.pt")
    with pytest.raises(FileFormatError, match="holds activation_mean, activation_global_scale, target_rms and no acti"):
        read(Written(tmp_path / "sae", rows, rows, {"unpickle": True}))


def test_a_coefficient_of_zero_is_no_missing_one(tmp_path: Path) -> None:
    for name, alphas in (("none", {}), ("zero", {"code_normalization_alpha_sae": 0.0})):
        written = files.crosscoder(tmp_path / name, code=3, code_normalization="MIXED", **alphas)
        agree(read(written), written)


def test_checkpoints_of_a_run_are_read_with_the_description_above_them(tmp_path: Path) -> None:
    written = files.dictionary_learning(tmp_path / "run", "AutoEncoderTopK")
    (tmp_path / "run" / "checkpoints").mkdir()
    checkpoint = (tmp_path / "run" / "ae.pt").rename(tmp_path / "run" / "checkpoints" / "ae_1000.pt")
    agree(read(replace(written, path=checkpoint)), written)
    torch.save({"step": 3, "ae": {}, "optimizer": {}, "config": {}, "norm_factor": 2.0}, tmp_path / "run" / "ae.pt")
    with pytest.raises(FileFormatError, match=r"is a backup of a run .* that had not ended \(step 3\)"):
        read(written)


@pytest.mark.parametrize("architecture", [
    "standard", "gated", "topk", "jumprelu", "transcoder", "skip_transcoder", "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
])  # fmt: skip
def test_saelens_is_read(tmp_path: Path, architecture: str) -> None:
    coder = read(files.saelens(tmp_path / "sae", architecture))
    agree(coder, files.saelens(tmp_path / "sae", architecture))
    assert coder.in_sites == (RESID,)
    assert coder.out_sites == ((MLP_OUT,) if "transcoder" in architecture else (RESID,))
    assert isinstance(coder, Dictionary)
    assert coder.metadata["model_name"] == "gpt2-small"


def test_a_file_that_is_given_is_read_with_those_beside_it(tmp_path: Path) -> None:
    for written, name in ((files.saelens(tmp_path / "a"), "sae_weights.safetensors"),
                          (files.sparsify(tmp_path / "layers.3"), "sae.safetensors"),
                          (files.crosscoder(tmp_path / "c"), "model.safetensors")):  # fmt: skip
        agree(load(written.path / name), written)


@pytest.mark.parametrize("changes", [
    {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
])  # fmt: skip
def test_settings_of_saelens_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = files.saelens(tmp_path, changes.pop("architecture", "standard"), **changes)
    agree(read(written), written)


@pytest.mark.parametrize("architecture", ["standard", "topk", "gated"])
def test_saelens_from_before_version_6_is_read(tmp_path: Path, architecture: str) -> None:
    written = files.saelens(tmp_path, architecture, old=True)
    coder = read(written)
    agree(coder, written)
    assert coder.in_sites == (RESID,)


def test_the_factor_that_saelens_trained_with_is_asked_for(tmp_path: Path) -> None:
    written = files.saelens(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.raises(FileFormatError, match=r"in_scale=1\.0 takes the weights as they are"):
        load(tmp_path)
    agree(load(tmp_path, in_scale=1.0), written)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    x = rows()
    for coder in (load(tmp_path), load(tmp_path, in_scale=0.25)):
        torch.testing.assert_close(coder.encode(x), written.encode(x * 0.25))
        torch.testing.assert_close(coder.reconstruct(x), written.reconstruct(x * 0.25) * 4)
    files.saelens(tmp_path)
    with pytest.raises(InputError, match="in_scale is for dictionaries with normalize_activations"):
        load(tmp_path, in_scale=0.5)


def test_exports_of_batchtopk_and_matryoshka_say_what_they_were(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.hook_resid_post",
                "training_architecture": "matryoshka_batchtopk",
                "training_architecture_details": {"matryoshka_widths": [5, 10, M]}}  # fmt: skip
    written = files.saelens(tmp_path, "jumprelu", metadata=metadata)
    coder = read(written)
    agree(coder, written)
    assert isinstance(coder, Dictionary)
    assert (coder.activation, coder.groups) == ("jumprelu", (5, 10, M))
    checkpoint = files.saelens(tmp_path, "standard")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": "batchtopk", "k": K}))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**weights, "topk_threshold": torch.tensor(0.7)}, tmp_path / "sae_weights.safetensors")
    trained = load(tmp_path)
    pre = checkpoint.encode(rows())
    torch.testing.assert_close(trained.encode(rows()), pre * (pre > 0.7))


def test_heads_are_one_width(tmp_path: Path) -> None:
    metadata = {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.attn.hook_z"}
    written = files.saelens(tmp_path, reshape_activations="hook_z", metadata=metadata)
    coder, x = load(tmp_path), rows()
    assert coder.in_sites == (vs.Site.parse("layers.3.z"),)
    torch.testing.assert_close(coder.encode(x.reshape(-1, 2, D // 2)), written.encode(x))


def test_a_finetuned_decoder_is_read_with_its_factors(tmp_path: Path) -> None:
    written = files.saelens(tmp_path, old=True, finetuning_scaling_factor=True)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    factor = normal(M, seed=12)
    save_file({**weights, "scaling_factor": factor}, tmp_path / "sae_weights.safetensors")
    expected = (written.encode(rows()) * factor) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(load(tmp_path).reconstruct(rows()), expected)
    files.saelens(tmp_path, old=True)
    save_file({**weights, "scaling_factor": factor}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FileFormatError, match="does not say that it is used"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes", [{}, {"transcode": True}, {"transcode": True, "skip_connection": True}, {"skip_connection": True}]
)
def test_sparsify_is_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    written = files.sparsify(tmp_path / "layers.3.mlp", **changes)
    coder = read(written)
    agree(coder, written)
    assert coder.in_sites == ((MLP_IN,) if "transcode" in changes else (MLP_OUT,))
    assert coder.out_sites == (MLP_OUT,)


@pytest.mark.parametrize("name", [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder",
    "MatryoshkaBatchTopKSAE",
])  # fmt: skip
def test_dictionary_learning_is_read_when_asked(tmp_path: Path, name: str) -> None:
    written = files.dictionary_learning(tmp_path, name)
    with pytest.raises(FileFormatError, match=r"unpickle=True\) reads the tensors in it and nothing else"):
        load(tmp_path)
    coder = read(written)
    agree(coder, written)
    assert coder.in_sites == (RESID,)
    assert isinstance(coder, Dictionary)
    assert coder.groups == ((5, 10, 20) if name.startswith("Matryoshka") else ())


def test_a_state_dict_that_was_turned_into_safetensors_needs_no_asking(tmp_path: Path) -> None:
    written = files.dictionary_learning(tmp_path, "BatchTopKSAE")
    save_file(torch.load(tmp_path / "ae.pt", weights_only=True), tmp_path / "ae.safetensors")
    agree(load(tmp_path), written)


@pytest.mark.parametrize("code", [1, 2, 4])
@pytest.mark.parametrize("normalised", [False, True])
def test_crosscoders_are_read(tmp_path: Path, code: int, normalised: bool) -> None:
    written = files.crosscoder(tmp_path, code=code, normalised=normalised)
    coder = load(tmp_path, site=["base/layers.3.resid_post", "chat/layers.3.resid_post"])
    agree(coder, written)
    assert [site.tag for site in coder.out_sites] == ["base", "chat"]
    agree(load(files.crosscoder(tmp_path / "plain", batchtopk=False).path),
          files.crosscoder(tmp_path / "plain", batchtopk=False))  # fmt: skip


def test_norms_of_a_crosscoder_are_compared_in_the_units_it_was_trained_in(tmp_path: Path) -> None:
    norms = load_file(files.crosscoder(tmp_path, normalised=True).path / "model.safetensors")["decoder.weight"].norm(
        dim=2
    )
    coder = load(tmp_path, site=["base/layers.3.resid_post", "chat/layers.3.resid_post"])
    assert isinstance(coder, Dictionary)
    torch.testing.assert_close(relative_norms(coder), norms[1] / norms.sum(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("place", "sites"),
    [("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", ("layers.12.resid_post",) * 2),
     ("models--google--gemma-scope-9b-it-mlp/snapshots/0a/layer_3/w", ("layers.3.mlp_out",) * 2),
     ("gemma-scope-2b-pt-att/layer_3/w", ("layers.3.z",) * 2),
     ("gemma-scope-2b-pt-transcoders/layer_3/w", ("module:?blocks.3.ln2.hook_normalized|out", "layers.3.mlp_out")),
     ("somewhere", ("module:?|out",) * 2)],
)  # fmt: skip
def test_gemma_scope_is_read_at_the_place_that_its_path_tells(
    tmp_path: Path, place: str, sites: tuple[str, str]
) -> None:
    for lower in (False, True):
        written = files.gemma_scope(tmp_path / place, lower)
        coder = load(written.path)
        agree(coder, written)
        agree(load(written.path / "params.npz"), written)
        assert tuple(map(str, coder.in_sites + coder.out_sites)) == sites


def test_gemma_scope_of_the_embedding_is_in_units_before_gemma_scales_it(tmp_path: Path) -> None:
    written = files.gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k")
    coder, x = load(written.path), rows()
    assert coder.in_sites == (vs.Site.parse("embed"),)
    torch.testing.assert_close(coder.encode(x), written.encode(x / D**0.5))
    torch.testing.assert_close(coder.reconstruct(x), written.reconstruct(x / D**0.5) * D**0.5)


@pytest.mark.parametrize(
    ("place", "config", "sites"),
    [("resid_post/layer_12_width_16k", None, ("layers.12.resid_post",) * 2),
     ("attn_out/layer_3_w", None, ("layers.3.z",) * 2),
     ("a", {"hf_hook_point_in": "model.layers.3.self_attn.o_proj.input"}, ("layers.3.z",) * 2),
     ("a", {"hf_hook_point_in": "model.layers.3.post_feedforward_layernorm.output"}, ("layers.3.mlp_out",) * 2),
     ("a", {"hf_hook_point_in": "model.layers.3.mlp.output"}, ("module:model.layers.3.mlp|out",) * 2)],
)  # fmt: skip
def test_gemma_scope_2_is_read(tmp_path: Path, place: str, config: Any, sites: tuple[str, str]) -> None:
    written = files.gemma_scope_2(tmp_path / place, config=config)
    coder = load(written.path)
    agree(coder, written)
    assert tuple(map(str, coder.in_sites + coder.out_sites)) == sites


@pytest.mark.parametrize("told", [True, False])
def test_transcoders_of_gemma_scope_2_have_their_skip(tmp_path: Path, told: bool) -> None:
    ends = {"hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
            "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output"}  # fmt: skip
    place = "b" if told else "transcoder/layer_3_width_16k_affine"
    written = files.gemma_scope_2(tmp_path / place, skip=True, config=ends if told else None)
    coder = load(written.path)
    agree(coder, written)
    agree(load(written.path / "params.safetensors"), written)
    assert (coder.in_sites, coder.out_sites) == ((MLP_IN,), (MLP_OUT,))


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_of_circuit_tracer_are_read(tmp_path: Path, activation: str, skip: bool) -> None:
    written = files.circuit_tracer(tmp_path, activation, skip=skip)
    coder = load(tmp_path)
    agree(coder, written)
    agree(load(tmp_path / "layer_3.safetensors"), written)
    assert (str(coder.in_sites[0]), coder.out_sites) == ("layers.3.resid_mid", (MLP_OUT,))
    files.circuit_tracer(tmp_path, activation, skip=skip, layer=0)
    with pytest.raises(InputError, match=r"transcoders of 2 layers \(0, 3\): say which with layer="):
        load(tmp_path)
    agree(load(tmp_path, layer=3), written)


@pytest.mark.parametrize("style", ["circuit_tracer", "gemma_scope_2"])
def test_cross_layer_transcoders_are_read_and_stay_on_disk(tmp_path: Path, style: str) -> None:
    written = files.cross_layer(tmp_path, style)
    coder = load(tmp_path)
    agree(coder, written)
    assert isinstance(coder, CrossLayerTranscoder)
    assert all(isinstance(layer, StoredLayer) for layer in coder.layers)
    assert [str(site) for site in coder.out_sites] == [f"layers.{n}.mlp_out" for n in range(LAYERS)]


def test_openai_s_that_were_trained_without_normalising_rows_are_read_when_told(tmp_path: Path) -> None:
    written = files.openai(tmp_path / "resid_post_mlp" / "autoencoders" / "6.pt", "TopK", normalised=False)
    agree(read(written, row_norm="none"), written)
    written = files.openai(tmp_path / "6.pt", "ReLU", normalised=True)
    agree(read(written, row_norm="layer_norm"), written)
    with pytest.raises(UnknownNameError, match="way in which OpenAI's normalise rows 'centred'"):
        read(written, row_norm="centred")
    with pytest.raises(InputError, match=r"row_norm is for files of pickled; .* is one of saelens"):
        read(files.saelens(tmp_path / "sae"), row_norm="none")


@pytest.mark.parametrize(
    ("made", "site", "model"),
    [(files.goodfire, "layers.19.resid_post", "meta-llama/Llama-3.1-8B-Instruct"),
     (files.kissane, "layers.3.z", "gpt2-small"),
     (files.qwen_scope, "layers.3.resid_post", "Qwen/Qwen3-1.7B-Base")],
)  # fmt: skip
def test_single_files_are_read_when_asked(tmp_path: Path, made: Made, site: str, model: str) -> None:
    written = made(tmp_path)
    with pytest.raises(FileFormatError, match="is a pickle, which can run any program"):
        load(written.path)
    coder: Any = read(written)
    agree(coder, written)
    assert coder.in_sites == (vs.Site.parse(site),)
    assert coder.metadata["model_name"] == model
    with pytest.raises(FileFormatError, match="holds single files"):
        load(written.path.parent)


def test_single_files_that_nobody_is_known_to_write_are_not_guessed(tmp_path: Path) -> None:
    written = files.qwen_scope(tmp_path)
    moved = written.path.rename(tmp_path / "layer3.sae.pt")
    agree(read(replace(written, path=moved), k=K), written)
    with pytest.raises(FileFormatError, match=r"in another. Give it as k="):
        read(replace(written, path=moved))
    renamed = replace(written, path=moved.rename(tmp_path / "mine.pt"))
    with pytest.raises(FileFormatError, match="holds W_enc, W_dec, b_enc and b_dec, which several libraries write"):
        read(renamed)
    for state, message in (
        (
            {"weights": torch.ones(3)},
            "holds weights: no dictionary that is known here. Known are: a .pt file of OpenAI",
        ),
        ({name: torch.ones(2) for name in ("W_Q", "W_K", "W_V", "W_O")}, r"is low-rank sparse attention \(Lorsa\)"),
        ({"encoder.weight": torch.ones(2, 2), "decoder.weight": torch.ones(2, 2)}, "what dictionary_learning writes"),
        ({"sae": {}, "version": "1"}, "is a checkpoint of OpenMOSS's library"),
    ):
        torch.save(state, renamed.path)
        with pytest.raises(FileFormatError, match=message):
            read(renamed)


def test_a_crosscoder_s_checkpoint_is_read_when_asked(tmp_path: Path) -> None:
    written = files.crosscoder(tmp_path / "run")
    torch.save(load_file(tmp_path / "run" / "model.safetensors"), tmp_path / "run" / "model_final.pt")
    agree(read(replace(written, path=tmp_path / "run" / "model_final.pt", options={"unpickle": True})), written)


TRANSCODES = {"hook_point_out": "blocks.3.hook_mlp_out"}


@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("act_fn", ["jumprelu", "relu", "topk"])
@pytest.mark.parametrize("changes", [{}, TRANSCODES])
def test_llama_scope_is_read_in_all_its_layouts(
    tmp_path: Path, layout: int, act_fn: str, changes: dict[str, Any]
) -> None:
    written = files.openmoss(tmp_path / "sae", layout, act_fn, **changes)
    coder = read(written)
    agree(coder, written)
    assert coder.in_sites == (RESID,)
    assert coder.out_sites == ((MLP_OUT,) if changes else (RESID,))
    weights = next((tmp_path / "sae").rglob("*.safetensors"))
    agree(load(weights), written)


def test_what_openmoss_folded_itself_is_read_as_it_is(tmp_path: Path) -> None:
    written = files.openmoss(tmp_path, 3, norm_activation="inference")
    agree(read(written), written)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (3, {"sae_type": "lorsa"}, r"is of low-rank sparse attention \(Lorsa\)"),
        (3, {"sae_type": "clt"}, "is of a cross-layer transcoder, which is not read here"),
        (3, {"act_fn": "batchtopk"}, "act_fn='batchtopk' is not read here; what is: relu, jumprelu, topk"),
        (2, {"norm_activation": "batch-wise"}, "norm_activation='batch-wise' is not read here"),
        (3, {"use_glu_encoder": True}, "use_glu_encoder=True"),
        (3, {"d_model": 7}, "says d_model=7, and the weights beside it have 6"),
        (1, {"act_fn": "jumprelu", "jump_relu_threshold": None}, "says jump_relu_threshold=None"),
        (1, {"dataset_average_activation_norm": {"in": 0, "out": 3}}, r"should be above 0, they are \[0, 3\]"),
        (3, {"use_decoder_bias": False}, "holds b_D, which a dictionary of OpenMOSS with this config has no use for"),
        (3, {"leak": 0.1}, "says leak=0.1, which is not known"),
    ],
)
def test_what_is_not_read_of_openmoss_is_named(
    tmp_path: Path, layout: int, change: dict[str, Any], message: str
) -> None:
    files.openmoss(tmp_path, layout)
    path = tmp_path / ("hyperparams.json" if layout == 1 else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message):
        load(tmp_path)


def test_the_norm_that_openmoss_trained_with_is_asked_for(tmp_path: Path) -> None:
    written = files.openmoss(tmp_path, 2)
    state = load_file(tmp_path / "sae_weights.safetensors")
    save_file({n: t for n, t in state.items() if "norm" not in n}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(FileFormatError, match="give that factor as in_scale="):
        load(tmp_path)
    agree(load(tmp_path, in_scale=D**0.5 / 3.0), written)


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai_is_read_when_asked(tmp_path: Path, activation: str) -> None:
    written = files.openai(tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "6.pt", activation)
    with pytest.raises(FileFormatError, match="unpickle=True"):
        load(written.path)
    coder = read(written)
    agree(coder, written)
    assert str(coder.in_sites[0]) == "layers.6.resid_post"


# Places


@pytest.mark.parametrize(
    ("hook", "site"),
    [("blocks.15.hook_resid_post", "layers.15.resid_post"), ("blocks.0.hook_resid_pre", "layers.0.resid_pre"),
     ("blocks.2.hook_attn_out", "layers.2.attn_out"), ("blocks.2.attn.hook_q", "layers.2.q"),
     ("blocks.2.mlp.hook_post", "layers.2.mlp_post"), ("hook_embed", "embed"),
     ("blocks.2.hook_mlp_in", "layers.2.resid_mid"),
     ("blocks.2.mlp.hook_out", "layers.2.mlp_out")],
)  # fmt: skip
def test_hooks_have_their_sites(tmp_path: Path, hook: str, site: str) -> None:
    files.saelens(tmp_path, metadata={"sae_lens_version": "6.0.0", "hook_name": hook})
    assert [str(found) for found in load(tmp_path).in_sites] == [site]


def test_a_head_and_a_module_have_their_sites(tmp_path: Path) -> None:
    said = {"sae_lens_version": "6.0.0", "hook_name": "blocks.2.attn.hook_z", "hook_head_index": 5}
    files.saelens(tmp_path, metadata=said)
    assert str(load(tmp_path).in_sites[0]) == "layers.2.z[5]"
    modules = {"model.layers.7": "layers.7.resid_post", "model.layers.7.mlp": "layers.7.mlp_out",
               "model.layers.7.mlp.act_fn": "module:model.layers.7.mlp.act_fn|out"}  # fmt: skip
    for name, site in modules.items():
        said = {"sae_lens_version": "6.0.0", "hook_name": name, "model_class_name": "AutoModelForCausalLM"}
        files.saelens(tmp_path, metadata=said)
        assert str(load(tmp_path).in_sites[0]) == site
    ends = {
        "model.layers.7": "layers.7.resid_post",
        "model.layers.7.pre_feedforward_layernorm.output": "layers.7.mlp_in",
    }
    for name, site in ends.items():  # what SAELens says of modules goes before its hook_mlp_in, which is another place
        said = {"sae_lens_version": "6.0.0", "hook_name": "blocks.7.hook_mlp_in", "hf_hook_name": name}
        files.saelens(tmp_path, metadata={**said, "model_name": "google/gemma-3-1b-pt"})
        assert str(load(tmp_path).in_sites[0]) == site


def test_modules_before_a_norm_are_not_what_is_added_to_the_stream(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": "google/gemma-2-2b"}')
    written = files.sparsify(tmp_path / "layers.3.mlp")
    assert str(load(written.path).out_sites[0]) == "module:model.layers.3.mlp|out"
    assert str(load(files.sparsify(tmp_path / "embed_tokens").path).in_sites[0]) == "module:model.embed_tokens|out"
    assert str(load(files.sparsify(tmp_path / "layers.3").path).out_sites[0]) == "layers.3.resid_post"


@pytest.mark.parametrize(
    ("folder", "model", "sites"),
    [("layers.3", "", ("layers.3.resid_pre", "layers.3.resid_post")),
     ("h.3.mlp", "gpt2", ("layers.3.mlp_in", "layers.3.mlp_out")),
     ("layers.3.attention", "", ("module:model.layers.3.attention|in", "layers.3.attn_out")),
     ("layers.3.mlp.act", "EleutherAI/pythia-70m",
      ("module:gpt_neox.layers.3.mlp.act|in", "module:gpt_neox.layers.3.mlp.act|out")),
     ("v1.2", "", ("module:?v1.2|out", "module:?v1.2 (output)|out"))],
)  # fmt: skip
def test_modules_of_sparsify_have_their_sites(tmp_path: Path, folder: str, model: str, sites: tuple[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    coder = load(files.sparsify(tmp_path / folder, transcode=True).path)
    assert tuple(map(str, coder.in_sites + coder.out_sites)) == sites


def test_an_unknown_place_matters_only_when_a_site_is_needed(tmp_path: Path) -> None:
    written = files.saelens(
        tmp_path, metadata={"sae_lens_version": "6.0.0", "hook_name": "blocks.3.ln2.hook_normalized"}
    )
    coder = load(tmp_path)
    agree(coder, written)
    for needs in (lambda: coder.latent(0).site, lambda: coder.encode({"layers.3.mlp_in": rows()})):
        with pytest.raises(
            InputError, match=r"'blocks\.3\.ln2\.hook_normalized', which stands for no site here\. Load it with site="
        ):
            needs()
    source = vs.data.TensorSource(rows(), sites=["layers.3.mlp_in"])
    with pytest.raises(InputError, match="Load it with site="):
        vs.dictionaries.quality(coder, source)
    told = load(tmp_path, site="layers.3.mlp_in")
    assert told.latent(0).site == told.out_sites[0] == MLP_IN
    torch.testing.assert_close(told.encode({MLP_IN: rows()}), coder.encode(rows()))


def test_sites_are_said_for_both_ends(tmp_path: Path) -> None:
    files.saelens(tmp_path, "transcoder", metadata={"sae_lens_version": "6.0.0"})
    unknown = load(tmp_path)
    assert unknown.in_sites != unknown.out_sites
    both = load(tmp_path, site="layers.3.mlp_in", out_site=MLP_OUT)
    assert (both.in_sites, both.out_sites) == ((MLP_IN,), (MLP_OUT,))
    with pytest.raises(InputError, match=r"site= names 2 site\(s\), and this dictionary has 1"):
        load(tmp_path, site=["layers.3.mlp_in", "layers.4.mlp_in"])
    with pytest.raises(InputError, match="is not a site name"):
        load(tmp_path, site="blocks.3 hook")
    clt = load(files.cross_layer(tmp_path / "clt").path, site=[f"layers.{n}.mlp_in" for n in range(LAYERS)])
    assert [str(site) for site in clt.in_sites] == [f"layers.{n}.mlp_in" for n in range(LAYERS)]
    agree(clt, files.cross_layer(tmp_path / "clt"))


# Writing


def ours(activation: str, *, to: int = D, **changes: Any) -> Dictionary:
    ends = (RESID, RESID) if to == D and "skip" not in changes else (MLP_IN, MLP_OUT)
    extras = {
        "gated": {"r_mag": normal(M, seed=11), "b_mag": normal(M, seed=12)},
        "jumprelu": {"threshold": normal(M, seed=13).abs()}, "batchtopk": {"threshold": torch.tensor(0.7)},
    }.get(activation, {})  # fmt: skip
    fields: dict[str, Any] = {
        "in_sites": ends[:1], "out_sites": ends[1:], "encoders": (normal(D, M, seed=1),), "b_enc": normal(M, seed=3),
        "decoders": (normal(M, to, seed=2),), "b_dec": (normal(to, seed=4),), "extras": extras,
        "k": K if activation == "topk" else None,
    }  # fmt: skip
    return Dictionary(activation, **{**fields, **changes})


def same(one: Coder, other: Coder) -> None:
    assert (one.in_sites, one.out_sites) == (other.in_sites, other.out_sites)
    torch.testing.assert_close(one.encode(rows()), other.encode(rows()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.reconstruct(rows()), other.reconstruct(rows()), atol=1e-5, rtol=1e-5)


SKIP = normal(D, D, seed=8)
EXPRESSIBLE = {
    "saelens": [ours("relu"), ours("gated"), ours("jumprelu"), ours("topk"), ours("batchtopk"), ours("relu", to=4),
                ours("jumprelu", skip=SKIP), ours("relu", skip=SKIP, apply_b_dec_to_input=True),
                ours("topk", row_norm="layer_norm"),
                ours("gated", row_norm="constant_norm", apply_b_dec_to_input=True)],
    "sparsify": [ours("topk"), ours("topk", apply_b_dec_to_input=True), ours("topk", skip=SKIP),
                 ours("topk", skip=SKIP, apply_b_dec_to_input=True)],
    "gemma_scope": [ours("relu"), ours("jumprelu"), ours("batchtopk", apply_b_dec_to_input=True)],
    "gemma_scope_2": [ours("relu"), ours("jumprelu", to=4), ours("batchtopk", skip=SKIP)],
    "circuit_tracer": [replace(d, in_sites=(MLP_IN,), out_sites=(MLP_OUT,)) for d in (
        ours("relu"), ours("jumprelu"), ours("batchtopk"), ours("topk"), ours("jumprelu", skip=SKIP),
        ours("relu", apply_b_dec_to_input=True))],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, given in EXPRESSIBLE.items() for number in range(len(given))]
)
def test_what_is_written_reads_back_as_the_same_function(tmp_path: Path, name: str, number: int) -> None:
    place = tmp_path / ("gemma-scope-2b-pt-res/layer_3" if name == "gemma_scope" else "layers.3")
    given = EXPRESSIBLE[name][number]
    same(load(save(given, place, format=name)), given)
    assert not [path for path in place.rglob("*") if path.suffix in (".pt", ".pkl", ".bin")]


def test_gemma_scope_2_is_written_with_the_names_of_gemma_s_modules(tmp_path: Path) -> None:
    save(ours("jumprelu", skip=SKIP), tmp_path, format="gemma_scope_2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hf_hook_point_in"] == "model.layers.3.pre_feedforward_layernorm.output"
    assert config["hf_hook_point_out"] == "model.layers.3.post_feedforward_layernorm.output"
    del config["vesalius"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    same(load(tmp_path), ours("jumprelu", skip=SKIP))


@pytest.mark.parametrize("name", ["saelens", "gemma_scope_2"])
def test_scales_are_folded_into_what_is_written(tmp_path: Path, name: str) -> None:
    scaled = ours("relu", in_scale=(2.0,), out_scale=(2.0,))
    same(load(save(scaled, tmp_path, format=name)), scaled.folded())


def test_matryoshka_is_written_for_saelens_as_jumprelu_and_says_so(tmp_path: Path) -> None:
    given = ours("batchtopk", groups=(5, 10, M))
    save(given, tmp_path, format="saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "matryoshka_batchtopk"
    again = load(tmp_path)
    assert isinstance(again, Dictionary)
    assert again.groups == (5, 10, M)
    same(again, given)


def test_what_saelens_wrote_survives_being_written_again(tmp_path: Path) -> None:
    said = {
        "sae_lens_version": "6.1.0",
        "hook_name": "blocks.3.ln2.hook_normalized",
        "context_size": 77,
        "prepend_bos": False,
    }
    first = load(files.saelens(tmp_path / "a", metadata=said).path)
    config = json.loads((save(first, tmp_path / "b", format="saelens") / "cfg.json").read_text())
    assert {name: config["metadata"][name] for name in ("hook_name", "context_size", "prepend_bos")} == {
        "hook_name": "blocks.3.ln2.hook_normalized", "context_size": 77, "prepend_bos": False
    }  # fmt: skip
    same(load(tmp_path / "b"), first)


def test_every_foreign_dictionary_can_be_kept_in_our_own_format(tmp_path: Path) -> None:
    for number, written in enumerate([files.saelens(tmp_path / "a", "topk", normalize_activations="layer_norm"),
                                      files.sparsify(tmp_path / "layers.1"), files.gemma_scope(tmp_path / "g"),
                                      files.cross_layer(tmp_path / "clt", "gemma_scope_2")]):  # fmt: skip
        coder = load(written.path)
        again = load(save(coder, tmp_path / str(number)))
        agree(again, written)
        assert again.content_hash == coder.content_hash


def test_cross_layer_transcoders_are_written_layer_by_layer(tmp_path: Path) -> None:
    written = files.cross_layer(tmp_path / "a")
    first = load(tmp_path / "a")
    again = load(save(first, tmp_path / "b", format="circuit_tracer"))
    agree(again, written)
    assert isinstance(first, CrossLayerTranscoder)
    whole = replace(first, layers=tuple(layer.whole() for layer in first.layers if isinstance(layer, StoredLayer)))
    agree(load(save(whole, tmp_path / "c", format="circuit_tracer")), written)
    assert first.content_hash == again.content_hash == whole.content_hash


def test_several_layers_share_a_folder_of_circuit_tracer(tmp_path: Path) -> None:
    for layer in (0, 1):
        sites = {"in_sites": (vs.Site("mlp_in", layer=layer),), "out_sites": (vs.Site("mlp_out", layer=layer),)}
        save(ours("relu", **sites), tmp_path, format="circuit_tracer")
    assert str(load(tmp_path, layer=1).in_sites[0]) == "layers.1.mlp_in"
    with pytest.raises(
        InputError, match=r"has feature_input_hook='mlp\.hook_in' for every layer, this has 'hook_resid_mid'"
    ):
        other = (vs.Site("resid_mid", layer=2),)
        save(ours("relu", in_sites=other, out_sites=(vs.Site("mlp_out", layer=2),)), tmp_path, format="circuit_tracer")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [("saelens", ours("topk", to=4), r"SAELens's transcoders cannot express activation='topk'"),
     ("saelens", ours("relu", skip=SKIP, in_sites=(RESID,), out_sites=(RESID,)), "only transcoders have a skip"),
     ("sparsify", ours("relu"), r"sparsify cannot express activation='relu'; it has topk"),
     ("sparsify", ours("topk", row_norm="layer_norm"), r"sparsify cannot express row_norm='layer_norm'"),
     ("sparsify", ours("topk", to=4), "an input of width 6 and an output of width 4"),
     ("gemma_scope", ours("gated"), r"Gemma Scope 1 cannot express activation='gated'"),
     ("gemma_scope", ours("batchtopk", groups=(5, M)), r"Gemma Scope 1 cannot express groups=\(5, 20\)"),
     ("gemma_scope", ours("relu", skip=SKIP), r"Gemma Scope 1 cannot express skip="),
     ("circuit_tracer", ours("gated"), r"circuit-tracer cannot express activation='gated'"),
     ("circuit_tracer", ours("relu", in_sites=(vs.Site("embed"),)), "a layer and a hook in it, which embed has not"),
     ("circuit_tracer", ours("relu", in_sites=(vs.Site("mlp_in", layer=1),)), "transcoders within one layer"),
     ("saelens", ours("relu", in_sites=(RESID, MLP_OUT), encoders=(normal(D, M),) * 2), "read one site and write one")],
)  # fmt: skip
def test_what_a_format_cannot_express_is_refused_by_name(
    tmp_path: Path, name: str, given: Dictionary, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save(given, tmp_path / "out", format=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_another_dictionary_is_not_written_over(tmp_path: Path, name: str) -> None:
    given = EXPRESSIBLE[name][0]
    save(given, tmp_path, format=name)
    save(given, tmp_path, format=name)  # the same again may be
    with pytest.raises(InputError, match="is there already and holds something else; choose another folder"):
        save(replace(given, b_enc=given.b_enc + 1), tmp_path, format=name)
    again = load(tmp_path)
    torch.testing.assert_close(again.encode(rows()), given.encode(rows()), atol=1e-5, rtol=1e-5)


def test_which_models_have_a_norm_after_the_mlp() -> None:
    yes = [
        "google/gemma-2-2b",
        "gemma-3-1b-it",
        "gemma2",
        "gemma-v3-1b-pt",
        "allenai/OLMo-2-1124-7B",
        "google/gemma-2-27b-it",
    ]
    no = ["google/gemma-2b", "gemma-7b", "meta-llama/Llama-2-7b", "gpt2", "allenai/OLMo-7B", ""]
    assert [post_normed(name) for name in (*yes, *no)] == [True] * len(yes) + [False] * len(no)


def test_formats_that_are_not_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="dictionary_learning is read only"):
        save(ours("relu"), tmp_path, format="dictionary_learning")
    with pytest.raises(
        UnknownNameError, match="known: circuit_tracer, gemma_scope, gemma_scope_2, saelens, sparsify, vesalius"
    ):
        save(ours("relu"), tmp_path, format="onnx")
    clt = load(files.cross_layer(tmp_path / "clt").path)
    with pytest.raises(InputError, match="saelens cannot express a cross-layer transcoder"):
        save(clt, tmp_path / "out", format="saelens")
    save(ours("relu"), tmp_path / "own")
    with pytest.raises(InputError, match="holds a dictionary in our own format"):
        save(ours("relu"), tmp_path / "own", format="saelens")


def test_dtype_and_device_are_chosen_when_loading(tmp_path: Path) -> None:
    written = files.saelens(tmp_path)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    single, half = load(tmp_path), load(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert isinstance(single, Dictionary)
    assert isinstance(half, Dictionary)
    assert (single.b_enc.dtype, half.b_enc.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.encode(rows()), written.encode(rows()), atol=0.1, rtol=0.05)


PAGE = (Path(__file__).parents[1] / "docs" / "dictionary-files.md").read_text()


def test_the_page_lists_every_format_and_every_architecture() -> None:
    named = set(re.findall(r"`format=\"(\w+)\"`", PAGE))
    assert named == {"vesalius", *vs.dictionaries.formats.WRITERS}
    assert [name for name in (*saelens.ACTIVATIONS, *dictionary_learning.CLASSES) if f"`{name}`" not in PAGE] == []


def test_the_python_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    written = files.saelens(tmp_path / "sae", "topk")
    names: dict[str, Any] = {}
    exec(compile(code, "dictionary-files.md", "exec"), names)
    assert names["latents"].shape == (8, M)
    agree(names["again"], written)
    assert names["again"].in_sites == (MLP_OUT,)
