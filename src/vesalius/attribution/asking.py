"""From a model, an input and a target to a question: images, rows of a table, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from vesalius.activations import Run
from vesalius.attribution.question import ALWAYS, BATCH, Kind, NetworkScore, Question, Score, grid
from vesalius.describe.embedded import baseline_of, check_embedded, embeddings_of
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import speller
from vesalius.model import Model
from vesalius.parts import Part, places

SCALES = ("raw", "probability", "log odds")
IMAGE_BASELINES, TOKEN_BASELINES = ("zero", "mean", "blur"), ("mean", "zero", "pad")
_BLUR = 31


def question_of(
    model: Any,
    given: Any,
    target: Any = None,
    *,
    baseline: Any = None,
    features: Any = None,
    names: Sequence[str] = (),
    scale: str = "raw",
    keep_first: bool = True,
    batch: int = BATCH,
) -> Question:
    """The question that `explain` answers; its arguments are the same. Raises InputError as `explain` does."""
    if scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    if batch < 1:
        raise InputError(f"batch must be at least 1; got {batch}")
    if isinstance(model, nn.Module):
        model = Model(model)
    if isinstance(model, Model):
        model.check_evaluating()
        if isinstance(given, str | Tokens) or (isinstance(given, Tensor) and not given.is_floating_point()):
            return _of_tokens(model, given, target, baseline, scale, keep_first, batch)
    x = _values(given)
    kind: Kind = "row" if x.ndim == 1 else "image"
    if kind == "image" and not isinstance(model, Model):
        raise InputError(f"an image {list(x.shape)} is explained of a network; got a {type(model).__name__}")
    if isinstance(model, Model):
        x = x.to(model.device, _dtype(model))
        if kind == "image":
            _check_image(model, x)
    score, output, words = _score(model, x, target, scale)
    references, said = _references(kind, x, baseline)
    numbers, known = _features(kind, x, features, names)
    return Question(kind, score, x, references, numbers, known, words, scale, model, output, said, batch)


def _values(given: Any) -> Float[Tensor, "*any"]:
    """One input without an axis of examples: a row or an image."""
    if isinstance(given, Tensor):
        found = given.detach()
    else:
        try:
            found = torch.as_tensor(np.asarray(given, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the input is numbers (or text, or token ids); got {type(given).__name__}: {error}"
            ) from error
    if found.ndim in (2, 4) and len(found) == 1:
        found = found[0]
    if found.ndim not in (1, 3) or not found.is_floating_point() or not found.numel():
        raise InputError(
            "one input at a time: a row [column] or an image [channel, row, column] of floats; got "
            f"{found.dtype} {list(found.shape)}"
        )
    return found


def _dtype(model: Model) -> torch.dtype:
    return next((p.dtype for p in model.module.parameters() if p.is_floating_point()), torch.float32)


def _check_image(model: Model, x: Float[Tensor, "channel row column"]) -> None:
    """Raises InputError for the channels last, another number of them, or another size than the network takes."""
    config = getattr(model.module, "config", None)
    first = next((one for one in model.module.modules() if isinstance(one, nn.Conv2d)), None)
    channels = getattr(config, "num_channels", None) or (None if first is None else first.in_channels)
    if channels is not None and x.shape[0] != channels:
        last = " The channels seem to come last: give x.permute(2, 0, 1)." if x.shape[-1] == channels else ""
        raise InputError(f"{model.name} takes {channels} channels; got an image {list(x.shape)}.{last}")
    size = getattr(config, "image_size", None)
    wanted = (size, size) if isinstance(size, int) else size
    if model.adapter is not None and wanted is not None and tuple(x.shape[1:]) != tuple(wanted):
        raise InputError(f"{model.name} takes images of {wanted[0]} x {wanted[1]}; got {x.shape[1]} x {x.shape[2]}")


# ------------------------------------------------------------------------------------------------------ the number


def _score(model: Any, x: Tensor, target: Any, scale: str) -> tuple[Score, int | None, str]:
    """The number, the class it belongs to, and its words."""
    if isinstance(model, Model):
        return _of_network(NetworkScore(model, _none), x, target, scale, _labels(model))
    values, has = _estimated(model, scale)
    outputs = values(x[None])
    if isinstance(target, Part):
        raise InputError(f"{target} is a part of a network, and a {type(model).__name__} is none")
    classes = [str(one) for one in getattr(model, "classes_", range(outputs.shape[1]))]
    if outputs.shape[1] == 1:
        # A regressor, or the margin of two classes, which speaks for the second.
        number = None if has == "value" else _class(target, classes, 1)
        sign = -1.0 if number == 0 else 1.0
        words = has if number is None else f"{has} of class {classes[number]}"
        return _Estimate(values, 0, sign), number, words
    number = _class(target, classes, int(outputs[0].argmax()))
    return _Estimate(values, number, 1.0), number, f"{has} of class {classes[number]}"


@dataclass(frozen=True)
class _Estimate:
    """One output of an estimator."""

    values: Callable[[Tensor], Float[Tensor, "point output"]]
    output: int
    sign: float

    def __call__(self, points: Tensor, grad: bool = False) -> Float[Tensor, " point"]:  # noqa: ARG002
        return self.sign * self.values(points)[:, self.output]


def _estimated(estimator: Any, scale: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """What an estimator, or a function of rows [row, column], gives as [row, output], and what that is."""
    named = [name for name in ("decision_function", "predict_proba", "predict") if hasattr(estimator, name)]
    if not named and not callable(estimator):
        raise InputError(
            f"a {type(estimator).__name__} cannot be explained: give a Model, an nn.Module, an estimator with "
            "predict_proba, decision_function or predict, or a function of rows"
        )
    if scale != "raw" and "predict_proba" not in named:
        raise InputError(f"a {type(estimator).__name__} gives no probabilities (predict_proba); take scale='raw'")
    name = "predict_proba" if scale != "raw" else (named or [""])[0]
    function = getattr(estimator, name) if name else estimator
    said = {"decision_function": "margin", "predict_proba": "probability"}.get(name, "value")

    def values(points: Tensor) -> Float[Tensor, "point output"]:
        found = torch.as_tensor(np.asarray(function(points.double().cpu().numpy()), dtype=np.float64))
        if found.ndim not in (1, 2) or len(found) != len(points):
            raise InputError(f"{len(points)} rows gave {list(found.shape)} numbers; one for each row is needed")
        found = found[:, None] if found.ndim == 1 else found
        return torch.logit(found, 1e-12) if scale == "log odds" else found

    return values, "log odds" if scale == "log odds" else said


def _class(target: Any, classes: Sequence[str], default: int) -> int:
    """The number of a class. Raises InputError for one that is not there."""
    if target is None:
        return default
    if isinstance(target, str):
        if target not in classes:
            raise UnknownNameError("class", target, list(classes)[:20])
        return list(classes).index(target)
    if isinstance(target, bool) or not isinstance(target, int | np.integer):
        raise InputError(f"target= is the number or name of a class, a Part, or a function of logits; got {target!r}")
    if not 0 <= int(target) < len(classes):
        raise InputError(f"there is no class {target}: the model has {len(classes)}, numbered from 0")
    return int(target)


def _none(_run: Run) -> Tensor:
    raise InputError("nothing is asked")


def _labels(model: Model) -> list[str]:
    labels = getattr(getattr(model.module, "config", None), "id2label", None) or {}
    return [str(labels[number]) for number in sorted(labels)]


def _of_network(
    score: NetworkScore, x: Tensor, target: Any, scale: str, labels: Sequence[str]
) -> tuple[NetworkScore, int | None, str]:
    if isinstance(target, Part):
        return replace(score, of=lambda run: _mean_value(target, run), needs=tuple(places([target]))), None, str(target)
    if callable(target):
        words = getattr(target, "__name__", "a function of the logits")
        return replace(score, of=lambda run: _of_function(target, run)), None, words
    with torch.no_grad():
        try:
            logits = _outputs(score.run(x[None], ()))
        except RuntimeError as error:
            raise InputError(f"{score.model.name} does not take an input {list(x.shape)}: {error}") from error
    classes = labels if len(labels) == logits.shape[1] else [str(number) for number in range(logits.shape[1])]
    number = _class(target, classes, int(logits[0].argmax()))
    what = {"raw": "logit" if len(classes) > 1 else "output"}.get(scale, scale)
    words = f"{what} of class {classes[number]}" if len(classes) > 1 else what
    return replace(score, of=lambda run: _scaled(_outputs(run), number, scale)), number, words


def _outputs(run: Run) -> Float[Tensor, "point output"]:
    """Logits of classes; of a language model those after the last token."""
    found = run.logits
    if not isinstance(found, Tensor) or found.ndim not in (1, 2, 3):
        raise InputError("the network does not return logits [input, class]; give a Part or a function as target=")
    return found[:, None] if found.ndim == 1 else (found if found.ndim == 2 else found[:, -1])


def _scaled(outputs: Tensor, number: int, scale: str) -> Float[Tensor, " point"]:
    if scale == "raw":
        return outputs[:, number]
    log_p = outputs.log_softmax(-1)[:, number] if outputs.shape[1] > 1 else nn.functional.logsigmoid(outputs[:, 0])
    return log_p.exp() if scale == "probability" else log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-7))


def _of_function(function: Callable[[Tensor], Tensor], run: Run) -> Float[Tensor, " point"]:
    found = function(run.logits)
    if not isinstance(found, Tensor) or found.shape != run.logits.shape[:1]:
        raise InputError("target= as a function takes logits [input, ...] and gives one number for each input")
    return found


def _mean_value(part: Part, run: Run) -> Float[Tensor, " point"]:
    """A part's mean over positions, or over rows and columns."""
    return part.value(run.activations).flatten(1).mean(1)


