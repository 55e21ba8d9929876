"""Scores: items as parts, selection, ranking, tables; and no mean over positions that are not the same thing."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import silent


@pytest.fixture(scope="module")
def model() -> vs.Model:
    made = tiny.model("llama")
    made.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    return made


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    """Six prompts of two shapes, one of 6 tokens and one of 9, with a named position."""
    made = tiny.pairs(6)
    lengths = torch.tensor([6, 9, 6, 9, 6, 9])
    groups = {"template": tuple("short" if n == 6 else "long" for n in lengths.tolist()), "names": tuple("abcdef")}
    named = {"subject": torch.where(lengths == 6, 2, 3)}
    return replace(made, lengths=lengths, read=lengths - 1, groups=groups, named_positions=named)


@pytest.fixture(scope="module")
def positions(model: vs.Model, pairs: vs.Pairs) -> vs.Scores:
    return vs.sweep(model, pairs, sites="layers.*.resid_post", each="position", edit="zero", sink=silent)


@pytest.fixture(scope="module")
def heads(model: vs.Model, pairs: vs.Pairs) -> vs.Scores:
    return vs.sweep(model, pairs, sites="layers.*.z", each="head", edit="zero", sink=silent)


def test_items_are_parts_row_by_row(heads: vs.Scores, positions: vs.Scores) -> None:
    assert heads.items[:2] == (vs.head(0, 0), vs.head(0, 1))
    assert len(heads.items) == heads.values.shape[0] * heads.values.shape[1]
    assert [str(row) for row in heads.rows] == [f"layers.{n}.z" for n in range(3)]
    torch.testing.assert_close(heads.per_item, heads.effects.flatten(0, 1))
    assert positions.items == positions.rows
    assert positions.per_item.shape == positions.values.shape


def test_grouped_neurons_are_groups(model: vs.Model, pairs: vs.Pairs) -> None:
    found = vs.sweep(model, pairs, sites="layers.1.mlp_post", each="neuron", group=5, edit="zero", sink=silent)
    assert found.items[1] == vs.Group("layers.1.mlp_post", range(5, 10))


def test_paths_are_edges(model: vs.Model, pairs: vs.Pairs) -> None:
    found = vs.path_patching(
        model, pairs, senders="layers.0.z", each="head", receivers=["layers.2.q[0]", "layers.2.q[1]"], sink=silent
    )
    assert found.items[0].source == vs.head(0, 0)
    assert found.items[0].target == vs.Together((vs.Unit(vs.Site("q", 2, 0)), vs.Unit(vs.Site("q", 2, 1))))
    assert str(found.items[0]) == "layers.0.z[0] -> layers.2.q[0] and 1 more"


def test_the_top_is_ranked_by_size_with_an_interval(heads: vs.Scores) -> None:
    top = heads.top(4)
    means = heads.per_item.mean(1)
    assert [abs(one.effect.estimate) for one in top] == pytest.approx(means.abs().sort(descending=True).values[:4])
    first = top[0].effect
    assert first.low is not None and first.high is not None and first.low < first.estimate < first.high
    assert (first.n, first.n_groups, first.name) == (6, 2, str(top[0].item))
    assert first.unit == "logit_diff, logits"


def test_positions_are_ranked_within_a_shape(positions: vs.Scores) -> None:
    top = positions.top(5)
    sizes = [abs(one.effect.estimate) for one in top]
    assert sizes == sorted(sizes, reverse=True)
    assert {one.effect.n for one in top} == {3}
    assert all(one.token for one in top)
    best = max(float(shape.mean.nan_to_num().abs().max()) for shape in positions.by_shape())
    assert sizes[0] == pytest.approx(best)


def test_one_example_has_no_interval(heads: vs.Scores) -> None:
    alone = heads.of([2]).top(1)[0].effect
    assert (alone.n, alone.low, alone.high) == (1, None, None)


def test_positions_of_other_shapes_are_not_averaged(positions: vs.Scores) -> None:
    with pytest.raises(InputError, match=r"6 prompts have 2 shapes.*by_shape\(\).*scores.at\(name\), one of subject"):
        _ = positions.mean
    short, long = positions.by_shape()
    assert (len(short.base), len(long.base)) == (3, 3)
    torch.testing.assert_close(short.mean[:, :6], positions.effects[:, :6, [0, 2, 4]].mean(-1))
    assert bool(short.mean[:, 6:].isnan().all())


def test_a_named_position_lines_prompts_up(positions: vs.Scores) -> None:
    found = positions.at("subject")
    at = torch.tensor([2, 3, 2, 3, 2, 3])
    expected = torch.stack([positions.values[:, at[row], row] for row in range(6)], 1)
    assert torch.equal(found.values, expected)
    assert found.mean.shape == (3,)
    with pytest.raises(UnknownNameError, match="unknown position 'object'; known: subject"):
        positions.at("object")
    with pytest.raises(InputError, match="sweep each position"):
        found.at("subject")


def test_prompts_without_the_position_are_masked(model: vs.Model, pairs: vs.Pairs) -> None:
    named = {"subject": torch.tensor([2, -1, 2, 3, -1, 3])}
    found = vs.sweep(model, replace(pairs, named_positions=named), sites="layers.0.mlp_out", each="position",
                     edit="zero", sink=silent).at("subject")  # fmt: skip
    assert found.mask[0].tolist() == [True, False, True, True, False, True]


def test_selection_by_site_layer_head_and_token(heads: vs.Scores, positions: vs.Scores) -> None:
    one = heads.select(layer=1)
    assert (one.sites, one.items) == (("layers.1.z",), heads.items[6:12])
    assert torch.equal(one.values, heads.values[1:2])
    some = heads.select(head=2)
    assert some.mask[:, 2].all() and not some.mask[:, [0, 1, 3]].any()
    assert {str(ranked.item) for ranked in some.top(9)} == {f"layers.{n}.z[2]" for n in range(3)}
    token = positions.examples.texts[0][3]
    where = positions.select("layers.2.", token=token)
    assert where.sites == ("layers.2.resid_post",)
    for position, example in where.mask[0].nonzero().tolist():
        assert positions.examples.texts[example][position] == token
    assert bool(where.mask[0, 3, 0])
    for bad, message in (({"layer": 9}, "no row of these scores"), ({"position": 1}, "of each head"),
                         ({"token": "<3>"}, 'each="position"')):  # fmt: skip
        with pytest.raises(InputError, match=message):
            heads.select(**bad)
    with pytest.raises(InputError, match="no prompt has the token"):
        positions.select(token="nowhere")


def test_a_frame_has_one_row_per_cell(heads: vs.Scores, positions: vs.Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    frame: Any = positions.to_frame()
    assert list(frame.columns) == ["item", "layer", "position", "token", "example", "value", "effect"]
    assert len(frame) == int(positions.mask.sum()) == 3 * 45
    cell = frame[(frame.item == "layers.1.resid_post") & (frame.position == 4) & (frame.example == 3)].iloc[0]
    assert cell.value == pytest.approx(float(positions.values[1, 4, 3]))
    assert cell.token == positions.examples.texts[3][4]
    plain: Any = heads.to_frame()
    assert plain.groupby("item").effect.mean()["layers.2.z[1]"] == pytest.approx(float(heads.mean[2, 1]), abs=1e-6)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        heads.to_frame()


def test_a_notebook_shows_tokens_and_every_shape(heads: vs.Scores, positions: vs.Scores) -> None:
    shown = positions._repr_html_()
    assert shown.count("<table>") == 3  # by named position, and one for each shape
    assert ">subject<" in shown
    # The first token of prompts that begin differently has an ellipsis.
    assert f"0 {positions.by_shape()[0].token(0)}".replace("<", "&lt;").replace(">", "&gt;") in shown
    assert "(3 of one shape)" in shown
    assert heads._repr_html_().count("<table>") == 1
    assert "layers.2.z" in heads._repr_html_()
