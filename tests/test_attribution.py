"""Attribution to the tokens of an input: closed forms, and against forwards that were run the plain way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.describe import Attribution, attribute, integrated_gradients
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import Event

METHODS = ("gradient_x_input", "integrated_gradients", "ablate", "resample", "window")


def ids(rows: int = 4, width: int = 8, seed: int = 0) -> vs.Tokens:
    draw = torch.Generator().manual_seed(seed)
    listed = [torch.randint(2, tiny.VOCAB, (width - row,), generator=draw).tolist() for row in range(rows)]
    return vs.Tokens.from_rows(listed)


def shares(model: vs.Model, inputs: Any, target: Any, method: str, **options: Any) -> Attribution:
    return attribute(model, inputs, target, method=method, **{"sink": vs.silent, "check": False, **options})


# Integrated gradients of functions that can be integrated by hand


def double(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "start", "end", "expected"),
    [
        (lambda x: x[:, 0] * x[:, 1] ** 2, (0, 0), (1, 1), (1 / 3, 2 / 3)),
        (lambda x: x[:, 0] ** 2 * x[:, 1], (0, 0), (1, 1), (2 / 3, 1 / 3)),  # Shapley values would be (1/2, 1/2)
        (lambda x: x[:, 0] * x[:, 1], (0, 0), (1, 1), (0.5, 0.5)),
        (lambda x: 3 * x[:, 0] - 2 * x[:, 1] + 5, (1, 1), (4, -1), (9, 4)),  # linear: coefficient times difference
        (lambda x: 1 - (1 - x[:, 0]).relu() + 0 * x[:, 1], (0, 0), (2, 7), (1, 0)),  # saturated: the gradient is zero
        (lambda x: torch.ones(len(x), dtype=x.dtype), (0, 0), (1, 1), (0, 0)),  # depends on nothing
    ],
)
def test_integrated_gradients_are_the_integrals(function: Any, start: Any, end: Any, expected: Any) -> None:
    for together in (1, 7):
        values, gap = integrated_gradients(function, double(*end), double(*start), 1000, together)
        assert values[0].tolist() == pytest.approx(expected, abs=2e-6)
        assert float(gap[0]) == pytest.approx(0, abs=2e-6)


def test_the_gap_is_the_midpoint_rules_and_shrinks_as_the_square_of_the_steps() -> None:
    function = lambda x: x[:, 0] ** 2 * x[:, 1]  # noqa: E731
    gaps = [float(integrated_gradients(function, double(1, 1), double(0, 0), n)[1][0]) for n in (10, 50, 100)]
    # A left or right sum would be off by about 0.15 and 0.03.
    assert gaps == pytest.approx([0.0025, 0.0001, 0.000025], rel=1e-3)


def test_two_implementations_of_one_function_get_the_same_shares() -> None:
    one = lambda x: torch.where(x[:, 0] > 0, x[:, 0], 0.0) ** 2  # noqa: E731
    two = lambda x: (x[:, 0].relu() * x[:, 0].abs() + 0 * x[:, 1]).relu()  # noqa: E731
    given = double(1.5, 3.0)
    values = [integrated_gradients(f, given, torch.zeros_like(given), 200)[0] for f in (one, two)]
    assert torch.allclose(values[0], values[1], atol=1e-9)
    assert values[0][0].tolist() == pytest.approx([2.25, 0.0])
    with pytest.raises(InputError, match="at least 1"):
        integrated_gradients(one, given, given, 0)


# On networks


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_of_a_linear_part_every_method_gives_what_the_token_adds(model: vs.Model, method: str) -> None:
    tokens, vector = ids(), torch.randn(48, generator=torch.Generator().manual_seed(1))
    direction = vs.Direction("embed", vector)
    found = shares(model, tokens, direction, method, at="sum", baseline="zero", keep_first=False, window=1, draws=100)
    embedded = model.run(tokens, capture=["embed"])["embed"] @ direction.vector
    if method == "resample":  # the mean over the other inputs' tokens, up to chance
        pool = [embedded[tokens.real & (torch.arange(4) != row)[:, None]] for row in range(4)]
        means = torch.stack([some.mean() for some in pool])
        assert torch.allclose(found.values, ((embedded - means[:, None]) * tokens.real).double(), atol=0.3)
        return
    assert torch.allclose(found.values, (embedded * tokens.real).double(), atol=1e-5)
    assert float(found.gap.abs().max()) < 1e-4
    assert torch.allclose(found.value, found.values.sum(1), atol=1e-4)


def test_integrated_gradients_are_complete_and_the_gap_says_when_not(model: vs.Model) -> None:
    neuron = vs.neuron(1, 3)
    fine, coarse = (
        shares(model, ids(), neuron, "integrated_gradients", at="last", steps=steps, baseline="mean")
        for steps in (300, 2)
    )
    assert float(fine.relative_gap.max()) < 1e-3 < float(coarse.relative_gap.max())
    assert torch.allclose(fine.gap, fine.value - fine.at_baseline - fine.values.sum(1))


def test_a_large_gap_is_pointed_out(model: vs.Model) -> None:
    heard: list[Event] = []
    shares(model, ids(), vs.neuron(1, 3), "integrated_gradients", at="last", steps=1, baseline=7, sink=heard.append)
    notes = [event.message for event in heard if event.kind == "note"]
    assert any("unexplained; give more steps than 1" in note for note in notes)
    assert any("forward passes" in note for note in notes)  # the cost, before the work


def test_the_gradient_is_that_of_plain_autograd(model: vs.Model) -> None:
    tokens, part = ids(1), vs.neuron(2, 5)
    found = shares(model, tokens, part, "gradient_x_input", at=5, baseline=9, keep_first=False)
    embed = model.module.get_input_embeddings()
    own = embed(tokens.ids).detach().requires_grad_()
    kept: list[Tensor] = []
    layers = model.module.model.layers if hasattr(model.module, "model") else model.module.transformer.h
    mlp = layers[2].mlp
    down: nn.Module = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj
    handle = down.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model.module(inputs_embeds=own)
    handle.remove()
    (gradient,) = torch.autograd.grad(kept[0][0, 5, 5], own)
    absent = embed(torch.tensor([9]))[0].detach()
    assert torch.allclose(found.values[0], (gradient * (own - absent)).sum(-1)[0].double(), atol=1e-5)
    assert torch.equal(found.values[0, 6:], torch.zeros(2, dtype=torch.float64))  # what comes after can't matter


@pytest.mark.parametrize("at", ["last", "sum", "max", 2])
def test_ablation_is_what_plain_runs_with_another_token_give(model: vs.Model, at: Any) -> None:
    tokens, part, absent = ids(), vs.neuron(1, 4), 9
    found = shares(model, tokens, part, "ablate", at=at, baseline=absent, keep_first=False)

    def read(given: vs.Tokens, row: int) -> float:
        values = part.value(model.run(given, capture=part.reads))[0][: int(tokens.lengths[row])]
        return float(values.sum() if at == "sum" else values[int(found.at[row])])  # type: ignore[index]

    for row in range(len(tokens)):
        alone = tokens.take(torch.tensor([row]), int(tokens.lengths[row]))
        plain = read(alone, row)
        assert float(found.value[row]) == pytest.approx(plain, abs=1e-5)
        for position in range(int(tokens.lengths[row])):
            other = alone.ids.clone()
            other[0, position] = absent
            changed = read(vs.Tokens(other), row)
            assert float(found.values[row, position]) == pytest.approx(plain - changed, abs=1e-5)
    if at == "max":
        values = part.value(model.run(tokens, capture=part.reads)).masked_fill(~tokens.real, -torch.inf)
        assert torch.equal(found.at, values.argmax(1))  # type: ignore[arg-type]


def test_windows_are_replaced_together_and_shared_by_their_tokens(model: vs.Model) -> None:
    tokens, part, absent, size = ids(2), vs.neuron(1, 4), 9, 3
    found = shares(model, tokens, part, "window", at="last", baseline=absent, window=size)
    for row in range(2):
        n = int(tokens.lengths[row])
        alone = tokens.ids[row : row + 1, :n]
        read = lambda given: float(part.value(model.run(vs.Tokens(given), capture=part.reads))[0, -1])  # noqa: E731
        of: dict[int, list[float]] = {position: [] for position in range(n)}
        for first in range(1, n - size + 1):  # the first token is kept
            other = alone.clone()
            other[0, first : first + size] = absent
            for position in range(first, first + size):
                of[position].append(read(alone) - read(other))
        expected = [sum(some) / len(some) if some else 0.0 for some in of.values()]
        assert found.values[row, :n].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_input_of_one_token_that_is_kept_has_no_shares(model: vs.Model, method: str) -> None:
    found = shares(model, ids(1, 1), vs.neuron(1, 4), method, baseline=9, others=ids(), check=True)
    assert found.values.tolist() == [[0.0]]
    assert float(found.gap[0]) == 0


def test_the_first_token_is_not_the_largest_where_it_is_kept(model: vs.Model) -> None:
    tokens = ids(40, 45)
    free, kept = (shares(model, tokens, vs.neuron(1, 4), "gradient_x_input", keep_first=keep) for keep in (False, True))
    assert bool((free.at == 0).any())  # type: ignore[union-attr]
    assert not bool((kept.at == 0)[:-1].any())  # type: ignore[index]
    assert float(kept.values[:, 0].abs().max()) == 0


def test_a_window_wider_than_the_text_is_the_whole_text(model: vs.Model) -> None:
    found = shares(model, ids(1, 4), vs.neuron(1, 4), "window", at="last", baseline=9, window=50)
    assert torch.allclose(found.values[0, 1:], (found.value - found.at_baseline).expand(3), atol=1e-5)


@pytest.mark.parametrize("method", ["ablate", "resample"])
def test_a_metric_is_perturbed_by_the_sweep_engine_as_plain_runs_would(model: vs.Model, method: str) -> None:
    pairs = tiny.pairs()
    found = shares(model, pairs, vs.logit_diff, method, baseline=9, draws=1, keep_first=False)
    everywhere = vs.Metric("all", "logits", vs.Needs(positions="all", tokens="answer_distractor"), _last_difference)
    # A metric that reads every position is not replayed: the same by passes over changed embeddings.
    plain = shares(model, pairs, everywhere, method, baseline=9, draws=1, keep_first=False)
    assert torch.allclose(found.values, plain.values, atol=1e-4)
    assert found.cost.spent < plain.cost.spent
    assert float(found.values.abs().max()) > 0.1


def _last_difference(logits: Tensor, _base: Tensor | None, pairs: vs.Pairs) -> Tensor:
    rows = torch.arange(len(pairs))
    last = logits[rows, pairs.at]
    return last[rows, pairs.answer] - last[rows, pairs.distractor]


def test_gradients_are_compared_with_ablation_within_each_example(model: vs.Model) -> None:
    direction = vs.Direction("embed", torch.randn(48, generator=torch.Generator().manual_seed(1)))
    linear = shares(model, ids(), direction, "gradient_x_input", at="sum", check=True)
    assert linear.agreement is not None
    # A token that is there twice has equal shares, but for rounding.
    assert linear.agreement.rank_per_example.tolist() == pytest.approx([1.0] * 4, abs=0.05)
    assert linear.agreement.per_example.tolist() == pytest.approx([1.0] * 4)
    assert linear.agreement.pearson == pytest.approx(1.0)
    bent = shares(model, ids(), vs.neuron(2, 7), "gradient_x_input", at="last", check=True)
    assert bent.agreement is not None
    assert bent.agreement.pearson < 0.999
    assert bent.cost.spent > linear.cost.spent
    with pytest.raises(InputError, match="do not compare"):
        bent.against(linear)


def test_values_do_not_depend_on_how_much_runs_together(model: vs.Model) -> None:
    for method in METHODS:
        few, many = (
            shares(model, ids(), vs.neuron(1, 4), method, batch_tokens=size, draws=2, steps=9) for size in (1, 1000)
        )
        assert torch.allclose(few.values, many.values, atol=1e-5)


def test_a_latent_of_a_dictionary_has_gradients_too(model: vs.Model) -> None:
    rows = torch.randn(256, 48, generator=torch.Generator().manual_seed(0))
    config = vs.TrainConfig(kind="topk", n_latents=24, k=12, batch_size=64, steps=3)
    trained = vs.dictionaries.train(rows, config, sink=vs.silent)
    sites = (vs.Site.parse("layers.1.resid_post"),)
    dictionary = replace(trained, in_sites=sites, out_sites=sites)
    values = dictionary.encode(model.run(ids(), capture=sites)[sites[0]])
    active = int((values[0] * ids().real[0, :, None]).amax(0).argmax())
    found = shares(model, ids(1), dictionary.latent(active), "gradient_x_input", at="max")
    assert float(found.value[0]) > 0
    assert float(found.values.abs().max()) > 0


def test_what_cannot_be_attributed_is_refused_with_the_reason(model: vs.Model) -> None:
    with pytest.raises(UnknownNameError, match="unknown method 'shap'"):
        shares(model, ids(), vs.neuron(1, 3), "shap")
    with pytest.raises(UnknownNameError, match="unknown place 'first'"):
        shares(model, ids(), vs.neuron(1, 3), "ablate", at="first")
    with pytest.raises(UnknownNameError, match="unknown baseline 'noise'"):
        shares(model, ids(), vs.neuron(1, 3), "ablate", baseline="noise")
    with pytest.raises(InputError, match="no padding token"):
        shares(model, ids(), vs.neuron(1, 3), "ablate", baseline="pad")
    with pytest.raises(InputError, match="no position of every input"):
        shares(model, ids(), vs.neuron(1, 3), "ablate", at=7)
    with pytest.raises(InputError, match="numbers at each position"):
        shares(model, ids(), vs.Unit(vs.Site.parse("layers.1.mlp_out")), "ablate", at="last")
    with pytest.raises(InputError, match=r"metric of vs\.Pairs"):
        shares(model, ids(), vs.logit_diff, "ablate")
    with pytest.raises(InputError, match="is zero there"):
        shares(model, tiny.pairs(), vs.kl_divergence, "ablate")
    with pytest.raises(InputError, match="give others="):
        shares(model, ids(1), vs.neuron(1, 3), "resample")
    with pytest.raises(InputError, match="must be at least 1"):
        shares(model, ids(), vs.neuron(1, 3), "window", window=0)
    with pytest.raises(InputError, match="has no adapter"):
        shares(vs.Model(nn.Linear(2, 2)), ids(), vs.neuron(1, 3), "ablate")


def test_an_attribution_is_drawn_and_goes_into_a_table(model: vs.Model) -> None:
    found = shares(model, ids(2), vs.neuron(1, 4), "integrated_gradients", check=True)
    frame = found.to_frame()
    assert len(frame) == int(ids(2).lengths.sum())
    assert frame.groupby("example")["read"].sum().tolist() == [1, 1]
    page = found._repr_html_()
    assert page.count("<span") == len(frame)
    assert "completeness gap" in page
    assert "rank correlation with ablation" in repr(found)
    assert set(found.off_distribution) == {"norm_ratio", "z_rms"}
