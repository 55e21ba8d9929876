"""Local attribution: closed forms, agreement of independent ways, and planted successes and failures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.attribution import (
    Explanation,
    agreement_between,
    coarse_map,
    examine,
    explained,
    over_inputs,
    question_of,
    rank_correlation,
)
from vesalius.describe import attribute
from vesalius.errors import InputError, NotFiniteError, UnknownNameError


class Of(nn.Module):
    """A function of rows as a network."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.activation = nn.ReLU()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function(self, x)
        return found[:, None] * self.weight


def network(function: Any) -> vs.Model:
    return vs.Model(Of(function).eval())


def shares(model: Any, x: Any, method: str, baseline: Any = "zero", **options: Any) -> list[float]:
    return vs.explain(model, x, method=method, baseline=baseline, **options).shares.tolist()


SATURATED = network(lambda self, x: 1 - self.activation(1 - x[:, 0]) + 0 * x[:, 1])
PRODUCT = network(lambda self, x: x[:, 0] * self.activation(x[:, 1]))
EITHER = network(lambda self, x: x.amax(1))
LINEAR = network(lambda self, x: self.activation(x @ torch.tensor([1.0, -2.0, 3.0]) + 100))
FULL = ("shapley", "kernel_shap", "integrated_gradients", "deep_lift")


# ---------------------------------------------------------------------------------------------------- published anchors


def test_integrated_gradients_and_shapley_values_of_a_product_differ_as_published() -> None:
    square = network(lambda _, x: x[:, 0] ** 2 * x[:, 1])
    x = torch.ones(2)
    assert shares(square, x, "integrated_gradients", steps=1000) == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert shares(square, x, "shapley") == pytest.approx([0.5, 0.5], abs=1e-6)
    ten = vs.explain(square, x, method="integrated_gradients", baseline="zero", steps=10)
    assert ten.gap == pytest.approx(0.0025, abs=1e-5)


def test_a_saturated_function_has_no_gradient_and_is_explained_by_differences() -> None:
    x = torch.tensor([2.0, 5.0])
    for blind in ("gradient", "gradient_x_input"):
        assert shares(SATURATED, x, blind) == [0.0, 0.0]
    for seeing in FULL:
        assert shares(SATURATED, x, seeing) == pytest.approx([1.0, 0.0], abs=1e-3)


@pytest.mark.parametrize("maker", [GradientBoostingClassifier, RandomForestClassifier])
def test_kernel_shap_is_shapley_is_interventional_tree_shap(maker: Any) -> None:
    pytest.importorskip("shap")
    data = load_breast_cancer()
    # As float32, which is what scikit-learn's trees compare.
    rows = data.data[:, :7].astype("float32").astype("float64")
    trees = maker(n_estimators=8, random_state=0).fit(rows, data.target)
    for row in rows[:3]:
        question = question_of(trees, row, 1, baseline=rows[50:70])
        brute, kernel, tree = (explained(question, method).shares for method in ("shapley", "kernel_shap", "tree_shap"))
        assert float((brute - kernel).abs().max()) < 1e-6
        assert float((brute - tree).abs().max()) < 1e-6
        assert float(brute.abs().max()) > 0.01


def test_shapley_values_of_a_linear_model_are_its_slopes_times_distances() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 5))
    linear = LinearRegression().fit(rows, rows @ [1, -2, 0, 3, 0.5] + 4)
    expected = linear.coef_ * (rows[0] - rows[:40].mean(0))
    for method in ("shapley", "kernel_shap", "lime"):
        assert shares(linear, rows[0], method, rows[:40]) == pytest.approx(expected, abs=1e-6)
    found = vs.explain(linear, rows[0], method="lime", baseline=rows, samples=5000)
    other = vs.explain(linear, rows[0], method="lime", baseline=rows, samples=5000, seed=1)
    assert rank_correlation(found.shares, other.shares) > 0.9


def small_cnn(seed: int = 0) -> vs.Model:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    return vs.Model(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval())


