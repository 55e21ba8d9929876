from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
import vesalius as vs
from vesalius.data import TASKS, Row, bos_token, build_pairs, named_positions, task
from vesalius.data.tasks import capitals as make_capitals
from vesalius.data.tasks import induction as make_induction
from vesalius.data.tasks import ioi as make_ioi
from vesalius.data.tasks.base import BalancedSampler
from vesalius.data.tasks.capitals import CAPITALS
from vesalius.data.tasks.capitals import FRAMES as CAPITAL_FRAMES
from vesalius.data.tasks.gendered_pronoun import FRAMES as PRONOUN_FRAMES
from vesalius.data.tasks.gendered_pronoun import NAMES as PRONOUN_NAMES
from vesalius.data.tasks.induction import WORDS
from vesalius.data.tasks.ioi import FRAMES, NAMES, OBJECTS, PLACES
from vesalius.data.tasks.sva import FRAMES as SVA_FRAMES
from vesalius.data.tasks.sva import NOUNS
from vesalius.errors import InputError, PairsError, TokenizerError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.seeds import generator_for

SPLITS = ("discovery", "validation")
LESS_TIDY = ("greater_than", "insecure_code", "translation")
"""Whose words are few, and tokens of few tokenizers: tested on the demo model."""
TIDY = sorted(set(TASKS) - set(LESS_TIDY))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _all_words() -> list[str]:
    texts = [*(f for frames in FRAMES.values() for f in frames), "and she he had"]
    texts += [f for frames in CAPITAL_FRAMES.values() for f in frames]
    texts += [f for frames in PRONOUN_FRAMES.values() for f in frames]
    texts += [" ".join(parts) for frames in SVA_FRAMES.values() for parts in frames]
    for table in (NAMES, PLACES, OBJECTS, WORDS, NOUNS):
        texts += [" ".join(items) for items in table.values()]
    texts += [f"{noun}s" for nouns in NOUNS.values() for noun in nouns]
    texts += [" ".join((*pair.keys(), *pair.values())) for pair in CAPITALS.values()]
    texts += [" ".join(names) for by_gender in PRONOUN_NAMES.values() for names in by_gender.values()]
    return sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(texts))))


