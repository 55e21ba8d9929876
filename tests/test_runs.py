"""Effects in runs equal hand-written runs, are oriented alike, and survive a killed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import patching
import tiny
import vesalius as vs
from vesalius.errors import PairsError, UnknownNameError
from vesalius.jobs import Blocks
from vesalius.quantities import Runs, heads_and_mlps
from vesalius.quantities.contrast import EMBED
from vesalius.quantities.runs import DIRECTIONS

FAMILIES = sorted(tiny.FAMILIES)


def other_corruption(pairs: vs.Pairs) -> vs.Pairs:
    """The same clean prompts, changed at one more position."""
    corrupted = pairs.corrupted.clone()
    corrupted[:, 3] = (pairs.clean[:, 3] - 2 + 11) % (tiny.VOCAB - 2) + 2
    return replace(pairs, corrupted=corrupted, corruption="more")


def made(family: str, **options: object) -> Runs:
    pairs = tiny.pairs()
    return Runs(tiny.model(family, layers=2), {"corrupted": pairs, "more": other_corruption(pairs)}, **options)  # type: ignore[arg-type]


@pytest.fixture(params=FAMILIES)
def runs(request: pytest.FixtureRequest) -> Runs:
    return made(request.param)


def by_hand(runs: Runs, part: vs.Part, corruption: str, direction: str) -> Tensor:
    pairs = runs.corruptions[corruption]
    base = "clean" if direction == "noising" else "corrupted"
    plain = patching.difference(patching.forward(runs.model, pairs.tokens(base)), pairs)
    edited = patching.patched(runs.model, pairs, [part.writes[0]], base)
    return plain - edited if direction == "noising" else edited - plain


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("corruption", ["corrupted", "more"])
def test_effects_are_those_of_one_hooked_run_per_component(runs: Runs, corruption: str, direction: str) -> None:
    parts = heads_and_mlps(runs.model)
    found = runs.effects(parts, corruption, direction)
    expected = torch.stack([by_hand(runs, part, corruption, direction) for part in parts])
    assert torch.allclose(found, expected, atol=2e-4)
    assert expected.abs().mean() > 0.01


def test_components_are_the_embeddings_every_head_and_every_mlp_in_forward_order(runs: Runs) -> None:
    layout = runs.model.architecture[1]
    parts = heads_and_mlps(runs.model)
    assert len(parts) == len(set(parts)) == 1 + layout.n_layers * (layout.n_heads + 1)
    assert list(parts) == sorted(parts, key=lambda part: part.writes[0].order)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_patching_the_embeddings_is_the_total_effect_in_both_directions(runs: Runs, direction: str) -> None:
    for corruption in runs.corruptions:
        total = runs.total(corruption)
        assert torch.allclose(runs.effects([EMBED], corruption, direction)[0], total, atol=1e-4)
        assert total.abs().min() > 1e-3


def test_shuffled_effects_are_the_same_edits_scored_with_other_prompts_labels(runs: Runs) -> None:
    part, pairs = vs.head(1, 2), runs.pairs
    labels = runs.shuffled
    assert sorted(labels.answer.tolist()) == sorted(pairs.answer.tolist())
    donors = [pairs.answer.tolist().index(int(answer)) for answer in labels.answer]
    assert all(donor != row for row, donor in enumerate(donors))
    base = patching.forward(runs.model, pairs.tokens("clean"))
    other = patching.values(runs.model, pairs.tokens("corrupted"))
    edited = patching.forward(runs.model, pairs.tokens("clean"), {part.site: other[part.site]})
    expected = patching.difference(base, labels) - patching.difference(edited, labels)
    assert torch.allclose(runs.shuffled_effects([part], "corrupted", "noising")[0], expected, atol=1e-4)
    assert not torch.allclose(expected, runs.effects([part], "corrupted", "noising")[0], atol=1e-3)


def test_what_is_measured_once_is_not_measured_again(runs: Runs) -> None:
    parts = heads_and_mlps(runs.model)
    true, shuffled = (measure(parts, "corrupted", "noising") for measure in (runs.effects, runs.shuffled_effects))
    spent = runs.cost
    assert spent.spent > 0
    assert torch.equal(runs.effects(parts[::-1], "corrupted", "noising").flip(0), true)
    assert torch.equal(runs.shuffled_effects(parts[::-1], "corrupted", "noising").flip(0), shuffled)
    assert runs.cost == spent


def test_runs_with_blocks_go_on_where_others_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    parts = heads_and_mlps(first.model)
    expected = first.effects(parts, "more", "denoising")
    resumed = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    monkeypatch.setattr(Runs, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    assert torch.equal(resumed.effects(parts, "more", "denoising"), expected)
    assert resumed.cost == first.cost
    assert first.cost.spent > 0


def test_runs_of_other_names_do_not_take_each_other_s_blocks(tmp_path: Path) -> None:
    first = made("llama", blocks=Blocks(tmp_path, "plan"), name="discovery")
    first.effects([EMBED], "corrupted", "noising")
    flipped = {"corrupted": tiny.pairs(seed=1)}
    other = Runs(first.model, flipped, blocks=Blocks(tmp_path, "plan"), name="validation")
    assert torch.allclose(other.effects([EMBED], "corrupted", "noising")[0], other.total("corrupted"), atol=1e-4)


def test_blocks_do_not_change_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.quantities.runs.BLOCK", 4)
    plain, kept = made("gpt2"), made("gpt2", blocks=Blocks(tmp_path, "plan"))
    parts = heads_and_mlps(plain.model)
    for direction in DIRECTIONS:
        expected = plain.effects(parts, "corrupted", direction)
        assert torch.equal(kept.effects(parts, "corrupted", direction), expected)
    assert plain.cost == kept.cost
    assert len(list(tmp_path.glob("*.npz"))) == 2 * -(-len(parts) // 4)


def test_a_stored_piece_costs_the_same_when_it_is_read_back(tmp_path: Path) -> None:
    runs = made("llama", blocks=Blocks(tmp_path, "plan"))

    def work() -> dict[str, object]:
        return {"value": runs.effects([EMBED], "corrupted", "noising").numpy()}

    once = runs.stored("piece", work)
    cost = runs.cost
    twice = runs.stored("piece", work)
    assert (runs.cost - cost) == cost
    assert once["value"].tolist() == twice["value"].tolist()


def test_runs_that_were_forgotten_are_made_again(runs: Runs) -> None:
    before = runs.metric("clean")
    runs.forget()
    assert torch.equal(runs.metric("clean"), before)


def test_corruptions_of_other_clean_prompts_are_refused() -> None:
    model, pairs = tiny.model("llama", layers=1), tiny.pairs()
    with pytest.raises(PairsError, match=r"corruption 'b' has other clean prompts than 'a'.*row by row"):
        Runs(model, {"a": pairs, "b": tiny.pairs(seed=5)})
    turned = pairs.subset(range(len(pairs) - 1, -1, -1))
    with pytest.raises(PairsError, match="corruption 'b' has other clean prompts"):
        Runs(model, {"a": pairs, "b": turned})


@pytest.mark.parametrize(
    ("field", "words"), [("answer", "answers"), ("distractor", "distractors"), ("read", "read positions")]
)
def test_corruptions_that_are_scored_otherwise_are_refused(field: str, words: str) -> None:
    pairs = tiny.pairs()
    changed = {"answer": pairs.answer - 1, "distractor": (pairs.answer + 2) % tiny.VOCAB, "read": pairs.at - 1}[field]
    with pytest.raises(PairsError, match=f"corruption 'b' has other {words} than 'a'"):
        Runs(tiny.model("llama", layers=1), {"a": pairs, "b": replace(pairs, **{field: changed})})


def test_no_corruption_at_all_is_refused() -> None:
    with pytest.raises(PairsError, match="at least one corruption; got none"):
        Runs(tiny.model("llama", layers=1), {})


def test_an_unknown_corruption_or_direction_lists_the_known(runs: Runs) -> None:
    with pytest.raises(UnknownNameError, match="unknown corruption 'abc'; known: clean, corrupted, more"):
        runs.run("abc")
    with pytest.raises(UnknownNameError, match="unknown direction 'sideways'; known: denoising, noising"):
        runs.effects([EMBED], "corrupted", "sideways")