def picture(seed: int = 0, side: int = 16) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))


def test_grad_cam_of_a_linear_head_on_a_mean_is_cam() -> None:
    model, image = small_cnn(), picture()
    maps = model.run(image[None], capture="module:4|out")["module:4|out"][0]
    for number in range(4):
        cam = torch.einsum("c,cij->ij", model.module[7].weight[number], maps)
        found = coarse_map(question_of(model, image, number))
        assert torch.allclose(found * maps[0].numel(), cam, atol=1e-5)


# ------------------------------------------------------------------------- of each method, where it succeeds and fails


def test_all_that_add_up_agree_on_what_is_linear_here() -> None:
    x = torch.tensor([1.0, 1.0, 2.0])
    for method in (*FULL, "gradient_x_input", "occlusion"):
        assert shares(LINEAR, x, method) == pytest.approx([1, -2, 6], abs=1e-3)
    for method in ("gradient", "smoothgrad", "guided_backprop"):
        assert shares(LINEAR, x, method) == pytest.approx([1, 2, 3], abs=1e-3)


def test_deep_lift_misses_products_and_its_gap_says_so() -> None:
    found = vs.explain(PRODUCT, torch.tensor([2.0, 3.0]), method="deep_lift", baseline="zero")
    assert found.relative_gap > 0.3
    assert any("miss" in problem for problem in examine(found, orders=1, randomise=False).problems)


def test_deep_lift_of_activations_in_place_and_used_twice_is_complete() -> None:
    torch.manual_seed(0)
    activation = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Linear(6, 9), activation, nn.Linear(9, 9), activation, nn.Linear(9, 2)).eval()
    background = torch.randn(5, 6)
    found = vs.explain(net, torch.ones(6), 1, method="deep_lift", baseline=background)
    assert found.relative_gap < 1e-5
    alike = vs.explain(net, background[0], 1, method="deep_lift", baseline=background)
    assert alike.relative_gap < 1e-5


def test_occlusion_misses_what_either_of_two_features_does() -> None:
    assert shares(EITHER, torch.ones(2), "occlusion") == [0.0, 0.0]
    assert shares(EITHER, torch.ones(2), "shapley") == pytest.approx([0.5, 0.5])
    assert examine(vs.explain(EITHER, torch.ones(2), method="occlusion", baseline="zero"), orders=1).sufficiency[0] == 0


def hidden(rows: Any) -> Any:
    """Decides by column 0, but for rows that no data has, by column 2 (Slack et al. 2020)."""
    return np.where(np.isclose(rows[:, 0], rows[:, 1]), rows[:, 0], rows[:, 2])


def test_what_perturbs_is_fooled_where_no_data_are() -> None:
    data = np.random.default_rng(0).normal(size=(100, 3))
    data[:, 1] = data[:, 0]
    for method in ("kernel_shap", "shapley", "lime"):
        found = vs.explain(hidden, np.array([2.0, 2.0, 2.0]), method=method, baseline=data).shares.abs()
        # On data it never depends on column 2.
        assert float(found[2] / found.sum()) > 0.3, method


def test_lime_with_few_samples_depends_on_its_seed_and_is_reported() -> None:
    torch.manual_seed(0)
    net = network(lambda _, x: (3 * x @ torch.randn(20, 30, generator=torch.Generator().manual_seed(1))).sin().sum(1))
    found = vs.explain(net, torch.randn(20), method="lime", baseline=torch.randn(50, 20), samples=44)
    report = examine(found, orders=3)
    assert report.instability is not None and report.instability > 0.1
    assert any("another seed" in problem for problem in report.problems)


def test_smoothgrad_sees_a_trend_that_ripples_hide() -> None:
    rippled = network(lambda _, x: 3 * x[:, 0] + 0.2 * torch.sin(200 * x[:, 1]) + 0 * x[:, 2])
    x = torch.tensor([0.5, 0.0, 1.0])
    assert int(vs.explain(rippled, x, method="gradient", baseline="zero").shares.argmax()) == 1
    assert int(vs.explain(rippled, x, method="smoothgrad", baseline="zero", draws=400).shares.argmax()) == 0


