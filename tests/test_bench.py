"""Effects on a bench equal hand-written runs, are oriented alike, and survive a killed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vesalius.bench import DIRECTIONS, EMBED, Bench, components

import patching
import tiny
import vesalius as vs
from vesalius.errors import PairsError, UnknownNameError
from vesalius.jobs import Blocks

FAMILIES = sorted(tiny.FAMILIES)


def other_corruption(pairs: vs.Pairs) -> vs.Pairs:
    """The same clean prompts, changed at one more position."""
    corrupted = pairs.corrupted.clone()
    corrupted[:, 3] = (pairs.clean[:, 3] - 2 + 11) % (tiny.VOCAB - 2) + 2
    return replace(pairs, corrupted=corrupted, corruption="more")


def made(family: str, **options: object) -> Bench:
    pairs = tiny.pairs()
    return Bench(tiny.model(family, layers=2), {"corrupted": pairs, "more": other_corruption(pairs)}, **options)  # type: ignore[arg-type]


@pytest.fixture(params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    return made(request.param)


def by_hand(bench: Bench, part: vs.Site, corruption: str, direction: str) -> Tensor:
    pairs = bench.corruptions[corruption]
    base = "clean" if direction == "noising" else "corrupted"
    plain = patching.difference(patching.forward(bench.model, pairs.tokens(base)), pairs)
    edited = patching.patched(bench.model, pairs, [part], base)
    return plain - edited if direction == "noising" else edited - plain


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("corruption", ["corrupted", "more"])
def test_effects_are_those_of_one_hooked_run_per_component(bench: Bench, corruption: str, direction: str) -> None:
    parts = components(bench.model)
    found = bench.effects(parts, corruption, direction)
    expected = torch.stack([by_hand(bench, part, corruption, direction) for part in parts])
    assert torch.allclose(found, expected, atol=2e-4)
    assert expected.abs().mean() > 0.01


def test_components_are_the_embeddings_every_head_and_every_mlp_in_forward_order(bench: Bench) -> None:
    layout = bench.model.architecture[1]
    parts = components(bench.model)
    assert len(parts) == len(set(parts)) == 1 + layout.n_layers * (layout.n_heads + 1)
    assert parts == sorted(parts, key=lambda part: part.order)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_patching_the_embeddings_is_the_total_effect_in_both_directions(bench: Bench, direction: str) -> None:
    for corruption in bench.corruptions:
        total = bench.total(corruption)
        assert torch.allclose(bench.effects([EMBED], corruption, direction)[0], total, atol=1e-4)
        assert total.abs().min() > 1e-3


def test_shuffled_effects_are_the_same_edits_scored_with_other_prompts_labels(bench: Bench) -> None:
    part, pairs = vs.Site("z", 1, 2), bench.pairs
    labels = bench.shuffled
    assert sorted(labels.answer.tolist()) == sorted(pairs.answer.tolist())
    donors = [pairs.answer.tolist().index(int(answer)) for answer in labels.answer]
    assert all(donor != row for row, donor in enumerate(donors))
    base = patching.forward(bench.model, pairs.tokens("clean"))
    other = patching.values(bench.model, pairs.tokens("corrupted"))
    edited = patching.forward(bench.model, pairs.tokens("clean"), {part: other[part]})
    expected = patching.difference(base, labels) - patching.difference(edited, labels)
    assert torch.allclose(bench.shuffled_effects([part], "corrupted", "noising")[0], expected, atol=1e-4)
    assert not torch.allclose(expected, bench.effects([part], "corrupted", "noising")[0], atol=1e-3)


def test_what_is_measured_once_is_not_measured_again(bench: Bench) -> None:
    parts = components(bench.model)
    true, shuffled = bench.recall(parts, "corrupted", "noising")
    spent = bench.cost
    assert spent.spent > 0
    again = bench.recall(parts[::-1], "corrupted", "noising")
    assert bench.cost == spent
    assert torch.equal(again[0].flip(0), true)
    assert torch.equal(again[1].flip(0), shuffled)


def test_a_bench_with_blocks_goes_on_where_another_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    parts = components(first.model)
    expected = first.effects(parts, "more", "denoising")
    resumed = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    monkeypatch.setattr(Bench, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert torch.equal(resumed.effects(parts, "more", "denoising"), expected)
    assert resumed.cost == first.cost
    assert first.cost.spent > 0


def test_benches_of_other_names_do_not_take_each_other_s_blocks(tmp_path: Path) -> None:
    first = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    first.effects([EMBED], "corrupted", "noising")
    flipped = {"corrupted": tiny.pairs(seed=1)}
    other = Bench(first.model, flipped, blocks=Blocks(tmp_path, "plan"), name="validation")
    assert torch.allclose(other.effects([EMBED], "corrupted", "noising")[0], other.total("corrupted"), atol=1e-4)


def test_blocks_do_not_change_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.bench.BLOCK", 4)
    plain, kept = made("gpt2"), made("gpt2", blocks=Blocks(tmp_path, "plan"))
    parts = components(plain.model)
    for direction in DIRECTIONS:
        expected = plain.effects(parts, "corrupted", direction)
        assert torch.equal(kept.effects(parts, "corrupted", direction), expected)
    assert plain.cost == kept.cost
    assert len(list(tmp_path.glob("*.npz"))) == 2 * -(-len(parts) // 4)


def test_a_stored_piece_costs_the_same_when_it_is_read_back(tmp_path: Path) -> None:
    bench = made("llama", blocks=Blocks(tmp_path, "plan"))

    def work() -> dict[str, object]:
        return {"value": bench.effects([EMBED], "corrupted", "noising").numpy()}

    once = bench.stored("piece", work)
    cost = bench.cost
    twice = bench.stored("piece", work)
    assert (bench.cost - cost) == cost
    assert once["value"].tolist() == twice["value"].tolist()


def test_runs_that_were_forgotten_are_made_again(bench: Bench) -> None:
    before = bench.metric("clean")
    bench.forget()
    assert torch.equal(bench.metric("clean"), before)


def test_corruptions_of_other_clean_prompts_are_refused() -> None:
    model, pairs = tiny.model("llama", layers=1), tiny.pairs()
    with pytest.raises(PairsError, match=r"corruption 'b' has other clean prompts than 'a'.*row by row"):
        Bench(model, {"a": pairs, "b": tiny.pairs(seed=5)})
    turned = pairs.subset(range(len(pairs) - 1, -1, -1))
    with pytest.raises(PairsError, match="corruption 'b' has other clean prompts"):
        Bench(model, {"a": pairs, "b": turned})


@pytest.mark.parametrize(
    ("field", "words"), [("answer", "answers"), ("distractor", "distractors"), ("read", "read positions")]
)
def test_corruptions_that_are_scored_otherwise_are_refused(field: str, words: str) -> None:
    pairs = tiny.pairs()
    changed = {"answer": pairs.answer - 1, "distractor": (pairs.answer + 2) % tiny.VOCAB, "read": pairs.at - 1}[field]
    with pytest.raises(PairsError, match=f"corruption 'b' has other {words} than 'a'"):
        Bench(tiny.model("llama", layers=1), {"a": pairs, "b": replace(pairs, **{field: changed})})


def test_no_corruption_at_all_is_refused() -> None:
    with pytest.raises(PairsError, match="at least one corruption; got none"):
        Bench(tiny.model("llama", layers=1), {})


def test_an_unknown_corruption_or_direction_lists_the_known(bench: Bench) -> None:
    with pytest.raises(UnknownNameError, match="unknown corruption 'abc'; known: clean, corrupted, more"):
        bench.run("abc")
    with pytest.raises(UnknownNameError, match="unknown direction 'sideways'; known: denoising, noising"):
        bench.effects([EMBED], "corrupted", "sideways")
