"""Attribution by maps inside the network: Grad-CAM, and attention rollout as a cautionary baseline."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from vesalius.attribution.gradients import Values
from vesalius.attribution.question import ALWAYS, Question
from vesalius.errors import InputError
from vesalius.model import Model
from vesalius.model.hooks import OutputTap, tapped
from vesalius.site import Site


def grad_cam(question: Question, site: Site | str | None = None, positive: bool = True) -> Values:
    """Grad-CAM (Selvaraju et al. 2017, equations 1 and 2) of an image, brought to its size.

    site: where the map is; default the last tensor [image, channel, row, column] that a module takes, which is after
    the activation function; of a ViT what its last layer reads. positive: keep what speaks for the target only. Raises
    InputError for what is no image, or a site without rows and columns.
    """
    coarse = coarse_map(question, site)
    return _on_image(question, coarse.clamp_min(0) if positive else coarse)


def coarse_map(question: Question, site: Site | str | None = None) -> Float[Tensor, "row column"]:
    """Grad-CAM's map in the network's own resolution, before anything is cut off.

    The mean gradient of each channel weighs the channel. Raises InputError as `grad_cam` does.
    """
    score = question.network("grad_cam")
    if question.kind != "image":
        raise InputError(f"grad_cam draws on an image; this input is of the kind {question.kind!r}")
    place = Site.parse(site) if site is not None else last_map(score.model, question.x[None])
    with torch.enable_grad():
        run = score.run(question.x[None], [*score.needs, place], grad=True)
        (gradient,) = torch.autograd.grad(score.of(run).sum(), run[place], allow_unused=True)
    values = run[place].detach()
    slopes = torch.zeros_like(values) if gradient is None else gradient
    values, slopes = (_as_map(score.model, place, tensor)[0] for tensor in (values, slopes))
    return torch.einsum("c,cij->ij", slopes.mean((-2, -1)), values)


def last_map(model: Model, image: Float[Tensor, "1 channel row column"]) -> Site:
    """The last tensor with rows and columns that a module takes, or what the last layer of a transformer reads."""
    if model.adapter is not None:
        return Site("resid_pre", model.architecture[1].n_layers - 1)
    names: list[str] = []
    leaves = [(name, module) for name, module in model.module.named_modules() if name and not [*module.children()]]
    with torch.no_grad(), tapped([OutputTap(module, partial(_note_map, names, name)) for name, module in leaves]):
        model.run(image)
    if not names:
        raise InputError(f"no module of {model.name} takes a tensor [image, channel, row, column]; name a site")
    return Site("module", module=names[-1], side="in")


def _note_map(names: list[str], name: str, args: tuple[Any, ...], _output: Any) -> None:
    given = args[0] if args else None
    if isinstance(given, Tensor) and given.ndim == 4 and min(given.shape[-2:]) > 1:
        names.append(name)


def _as_map(model: Model, place: Site, values: Tensor) -> Float[Tensor, "image channel row column"]:
    """Of a ViT's positions those of patches, in rows and columns."""
    if values.ndim == 4 and model.adapter is None:
        return values
    patches = values.shape[1] if values.ndim == 3 else 0
    side = int(patches**0.5)
    if model.adapter is None or side < 2:
        raise InputError(f"{place} is {list(values.shape)}, which has no rows and columns; name another site")
    # What comes before the patches is a class token, or several (registers).
    return values[:, patches - side**2 :].unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _on_image(question: Question, coarse: Float[Tensor, "row column"]) -> Values:
    size = tuple(question.x.shape[-2:])
    fine = interpolate(coarse[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return (fine / question.x.shape[0]).expand(question.x.shape).contiguous()


def attention_rollout(question: Question) -> Values:
    """Attention rollout (Abnar and Zuidema 2020, section 3): the product over layers of the heads' mean pattern.

    Half of each layer is the residual stream. It asks where attention goes and not what the number depends on: it is
    the same for every class, and has no sign. Read from the class token, or from the last token of a causal model.
    Raises InputError for a model without attention patterns.
    """
    score = question.network("attention_rollout")
    if score.model.adapter is None:
        raise InputError(f"{score.model.name} has no adapter that says where its attention is")
    sites = score.model.sites("layers.*.pattern")
    with torch.no_grad():
        run = score.run(question.x[None], sites)
    whole = torch.eye(run[sites[0]].shape[-1], device=question.x.device)
    for site in sites:
        mean = run[site][0].float().mean(0)
        whole = (0.5 * mean + 0.5 * torch.eye(len(mean), device=mean.device)) @ whole
    row = whole[-1 if score.model.architecture[0].causal else 0]
    if question.kind == "image":
        side = int(len(row) ** 0.5)
        return _on_image(question, row[len(row) - side**2 :].view(side, side))
    shares = torch.zeros(len(question), dtype=torch.float64)
    numbers = question.features[:, 0]
    shares[numbers[numbers != ALWAYS]] = row.double().cpu()[: len(numbers)][(numbers != ALWAYS).cpu()]
    return question.spread(shares)