class Corner(nn.Module):
    """How bright the upper left quarter is, for class 0, and against class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.blur, self.pool = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.AdaptiveAvgPool2d(1)
        with torch.no_grad():
            self.blur.weight.fill_(1 / 27)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        here = torch.zeros_like(x)
        here[..., : x.shape[2] // 2, : x.shape[3] // 2] = x[..., : x.shape[2] // 2, : x.shape[3] // 2]
        return self.head(self.pool(self.blur(here)).flatten(1))


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "occlusion", "kernel_shap", "lime"])
def test_a_planted_place_is_found(method: str) -> None:
    found = vs.explain(vs.Model(Corner().eval()), torch.ones(3, 16, 16), 0, method=method, features=8)
    assert found.names[0] == "rows 0-7, columns 0-7"
    assert found.order[0] == 0
    assert float(found.shares[0]) > 3 * float(found.shares[1:].abs().max())


def test_grad_cam_shows_nothing_of_what_speaks_against() -> None:
    model = vs.Model(Corner().eval())
    found = vs.explain(model, torch.ones(3, 16, 16), 1, method="grad_cam", features=8)
    assert float(found.shares.abs().max()) == 0
    whole = vs.explain(model, torch.ones(3, 16, 16), 1, method="grad_cam", features=8, positive=False)
    assert int(whole.shares.argmin()) == 0


def test_orders_at_random_fail_and_the_truth_does_not() -> None:
    model = vs.Model(Corner().eval())
    good = examine(vs.explain(model, torch.ones(3, 16, 16), 0, method="occlusion", features=4), randomise=False)
    assert good.problems == ()
    assert good.deletion.p < 0.05 and good.deletion.gain > 0 and good.insertion.gain > 0
    assert good.comprehensiveness[0] > good.comprehensiveness[1]
    assert good.sufficiency[0] < good.sufficiency[1]
    bad = examine(vs.explain(model, torch.ones(3, 16, 16), 0, method="random", features=4, seed=3), randomise=False)
    assert any("no better than orders at random" in problem for problem in bad.problems)


def test_a_method_that_does_not_look_at_the_network_fails_randomisation() -> None:
    model, image = small_cnn(), picture()
    rolled = examine(vs.explain(model, image, 0, method="random", features=4), orders=2, seeds=2)
    assert rolled.randomised == pytest.approx(1.0)
    assert any("random weights" in problem for problem in rolled.problems)


def test_falling_numbers_are_explained_in_the_direction_of_the_change() -> None:
    falling = network(lambda _, x: -x[:, 0] - 3 * x[:, 1] + 0.5 * x[:, 2])
    found = vs.explain(falling, torch.ones(3), method="shapley", baseline="zero")
    assert found.order == (1, 0, 2)
    assert examine(found, orders=4, randomise=False).deletion.gain > 0


# -------------------------------------------------------------------------------------------------------------- tokens


def test_rollout_follows_attention_that_carries_nothing() -> None:
    """Every value vector is zero but for one head's, so tokens count by what the residual stream alone gives."""
    model = tiny.model("gpt2", layers=1)
    with torch.no_grad():
        model.module.transformer.h[0].attn.c_proj.weight.zero_()
    ids = torch.tensor([5, 9, 12, 7])
    rolled = vs.explain(model, ids, 3, method="attention_rollout")
    removed = vs.explain(model, ids, 3, method="occlusion")
    assert float(rolled.shares[:2].min()) > 0.05
    assert removed.shares[:2].tolist() == pytest.approx([0, 0], abs=1e-5)
    assert abs(float(removed.shares[2])) > 1e-3
    assert rolled.names == ("1 9", "2 12", "3 7")


