"""Steering: planted directions do what closed forms say, random ones of the same norm do not; a stop loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.describe import contrast_vector, steer
from vesalius.describe.steering import _controls
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Event

LAST = "layers.2.resid_post"


def same_answers() -> vs.Pairs:
    pairs = tiny.pairs()
    answer = torch.full((len(pairs),), 5)
    return vs.Pairs(clean=pairs.clean, corrupted=pairs.corrupted, answer=answer, distractor=answer + 1,
                    lengths=pairs.size)  # fmt: skip


def plain(n: int = 4) -> vs.Tokens:
    return vs.Tokens(torch.randint(2, tiny.VOCAB, (n, 11), generator=torch.Generator().manual_seed(5)))


def quiet(model: vs.Model, part: Any, prompts: Any, **how: Any) -> vs.describe.Steering:
    return steer(model, part, prompts, sink=vs.silent, **{"scales": (1.0, 4.0), **how})


def test_a_planted_direction_moves_the_logits_as_the_closed_form_says_and_random_ones_do_not() -> None:
    net = tiny.llama()
    model, pairs = vs.Model(net), same_answers()
    vector = net.lm_head.weight[5].detach() - net.lm_head.weight[6].detach()
    found = quiet(model, vs.Direction(LAST, vector), pairs)
    rows = torch.arange(len(pairs))
    with torch.no_grad():
        out = net(pairs.clean, attention_mask=pairs.real.long(), output_hidden_states=True)
        resid = model.run(pairs.tokens("clean"), LAST)[LAST][rows, pairs.at]
        before = out.logits[rows, pairs.at]
        for scale in (1.0, 4.0):
            after = net.lm_head(net.model.norm(resid + scale * vector / vector.norm()))
            expected = ((after - before)[:, 5] - (after - before)[:, 6]).double()
            assert torch.allclose(torch.tensor(found.effects[found.number(scale)]), expected, atol=1e-4)
            assert found.p_value(scale) == pytest.approx(1 / 20)
            assert found.effect(scale).estimate > 3 * abs(found.random[:, found.number(scale)].mean())
    assert found.effect(4.0).estimate > found.effect(1.0).estimate > 0
    one = found.effect(4.0)
    assert one.values == tuple(found.effects[1])
    assert one.diagnostics["off_distribution"][0]["norm_ratio"] > 1.0
    assert found.over_random(4.0).estimate == pytest.approx(one.estimate - found.random[:, 1].mean())


def test_a_random_direction_is_one_of_the_crowd() -> None:
    part = vs.Direction(LAST, torch.randn(48, generator=torch.Generator().manual_seed(9)))
    found = quiet(tiny.model("llama"), part, same_answers())
    assert found.p_value(4.0) > 0.05


@pytest.mark.parametrize("part", ["layers.1.mlp_post[7]", "layers.1.resid_post[3]"])
def test_random_directions_change_what_is_written_by_as_much_as_the_part(part: str) -> None:
    model, tokens = tiny.model("llama"), plain()
    unit = vs.Unit(vs.Site.parse(part))
    site = unit.site.whole
    base = model.run(tokens, site)[site]
    for edits in _controls(model, unit, tokens, 3, 0):
        moved = model.run(tokens, site, edits(2.5, None))[site] - base
        assert torch.allclose(moved.norm(dim=-1), torch.tensor(2.5), atol=1e-4)


def test_texts_are_measured_by_divergence_or_towards_tokens() -> None:
    net = tiny.llama()
    model, tokens = vs.Model(net), plain()
    part = vs.Direction(LAST, net.lm_head.weight[9].detach())
    zero = quiet(model, part, tokens, scales=[0.0], random=2)
    assert float(abs(zero.effects).max()) == 0.0
    assert zero.p_value(0.0) == 1.0
    shifted = quiet(model, part, tokens, scales=[3.0], random=2)
    assert (shifted.effects > 0).all()
    towards = quiet(model, part, tokens, scales=[3.0], towards=[9], random=4)
    base = model.run(tokens, LAST)
    after = net.lm_head(net.model.norm(base[LAST][:, -1] + 3.0 * part.vector)).log_softmax(-1)[:, 9]
    expected = (after - base.logits[:, -1].log_softmax(-1)[:, 9]).detach().double()
    assert torch.allclose(torch.tensor(towards.effects[0]), expected, atol=1e-4)
    assert towards.promoted[0][0] == "9"


def test_the_price_is_the_loss_that_is_added_on_plain_text() -> None:
    model, texts = tiny.model("gpt2"), plain(5)
    part = vs.Direction("layers.1.resid_post", torch.ones(48).cumsum(0))
    found = quiet(model, part, same_answers(), plain=texts, random=2)
    ids = texts.ids
    for scale in (1.0, 4.0):
        logits = model.run(texts, interventions=vs.Steer(part, scale=scale)).logits
        losses = [torch.nn.functional.cross_entropy(row[:-1], own[1:]) for row, own in zip(logits, ids, strict=True)]
        unsteered = model.run(texts).logits
        before = [torch.nn.functional.cross_entropy(row[:-1], own[1:]) for row, own in zip(unsteered, ids, strict=True)]
        expected = [float(a - b) for a, b in zip(losses, before, strict=True)]
        assert found.price(scale).values == pytest.approx(expected, abs=1e-5)
        assert found.perplexity_ratio(scale) == pytest.approx(
            float(torch.tensor(expected).double().mean().exp()), rel=1e-4
        )
    assert found.random_cost.shape == (2, 2, 5)
    with pytest.raises(InputError, match="the price of steering needs plain texts"):
        quiet(model, part, same_answers(), random=1).price(1.0)


def test_a_contrastive_vector_is_the_difference_of_means() -> None:
    model, pairs = tiny.model("llama"), tiny.pairs()
    sides = [pairs.tokens(which) for which in ("clean", "corrupted")]
    rows = torch.arange(len(pairs))
    means = [model.run(side, "layers.1.resid_post")["layers.1.resid_post"][rows, pairs.at].mean(0) for side in sides]
    found = contrast_vector(model, "layers.1.resid_post", *sides, label="clean")
    assert torch.allclose(found.direction.vector * found.size, means[0] - means[1], atol=1e-5)
    assert found.scales([1, -2]) == (found.size, -2 * found.size)
    with pytest.raises(InputError, match="both sets of prompts have the same mean"):
        contrast_vector(model, "layers.1.resid_post", sides[0], sides[0])
    with pytest.raises(InputError, match="name one head of it"):
        contrast_vector(model, "layers.1.z", *sides)
    head = contrast_vector(model, "layers.1.z[2]", *sides)
    assert len(head.direction.vector) == 8
    assert quiet(model, head.direction, pairs, random=1, scales=head.scales([1.0])).effects.shape == (1, 6)


def test_it_writes_text_and_gives_tables(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    model, part = tiny.model("llama"), vs.Direction(LAST, torch.ones(48).cumsum(0))
    found = quiet(model, part, same_answers(), plain=plain(), new_tokens=3, random=2)
    assert [len(texts) for texts in found.texts] == [6, 6]
    assert len(found.unsteered) == 6
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 3 * 2 * 6
    assert json.loads(json.dumps(found.to_json()))["scales"][1]["effect"]["n"] == 6
    page = found._repr_html_()
    assert "random directions" in page
    assert "What is written after the first prompts" in page
    with pytest.raises(UnknownNameError, match="unknown scale '2"):
        found.effect(2.0)


class StoppedError(Exception):
    """Stands for a kill."""


def test_stopped_it_goes_on_and_says_what_it_expects_to_cost(tmp_path: Path) -> None:
    model, part, heard = tiny.model("llama"), vs.Direction(LAST, torch.ones(48).cumsum(0)), []

    def sink(event: Event) -> None:
        heard.append(event)
        if event.kind == "advance" and event.done == 3:
            raise StoppedError

    how: dict[str, Any] = {"scales": (1.0, 2.0), "random": 2, "plain": plain()}
    with pytest.raises(StoppedError):
        steer(model, part, same_answers(), out=tmp_path, sink=sink, **how)
    assert any(event.message.startswith("expected cost: about") for event in heard)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.npz")}
    assert len(kept) == 3
    found = steer(model, part, same_answers(), out=tmp_path, sink=vs.silent, **how)
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in kept.items())
    whole = steer(model, part, same_answers(), sink=vs.silent, **how)
    assert (found.effects == whole.effects).all()
    assert (found.random == whole.random).all()
    assert (found.cost == whole.cost).all()
    with pytest.raises(InputError, match="holds blocks of plan"):
        steer(model, part, same_answers(), out=tmp_path, sink=vs.silent, **how, seed=1)


def test_what_cannot_be_steered_or_measured_is_refused() -> None:
    model, part = tiny.model("llama"), vs.Direction(LAST, torch.ones(48))
    bad: list[tuple[dict[str, Any], Any, str]] = [
        ({"scales": []}, same_answers(), "scales are different finite numbers"),
        ({"scales": [1.0, float("nan")]}, same_answers(), "scales are different finite numbers"),
        ({"random": 0}, same_answers(), "at least 1; got 0"),
        ({"metric": vs.next_token_loss}, same_answers(), "a metric of the position that is read"),
        ({"metric": vs.logit_diff}, plain(), "logit_diff needs vs.Pairs"),
        ({}, plain(1), "at least 2 of them"),
        ({"plain": plain(1)}, same_answers(), "at least 2 plain texts"),
    ]
    for how, prompts, message in bad:
        with pytest.raises(InputError, match=message):
            quiet(model, part, prompts, **how)
    with pytest.raises(InputError, match="needs vector=, or a part with one number per position"):
        quiet(model, vs.Unit(vs.Site.parse("layers.1.mlp_out")), same_answers())


@pytest.mark.demo_model
def test_on_the_demo_model_a_contrastive_vector_changes_what_it_is_made_of(demo: vs.Model) -> None:
    happy = ["I feel so happy today", "What a wonderful, joyful day", "She smiled and laughed with joy"]
    sad = ["I feel so sad today", "What a terrible, gloomy day", "She cried and wept with grief"]
    vector = contrast_vector(demo, "layers.20.resid_post", happy, sad, label="happy")
    found = steer(demo, vector.direction, ["The weather made me feel", "After the news he was"],
                  scales=vector.scales([1.0]), towards=[" happy", " good", " better"], random=3,
                  sink=vs.silent)  # fmt: skip
    assert found.effects.mean() > 0
    with pytest.raises(InputError, match=r"' unhappily so' is . tokens"):
        steer(demo, vector.direction, ["a b", "c d"], scales=[1.0], towards=[" unhappily so"], sink=vs.silent)
