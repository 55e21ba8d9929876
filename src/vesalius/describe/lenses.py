"""The logit lens: what the model would say if a residual vector were its last layer's output (nostalgebraist 2020).

A lens reads with the model's own final norm and unembedding, scale and cap included, so that at the last layer it is
the model. It shows what could be read off at once, and nothing of what a component does through later layers; how much
that is, `split_effects` measures. `vesalius.describe.tuned` has the lens whose vectors are translated first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.activations import Run
from vesalius.errors import InputError, SelfCheckError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import speller
from vesalius.intervention import Intervention, listed
from vesalius.jobs.frames import data_frame
from vesalius.model import Model
from vesalius.model.readout import unembedded
from vesalius.patching.heatmap import heatmap
from vesalius.site import Site
from vesalius.stats import Measurement, measure

if TYPE_CHECKING:
    import pandas

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
NO_TOKEN = -1
BATCH = 2048
"""Tokens run together."""
ROWS = 512
"""Vectors whose logits there are at a time."""


@runtime_checkable
class Lens(Protocol):
    """Something that turns residual vectors at some sites of a model into logits."""

    @property
    def model(self) -> Model: ...

    @property
    def sites(self) -> tuple[Site, ...]: ...

    def logits(self, site: Site | str, residual: Tensor) -> Tensor:
        """[..., vocab] from [..., d_model]."""
        ...


def residual_sites(model: Model, sites: str | Site | Sequence[Site | str]) -> tuple[Site, ...]:
    """Residual sites by name or glob, in forward order.

    Raises InputError for a site that is not the residual stream, and for a model whose logits are not the unembedding
    of its normed residual stream (BERT, T5).
    """
    adapter = model.architecture[0]
    if not adapter.direct:
        raise InputError(
            f"{model.name} has no lens: the logits of the {adapter.family} family are not the unembedding of the "
            "normed residual stream"
        )
    names = [sites] if isinstance(sites, str | Site) else list(sites)
    found = dict.fromkeys(site for name in names for site in model.sites(str(name)))
    wrong = [site for site in found if site.kind not in RESIDUAL]
    if wrong or not found:
        raise InputError(
            f"a lens reads the residual stream ({', '.join(RESIDUAL)}); got {wrong[0] if wrong else names}"
        )
    return tuple(sorted(found, key=lambda site: site.order))


def last_site(model: Model) -> Site:
    """The last layer's output, where a lens is the model."""
    return Site("resid_post", model.architecture[1].n_layers - 1)


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens:
    """The logit lens of a model with an adapter. sites: names or globs of the residual stream.

    Raises as `residual_sites`.
    """

    model: Model
    sites: tuple[Site, ...] = ()

    def __init__(self, model: Model, sites: str | Site | Sequence[Site | str] = "layers.*.resid_post") -> None:
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "sites", residual_sites(model, sites))

    def __repr__(self) -> str:
        return f"LogitLens({self.model.name}, {len(self.sites)} sites)"

    def logits(self, site: Site | str, residual: Float[Tensor, "*any d_model"]) -> Float[Tensor, "*any vocab"]:
        """Logits of residual vectors, the same way at every residual site. Raises as `residual_sites`."""
        residual_sites(self.model, site)
        return unembedded(self.model, residual)

    def read(self, inputs: Any, **how: Any) -> LensReading:
        """See `read_lens`."""
        return read_lens(self, inputs, **how)


