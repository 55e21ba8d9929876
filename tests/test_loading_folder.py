from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

import families
import test_adapters
import test_encoder_decoder
import tiny
from tiny_folder import change_config, refused, tiny_folder
from tiny_gguf import TOKENS, logits_of, tiny_llama
from vesalius.errors import FileFormatError, NotFiniteError, UnknownArchitectureError
from vesalius.jobs import Event
from vesalius.model.loading import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in transformers layout, with the tokenizer of the tiny GGUF file."""
    return tiny_folder(tmp_path)


def test_folder_gives_the_model_and_its_tokenizer(folder: Path) -> None:
    model = load(folder)
    assert model.name == "tiny"
    assert not model.module.training
    assert torch.equal(logits_of(model.module), logits_of(tiny_llama()))
    assert model.tokenizer("he").input_ids == [TOKENS.index("he")]


def test_path_as_text_and_through_a_link_and_with_an_odd_name_is_fine(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "an odd näme.gguf [1]%"
    odd.symlink_to(folder)
    assert torch.equal(logits_of(load(str(odd)).module), logits_of(tiny_llama()))


def test_folder_without_tokenizer_gives_a_model_without_one(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    assert load(folder).tokenizer is None


def test_dtype_and_device_are_as_asked(folder: Path) -> None:
    module = load(folder, dtype=torch.bfloat16, device="cpu").module
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in module.parameters()} == {"cpu"}


def test_half_precision_folder_is_read_as_exact_float32(folder: Path) -> None:
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    module = load(folder).module
    assert module.dtype == torch.float32
    assert torch.equal(module.model.embed_tokens.weight, weights["model.embed_tokens.weight"].float())


def test_editing_loaded_weights_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    module = load(folder).module
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(logits_of(load(folder).module), logits_of(tiny_llama()))


def test_several_weight_files_are_read_by_their_index(folder: Path) -> None:
    shard(folder)
    assert torch.equal(logits_of(load(folder).module), logits_of(tiny_llama()))


def test_tied_weights_in_several_files_with_more_vocabulary_than_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    """As Qwen's files are: the table is padded, and stands for the unembedding too."""
    tokenizer = load(folder).tokenizer
    for tied in (True, False):
        wide = tiny.llama(vocab_size=len(tokenizer) + 9, tie_word_embeddings=tied)
        out = tmp_path / f"tied {tied}"
        tokenizer.save_pretrained(out)
        wide.save_pretrained(out, max_shard_size="20KB")
        assert len(list(out.glob("*.safetensors"))) > 2
        model = load(out)
        ids = torch.tensor([[1, 2, len(tokenizer) + 8]])
        assert torch.equal(model.run(ids).logits, wide(ids).logits)
        shared = model.module.lm_head.weight is model.module.model.embed_tokens.weight
        assert shared is tied
        assert torch.equal(model.W_U, wide.lm_head.weight)
        assert len(model.generate("he", 3).texts) == 1


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    place = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({n: weights[n] for n in names if place[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))


def test_loading_draws_nothing_and_leaves_the_progress_bars_as_they_were(folder: Path, capfd) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    load(folder)
    assert transformers_logging.is_progress_bar_enabled() is before
    assert capfd.readouterr() == ("", "")


def test_unused_tensor_is_told_in_a_note(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.stray": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    events: list[Event] = []
    load(folder, sink=events.append)
    assert ["model.stray" in event.message for event in events if event.kind == "note"] == [True]


# --- a folder that cannot be loaded


def test_folder_without_config_is_refused_with_what_it_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refused(folder, FileFormatError)
    assert f"{folder} holds no config.json" in message
    assert "model.safetensors" in message


def test_adapter_folder_is_told_to_be_merged(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "merge the adapter" in refused(folder, FileFormatError)


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read as JSON"), ("[1]", "holds a list")])
def test_broken_config_is_named(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    message = refused(folder, FileFormatError)
    assert f"{folder}/config.json" in message
    assert words in message


def test_code_that_comes_with_a_model_is_refused_and_never_run(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    message = refused(folder, FileFormatError)
    assert "auto_map" in message
    assert "never run" in message
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["lama", "t5", None])
def test_model_type_without_causal_model_is_refused_with_near_ones(folder: Path, kind: str | None) -> None:
    change_config(folder, model_type=kind)
    message = refused(folder, UnknownArchitectureError)
    assert repr(str(kind)) in message
    assert "llama" in message or kind != "lama"
    assert "Model(module)" in message


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"num_attention_heads": 7}, {"hidden_act": "nope"}])
def test_impossible_config_is_a_format_error_naming_the_folder(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    assert str(folder) in refused(folder, FileFormatError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth"])
def test_pickle_is_refused_and_the_line_of_python_given_converts_it(folder: Path, name: str) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    message = refused(folder, FileFormatError)
    assert str(folder / name) in message
    exec(message[message.index("import torch") :], {})
    assert torch.equal(logits_of(load(folder).module), logits_of(tiny_llama()))


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(folder, FileFormatError)


@pytest.mark.parametrize("keep", [0, 4, 200, 20000, -4])
def test_truncated_weights_are_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(folder, FileFormatError)
    assert f"{path} is truncated or corrupt" in message


def test_missing_and_truncated_shards_are_named(folder: Path) -> None:
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-7])
    assert f"{second} is truncated or corrupt" in refused(folder, FileFormatError)
    second.unlink()
    assert "lacks 1 of its weight files: model-00002-of-00002.safetensors" in refused(folder, FileFormatError)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refused(folder, FileFormatError)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_named_with_its_file(folder: Path, bad: float, sharded: bool) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = "model.safetensors"
    if sharded:
        shard(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    message = refused(folder, NotFiniteError)
    assert f"{folder / file}: tensor model.layers.1.mlp.up_proj.weight" in message


def test_value_too_large_for_the_asked_dtype_is_told(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(folder, NotFiniteError, dtype=torch.float16)
    assert load(folder).module.model.norm.weight[0] == 1e6


def test_missing_tensor_is_never_filled_with_random_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight" in refused(folder, FileFormatError)


def test_tensor_of_another_shape_is_named_and_nothing_is_drawn(folder: Path, capfd) -> None:
    change_config(folder, intermediate_size=100)
    message = refused(folder, FileFormatError)
    assert str(folder) in message
    assert "model.layers.0.mlp.down_proj.weight ((64, 96) in the file, (64, 100) by the config)" in message
    assert capfd.readouterr() == ("", "")


def test_broken_tokenizer_is_a_format_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert str(folder) in refused(folder, FileFormatError)


# --- other classes that an adapter knows


@pytest.mark.parametrize("name", ["bert", "albert", "modernbert", "vit", "t5"])
def test_masked_image_and_encoder_decoder_models_are_loaded_as_what_they_are(name: str, tmp_path: Path) -> None:
    built = {"vit": test_adapters.vit, "t5": test_encoder_decoder.t5}
    given = built[name]() if name in built else families.model(name)
    given.module.save_pretrained(tmp_path / name)
    model = load(tmp_path / name)
    assert type(model.module) is type(given.module)
    assert model.architecture[0].family == name
    inputs = torch.randn(2, 3, 8, 8) if name == "vit" else torch.arange(2, 14).view(2, 6)
    assert torch.equal(model.run(inputs).logits, given.run(inputs).logits)