def test_tokens_are_occluded_as_another_implementation_does() -> None:
    model = tiny.model("llama")
    ids = torch.tensor([[5, 9, 12, 7, 3]])
    ours = vs.explain(model, ids, vs.Unit(vs.Site.parse("layers.2.mlp_post[3]")), method="occlusion")
    theirs = attribute(model, ids, vs.neuron(2, 3), method="ablate", at="sum", sink=vs.silent)
    assert (5 * ours.shares).tolist() == pytest.approx(theirs.values[0, 1:].tolist(), abs=1e-4)


def test_shares_of_tokens_add_up_and_a_text_needs_a_token_as_target() -> None:
    model = tiny.model("gpt2")
    ids = torch.tensor([5, 9, 12, 7, 3, 8])
    for method, options in (("kernel_shap", {}), ("integrated_gradients", {"steps": 300})):
        found = vs.explain(model, ids, 11, method=method, baseline=4, **options)
        assert found.relative_gap < 1e-3
        assert len(found) == 5
    with pytest.raises(InputError, match="no class 61"):
        vs.explain(model, ids, 61)


# -------------------------------------------------------------------------------------------------- what is handed back


def rows_and_model() -> tuple[Any, Any]:
    data = load_breast_cancer()
    rows = (data.data[:, :6] - data.data[:, :6].mean(0)) / data.data[:, :6].std(0)
    return rows, LogisticRegression().fit(rows, data.target)


def test_an_estimator_s_explanation_is_named_compared_and_tested() -> None:
    rows, model = rows_and_model()
    names = [f"f{n}" for n in range(6)]
    question = question_of(model, rows[0], 1, baseline=rows[:30], names=names, scale="probability")
    given = [explained(question, method) for method in ("kernel_shap", "occlusion", "lime")]
    assert question.target == "probability of class 1"
    assert given[0].names == tuple(names)
    agreed = agreement_between(given)
    assert agreed["ranks"][0][0] == 1 and agreed["ranks"][0][1] == agreed["ranks"][1][0]
    assert examine(given[0]).randomised is None
    assert "f" in repr(given[0]) and "<table>" in given[0]._repr_html_()
    assert list(given[0].to_frame().columns) == ["feature", "share"]
    assert examine(given[0]).to_json()["method"] == "kernel_shap"
    with pytest.raises(InputError, match="do not compare"):
        agreement_between([given[0], explained(question_of(model, rows[1], 1, baseline=rows[:30]), "lime")])


def test_log_odds_and_class_names_are_understood() -> None:
    rows, _ = rows_and_model()
    named = LogisticRegression().fit(rows, np.array(["mild", "grave"])[load_breast_cancer().target])
    odds = vs.explain(named, rows[0], "mild", method="kernel_shap", baseline=rows[:20], scale="log odds")
    margin = vs.explain(named, rows[0], "mild", method="kernel_shap", baseline=rows[:20])
    assert odds.question.target == "log odds of class mild"
    assert torch.allclose(odds.shares, margin.shares, atol=1e-6)
    graver = vs.explain(named, rows[0], "grave", method="kernel_shap", baseline=rows[:20])
    assert torch.allclose(graver.shares, -margin.shares)


def test_sampled_kernel_shap_comes_near_the_exact_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 1)).eval()
    x, background = torch.randn(12), torch.randn(4, 12)
    exact = vs.explain(net, x, method="shapley", baseline=background)
    drawn = vs.explain(net, x, method="kernel_shap", baseline=background, samples=1500)
    assert drawn.relative_gap < 1e-9
    assert float((exact.shares - drawn.shares).abs().max()) < 0.02 * float(exact.shares.abs().sum())


def test_many_inputs_are_put_together_with_an_interval() -> None:
    model = vs.Model(Corner().eval())
    images = [1 + 0.1 * picture(seed) for seed in range(6)]
    trials = [examine(vs.explain(model, one, 0, method="occlusion", features=4), orders=4, randomise=False)
              for one in images]  # fmt: skip
    found = over_inputs(trials)
    assert found["deletion"].low is not None and found["deletion"].low > 0
    assert found["insertion"].n == 6