def word_level(drop: tuple[str, ...] = ()) -> Any:
    """One token a word, no spaces in the vocabulary, unknown words are all <unk>."""
    words = [word for word in _all_words() if word not in drop]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<s>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def byte_level(**special: str) -> Any:
    """GPT-2-like: a word with and without its leading space are different tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" " + word for word in _all_words()] * 3, trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


WORD_LEVEL = word_level()
BYTE_LEVEL = byte_level(bos_token="<|im_start|>", eos_token="<|im_end|>")


def model(tokenizer: Any = BYTE_LEVEL) -> Any:
    return SimpleNamespace(tokenizer=tokenizer)


def rows(pairs: Pairs, which: str = "clean") -> list[list[int]]:
    ids = getattr(pairs, which)
    return [row[:n] for row, n in zip(ids.tolist(), pairs.size.tolist(), strict=True)]


def groups_of(pairs: Pairs, name: str, split: str) -> set[str]:
    return set(pairs.split(split).groups[name])


@pytest.fixture(params=["byte_level", "word_level"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return {"byte_level": BYTE_LEVEL, "word_level": WORD_LEVEL}[request.param]


# --- all tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TIDY)
def test_every_task_gives_n_distinct_aligned_pairs_in_each_of_two_splits(name: str, tokenizer: Any) -> None:
    for corruption in task(name).corruptions:
        pairs = task(name).build(model(tokenizer), n=20, seed=3, corruption=corruption)
        assert Counter(pairs.splits) == {"discovery": 20, "validation": 20}
        assert len(set(pairs.example_hashes)) == 40
        assert pairs.task == name
        assert pairs.corruption == corruption
        assert bool((pairs.at == pairs.size - 1).all())
        assert "template" in pairs.groups
        assert tokenizer.unk_token_id is None or not any(tokenizer.unk_token_id in row for row in rows(pairs))


@pytest.mark.parametrize("name", TIDY)
def test_splits_share_no_template_name_or_prompt(name: str) -> None:
    pairs = task(name).build(model(), n=40, seed=0)
    for group in ("template", "names"):
        if group in pairs.groups:
            used = [{part for label in groups_of(pairs, group, split) for part in label.split("|")} for split in SPLITS]
            assert not used[0] & used[1]
    hashes = {split: set(pairs.split(split).example_hashes) for split in SPLITS}
    assert not hashes["discovery"] & hashes["validation"]
    assert all(len(groups_of(pairs, "template", split)) >= 12 for split in SPLITS)


@pytest.mark.parametrize("name", TIDY)
def test_a_seed_gives_the_same_pairs_again_and_another_seed_others(name: str) -> None:
    build = task(name).build
    assert build(model(), n=8, seed=5).content_hash == build(model(), n=8, seed=5).content_hash
    assert build(model(), n=8, seed=5).content_hash != build(model(), n=8, seed=6).content_hash


@pytest.mark.parametrize("name", TIDY)
@pytest.mark.parametrize("n", [0, -3, 2.5, True, 10**80])
def test_an_n_that_cannot_be_made_is_refused_with_the_maximum(name: str, n: Any) -> None:
    with pytest.raises(InputError, match=rf"n is {re.escape(repr(n))}; {name} can make 1 to \d+ distinct pairs"):
        task(name).build(model(), n=n)


@pytest.mark.parametrize("name", ["capitals", "gendered_pronoun", "sva"])
def test_the_stated_maximum_can_be_made_and_all_prompts_are_distinct(name: str) -> None:
    small = model(word_level(drop=(*NOUNS["discovery"][14:], *NOUNS["validation"][14:])))
    with pytest.raises(InputError) as error:
        task(name).build(small, n=10**6)
    found = re.search(r"1 to (\d+)", str(error.value))
    assert found
    maximum = int(found[1])
    pairs = task(name).build(small, n=maximum)
    assert len(set(pairs.example_hashes)) == 2 * maximum


@pytest.mark.parametrize("name", TIDY)
def test_the_validation_split_can_have_a_size_of_its_own(name: str) -> None:
    both, more = task(name).build(model(), n=8), task(name).build(model(), n=8, n_validation=30)
    assert Counter(more.splits) == {"discovery": 8, "validation": 30}
    assert more.split("discovery").example_hashes == both.split("discovery").example_hashes
    with pytest.raises(InputError, match=r"n_validation is 0; .* distinct pairs in the validation split"):
        task(name).build(model(), n=8, n_validation=0)


@pytest.mark.parametrize("name", sorted({*TIDY} - {"induction"}))
def test_every_validation_prompt_of_a_study_has_a_template_of_its_own(name: str) -> None:
    # About forty independent groups decide a claim of a family of twenty (docs/calibration.md).
    templates = task(name).build(model(), n=32, n_validation=48).split("validation").groups["template"]
    assert len(set(templates)) == 48


@pytest.mark.parametrize("name", TIDY)
def test_an_unknown_corruption_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(
        UnknownNameError, match=rf"unknown corruption of {name} 'shuffle'; known: .*{task(name).corruptions[0]}"
    ):
        task(name).build(model(), n=2, corruption="shuffle")


@pytest.mark.parametrize("name", TIDY)
def test_a_tokenizer_that_splits_the_words_is_refused_with_the_way_out(name: str) -> None:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.train_from_iterator(
        ["a"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    bytes_only = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(TokenizerError, match=r"only 0 of \d+ .* are single tokens .* `vesalius study pairs.jsonl`"):
        task(name).build(model(bytes_only), n=2)


@pytest.mark.parametrize("name", TIDY)
def test_a_model_without_tokenizer_is_refused(name: str) -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        task(name).build(model(None), n=2)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'iio'; known: capitals, .*ioi.*load_pairs"):
        task("iio")


def test_every_task_asks_a_question_and_its_positions_are_inside_the_prompt() -> None:
    for entry in map(task, TIDY):
        assert entry.question.startswith("How does the model")
        pairs = entry.build(model(), n=6)
        for position in entry.positions(pairs).values():
            assert position.shape == (12,)
            assert bool(((position >= -1) & (position <= pairs.at)).all())
        # Interventions can name these places: the prompts carry them.
        carried = pairs.tokens("corrupted").named_positions
        for name, position in entry.positions(pairs).items():
            assert torch.equal(carried[name], position), (entry.name, name)


# --- indirect object identification ----------------------------------------------------------------------------


def test_ioi_answer_is_the_name_mentioned_once_and_distractor_the_one_mentioned_twice(tokenizer: Any) -> None:
    pairs = make_ioi(model(tokenizer), n=32)
    for row, answer, distractor in zip(rows(pairs), pairs.answer.tolist(), pairs.distractor.tolist(), strict=True):
        assert row.count(answer) == 1
        assert row.count(distractor) == 2


def test_ioi_swap_changes_only_the_second_mention_and_turns_the_answer_round() -> None:
    pairs = make_ioi(model(), n=32)
    where = named_positions(pairs)
    assert pairs.differs.sum(1).tolist() == [1] * len(pairs)
    assert torch.equal(where["changed"], where["distractor_last"])
    for row, answer, distractor in zip(
        rows(pairs, "corrupted"), pairs.answer.tolist(), pairs.distractor.tolist(), strict=True
    ):
        assert (row.count(answer), row.count(distractor)) == (2, 1)


def test_ioi_abc_puts_three_other_names_of_the_split_into_the_three_places() -> None:
    pairs = make_ioi(model(), n=32, corruption="abc")
    named = task("ioi").positions(pairs)
    expected = torch.stack([named[key] for key in ("io", "s1", "s2")], 1).sort(1).values
    assert pairs.differs.sum(1).tolist() == [3] * len(pairs)
    assert torch.equal(pairs.differs.nonzero()[:, 1].view(-1, 3), expected)
    for row, (clean, corrupted) in enumerate(zip(rows(pairs), rows(pairs, "corrupted"), strict=True)):
        new = [corrupted[p] for p in expected[row].tolist()]
        assert len({*new, *(clean[p] for p in expected[row].tolist())}) == 5
        assert {BYTE_LEVEL.decode([i]).strip() for i in new} <= set(NAMES[pairs.splits[row]])


@pytest.mark.parametrize("n", [7, 32])
def test_ioi_clean_prompts_do_not_depend_on_the_corruption(n: int) -> None:
    swap, abc = (make_ioi(model(), n=n, seed=1, corruption=c) for c in ("swap", "abc"))
    assert torch.equal(swap.clean, abc.clean)
    assert torch.equal(swap.answer, abc.answer)
    assert swap.groups == abc.groups
    assert swap.example_hashes == abc.example_hashes
    assert swap.content_hash != abc.content_hash


def test_ioi_lists_of_the_two_splits_share_nothing() -> None:
    for table in (FRAMES, NAMES, PLACES, OBJECTS):
        first, second = (table[split] for split in SPLITS)
        assert not set(first) & set(second)
        assert len({*first, *second}) == len(first) + len(second)
    assert all(len(FRAMES[split]) >= 12 and len(NAMES[split]) >= 24 for split in SPLITS)


@pytest.mark.parametrize("n", [10, 32, 100])
def test_ioi_uses_templates_orders_names_and_pairs_of_names_evenly(n: int) -> None:
    for split in SPLITS:
        part = make_ioi(model(), n=n, seed=2).split(split)
        frames = Counter(part.groups["template"])
        assert max(frames.values()) - min(frames[f.strip()] for f in FRAMES[split]) <= 1
        cells = Counter(zip(part.groups["template"], part.groups["order"], strict=True))
        assert all(abs(cells[f, "ABBA"] - cells[f, "BABA"]) <= 1 for f in frames)
        orders = Counter(part.groups["order"])
        assert abs(orders["ABBA"] - orders["BABA"]) <= 1
        assert max(Counter(part.groups["names"]).values()) == 1
        uses = Counter(name for label in part.groups["names"] for name in label.split("|"))
        assert len(uses) >= min(24, 2 * n)
        assert max(uses.values()) - min(uses[name] for name in NAMES[split]) <= 2


def test_ioi_orders_are_what_their_label_says() -> None:
    pairs = make_ioi(model(), n=32)
    named = task("ioi").positions(pairs)
    for row, order in enumerate(pairs.groups["order"]):
        io, s1, s2 = (int(named[key][row]) for key in ("io", "s1", "s2"))
        assert (io < s1 < s2) if order == "ABBA" else (s1 < io < s2)
        assert int(named["s1_next"][row]) == s1 + 1
        assert int(named["end"][row]) == int(pairs.size[row]) - 1
    assert set(pairs.groups["order"]) == {"ABBA", "BABA"}


def test_ioi_names_in_first_position_are_found_like_any_other() -> None:
    pairs = make_ioi(model(), n=32, bos="none")
    first = [row for row, frame in enumerate(pairs.groups["template"]) if frame.startswith("{A}")]
    named = task("ioi").positions(pairs)
    assert len(first) >= 4
    assert all(min(int(named["io"][row]), int(named["s1"][row])) == 0 for row in first)


def test_ioi_drops_names_of_several_tokens_while_enough_remain() -> None:
    dropped = NAMES["discovery"][:5]
    pairs = make_ioi(model(word_level(drop=dropped)), n=60)
    used = {name for label in pairs.split("discovery").groups["names"] for name in label.split("|")}
    assert used == set(NAMES["discovery"]) - set(dropped)
    total = len(NAMES["discovery"])
    with pytest.raises(TokenizerError, match=f"only 23 of {total} names are single tokens .* and 24 are needed"):
        make_ioi(model(word_level(drop=NAMES["discovery"][23:])), n=4)


# --- the other tasks -------------------------------------------------------------------------------------------


def test_sva_flips_the_number_of_the_subject_alone() -> None:
    pairs = task("sva").build(model(), n=48)
    for row, (clean, corrupted) in enumerate(zip(rows(pairs), rows(pairs, "corrupted"), strict=True)):
        changed = [
            BYTE_LEVEL.decode([ids[int(named_positions(pairs)["changed"][row])]]).strip() for ids in (clean, corrupted)
        ]
        subject = pairs.groups["names"][row]
        assert sorted(changed) == [subject, f"{subject}s"]
        verb = BYTE_LEVEL.decode([int(pairs.answer[row])]).strip()
        assert (verb in ("are", "were", "have")) == changed[0].endswith("s")
    assert Counter(pairs.groups["other"]) == {"same": 48, "opposite": 48}
    plural = sum(BYTE_LEVEL.decode([i]).strip() in ("are", "were", "have") for i in pairs.answer.tolist())
    assert plural == 48
    assert not set(NOUNS["discovery"]) & set(NOUNS["validation"])


def test_capitals_answer_belongs_to_the_clean_country_and_distractor_to_the_corrupted_one(tokenizer: Any) -> None:
    pairs = make_capitals(model(tokenizer), n=24)
    capital = {**CAPITALS["discovery"], **CAPITALS["validation"]}
    for row in range(len(pairs)):
        texts = [set(re.findall(r"\w+", tokenizer.decode(rows(pairs, which)[row]))) for which in ("clean", "corrupted")]
        (country,), (other,) = (text & set(capital) for text in texts)
        assert country == pairs.groups["names"][row] != other
        assert tokenizer.decode([int(pairs.answer[row])]).strip() == capital[country]
        assert tokenizer.decode([int(pairs.distractor[row])]).strip() == capital[other]
    assert not set(CAPITALS["discovery"]) & set(CAPITALS["validation"])
    assert not set(CAPITALS["discovery"].values()) & set(CAPITALS["validation"].values())


def test_induction_answer_follows_the_only_earlier_copy_of_the_last_token() -> None:
    pairs = make_induction(model(), n=30, bos="none")
    for row, (clean, corrupted) in enumerate(zip(rows(pairs), rows(pairs, "corrupted"), strict=True)):
        period = int(pairs.groups["template"][row].removeprefix("period "))
        again = len(clean) - period
        assert 2 <= again < period
        assert len(clean) <= 40
        assert len(set(clean[:period])) == period
        assert clean[period:] == clean[:again]
        assert clean[again] == int(pairs.answer[row])
        assert clean[clean.index(clean[-1]) + 1] == int(pairs.answer[row])
        assert [i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b] == [again]
        assert corrupted[again] == int(pairs.distractor[row])
        assert int(pairs.distractor[row]) not in clean
        words = {BYTE_LEVEL.decode([i]).strip() for i in (*clean, *corrupted)}
        assert words <= set(WORDS[pairs.splits[row]])
    assert not set(WORDS["discovery"]) & set(WORDS["validation"])


def test_induction_is_not_solved_by_a_fixed_offset() -> None:
    pairs = make_induction(model(), n=60, bos="none")
    offsets = Counter(
        len(row) - row.index(answer) for row, answer in zip(rows(pairs), pairs.answer.tolist(), strict=True)
    )
    assert max(offsets.values()) <= len(pairs) // 10


@pytest.mark.parametrize("length", [10, 1000])
def test_induction_refuses_a_length_that_cannot_be_made(length: int) -> None:
    assert max(make_induction(model(), n=20, length=14).size) <= 15
    with pytest.raises(InputError, match=f"length is {length}; give 11 to 6"):
        make_induction(model(), n=4, length=length)


def test_gendered_pronouns_are_balanced_and_the_name_changes_its_gender() -> None:
    pairs = task("gendered_pronoun").build(model(), n=24)
    gender = {name: g for split in SPLITS for g, names in PRONOUN_NAMES[split].items() for name in names}
    at = named_positions(pairs)["changed"]
    for row in range(len(pairs)):
        clean, corrupted = (
            BYTE_LEVEL.decode([rows(pairs, w)[row][int(at[row])]]).strip() for w in ("clean", "corrupted")
        )
        assert gender[clean] == pairs.groups["gender"][row] != gender[corrupted]
        assert BYTE_LEVEL.decode([int(pairs.answer[row])]) == {"female": " she", "male": " he"}[gender[clean]]
    assert Counter(pairs.groups["gender"]) == {"female": 24, "male": 24}


# --- how a text begins ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|endoftext|>"),
        ({"bos_token": "<bos>", "eos_token": "<|endoftext|>"}, "<bos>"),
        ({"eos_token": "</s>"}, "</s>"),
    ],
)
def test_auto_bos_is_bos_then_eos_then_document_separator_but_never_a_chat_marker(
    special: dict[str, str], expected: str
) -> None:
    assert bos_token(byte_level(**special), "auto") == expected


def test_bos_is_put_in_front_once_and_recorded() -> None:
    token = int(BYTE_LEVEL.convert_tokens_to_ids("<|im_end|>"))
    plain, begun = (make_ioi(model(), n=4, bos=b) for b in ("none", "<|im_end|>"))
    assert rows(begun) == [[token, *row] for row in rows(plain)]
    assert (plain.bos, begun.bos) == ("none", "<|im_end|>")
    assert make_ioi(model(), n=4).bos == "<|endoftext|>"
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert bos_token(PreTrainedTokenizerFast(tokenizer_object=core), "auto") == "none"


def test_an_unknown_bos_is_refused_with_the_special_tokens() -> None:
    with pytest.raises(TokenizerError, match=r"bos '<bos>' is not a special token .*<\|endoftext\|>, <\|im_start\|>"):
        make_ioi(model(), n=4, bos="<bos>")


def wide() -> Any:
    net = tiny.llama()
    net.resize_token_embeddings(6000)
    return net


def putting_first(token: str) -> Any:
    """A tokenizer that puts a token first by itself, as Gemma's and Llama 3's do."""
    made = byte_level(bos_token="<|im_start|>", eos_token="<|im_end|>")
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, made.convert_tokens_to_ids(token))]
    )
    return made


def test_the_tokenizers_own_bos_is_everyones_and_never_doubled(tmp_path: Path) -> None:
    own, end = putting_first("<|im_end|>"), "<|im_end|>"
    net = vs.Model(wide(), tokenizer=own)
    text = GOOD.clean
    ids = own(text).input_ids
    assert own.decode(ids[:1]) == end
    assert net.tokens(text).ids[0].tolist() == ids
    assert torch.equal(net.run(text).logits, net.run(torch.tensor([ids])).logits)
    assert net.generate(text, 2).tokens.ids[0, :-2].tolist() == ids
    begun = f"{end}{text}"
    for bos in ("tokenizer", "auto", end):
        assert net.tokens([text, begun], bos=bos).ids.tolist() == [ids, ids], bos
        pairs = build_pairs([GOOD, replace(GOOD, clean=begun, corrupted=end + GOOD.corrupted)], own, bos=bos)
        assert pairs.bos == end
        assert rows(pairs)[0] == rows(pairs)[1] == ids
        store = vs.data.harvest(net, [text, begun], sites=["layers.0.z"], out=tmp_path / bos.strip("<|>"), bos=bos,
                                context=32, sink=vs.silent)  # fmt: skip
        assert store.n_rows == 2 * (len(ids) - 1)
    assert net.tokens(text, bos="none").ids[0].tolist() == ids[1:]
    # One that puts nothing first is taken at its word, by whoever asks for the tokenizer's own.
    plain = vs.Model(net.module, tokenizer=BYTE_LEVEL)
    assert plain.tokens(text).ids[0].tolist() == BYTE_LEVEL(text).input_ids == ids[1:]
    assert bos_token(BYTE_LEVEL, "tokenizer") == "none"


@pytest.mark.parametrize("word", ["<bos>", "yes", ""])
def test_an_unknown_bos_is_an_error_everywhere(word: str, tmp_path: Path) -> None:
    net = vs.Model(wide(), tokenizer=BYTE_LEVEL)
    with pytest.raises(TokenizerError, match=f"bos '{word}' is not a special token .*'tokenizer', 'auto' or 'none'"):
        net.tokens("a ticket", bos=word)
    with pytest.raises(TokenizerError, match=f"bos '{word}' is not a special token"):
        vs.data.harvest(net, ["a ticket"], sites=["layers.0.z"], out=tmp_path / "acts", context=32, bos=word)


# --- build_pairs -----------------------------------------------------------------------------------------------

GOOD = Row(
    "Then Anna and Paul left. Paul gave a ticket to", "Then Anna and Paul left. Anna gave a ticket to", " Anna", " Paul"
)


def change(**fields: Any) -> Row:
    return Row(**{**{name: getattr(GOOD, name) for name in ("clean", "corrupted", "answer", "distractor")}, **fields})


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (change(clean=" "), InputError, "pair 1: clean is empty"),
        (change(answer=3), InputError, r"pair 1: answer must be text, got 3 \(int\)"),
        (change(answer=" Paul"), PairsError, "pair 1: answer equals distractor"),
        (change(corrupted=GOOD.clean), PairsError, "pair 1: clean and corrupted prompts are identical"),
        (change(corrupted="Anna gave"), PairsError, r"pair 1: clean has 12 tokens and corrupted 4.*' Anna'"),
        (change(edits=2), PairsError, "pair 1: 1 token positions differ where 2 should"),
        (change(answer=" Anna" * 9), TokenizerError, r"pair 1: answer .* is \[' Anna', .* give 1 to 8 tokens, all of"),
        (change(distractor=" Paul" * 9), TokenizerError, r"pair 1: distractor .* give 1 to 8 tokens"),
        (change(answer="Anna"), TokenizerError, r"answer 'Anna' is \['.*'\] .* write ' Anna', which is \[' Anna'\]"),
        (change(answer=" Anna Paul", distractor=" Anna Paul"), PairsError, "pair 1: answer equals distractor"),
        (change(clean="a Paul ", corrupted="a Anna ", answer="Anna"), TokenizerError, "prompt without a space"),
        (change(where="line 7", answer=""), InputError, "line 7: answer is empty"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_refused_and_named(row: Row, error: type[Exception], message: str) -> None:
    assert len(build_pairs([GOOD, GOOD], BYTE_LEVEL)) == 2
    with pytest.raises(error, match=message):
        build_pairs([GOOD, row], BYTE_LEVEL)


def test_answers_of_up_to_eight_tokens_are_kept_as_sequences() -> None:
    longest = " Anna and Paul left. Anna and"
    pairs = build_pairs([GOOD, change(answer=" Anna Paul"), change(distractor=longest)], BYTE_LEVEL)
    assert pairs.several
    for row, texts in enumerate([(" Anna", " Paul"), (" Anna Paul", " Paul"), (" Anna", longest)]):
        for ids, text in zip((pairs.answer[row], pairs.distractor[row]), texts, strict=True):
            assert BYTE_LEVEL.decode(ids[ids >= 0]) == text
    assert int((pairs.distractor[2] >= 0).sum()) == pairs.distractor.shape[1] <= 8
    assert not build_pairs([GOOD, GOOD], BYTE_LEVEL).several


def test_two_words_that_begin_alike_are_two_answers() -> None:
    pairs = build_pairs([change(answer=" Anna Paul", distractor=" Anna and")], BYTE_LEVEL)
    assert torch.equal(pairs.answer[:, 0], pairs.distractor[:, 0])
    assert not torch.equal(pairs.answer, pairs.distractor)


def test_words_the_tokenizer_does_not_know_are_refused() -> None:
    for unknown in (" Zorblax", " Anna Zorblax"):
        with pytest.raises(
            TokenizerError, match=rf"answer '{unknown}' is .*'<unk>'\] to this tokenizer; .* all of them known"
        ):
            build_pairs([change(answer=unknown)], WORD_LEVEL)
    with pytest.raises(PairsError, match="identical to this tokenizer"):
        build_pairs([change(clean="gave Zorblax to", corrupted="gave Quuxly to")], WORD_LEVEL)
    with pytest.raises(InputError, match="no pairs"):
        build_pairs([], WORD_LEVEL)


# --- named_positions -------------------------------------------------------------------------------------------------


def by_hand(pairs: Pairs) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {
        key: [] for key in ("end", "answer", "distractor_first", "distractor_last", "changed", "changed_last")
    }
    for i, (clean, corrupted) in enumerate(zip(rows(pairs), rows(pairs, "corrupted"), strict=True)):
        end = int(pairs.at[i])
        answer, distractor = (
            beginnings(clean, [token for token in label[i].reshape(-1).tolist() if token >= 0], end)
            for label in (pairs.answer, pairs.distractor)
        )
        changed = [p for p in range(end + 1) if clean[p] != corrupted[p]]
        found["end"].append(end)
        found["answer"].append(answer[0] if answer else -1)
        found["distractor_first"].append(distractor[0] if distractor else -1)
        found["distractor_last"].append(distractor[-1] if len(distractor) > 1 else -1)
        found["changed"].append(changed[0] if changed else -1)
        found["changed_last"].append(changed[-1] if changed else -1)
    return found


def beginnings(prompt: list[int], words: list[int], end: int) -> list[int]:
    """Positions from where these tokens stand in a row, none of them past the end."""
    return [p for p in range(end + 2 - len(words)) if prompt[p : p + len(words)] == words]


def test_named_positions_equal_a_search_by_hand_on_random_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randint(0, 5, (200, 9), generator=draw) for _ in range(2))
    corrupted[:, 0] = 5  # so that every pair differs somewhere
    answer = torch.randint(0, 6, (200,), generator=draw)
    lengths = torch.randint(1, 10, (200,), generator=draw)
    read = (torch.rand(200, generator=draw) * lengths).long()
    pairs = Pairs(
        clean=clean, corrupted=corrupted, answer=answer, distractor=(answer + 1) % 6, lengths=lengths, read=read
    )
    assert {key: value.tolist() for key, value in named_positions(pairs).items()} == by_hand(pairs)
    more = torch.randint(0, 3, (200, 2), generator=draw)
    more[::3, 1], more[::4] = -1, -1
    answer, distractor = (torch.cat([label[:, None], more], 1) for label in (pairs.answer, pairs.distractor))
    sequences = replace(pairs, answer=answer, distractor=distractor)
    found = {key: value.tolist() for key, value in named_positions(sequences).items()}
    assert found == by_hand(sequences)
    several = ((answer >= 0).sum(1) > 1).tolist()
    assert sum(place >= 0 and long for place, long in zip(found["answer"], several, strict=True)) > 3


BARE = ("<unk>", "Anna", "ĠAnna", "ĠPaul", "ĠAmy", "Ġand", "Ġtold")


def test_named_positions_with_a_tokenizer_find_a_word_without_its_space() -> None:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(BARE)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    row = Row("Anna and Paul and Paul told", "Anna and Paul and Amy told", " Paul", " Anna")
    pairs = build_pairs([row], tokenizer, bos="none")
    assert named_positions(pairs)["distractor_first"].tolist() == [-1]
    assert named_positions(pairs, tokenizer)["distractor_first"].tolist() == [0]
    assert named_positions(pairs, tokenizer)["answer"].tolist() == named_positions(pairs)["answer"].tolist() == [2]


# --- draws -----------------------------------------------------------------------------------------------------


def test_a_rota_uses_everything_once_before_anything_twice() -> None:
    rota = BalancedSampler("abcde", generator_for("test", 0))
    assert sorted(rota.draw() for _ in range(5)) == list("abcde")
    assert rota.draw(exclude="abcd") == "e"
    assert rota.draw(only="ab", cost=lambda item: item == "a") == "b"
    with pytest.raises(LookupError, match="none of 5 items is left"):
        rota.draw(exclude="abcde")


# --- the packaged model


@pytest.mark.demo_model
@pytest.mark.parametrize("name", TIDY)
def test_the_demo_model_fits_every_task(name: str, demo: Any) -> None:
    for corruption in task(name).corruptions:
        pairs = task(name).build(demo, n=32, corruption=corruption)
        assert Counter(pairs.splits) == {"discovery": 32, "validation": 32}
        assert pairs.bos == "<|endoftext|>"


@pytest.mark.demo_model
@pytest.mark.parametrize("name", TIDY)
def test_the_demo_model_does_every_task(name: str, demo: Any) -> None:
    pairs = task(name).build(demo, n=6)
    with torch.no_grad():
        hidden = demo.module.model(pairs.clean, attention_mask=pairs.real.long()).last_hidden_state
        logits = demo.module.lm_head(hidden[torch.arange(len(pairs)), pairs.at])
    right = logits.gather(1, pairs.answer[:, None]) > logits.gather(1, pairs.distractor[:, None])
    assert right.float().mean() >= 0.8


# --- less tidy tasks


@pytest.mark.demo_model
@pytest.mark.parametrize("name", LESS_TIDY)
def test_less_tidy_tasks_are_aligned_and_their_splits_apart(name: str, demo: Any) -> None:
    pairs = task(name).build(demo, n=20, n_validation=24, seed=1)
    split = {one: pairs.split(one) for one in SPLITS}
    assert [len(split[one]) for one in SPLITS] == [20, 24]
    for kind in ("template", "names"):
        labels = [set(split[one].groups[kind]) for one in SPLITS]
        assert not labels[0] & labels[1]
    assert pairs.answer.ndim == 1
    assert len({(tuple(row), int(a)) for row, a in zip(pairs.clean.tolist(), pairs.answer, strict=True)}) == 44
    again, other = (task(name).build(demo, n=20, n_validation=24, seed=seed) for seed in (1, 2))
    assert again.content_hash == pairs.content_hash != other.content_hash
    with pytest.raises(InputError, match="can make 1 to"):
        task(name).build(demo, n=10**9)
    with pytest.raises(UnknownNameError, match="corruption"):
        task(name).build(demo, corruption="noise")


@pytest.mark.demo_model
@pytest.mark.parametrize(
    ("name", "least", "most"), [("greater_than", 0.95, 1.0), ("translation", 0.8, 1.0), ("insecure_code", 0.3, 0.75)]
)
@pytest.mark.slow
def test_what_the_demo_model_does_of_the_less_tidy_tasks(name: str, least: float, most: float, demo: Any) -> None:
    """It tells later years and finds translations; whether code is insecure it does not know."""
    pairs = task(name).build(demo, n=24).split("discovery")
    right = vs.logit_diff(demo.run(pairs.tokens("clean")).logits, pairs) > 0
    assert least <= float(right.float().mean()) <= most


def test_a_tokenizer_without_their_words_is_refused() -> None:
    for name in ("translation", "greater_than"):
        with pytest.raises(TokenizerError, match="are single tokens of this tokenizer"):
            task(name).build(model(word_level()), n=4)
