"""Patchscopes: a hidden state is put into another prompt, and the model says what it holds (Ghandeharioun et al. 2024).

The state at a source layer and position replaces the one at a target layer and position of an inspection prompt, in the
same model or in another one (then by way of a fitted affine map); what comes next is read as distribution and as text.
With source and target the same, nothing is changed, to the bit. What a state makes another prompt say is evidence of
what can be read from it there, not of what the source run used; the diagnostics tell how foreign it is at its target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.describe.lenses import RESIDUAL
from vesalius.errors import InputError, NotFiniteError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import speller
from vesalius.intervention import Interchange, Positions, mask_of
from vesalius.jobs.frames import data_frame
from vesalius.metric import wide
from vesalius.model import Model
from vesalius.site import Site

if TYPE_CHECKING:
    import pandas

TOKEN_IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"  # noqa: S105
"""The state stands in for "?" and should come out as a token (section 4.1)."""
FEW_SHOT = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational major "
    "appliance and consumer electronics corporation, x"
)
"""The state stands in for "x" and should be described (section 4.3)."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """x -> weight x + bias, from one model's residual stream to another's. fvu: of the rows that it was fitted to."""

    weight: Float[Tensor, "d_target d_source"]
    bias: Float[Tensor, " d_target"]
    fvu: float = 0.0

    def __call__(self, states: Float[Tensor, "*any d_source"]) -> Float[Tensor, "*any d_target"]:
        return states.to(self.weight) @ self.weight.T + self.bias


class AffineFitter:
    """Least squares, with an intercept, of rows that come batch by batch; sums are kept, in double precision."""

    def __init__(self) -> None:
        self._rows = 0
        self._xx: Tensor | None = None
        self._xy: Tensor | None = None
        self._yy = 0.0
        self._y: Tensor | None = None

    def update(self, x: Float[Tensor, "row d_source"], y: Float[Tensor, "row d_target"]) -> AffineFitter:
        """Take in rows: x[i] is to be mapped to y[i]. Raises NotFiniteError."""
        if not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
            raise NotFiniteError("rows to fit a map to hold NaN or infinity")
        ones = torch.cat([x.double().cpu(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
        target = y.double().cpu()
        if self._xx is None or self._xy is None or self._y is None:
            self._xx, self._xy = ones.new_zeros(ones.shape[1], ones.shape[1]), ones.new_zeros(ones.shape[1], y.shape[1])
            self._y = ones.new_zeros(y.shape[1])
        self._rows += len(x)
        self._xx += ones.T @ ones
        self._xy += ones.T @ target
        self._yy += float(target.square().sum())
        self._y += target.sum(0)
        return self

    def fitted(self) -> AffineMap:
        """The map of smallest norm that fits best. Raises InputError for fewer rows than unknowns."""
        if self._xx is None or self._xy is None or self._y is None or self._rows < len(self._xx):
            needed = "some" if self._xx is None else f"at least {len(self._xx)}"
            raise InputError(f"a map is fitted to {needed} rows; there are {self._rows}: give more text")
        solved = torch.linalg.pinv(self._xx, rtol=1e-12, hermitian=True) @ self._xy
        left = self._yy - 2 * float((solved * self._xy).sum()) + float((solved * (self._xx @ solved)).sum())
        spread = self._yy - float(self._y.square().sum()) / self._rows
        return AffineMap(solved[:-1].T.float(), solved[-1].float(), max(0.0, left) / max(spread, 1e-300))


def fit_map(
    source: Model, source_site: Site | str, target: Model, target_site: Site | str, texts: Any, batch: int = 16
) -> AffineMap:
    """The affine map from states of one model to those of another on the same texts, fitted by least squares.

    Token by token where both read the texts as the same tokens, else from last token to last token. First tokens are
    left out: their states are unlike all others. Raises InputError for too few rows.
    """
    sides = [tokens for model in (source, target) if (tokens := model.called_with(texts)[2]) is not None]
    if len(sides) < 2:
        raise InputError("a map is fitted to texts or token ids")
    same = torch.equal(sides[0].ids, sides[1].ids) and torch.equal(sides[0].real, sides[1].real)
    fitter = AffineFitter()
    for rows in torch.arange(len(sides[0])).split(batch):
        states = [
            _states(model, site, tokens.take(rows), same)
            for model, site, tokens in zip((source, target), (source_site, target_site), sides, strict=True)
        ]
        fitter.update(*states)
    return fitter.fitted()


def _states(model: Model, site: Site | str, tokens: Tokens, every: bool) -> Float[Tensor, "row d_model"]:
    with torch.no_grad():
        whole = model.run(tokens, site, last_logits=True)[site]
    chosen = tokens.real & (tokens.real.cumsum(1) > 1) if every else mask_of("last", tokens.real)
    assert chosen is not None
    return whole[chosen.to(whole.device)]


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """What an inspection prompt goes on with, by layer and source prompt.

    logits: [layer, example, vocab], of the target's next token. top: [layer, example, k]. texts: by layer, what is
    written. own: [example, vocab] logits that the source model has at the source position. diagnostics: by layer, of
    the target's run.
    """

    sources: tuple[Site, ...]
    targets: tuple[Site, ...]
    logits: Float[Tensor, "layer example vocab"]
    top: Int[Tensor, "layer example k"]
    own: Float[Tensor, "example own_vocab"]
    words: Mapping[int, str]
    texts: tuple[tuple[str, ...], ...]
    diagnostics: tuple[tuple[Mapping[str, Any], ...], ...]
    prompts: tuple[str, ...] = field(default=())

    def precision(self, k: int = 1) -> Float[Tensor, " layer"]:
        """Share of prompts whose likeliest next token, by the source model's own run, is among the k likeliest here.

        Precision@k of section 4.1, for models with one vocabulary. Raises InputError for other ones, or k beyond `top`.
        """
        if self.own.shape[-1] != self.logits.shape[-1]:
            raise InputError("precision compares next tokens, and the two models have different vocabularies")
        if not 1 <= k <= self.top.shape[-1]:
            raise InputError(f"k is between 1 and the {self.top.shape[-1]} likeliest tokens that are kept; got {k}")
        return self._hits(k).double().mean(1)

    def _hits(self, k: int) -> Bool[Tensor, "layer example"]:
        return (self.top[..., :k] == self.own.argmax(-1)[None, :, None].to(self.top.device)).any(-1)

    def to_frame(self) -> pandas.DataFrame:
        """One row per layer and prompt: source, target, example, top, probability, text, norm_ratio, z_rms.

        Raises InputError where pandas is not installed.
        """
        layers, examples = self.logits.shape[:2]
        return data_frame([self._row(layer, one) for layer in range(layers) for one in range(examples)])

    def _row(self, layer: int, example: int) -> dict[str, Any]:
        off = self.diagnostics[layer][0]
        return {
            "source": str(self.sources[layer]),
            "target": str(self.targets[layer]),
            "example": example,
            "top": self._word(int(self.top[layer, example, 0])),
            "probability": float(self.logits[layer, example].softmax(-1).max()),
            "text": self.texts[layer][example] if self.texts else "",
            "norm_ratio": float(off["norm_ratio"]),
            "z_rms": float(off["z_rms"]),
        }

    def _word(self, token: int) -> str:
        return self.words[token]

    def __repr__(self) -> str:
        layers, examples = self.logits.shape[:2]
        return f"Inspection({examples} states of {layers} layers into {self.targets[0]} to {self.targets[-1]})"

    def _repr_html_(self) -> str:
        """Layers down, source prompts across; what is written, or the likeliest next token."""
        shown = range(min(self.logits.shape[1], 8))
        heads = "".join(f"<th>{escape(self.prompts[e] if self.prompts else str(e))}</th>" for e in shown)
        lines = "".join(
            f"<tr><th style='text-align:left'>{s} &rarr; {t}</th>{''.join(self._cell(n, e) for e in shown)}</tr>"
            for n, (s, t) in enumerate(zip(self.sources, self.targets, strict=True))
        )
        title = "<caption>What the inspection prompt goes on with</caption>"
        return f"<table>{title}<thead><tr><th></th>{heads}</tr></thead><tbody>{lines}</tbody></table>"

    def _cell(self, layer: int, example: int) -> str:
        words = [self._word(token) for token in self.top[layer, example].tolist()]
        shown = self.texts[layer][example] if self.texts else words[0]
        return f"<td title='{escape(', '.join(map(repr, words)), quote=True)}'>{escape(shown)}</td>"


def patchscope(
    model: Model,
    prompts: Any,
    *,
    sites: str | Site | Sequence[str | Site],
    position: Positions = "last",
    into: Any = TOKEN_IDENTITY,
    into_site: str | Site | None = None,
    into_position: Positions = "last",
    target: Model | None = None,
    mapping: AffineMap | None = None,
    new_tokens: int = 0,
    k: int = 5,
) -> Inspection:
    """Put the state of each prompt, at each of some sites, into an inspection prompt, and see how that goes on.

    sites: where states are taken, names or globs of the residual stream; position: of which token. into: the inspection
    prompt, one for all or one for each prompt; its token at into_position is replaced, by default its last. into_site:
    where, by default at the site that the state comes from. target: the model that reads the inspection prompt, default
    the same one; mapping: applied to states before that (`fit_map`), needed where widths differ. new_tokens: written.

    Raises InputError for sites outside the residual stream, widths that differ, and prompts that do not fit.
    """
    reader = model if target is None else target
    taken = _residual(model, sites)
    put = [_residual(reader, into_site)[0] if into_site is not None else site for site in taken]
    tokens, inspection = model.called_with(prompts)[2], reader.called_with(into)[2]
    if tokens is None or inspection is None:
        raise InputError("a patchscope takes texts or token ids")
    inspection = _one_for_each(inspection, len(tokens))
    at = mask_of(position, tokens.real, tokens.named_positions)
    if at is None or not bool((at.sum(1) == 1).all()):
        raise InputError(f"a state comes from one token of each prompt; position={position!r} does not name one")
    with torch.no_grad():
        run = model.run(tokens, capture=taken)
        states = [run[site][at.to(run[site].device)] for site in taken]
        ends = inspection.lengths - 1
        found, texts, diagnostics = [], [], []
        for site, values in zip(put, states, strict=True):
            edit = _edit(reader, site, values, mapping, into_position)
            after = reader.run(inspection, interventions=edit)
            found.append(wide(after.logits[torch.arange(len(ends)), ends.to(after.logits.device)]))
            diagnostics.append(tuple(after.diagnostics))
            if new_tokens:
                texts.append(reader.generate(inspection, new_tokens, interventions=edit).written)
    logits = torch.stack(found)
    top, spell = logits.topk(k, -1).indices.cpu(), speller(reader.tokenizer)
    return Inspection(
        sources=tuple(taken),
        targets=tuple(put),
        logits=logits.cpu(),
        top=top,
        own=wide(run.logits[at.to(run.logits.device)]).cpu(),
        words={token: spell(token) for token in top.unique().tolist()},
        texts=tuple(texts),
        diagnostics=tuple(diagnostics),
        prompts=tuple(_shown(model, row, real) for row, real in zip(tokens.ids, tokens.real, strict=True)),
    )


def _residual(model: Model, sites: str | Site | Sequence[str | Site]) -> list[Site]:
    names = [sites] if isinstance(sites, str | Site) else list(sites)
    found = sorted(dict.fromkeys(s for name in names for s in model.sites(str(name))), key=lambda site: site.order)
    wrong = [str(site) for site in found if site.kind not in (*RESIDUAL, "embed")]
    if wrong:
        raise InputError(f"states are taken from and put into the residual stream, and {wrong[0]} is not of it")
    return found


def _one_for_each(inspection: Tokens, count: int) -> Tokens:
    if len(inspection) == 1:
        return inspection.take(torch.zeros(count, dtype=torch.long))
    if len(inspection) != count:
        raise InputError(f"{len(inspection)} inspection prompts for {count} prompts; give one, or one for each")
    return inspection


def _edit(
    reader: Model, site: Site, values: Float[Tensor, "example d_source"], mapping: AffineMap | None, at: Any
) -> Interchange:
    states = values if mapping is None else mapping(values).to(values.dtype)
    width = reader.architecture[1].d_model
    if states.shape[-1] != width:
        raise InputError(
            f"states of width {states.shape[-1]} do not fit {reader.name}, whose width is {width}; give mapping=, as "
            "vs.describe.fit_map fits it"
        )
    return Interchange(site, source=states[:, None].to(reader.device), source_positions=0, positions=at)


def _shown(model: Model, ids: Int[Tensor, " pos"], real: Bool[Tensor, " pos"]) -> str:
    kept = ids[real].tolist()
    return " ".join(map(str, kept)) if model.tokenizer is None else str(model.tokenizer.decode(kept))