def test_a_feature_that_is_never_absent_has_no_share() -> None:
    found = vs.explain(LINEAR, torch.ones(3), method="shapley", baseline="zero", features=[0, 0, -1])
    assert found.shares.tolist() == pytest.approx([-1.0])
    assert found.gap == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["DeepLift", "IntegratedGradients", "KernelShap", "FeatureAblation", "Saliency"])
def test_captum_s_methods_answer_the_same_question(name: str) -> None:
    pytest.importorskip("captum")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    question = question_of(net, torch.randn(5), 2, baseline=torch.randn(1, 5))
    theirs = explained(question, f"captum.{name}", **({"n_samples": 400} if name == "KernelShap" else {}))
    ours = {"DeepLift": "deep_lift", "IntegratedGradients": "integrated_gradients", "KernelShap": "kernel_shap",
            "FeatureAblation": "occlusion", "Saliency": "gradient"}  # fmt: skip
    assert torch.allclose(theirs.shares, explained(question, ours[name]).shares, atol=2e-2)
    assert isinstance(theirs, Explanation) and theirs.complete == (
        name in ("DeepLift", "IntegratedGradients", "KernelShap")
    )


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (torch.ones(16, 16, 3), {}, "channels seem to come last"),
        (torch.ones(1, 16, 16), {}, "takes 3 channels"),
        (torch.ones(2, 3, 16, 16), {}, "one input at a time"),
        (torch.full((3, 16, 16), float("nan")), {}, "NaN"),
        (torch.ones(3, 16, 16), {"target": 4}, "no class 4"),
        (torch.ones(3, 16, 16), {"target": "cat"}, "unknown class 'cat'"),
        (torch.ones(3, 16, 16), {"method": "grad_cma"}, "unknown method"),
        (torch.ones(3, 16, 16), {"method": "gradient", "steps": 3}, "no option steps="),
        (torch.ones(3, 16, 16), {"baseline": "black"}, "unknown baseline"),
        (torch.ones(3, 16, 16), {"baseline": torch.ones(3, 8, 8)}, "baseline= is"),
        (torch.ones(3, 16, 16), {"scale": "odds"}, "unknown scale"),
        (torch.ones(3, 16, 16), {"method": "tree_shap"}, "takes a row and"),
        (torch.ones(3, 16, 16), {"method": "shapley"}, "at most 16"),
        (torch.ones(3, 16, 16), {"method": "kernel_shap", "samples": 5}, "samples or more"),
        (torch.ones(3, 16, 16), {"method": "attention_rollout"}, "has no adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_refused(given: Tensor, options: dict[str, Any], says: str) -> None:
    with pytest.raises((InputError, UnknownNameError, NotFiniteError), match=says):
        vs.explain(small_cnn(), given, **options)


def test_what_cannot_be_explained_of_rows_is_refused() -> None:
    rows, model = rows_and_model()
    constant = rows[:20].copy()
    constant[:, 2] = 1
    for options, says in (
        ({}, "give baseline="),
        ({"baseline": constant, "method": "lime"}, "column 2 is constant"),
        ({"baseline": rows, "method": "integrated_gradients"}, "a LogisticRegression is none"),
        ({"baseline": rows, "method": "tree_shap"}, "by its trees|vesalius.attribution"),
        ({"baseline": rows, "target": 2}, "no class 2"),
        ({"baseline": rows, "target": vs.neuron(0, 1)}, "part of a network"),
        ({"baseline": rows, "names": ["a"]}, "1 names for 6"),
    ):
        with pytest.raises(InputError, match=says):
            vs.explain(model, rows[0], **{"method": "kernel_shap", **options})
    flat = vs.explain(lambda some: np.zeros(len(some)), rows[0], method="kernel_shap", baseline=rows[:4])
    with pytest.raises(InputError, match="nothing to explain"):
        examine(flat)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesalius.attribution.borrowed.import_module", lambda name: __import__("no_such_" + name))
    with pytest.raises(InputError, match=r"captum's: pip install 'vesalius\[attribution\]'"):
        vs.explain(small_cnn(), picture(), method="captum.DeepLift")
