from __future__ import annotations

import builtins
import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_gguf import BYTES, SPECIAL, TOKENS, add_tokenizer, logits_of, tensors_of, tiny_llama, write_gguf
from vesalius.errors import FileFormatError, InputError, NotFiniteError, UnknownArchitectureError, UnknownNameError
from vesalius.jobs import Event
from vesalius.model.gguf import convert_gguf, read_tokenizer
from vesalius.model.gguf.file import read_gguf

TEXTS = [
    "the hehe 12 1212",
    "héllo 日本語 🎉",
    "   lead\n\n  and trail  ",
    "\ttab\r\nend\n",
    "don't 3.14 ½ ²",
    "<|start|>the<own>12<|end|>",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as GGUF, with a tokenizer."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


def refused(path: Path, error: type[Exception]) -> str:
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    with pytest.raises(error) as caught:
        convert_gguf(path, out)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 8}, {"tie_word_embeddings": False}],
    ids=["grouped", "plain", "one-kv-head", "head-size", "untied"],
)
def test_converted_model_gives_the_logits_of_the_original(tmp_path: Path, changes: dict[str, object]) -> None:
    original = tiny_llama(**changes)
    folder = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(again), logits_of(original), atol=1e-5, rtol=0)
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_rotary_order_matters_in_this_round_trip(tmp_path: Path) -> None:
    # Positive control: without undoing the order the logits above would be far away.
    original, mixed = tiny_llama(), tiny_llama()
    folder = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    stored = tensors_of(original)["blk.0.attn_q.weight"]
    mixed.model.layers[0].self_attn.q_proj.weight.data = torch.tensor(stored)
    assert (logits_of(mixed) - logits_of(again)).abs().max() > 1e-2


def test_config_keeps_what_the_metadata_say(tiny: Path, tmp_path: Path) -> None:
    kept, given = transformers.AutoConfig.from_pretrained(converted(tiny, tmp_path / "out")), tiny_llama().config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
             "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
             "bos_token_id", "eos_token_id", "pad_token_id", "head_dim")  # fmt: skip
    assert {name: getattr(kept, name) for name in names} == {name: getattr(given, name) for name in names}
    assert kept.architectures == ["LlamaForCausalLM"]


def test_quantised_values_are_block_scale_times_integer(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    name = "blk.1.ffn_up.weight"
    path = write_gguf(tmp_path / "q.gguf", tiny_llama(), quantised={name: kind})
    raw = np.asarray(next(t for t in gguf.GGUFReader(path).tensors if t.name == name).data).tobytes()
    expected = []
    for block in range(0, len(raw), 34):
        scale, *integers = struct.unpack("<e32b", raw[block : block + 34])
        expected += [np.float32(scale) * np.float32(value) for value in integers]
    again = AutoModelForCausalLM.from_pretrained(converted(path, tmp_path / "out"))
    found = again.model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(found.ravel(), np.array(expected, dtype=np.float32))
    assert not np.array_equal(found, tensors_of(tiny_llama())[name])  # it was quantised


def test_half_precision_weights_become_the_same_float32(tmp_path: Path) -> None:
    tensors = {n: w.astype(np.float16) if w.ndim == 2 else w for n, w in tensors_of(tiny_llama()).items()}
    path = write_gguf(tmp_path / "h.gguf", tiny_llama(), tensors=tensors)
    again = AutoModelForCausalLM.from_pretrained(converted(path, tmp_path / "out"))
    found = again.model.embed_tokens.weight.detach().numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, tensors["token_embd.weight"].astype(np.float32))


def test_events_count_every_tensor(tiny: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    convert_gguf(tiny, tmp_path, sink=events.append)
    total = len(tensors_of(tiny_llama()))
    assert [event.kind for event in events] == ["start", *["advance"] * total, "end"]
    assert events[-2].done == events[-2].total == total
    assert events[0].task == "convert tiny.gguf"


# --- tokenizer


def test_tokenizer_survives_saving_and_round_trips_text(tiny: Path, tmp_path: Path) -> None:
    direct = read_tokenizer(read_gguf(tiny))
    saved = AutoTokenizer.from_pretrained(converted(tiny, tmp_path / "out"))
    assert direct is not None
    for text in TEXTS:
        ids = saved(text).input_ids
        assert ids == direct(text).input_ids
        assert saved.decode(ids) == text
    assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 0, 0)
    assert saved.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<|start|>he<|end|>"