@dataclass(frozen=True, eq=False, repr=False)
class LensReading:
    """What a lens says at every site and token. Axes [site, example, pos]; NaN and -1 on padding.

    top, top_probability: [site, example, pos, k], the likeliest next tokens. kl: nats, KL(model || lens), of the
    distributions of the next token. entropy: nats, of the lens. target: [example, pos] token; rank (0 is the first),
    target_probability: of that token, where there is one. diagnostics: of the runs that were read, one for each edit.
    """

    sites: tuple[Site, ...]
    tokens: Tokens
    top: Int[Tensor, "site example pos k"]
    top_probability: Float[Tensor, "site example pos k"]
    kl: Float[Tensor, "site example pos"]
    entropy: Float[Tensor, "site example pos"]
    target: Int[Tensor, "example pos"]
    rank: Int[Tensor, "site example pos"]
    target_probability: Float[Tensor, "site example pos"]
    text: Mapping[int, str]
    diagnostics: tuple[Mapping[str, Any], ...] = ()

    def __repr__(self) -> str:
        kl = ", ".join(f"{site} {value:.2f}" for site, value in zip(self.sites, self._mean_kl.tolist(), strict=True))
        return f"LensReading({len(self.tokens)} prompts; mean KL to the model in nats: {kl})"

    @property
    def _mean_kl(self) -> Float[Tensor, " site"]:
        return self.kl.flatten(1).nanmean(1)

    def number(self, site: Site | str) -> int:
        """Where a site is among `sites`. Raises UnknownNameError."""
        if Site.parse(site) not in self.sites:
            raise UnknownNameError("site of this lens", str(site), map(str, self.sites))
        return self.sites.index(Site.parse(site))

    def measurement(self, site: Site | str) -> Measurement:
        """KL at a site: the mean over each example's tokens, one value per example."""
        values = self.kl[self.number(site)].nanmean(1)
        off = {"off_distribution": list(self.diagnostics)} if self.diagnostics else {}
        return measure(f"KL(model || lens) at {site}", values.double().numpy(), unit="nats", diagnostics=off)

    def to_frame(self) -> pandas.DataFrame:
        """One row per site, example and real position.

        Columns: site, layer, example, position, token, top (the likeliest), probability, kl, entropy, target, rank,
        target_probability. Raises InputError where pandas is not installed.
        """
        cells = [(n, *at) for n in range(len(self.sites)) for at in self.tokens.real.nonzero().tolist()]
        return data_frame([self._row(*cell) for cell in cells])

    def _row(self, site: int, example: int, position: int) -> dict[str, Any]:
        at, target = (site, example, position), int(self.target[example, position])
        return {
            "site": str(self.sites[site]),
            "layer": self.sites[site].layer,
            "example": example,
            "position": position,
            "token": self._word(int(self.tokens.ids[example, position])),
            "top": self._word(int(self.top[at][0])),
            "probability": float(self.top_probability[at][0]),
            "kl": float(self.kl[at]),
            "entropy": float(self.entropy[at]),
            "target": "" if target == NO_TOKEN else self._word(target),
            "rank": int(self.rank[at]),
            "target_probability": float(self.target_probability[at]),
        }

    def _word(self, token: int) -> str:
        return self.text[token]

    def _repr_html_(self) -> str:
        """The first prompt: its tokens across, sites down; the likeliest token, tinted by its probability."""
        length = int(self.tokens.lengths[0])
        at = self.tokens.real[0].nonzero()[:, 0].tolist()[:length]
        heads = "".join(f"<th>{escape(self._word(int(self.tokens.ids[0, p])))}</th>" for p in at)
        lines = "".join(
            f"<tr><th style='text-align:left'>{site}</th>{''.join(self._cell(n, p) for p in at)}</tr>"
            for n, site in reversed(list(enumerate(self.sites)))
        )
        kl = heatmap("KL(model || lens) in nats, mean over tokens", list(map(str, self.sites)), ["KL"],
                     self._mean_kl[:, None])  # fmt: skip
        title = "<caption>The likeliest next token by site; the darker, the surer</caption>"
        return f"<table>{title}<thead><tr><th></th>{heads}</tr></thead><tbody>{lines}</tbody></table>{kl}"

    def _cell(self, site: int, position: int) -> str:
        at = (site, 0, position)
        words = [self._word(token) for token in self.top[at].tolist()]
        listed = ", ".join(f"{w!r} {p:.2f}" for w, p in zip(words, self.top_probability[at].tolist(), strict=True))
        about = f"{listed}; KL {float(self.kl[at]):.2f}, entropy {float(self.entropy[at]):.2f} nats"
        tint = 0.6 * float(self.top_probability[at][0])
        style = f"background:rgba(33,102,172,{tint:.2f})"
        return f"<td title='{escape(about, quote=True)}' style='{style}'>{escape(words[0])}</td>"


def read_lens(
    lens: Lens,
    inputs: Any,
    *,
    targets: str | Int[Tensor, "example pos"] | Int[Tensor, " example"] = "next",
    k: int = 5,
    interventions: Sequence[Intervention] | Intervention = (),
) -> LensReading:
    """Read prompts through a lens.

    targets: "next", the text's own next token; "model", the token that the model finds likeliest; or token ids, one for
    each prompt or for each of its positions. interventions: edits of the run that is read; their diagnostics are kept.

    Raises InputError for targets that do not fit, SelfCheckError when the lens's readout of the last layer differs from
    the model's logits beyond rounding: the adapter then lacks a scale or a norm.
    """
    tokens = lens.model.called_with(inputs)[2]
    if tokens is None:
        raise InputError("a lens reads text or token ids")
    edits = listed(interventions)
    named = targets if isinstance(targets, str) else ""
    if named not in ("next", "model", ""):
        raise UnknownNameError("targets", named, ["next", "model"], "Or give token ids.")
    wanted = None if isinstance(targets, str) else _given(targets, tokens)
    made = _Made(len(lens.sites), tokens, k)
    diagnostics: list[Mapping[str, Any]] = []
    for rows in _batches(tokens, bool(edits)):
        some = tokens.take(rows)
        with torch.no_grad():
            run = lens.model.run(some, [*lens.sites, last_site(lens.model)], edits)
            if not edits:
                _check_last(lens.model, run)
            target = _targets(named, some, run.logits) if wanted is None else wanted[rows]
            made.add(lens, run, some.real, rows, target)
        diagnostics += run.diagnostics
    return made.reading(lens, tuple(diagnostics))


