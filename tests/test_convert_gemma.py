"""Gemma 3 from GGUF: the same weights, windows, rotations and tokens as the original."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vesalius as vs
from tiny_gemma import SCORES, TOKENS, add_pieces, tiny_gemma, write_gemma
from vesalius.errors import FileFormatError
from vesalius.model.gguf import convert_gguf, read_tokenizer
from vesalius.model.gguf.file import read_gguf
from vesalius.model.gguf.tokenizer import merges_of


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(ids).logits


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gemma")
    return converted(write_gemma(place / "g.gguf", tiny_gemma()), place / "out")


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": False}], ids=str)
def test_the_converted_model_gives_the_logits_of_the_original(tmp_path: Path, changes: dict[str, Any]) -> None:
    original = tiny_gemma(**changes)
    out = converted(write_gemma(tmp_path / "g.gguf", original), tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(out, use_safetensors=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # 1 + weight - 1 rounds in the last place.
    torch.testing.assert_close(logits(again), logits(original), atol=1e-4, rtol=0)


def test_what_the_file_leaves_out_is_gemma_3s(folder: Path) -> None:
    """Six layers make a round, five of them with a window; windows turn faster than full attention."""
    config, given = AutoModelForCausalLM.from_pretrained(folder).config, tiny_gemma().config
    assert config.layer_types == [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    names = ("rope_parameters", "layer_types", "sliding_window", "query_pre_attn_scalar", "hidden_activation",
             "rms_norm_eps", "head_dim", "final_logit_softcapping", "bos_token_id", "eos_token_id")  # fmt: skip
    assert {name: getattr(config, name) for name in names} == {name: getattr(given, name) for name in names}
    assert config.architectures == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize(
    "change",
    [{"sliding_window": 50}, {"query_pre_attn_scalar": 64}, {"layer_types": ["full_attention"] * 7},
     {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_each_of_these_would_have_been_felt(change: dict[str, Any]) -> None:
    assert float((logits(tiny_gemma(**change)) - logits(tiny_gemma())).abs().max()) > 1e-2


def test_norms_taken_as_they_are_stored_would_be_felt(folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in again.named_parameters():
            weight += 1.0 if "norm" in name else 0.0
    assert float((logits(again) - logits(tiny_gemma())).abs().max()) > 1e-1


def test_another_round_and_local_base_are_read_when_the_file_has_them(tmp_path: Path) -> None:
    def fields(writer: Any) -> None:
        add_pieces(writer)
        writer.add_uint32("gemma3.attention.sliding_window_pattern", 2)
        writer.add_float32("gemma3.rope.freq_base_swa", 70.0)

    out = converted(write_gemma(tmp_path / "g.gguf", tiny_gemma(), fields), tmp_path / "out")
    config = AutoModelForCausalLM.from_pretrained(out).config
    assert config.layer_types[:3] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 70.0


def test_a_scaled_rotation_is_refused(tmp_path: Path) -> None:
    def fields(writer: Any) -> None:
        add_pieces(writer)
        writer.add_float32("gemma3.rope.scaling.factor", 8.0)

    with pytest.raises(FileFormatError, match=r"gemma3.rope.scaling.factor = 8.0 changes the computation"):
        convert_gguf(write_gemma(tmp_path / "g.gguf", tiny_gemma(), fields), tmp_path)


def test_vs_load_opens_it_with_the_gemma_adapter(tmp_path: Path) -> None:
    model = vs.load(write_gemma(tmp_path / "g.gguf", tiny_gemma()), cache=tmp_path / "cache")
    assert model.architecture[0].family == "gemma3"
    run = model.run(model.tokens("then the", bos="<bos>"), capture=["layers.5.z"])
    assert run["layers.5.z"].shape == (1, 4, 4, 32)


# ---------------------------------------------------------------------------------------------------------- tokens


def spelled(tokenizer: Any, text: str) -> list[str]:
    return [TOKENS[i] for i in tokenizer(text, add_special_tokens=False).input_ids]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (" the", ["▁the"]),  # t h e -> th e -> ▁th e -> ▁the
        ("the", ["th", "e"]),  # th before he
        (" then then", ["▁then", "▁then"]),
        ("he", ["he"]),
        ("12", ["1", "2"]),
        ("h\n\nh\n", ["h", "\n\n", "h", "\n"]),
        ("h   h", ["h", "   ", "h"]),
        ("é", ["<0xC3>", "<0xA9>"]),  # its bytes, when the letter is no token
    ],
)
def test_pieces_are_merged_in_the_order_of_their_scores(folder: Path, text: str, pieces: list[str]) -> None:
    saved, direct = AutoTokenizer.from_pretrained(folder), read_tokenizer(read_gguf(folder.parent / "g.gguf"))
    assert spelled(saved, text) == spelled(direct, text) == pieces
    assert saved.decode(saved(text).input_ids, skip_special_tokens=True) == text


def test_the_tokenizer_agrees_with_that_of_transformers(folder: Path) -> None:
    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder.parent, gguf_file="g.gguf")
    for text in (" then the then", "the\n\nthen", "é 12 the", "<eos>the"):
        assert ours(text).input_ids == theirs(text).input_ids, text


def test_the_weights_agree_with_what_transformers_reads(folder: Path) -> None:
    pytest.importorskip("accelerate")  # which transformers asks for here
    ours = AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder.parent, gguf_file="g.gguf", dtype=torch.float32)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    assert ours.config.layer_types == theirs.config.layer_types


def by_hand(text: str) -> list[str]:
    """SentencePiece's merging: as long as two neighbours make a token, merge the best such pair, leftmost first."""
    rank, parts = dict(zip(TOKENS, SCORES, strict=True)), list(text.replace(" ", "▁"))
    while True:
        made = [(-rank[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
        if not made:
            return parts
        at = min(made)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_any_text_of_known_letters_is_merged_as_by_hand(folder: Path) -> None:
    tokenizer, generator = AutoTokenizer.from_pretrained(folder), torch.Generator().manual_seed(0)
    for _ in range(300):
        letters = [" then12"[i] for i in torch.randint(0, 7, (12,), generator=generator)]
        text = "".join(letters).replace("   ", " ").replace("  ", " ")
        assert spelled(tokenizer, text) == by_hand(text), text


def test_merges_come_best_first_and_cover_every_way_to_make_a_token() -> None:
    found = merges_of(["a", "b", "c", "ab", "bc", "abc"], [-9.0, -8.0, -7.0, -2.0, -1.0, -3.0])
    assert found == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


def test_the_bos_is_added_as_the_file_asks(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("he").input_ids == [2, TOKENS.index("he")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


def test_a_space_put_first_and_missing_scores_are_refused(tmp_path: Path) -> None:
    for name, options, message in (("a", {"prefix": True}, "puts a space first is not known"),
                                   ("b", {"scores": SCORES[:5]}, "has no score for each of its tokens")):  # fmt: skip
        path = write_gemma(tmp_path / name, tiny_gemma(), lambda w, o=options: add_pieces(w, **o))
        with pytest.raises(FileFormatError, match=message):
            convert_gguf(path, tmp_path)
