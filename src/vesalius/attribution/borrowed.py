"""Attribution by captum and shap, where they are installed: what they have and we do not, tested as our own is."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vesalius.attribution.games import Shares
from vesalius.attribution.gradients import Values
from vesalius.attribution.question import ALWAYS, Question
from vesalius.errors import InputError, UnknownNameError

# Classes of captum.attr that are called with inputs, and with a baseline or features where True.
CAPTUM: dict[str, tuple[bool, bool]] = {
    "Saliency": (False, False),
    "InputXGradient": (False, False),
    "Deconvolution": (False, False),
    "GuidedBackprop": (False, False),
    "LRP": (False, False),
    "IntegratedGradients": (True, False),
    "DeepLift": (True, False),
    "GradientShap": (True, False),
    "FeatureAblation": (True, True),
    "ShapleyValueSampling": (True, True),
    "KernelShap": (True, True),
    "Lime": (True, True),
}


def _library(name: str) -> Any:
    """captum or shap. Raises InputError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except ImportError as error:
        raise InputError(f"this method is {name.split('.')[0]}'s: pip install 'vesalius[attribution]'") from error


class _Number(nn.Module):
    """The number of a question as a module, as captum takes one; the network inside it is its child."""

    def __init__(self, question: Question, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._question = question

    def forward(self, points: Tensor) -> Tensor:
        return self._question.score(points, grad=torch.is_grad_enabled())


def captum(question: Question, name: str, **options: Any) -> Values:
    """The method of captum of this name (`captum.attr.<name>`), with its own defaults but for options.

    With several references the mean over them. Raises InputError where captum is not installed or the question is not
    about a network; UnknownNameError for a class that is not in `CAPTUM`.
    """
    if name not in CAPTUM:
        raise UnknownNameError("method of captum", name, CAPTUM)
    network = question.network(f"captum.{name}").model.module
    method = getattr(_library("captum.attr"), name)(_Number(question, network))
    takes_baseline, takes_features = CAPTUM[name]
    with_features: dict[str, Any] = {}
    if takes_features:
        features = question.features.to(question.x.device)
        # captum has no features that are never absent: they become one that is.
        with_features = {"feature_mask": torch.where(features == ALWAYS, len(question), features)[None]}
    found = []
    for reference in question.references if takes_baseline else question.references[:1]:
        with_baseline = {"baselines": reference[None]} if takes_baseline else {}
        point = question.x[None].detach().clone().requires_grad_()
        with warnings.catch_warnings():
            # Notes on hooks, and a progress bar's on its own absence.
            warnings.simplefilter("ignore")
            found.append(method.attribute(point, **with_baseline, **with_features, **options)[0].detach())
    values = torch.stack(found).mean(0)
    if takes_features:
        # captum gives every element its feature's share.
        first = torch.stack([values[question.features == n].flatten()[0] for n in range(len(question))])
        return question.spread(first.double().cpu())
    return values


def tree_shap(question: Question) -> Shares:
    """Interventional TreeSHAP (Lundberg et al. 2020) of a tree ensemble, against the references, by shap.

    Not the path-dependent variant, which needs no references and answers another question. Raises InputError where shap
    is not installed, or what is asked about is no ensemble of trees.
    """
    if question.kind != "row" or hasattr(question.asked, "module"):
        raise InputError("tree_shap takes a row and an ensemble of trees, such as scikit-learn's")
    if question.scale != "raw" and (question.scale == "log odds" or hasattr(question.asked, "decision_function")):
        # For probabilities of margins shap only rescales the margin's values, which are no Shapley values then.
        raise InputError("tree_shap explains what the trees add up to; take scale='raw', or kernel_shap")
    shap = _library("shap")
    try:
        explainer = shap.TreeExplainer(
            question.asked,
            data=question.references.double().cpu().numpy(),
            feature_perturbation="interventional",
            model_output="raw",
        )
    except Exception as error:
        raise InputError(f"shap does not explain a {type(question.asked).__name__} by its trees: {error}") from error
    found = torch.as_tensor(explainer.shap_values(question.x[None].double().cpu().numpy(), check_additivity=False))[0]
    found = found[:, question.output or 0] if found.ndim == 2 else found
    return question.shares(found)