def _batches(tokens: Tokens, whole: bool) -> Iterator[Int[Tensor, " row"]]:
    # Positions of edits may be given prompt by prompt, so that an edited batch cannot be cut.
    size = len(tokens) if whole else max(1, BATCH // tokens.ids.shape[1])
    return iter(torch.arange(len(tokens)).split(size))


def _given(targets: Tensor, tokens: Tokens) -> Int[Tensor, "example pos"]:
    each = targets[:, None].expand(tokens.ids.shape) if targets.ndim == 1 and len(targets) == len(tokens) else targets
    if each.shape != tokens.ids.shape or each.dtype != torch.long:
        raise InputError(
            f"targets are int64 token ids [{len(tokens)}] or {list(tokens.ids.shape)}; got {targets.dtype} "
            f"{list(targets.shape)}"
        )
    return each.cpu()


def _targets(which: str, tokens: Tokens, logits: Tensor) -> Int[Tensor, "example pos"]:
    if which == "model":
        return logits.argmax(-1).cpu()
    after, real = (torch.nn.functional.pad(t[:, 1:], (0, 1)) for t in (tokens.ids, tokens.real))
    return torch.where(real & tokens.real, after, NO_TOKEN)


def _check_last(model: Model, run: Run) -> None:
    """Hold the readout of a few last vectors to the logits of their own run."""
    own = run.logits[:, :1].float()
    off = float((unembedded(model, run[last_site(model)][:, :1]).float() - own).abs().max())
    precise = run.logits.dtype in (torch.float32, torch.float64)
    allowed = (1e-4 if precise else 16 * torch.finfo(run.logits.dtype).eps) * float(own.max() - own.min())
    if off > allowed:
        raise SelfCheckError(
            f"the final norm and unembedding of {model.name}'s last layer give logits that differ by {off:.3g} from "
            f"its own: the {model.architecture[0].family} adapter lacks a scale or a norm. See vs.check_adapter(model)"
        )


class _Made:
    """The tensors of a reading while they are filled."""

    def __init__(self, sites: int, tokens: Tokens, k: int) -> None:
        if k < 1:
            raise InputError(f"k is the number of likeliest tokens to keep, at least 1; got {k}")
        shape = (sites, *tokens.ids.shape)
        self.tokens = tokens
        self.numbers = {name: torch.full(shape, torch.nan) for name in ("kl", "entropy", "target_probability")}
        self.top, self.top_probability = torch.full((*shape, k), NO_TOKEN), torch.full((*shape, k), torch.nan)
        self.rank, self.target = torch.full(shape, NO_TOKEN), torch.full(tokens.ids.shape, NO_TOKEN)

    def add(
        self,
        lens: Lens,
        run: Run,
        real: Bool[Tensor, "row pos"],
        rows: Int[Tensor, " row"],
        target: Int[Tensor, "row pos"],
    ) -> None:
        """Of some prompts, at every site."""
        row, pos = real.nonzero(as_tuple=True)
        self.target[rows] = target.masked_fill(~real, NO_TOKEN)
        for part in torch.arange(len(row)).split(ROWS):
            r, p = row[part], pos[part]
            model = run.logits[r, p].float().log_softmax(-1)
            for number, site in enumerate(lens.sites):
                found = lens.logits(site, run[site][r, p]).float().log_softmax(-1)
                self._put((number, rows[r], p), model, found, target[r, p])

    def _put(self, at: tuple[Any, ...], model: Tensor, found: Tensor, target: Int[Tensor, " n"]) -> None:
        self.numbers["kl"][at] = (model.exp() * (model - found)).sum(-1).cpu()
        self.numbers["entropy"][at] = -(found.exp() * found).sum(-1).cpu()
        best = found.topk(self.top.shape[-1], -1)
        self.top[at], self.top_probability[at] = best.indices.cpu(), best.values.exp().cpu()
        own = found.gather(1, target.clamp_min(0)[:, None].to(found.device))
        there = target != NO_TOKEN
        self.numbers["target_probability"][at] = torch.where(there, own[:, 0].exp().cpu(), torch.nan)
        self.rank[at] = torch.where(there, (found > own).sum(-1).cpu(), NO_TOKEN)

    def reading(self, lens: Lens, diagnostics: tuple[Mapping[str, Any], ...]) -> LensReading:
        seen = torch.cat([self.top.flatten(), self.target.flatten(), self.tokens.ids.flatten()]).unique().tolist()
        spell = speller(lens.model.tokenizer)
        text = {token: spell(token) for token in seen if token >= 0}
        return LensReading(
            sites=lens.sites,
            tokens=self.tokens,
            top=self.top,
            top_probability=self.top_probability,
            target=self.target,
            rank=self.rank,
            text=text,
            diagnostics=diagnostics,
            **self.numbers,
        )
