"""`explain`: one front for the methods of local attribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch

from vesalius.attribution.asking import question_of
from vesalius.attribution.borrowed import captum, tree_shap
from vesalius.attribution.explanation import Explanation
from vesalius.attribution.games import kernel_shap, lime, occlusion, shapley
from vesalius.attribution.gradients import gradient, gradient_x_input, integrated_gradients, smoothgrad
from vesalius.attribution.maps import attention_rollout, grad_cam
from vesalius.attribution.question import BATCH, Question
from vesalius.attribution.rules import deep_lift, guided_backprop
from vesalius.errors import InputError, UnknownNameError
from vesalius.seeds import generator_for


def random_order(question: Question, seed: int = 0) -> torch.Tensor:
    """Shares that know nothing: what every method has to beat."""
    return torch.randn(len(question), generator=generator_for("random order", seed), dtype=torch.float64)


@dataclass(frozen=True)
class Method:
    """How an explanation is made. of: gives values of the input's elements; of_features: shares of features instead.
    signed, complete: see `Explanation`."""

    of: Callable[..., torch.Tensor]
    signed: bool = True
    complete: bool = False
    of_features: bool = False

    @property
    def draws(self) -> bool:
        """Whether it depends on a seed."""
        return "seed" in self.options

    @property
    def options(self) -> tuple[str, ...]:
        """What may be said beside the question."""
        return tuple(signature(self.of).parameters)[1:]


METHODS: Mapping[str, Method] = {
    "gradient": Method(gradient, signed=False),
    "gradient_x_input": Method(gradient_x_input),
    "integrated_gradients": Method(integrated_gradients, complete=True),
    "smoothgrad": Method(smoothgrad, signed=False),
    "guided_backprop": Method(guided_backprop, signed=False),
    "deep_lift": Method(deep_lift, complete=True),
    "grad_cam": Method(grad_cam),
    "attention_rollout": Method(attention_rollout, signed=False),
    "occlusion": Method(occlusion, of_features=True),
    "shapley": Method(shapley, complete=True, of_features=True),
    "kernel_shap": Method(kernel_shap, complete=True, of_features=True),
    "lime": Method(lime, of_features=True),
    "tree_shap": Method(tree_shap, complete=True, of_features=True),
    "random": Method(random_order, of_features=True),
}
# Of captum's, those whose values add up to the change from the baseline.
_COMPLETE = ("IntegratedGradients", "DeepLift", "GradientShap", "ShapleyValueSampling", "KernelShap")
_SIZES = ("Saliency", "Deconvolution", "GuidedBackprop")


def explain(
    model: Any,
    input: Any,
    target: Any = None,
    *,
    method: str = "integrated_gradients",
    baseline: Any = None,
    features: Any = None,
    names: Sequence[str] = (),
    scale: str = "raw",
    keep_first: bool = True,
    batch: int = BATCH,
    **options: Any,
) -> Explanation:
    """Why a model gives this number for this input: what each feature contributed, by one method.

    model: a Model or nn.Module; for rows also an estimator with decision_function, predict_proba or predict, or a
    function of rows [row, column]. input: an image [channel, row, column], a row [column], a text or token ids [pos].
    target: the number or name of a class (of a language model the next token: its id, or text), a Part (its mean over
    positions), or a function of the logits that gives one number for each input; default the likeliest class.
    method: one of `METHODS`, or "captum.<class>" where captum is installed, with options of its own (steps=, samples=,
    seed=, site= ...).
    baseline: what an absent feature is replaced with. Rows: other rows [row, column], over which the mean is taken, or
    "zero". Images: "zero" (default; the mean of the training images, as most networks' inputs are scaled), "mean",
    "blur" or images. Tokens: "mean" embedding (default), "zero", "pad" or a token's id. features: which elements
    are absent together: the side of square patches of an image (default a fourteenth of it), or a number for every
    element; names: of the features. scale: "raw" (logits, margins), "probability" or "log odds". keep_first: the first
    token is never absent; many models attend there when there is nothing else to attend to.

    Raises UnknownNameError for a method, baseline, scale or class that does not exist; InputError for several inputs, a
    method that does not fit the model, or an option that the method has not.
    """
    question = question_of(
        model, input, target, baseline=baseline, features=features, names=names, scale=scale, keep_first=keep_first,
        batch=batch,
    )  # fmt: skip
    return explained(question, method, **options)


def explained(question: Question, method: str = "integrated_gradients", **options: Any) -> Explanation:
    """A question answered by one method; so that several methods are given the same one. Raises as `explain` does."""
    library, _, name = method.partition(".")
    if library == "captum":
        values = captum(question, name, **options)
        return Explanation(question, values, method, options, 0, name not in _SIZES, name in _COMPLETE)
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS, "Or captum.<class>, such as captum.DeepLift.")
    chosen = METHODS[method]
    unknown = sorted(set(options) - set(chosen.options))
    if unknown:
        listed = ", ".join(chosen.options) or "none"
        raise InputError(f"{method} has no option {unknown[0]}=; its options: {listed}")
    found = chosen.of(question, **options)
    values = question.spread(found.double().cpu()) if chosen.of_features else found
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{method} gave NaN or infinity for {question.target}")
    seed = int(options.get("seed", 0))
    return Explanation(question, values, method, dict(options), seed, chosen.signed, chosen.complete)