def test_tokenizer_agrees_with_that_of_transformers(tiny: Path) -> None:
    ours, theirs = read_tokenizer(read_gguf(tiny)), AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    assert ours is not None
    for text in ["the hehe the", "héllo 日本語 🎉", "   lead", "a\n\n\nb", "<|start|>the", "don't"]:
        assert ours(text).input_ids == theirs(text).input_ids


def test_smollm_splits_numbers_into_digits_and_gpt2_does_not(tmp_path: Path) -> None:
    digits, merged = [TOKENS.index("1"), TOKENS.index("2")], [TOKENS.index("12")]
    for pre, expected in (("smollm", digits), ("gpt-2", merged)):
        path = write_gguf(tmp_path / f"{pre}.gguf", tiny_llama(), fields=lambda w, pre=pre: add_tokenizer(w, pre=pre))
        tokenizer = read_tokenizer(read_gguf(path))
        assert tokenizer is not None
        assert tokenizer("12").input_ids == expected


def test_control_tokens_are_special_and_user_defined_ones_are_text(tiny: Path) -> None:
    tokenizer = read_tokenizer(read_gguf(tiny))
    assert tokenizer is not None
    ids = tokenizer("<|start|>he<own>").input_ids
    assert ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<own>"


@pytest.mark.parametrize("bos", [True, False])
def test_bos_token_is_added_only_if_the_file_asks(tmp_path: Path, bos: bool) -> None:
    path = write_gguf(tmp_path / "b.gguf", tiny_llama(), fields=lambda w: add_tokenizer(w, bos=bos))
    folder = converted(path, tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(folder)
    assert saved("he").input_ids == [1] * bos + [TOKENS.index("he")]
    assert saved("he", "he").input_ids == ([1] * bos + [TOKENS.index("he")]) * 2
    assert saved("he", add_special_tokens=False).input_ids == [TOKENS.index("he")]


def test_file_without_tokenizer_converts_without_one(tmp_path: Path) -> None:
    folder = converted(write_gguf(tmp_path / "m.gguf", tiny_llama(), fields=lambda w: None), tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        (lambda w: w.add_tokenizer_model("bert"), UnknownNameError, ["'bert'", "known: gpt2, llama"]),
        (lambda w: add_tokenizer(w, pre="qwen2"), UnknownNameError, ["'qwen2'", "gpt-2, smollm"]),
        (lambda w: add_tokenizer(w, tokens=[*TOKENS[:-1], "he"]), FileFormatError, ["lists a token twice"]),
        (lambda w: add_tokenizer(w, tokens=SPECIAL + BYTES), FileFormatError, ["merges do not fit"]),
        (lambda w: (add_tokenizer(w), w.add_add_space_prefix(True)), FileFormatError, ["add_space_prefix"]),
        (lambda w: (w.add_eos_token_id(9999)), FileFormatError, ["eos_token_id = 9999", "outside the vocabulary"]),
        (lambda w: add_tokenizer(w, tokens=TOKENS + [f"x{i}" for i in range(9)]), FileFormatError, ["do not fit"]),
    ],
)  # fmt: skip
def test_tokenizer_that_is_not_understood_is_refused(tmp_path, fields, error, words) -> None:
    message = refused(write_gguf(tmp_path / "t.gguf", tiny_llama(), fields=fields), error)
    assert all(word in message for word in words), message


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), ["llama.rope.scaling.type = 'linear'"]),
        (lambda w: w.add_rope_scaling_factor(4.0), ["llama.rope.scaling.factor = 4.0"]),
        (lambda w: w.add_expert_count(8), ["llama.expert_count = 8"]),
        (lambda w: w.add_sliding_window(64), ["llama.attention.sliding_window = 64"]),
        (lambda w: w.add_logit_scale(2.0), ["llama.logit_scale"]),
        (lambda w: w.add_causal_attention(False), ["llama.attention.causal = False"]),
        (lambda w: w.add_value_length(8), ["llama.attention.value_length = 8", "head size 16"]),
        (lambda w: w.add_type("adapter"), ["'adapter'", "not a whole model"]),
        (lambda w: w.add_uint16("split.count", 2), ["one of 2 parts", "llama-gguf-split"]),
    ],
)  # fmt: skip
def test_field_that_would_change_the_computation_is_refused(tmp_path, fields, words) -> None:
    message = refused(write_gguf(tmp_path / "f.gguf", tiny_llama(), fields=fields), FileFormatError)
    assert all(word in message for word in words), message