# ------------------------------------------------------------------------------------------- references and features


def _references(kind: Kind, x: Tensor, baseline: Any) -> tuple[Float[Tensor, "reference ..."], str]:
    if kind == "image" and (baseline is None or isinstance(baseline, str)):
        return _image_baseline(x, "zero" if baseline is None else baseline), baseline or "zero"
    if baseline is None:
        raise InputError("a row is explained against other rows: give baseline=, such as some of the training data")
    if isinstance(baseline, str) and not (kind == "row" and baseline == "zero"):
        raise UnknownNameError("baseline of a row", baseline, ["zero"], "Or rows [row, column].")
    if isinstance(baseline, str):
        return torch.zeros_like(x)[None], "zero"
    found = torch.as_tensor(baseline if isinstance(baseline, Tensor) else np.asarray(baseline, dtype=np.float64)).to(x)
    found = found[None] if found.ndim == x.ndim else found
    if found.shape[1:] != x.shape or not len(found):
        raise InputError(f"baseline= is [reference, {', '.join(map(str, x.shape))}] here; got {list(found.shape)}")
    return found, f"{len(found)} {'rows' if kind == 'row' else 'images'}" if len(found) > 1 else "given"


def _image_baseline(x: Float[Tensor, "channel row column"], name: str) -> Float[Tensor, "1 channel row column"]:
    if name == "zero":
        return torch.zeros_like(x)[None]
    if name == "mean":
        return x.mean((1, 2), keepdim=True).expand_as(x)[None].clone()
    if name != "blur":
        raise UnknownNameError("baseline of an image", name, IMAGE_BASELINES, "Or an image as a tensor.")
    side = min(_BLUR, 2 * (min(x.shape[1:]) // 2) - 1)
    found = x[None]
    # Two boxes are nearly a Gaussian.
    for _ in range(2):
        found = avg_pool2d(found, side, 1, side // 2, count_include_pad=False)
    return found


def _features(kind: Kind, x: Tensor, features: Any, names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers [like x] and names of the features."""
    if features is None and kind == "image":
        return _named(*grid(x.shape, max(1, min(x.shape[1:]) // 14)), names)
    if isinstance(features, int):
        if kind != "image" or features < 1:
            raise InputError(f"features= as a number is the side of an image's patches, in pixels; got {features}")
        return _named(*grid(x.shape, features), names)
    if features is None:
        return _named(torch.arange(len(x)), tuple(f"column {n}" for n in range(len(x))), names)
    numbers = torch.as_tensor(features).long().cpu()
    numbers = numbers.expand(x.shape).contiguous() if numbers.shape == x.shape[-numbers.ndim :] else numbers
    if numbers.shape != x.shape:
        raise InputError(f"features= numbers the elements of an input {list(x.shape)}; got {list(numbers.shape)}")
    return _named(numbers, tuple(f"feature {n}" for n in range(int(numbers.max()) + 1)), names)


def _named(numbers: Tensor, own: tuple[str, ...], names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    if len(names) and len(names) != len(own):
        raise InputError(f"{len(names)} names for {len(own)} features")
    return numbers, tuple(map(str, names)) if len(names) else own


# ------------------------------------------------------------------------------------------------------------ tokens


def _of_tokens(
    model: Model, given: Any, target: Any, baseline: Any, scale: str, keep_first: bool, batch: int
) -> Question:
    check_embedded(model)
    tokens = model.called_with(given[None] if isinstance(given, Tensor) and given.ndim == 1 else given)[2]
    if tokens is None or len(tokens) != 1 or not bool(tokens.real.all()):
        raise InputError("one text at a time, or the ids of one without padding")
    count, said = tokens.ids.shape[1], "mean" if baseline is None else baseline
    x = embeddings_of(model, tokens)[0]
    absent = baseline_of(model, said).to(x).expand_as(x)[None]
    first = int(keep_first and count > 1)
    numbers = torch.cat([torch.full((first,), ALWAYS), torch.arange(count - first)])[:, None].expand(x.shape)
    spell = speller(model.tokenizer)
    names = [f"{place} {spell(token)}" for place, token in enumerate(tokens.ids[0].tolist())][first:]
    if isinstance(target, str) and not _labels(model):
        target = _token_id(model, target)
    score, output, words = _of_network(
        NetworkScore(model, _none, tokens=tokens), x, target, scale, _token_labels(model)
    )
    if output is not None and model.tokenizer is not None and words.endswith(f"class {output}"):
        words = words.replace(f"class {output}", f"{spell(output)!r} after the last token")
    said = f"{said}{', first token kept' if first else ''}"
    return Question(
        "tokens", score, x, absent, numbers.contiguous(), tuple(names), words, scale, model, output, said, batch
    )  # fmt: skip


def _token_labels(model: Model) -> list[str]:
    labels = _labels(model)
    return [] if len(labels) == 2 and labels[0].startswith("LABEL_") else labels


def _token_id(model: Model, text: str) -> int:
    """The id of a text that is one token. Raises InputError for another."""
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: give the id of a token as target=")
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"target= {text!r} is {len(ids)} tokens; give one, perhaps with a space before it")
    return int(ids[0])
