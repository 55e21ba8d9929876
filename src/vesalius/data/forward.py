"""Forward: models run only up to the last site that is asked for, giving rows of activations.

A pass ends, by an exception out of a hook, when every site was captured: no later module is run.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from vesalius.activations import Activations
from vesalius.data.packing import Batch, Group, batches, tokenizer_hash
from vesalius.data.side_by_side import Models, side_by_side
from vesalius.errors import InputError, InterventionError, NotFiniteError, TokenizerError, UnknownNameError
from vesalius.inputs import Raw, Tokens
from vesalius.intervention import Intervention
from vesalius.model import Model
from vesalius.model.hooks import OutputTap, Tap, tapped
from vesalius.model.products import Halves, computing
from vesalius.model.taps import Recorder
from vesalius.site import Site

TAGS = "abcdefghijklmnopqrstuvwxyz"
_ROW_AXES = ("batch", "pos")
# Tokens of the pass that is timed, and run twice when its error is measured.
_TRIAL = 1024


def captured(
    model: Model,
    tokens: Tokens | Raw,
    sites: Sequence[Site],
    weights: Mapping[str, Tensor] | None = None,
    interventions: Sequence[Intervention] = (),
    grad: bool = False,
) -> Activations:
    """Activations at these sites, without their indices, from a pass that ends at the last of them.

    tokens: or images. weights: stand in for the module's parameters, by name. interventions, grad: as in `Model.run`.
    Attention's scores and patterns cannot be read so. Raises InterventionError when a site never fires.
    """
    if isinstance(tokens, Raw):
        args, call, begun = model.called_with(tokens)
    else:
        begun = model.begun(tokens)
        args, call = ((begun.ids.to(model.device),), {}) if model.adapter is None else ((), model.token_call(begun))
    recorder = Recorder(model, [site.whole for site in sites], list(interventions), begun, grad, copies=True)
    taps = [_ending(tap, recorder) for tap in recorder.taps]
    with torch.set_grad_enabled(grad), contextlib.suppress(_AllCapturedError), tapped(taps):
        functional_call(model.module, dict(weights), args, call) if weights else model.module(*args, **call)
    recorder.check_fired()
    return Activations(recorder.captured(), tokens if isinstance(tokens, Tokens) else None)


class _AllCapturedError(Exception):
    """Ends a forward pass when nothing more of it is wanted."""


def _ending(tap: Tap | OutputTap, recorder: Recorder) -> Tap | OutputTap:
    """The tap, after which the pass ends when every site was captured."""
    visit: Callable[..., Any] = tap.visit

    def watched(*given: Any) -> Any:
        changed = visit(*given)
        with contextlib.suppress(InterventionError):
            recorder.check_fired()
            raise _AllCapturedError
        return changed

    return OutputTap(tap.module, watched) if isinstance(tap, OutputTap) else Tap(tap.module, tap.side, watched)


@dataclass(frozen=True)
class Trial:
    """A first batch: tokens per second, and the relative error of the compute dtype at each site, if measured.

    The error is the norm of the difference from a run in the model's own dtype over that run's norm, all kept rows
    together.
    """

    tokens_per_second: float
    errors: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Forward:
    """Models by tag ("" for the only one), the sites with their tags, and how they are run.

    compute: dtype that the weights are cast to, beside the model, when it is not its own; None for the model's own.
    batch_tokens: tokens in a batch, padding included, about; on the CPU two batches are run at a time. Raises
    InputError for models that cannot be run so.
    """

    models: Mapping[str, Model]
    sites: tuple[Site, ...]
    compute: torch.dtype | None
    batch_tokens: int

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1; got {self.batch_tokens}")
        for model in self.models.values():
            _check_model(model, self.compute)
        for site in self.sites:
            _check_site(self.models[site.tag], site)

    @property
    def tokenizer(self) -> Any:
        return next(iter(self.models.values())).tokenizer

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Of the one tokenizer that the models share. Raises TokenizerError when they don't."""
        hashes = {tokenizer_hash(model.tokenizer) for model in self.models.values()}
        if len(hashes) > 1:
            raise TokenizerError(
                f"models {', '.join(self.models)} have different tokenizers, so they cannot be run on the same tokens"
            )
        return hashes.pop()

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Length of a row at each site, from a pass over two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.long)
        two = Batch(
            ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool), torch.arange(2)
        )
        return tuple(rows.shape[1] for rows in self._rows(two, exact=True))

    def rows(
        self, group: Group, dtype: torch.dtype, done: Callable[[int], None] = lambda _: None
    ) -> tuple[Tensor, ...]:
        """Rows [row, width] of a group at each site, in the order of its contexts, on the cpu.

        done: called after each batch with the number of its rows. Raises NotFiniteError for NaN and infinity.
        """
        kept = tuple(torch.empty(group.rows, width, dtype=dtype) for width in self.widths)
        _ = self._weights, self._halves  # made now, once for both batches

        def keep(models: Models, batch: Batch) -> int:
            with self._products():
                found = self._rows(batch, models)
            for site, whole, rows in zip(self.sites, kept, found, strict=True):
                whole[batch.rows] = _stored(site, rows, dtype, partial(self._where, group, batch))
            return len(batch.rows)

        sizes = side_by_side(keep, self.models, list(self._batches(group, self.batch_tokens)))
        with contextlib.closing(sizes):  # so that an error in `done` ends the other batch too
            for n in sizes:
                done(n)
        return kept

    def _where(self, group: Group, batch: Batch, row: int) -> str:
        """Where a row of a batch is in the texts, for people."""
        context, position = group.place(int(batch.rows[row]))
        number = int(context.ids[position])
        text = "" if self.tokenizer is None else f", {self.tokenizer.decode([number])!r}"
        return f"position {position} of the context at token {context.offset} of document {context.document}{text}"

    def trial(self, group: Group) -> Trial:
        """The group's first contexts, run to measure speed and rounding."""
        batch = next(self._batches(group, min(self.batch_tokens, _TRIAL)))
        weights = self._weights  # made now, so that it is not timed
        with self._products():
            began = time.perf_counter()
            rows = self._rows(batch)
            seconds = time.perf_counter() - began
            exact = self._rows(batch, exact=True) if weights else ()
        errors = {}
        for site, fast, slow in zip(self.sites, rows, exact, strict=bool(weights)):
            # Of all rows together: relative errors of single small rows would say little.
            gap = (fast.double() - slow.double()).norm() / slow.double().norm().clamp_min(1e-300)
            errors[str(site)] = float(f"{float(gap):.3g}")
        return Trial(int(batch.real.sum()) / max(seconds, 1e-9), errors)

    def to_json(self) -> dict[str, Any]:
        """What the rows depend on, beside the tokens."""
        models = [{"tag": tag, "name": model.name, "sha256": model.content_hash} for tag, model in self.models.items()]
        return {
            "models": models,
            "tokenizer_sha256": self.tokenizer_sha256,
            "sites": [{"site": str(site), "width": n} for site, n in zip(self.sites, self.widths, strict=True)],
            "compute": "as the model" if self._plain else f"{_name(self.compute)} weights",
            "batch_tokens": self.batch_tokens,
        }

    @property
    def _plain(self) -> bool:
        return all(self.compute in (None, _dtype(model)) for model in self.models.values())

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        """Products by the library that is fastest for each dtype."""
        with computing(), self._halves:
            yield

    @cached_property
    def _halves(self) -> Halves:
        return Halves()

    @cached_property
    def _weights(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameters in the compute dtype by tag; buffers, such as rotary frequencies, stay as they are."""
        if self._plain:
            return {}
        return {
            tag: {name: weight.detach().to(self.compute) for name, weight in model.module.named_parameters()}
            for tag, model in self.models.items()
        }

    def _batches(self, group: Group, tokens: int) -> Iterator[Batch]:
        # Networks that are not known may look at padding, and get none.
        ragged = all(model.adapter is not None for model in self.models.values())
        return batches(group, tokens, ragged)

    def _rows(self, batch: Batch, models: Models | None = None, exact: bool = False) -> tuple[Tensor, ...]:
        """The batch's rows [row, width] at each site, as the models (or their copies) give them. exact: with their own
        weights.
        """
        found: dict[Site, Tensor] = {}
        for tag, model in (models or self.models).items():
            own = [replace(site, tag="") for site in self.sites if site.tag == tag]
            # Padding is on the right, where a causal model does not look, and without a mask it is faster.
            masked = model.adapter is not None and not (model.adapter.causal and not model.adapter.stacks)
            weights = None if exact else self._weights.get(tag)
            activations = captured(model, Tokens(batch.ids, batch.real if masked else None), own, weights)
            found.update({replace(site, tag=tag): _flat(activations[site], site, batch) for site in own})
        return tuple(found[site] for site in self.sites)


def forward_for(
    models: Model | Sequence[Model] | Mapping[str, Model],
    sites: Sequence[Site | str],
    compute: torch.dtype | None,
    batch_tokens: int,
) -> Forward:
    """Models, sites and compute dtype, checked.

    models: one; or several by tag; or several in a list, with the tags a, b, c ... A site without tag stands for that
    site of every model. Globs are allowed. Raises InputError, UnknownNameError or TokenizerError.
    """
    by_tag = _by_tag(models)
    if isinstance(sites, str | Site):
        raise InputError(f"sites must be a list of sites, such as [{str(sites)!r}]")
    named = [site for name in sites for site in _expanded(by_tag, name)]
    if not named:
        raise InputError("no sites: give at least one, such as sites=['layers.5.resid_post']")
    # A model that is run and never read would cost as much as the others.
    unused = [tag for tag in by_tag if tag not in {site.tag for site in named}]
    if unused:
        raise InputError(f"no site names model {', '.join(unused)}; leave it out, or give it a site")
    forward = Forward(by_tag, tuple(dict.fromkeys(named)), compute, batch_tokens)
    _ = forward.tokenizer_sha256  # now, so that models that do not fit are refused before they are run
    return forward


def _by_tag(models: Any) -> dict[str, Model]:
    if isinstance(models, Model):
        return {"": models}
    if isinstance(models, Sequence) and 0 < len(models) <= len(TAGS):
        models = dict(zip(TAGS, models, strict=False))
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, Model) for m in models.values()):
        raise InputError(f"a model, a list of models or a mapping from tags to models is needed; got {models!r:.200}")
    for tag in models:
        if not re.fullmatch(r"[\w.-]*", str(tag)):
            raise InputError(f"{tag!r} cannot be a tag of a model; use letters, digits, '.', '-' and '_'")
    return dict(models)


def _expanded(models: Mapping[str, Model], name: Site | str) -> list[Site]:
    """The sites a name stands for, each with the tag of its model."""
    tag, _, rest = str(name).rpartition("/") if "module:" not in str(name) else _module_tag(str(name))
    if tag and tag not in models:
        raise UnknownNameError("tag of a model", tag, models, f"(in {str(name)!r})")
    chosen = {tag: models[tag]} if tag else models
    return [replace(site, tag=own) for own, model in chosen.items() for site in _sites(model, rest)]


def _module_tag(name: str) -> tuple[str, str, str]:
    tag, _, rest = name.partition("module:")
    return tag.removesuffix("/"), "/", f"module:{rest}"


def _sites(model: Model, name: str) -> list[Site]:
    return model.sites(name) if "*" in name else [Site.parse(name)]


def _check_model(model: Model, compute: torch.dtype | None) -> None:
    if model.module.training:
        raise InputError(f"{model.name} is in training mode, so dropout is on; call model.module.eval()")
    if model.adapter is not None and model.adapter.input != "input_ids":
        raise InputError(f"{model.name} takes {model.adapter.input}, not tokens; activations are read from text")
    own = _dtype(model)
    if compute not in (None, own) and not (own == torch.float32 and compute in (torch.bfloat16, torch.float16)):
        raise InputError(
            f"{model.name} has {_name(own)} weights and cannot compute in {_name(compute)}; load it with another "
            "dtype, or compute a float32 model in bfloat16"
        )


def _check_site(model: Model, site: Site) -> None:
    model.check_site(replace(site, tag=""))
    if site.kind != "module" and model.architecture[0].stacks and not site.of_encoder:
        raise InputError(f"{site}: text is read by {model.name}'s encoder, so only the encoder's sites have its tokens")
    if site.kind != "module" and site.axes[:2] != _ROW_AXES:
        raise InputError(f"{site} has axes {', '.join(site.axes)}; rows are tokens, so a site must be [batch, pos ...]")


def _dtype(model: Model) -> torch.dtype:
    return next((p.dtype for p in model.module.parameters() if p.is_floating_point()), torch.float32)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _flat(tensor: Tensor, site: Site, batch: Batch) -> Tensor:
    """Rows [row, width] of a captured tensor [batch, pos, ...]."""
    if tensor.shape[:2] != batch.ids.shape:
        raise InputError(
            f"{site} is {list(tensor.shape)} for tokens {list(batch.ids.shape)}; rows are tokens, so a site must be "
            "[batch, pos, ...]"
        )
    return tensor.reshape(*tensor.shape[:2], -1)[batch.kept.to(tensor.device)]


def _stored(site: Site, rows: Tensor, dtype: torch.dtype, where: Callable[[int], str]) -> Tensor:
    """Rows as they are kept. where: says where a row is. Raises NotFiniteError when they hold NaN or infinity."""
    kept = rows.to("cpu", dtype)
    bad = ~torch.isfinite(kept).all(1)
    if bool(bad.any()):
        first = where(int(bad.nonzero()[0]))
        if bool(torch.isfinite(rows).all()):
            raise NotFiniteError(
                f"{site} has values up to {float(rows.abs().max()):.3g}, too large for {_name(dtype)}, first at "
                f"{first}; keep it as bfloat16 or float32"
            )
        raise NotFiniteError(
            f"{site} holds NaN or infinity, first at {first}; model.run(..., check_finite=True) says what made it"
        )
    return kept