def test_field_at_the_value_where_it_changes_nothing_is_accepted(tmp_path: Path) -> None:
    def fields(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_expert_count(0)
        writer.add_causal_attention(True)
        writer.add_name("any name")

    path = write_gguf(tmp_path / "f.gguf", tiny_llama(), fields=fields)
    again = AutoModelForCausalLM.from_pretrained(converted(path, tmp_path / "out"))
    torch.testing.assert_close(logits_of(again), logits_of(tiny_llama()), atol=1e-5, rtol=0)


def test_other_architecture_is_refused_with_the_known(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "g.gguf", tiny_llama(), architecture="gemma2")
    assert "'gemma2'; known for GGUF: gemma3, llama" in refused(path, UnknownArchitectureError)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), FileFormatError, ["lacks tensor blk.1.ffn_up.weight"]),
        (lambda t: t.pop("token_embd.weight"), FileFormatError, ["lacks a matrix token_embd.weight"]),
        (lambda t: t.update({"rope_freqs.weight": np.ones(8, np.float32)}), FileFormatError, ["rope_freqs.weight"]),
        (lambda t: t.update({"blk.0.attn_q.bias": np.ones(64, np.float32)}), FileFormatError, ["attn_q.bias"]),
        (lambda t: t.update({"output_norm.weight": np.ones(32, np.float32)}), FileFormatError, ["(32,)", "(64,)"]),
        (lambda t: t["blk.0.ffn_down.weight"].__setitem__((3, 3), np.nan), NotFiniteError, ["blk.0.ffn_down.weight"]),
        (lambda t: t["output_norm.weight"].__setitem__(0, np.inf), NotFiniteError, ["output_norm.weight"]),
    ],
)  # fmt: skip
def test_wrong_tensor_is_named(tmp_path, change, error, words) -> None:
    tensors = tensors_of(tiny_llama())
    change(tensors)
    message = refused(write_gguf(tmp_path / "w.gguf", tiny_llama(), tensors=tensors), error)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("keep", [0, 3, 20, 400, 5000, -100])
def test_truncated_file_is_refused(tiny: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:keep])
    assert "not a complete GGUF file" in refused(path, FileFormatError)


def test_flipped_bytes_in_the_header_never_end_in_a_stray_exception(tiny: Path, tmp_path: Path) -> None:
    whole, rng = tiny.read_bytes(), random.Random(0)
    path, out, stopped = tmp_path / "flip.gguf", tmp_path / "out", 0
    out.mkdir()
    spots = [*range(0, 900, 3), *(rng.randrange(900, 14000) for _ in range(120))]
    for spot in spots:
        damaged = bytearray(whole)
        damaged[spot] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            convert_gguf(path, out)  # a flip in a name or in unused text harms nothing
        except InputError as error:
            assert str(path) in str(error)
            stopped += 1
    assert stopped > len(spots) // 4


def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "gone.gguf", InputError)


def test_missing_gguf_package_is_told_with_the_pip_line(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("gguf"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install gguf"):
        convert_gguf(tiny, tmp_path)
