"""The public sweep: one edit at many places, one at a time, with the metric of every edited run.

Activation patching (Meng et al. 2022, section 2; Zhang & Nanda 2024 on the choice of metric and direction) is
`edit="patch"`: `base="corrupted"` asks what is enough to bring the clean behaviour back (denoising), `base="clean"`
what is needed for it (noising).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs import Blocks, Event, Sink, silent
from vesalius.metric import Metric, logit_diff
from vesalius.model import Model
from vesalius.records import content_hash
from vesalius.site import Site
from vesalius.sweeps.evaluate import TOKENS_PER_BATCH, Cost, base_values, estimate, evaluate
from vesalius.sweeps.plain import why_plain
from vesalius.sweeps.record import Record, record
from vesalius.sweeps.variants import EDITS, Donor, Variant, donor_for, normal

EACH = ("position", "head")
PROMPTS = ("corrupted", "clean")


@dataclass(frozen=True, eq=False)
class Scores:
    """What a sweep measured; nothing is averaged."""

    values: Float[Tensor, "site *each example"]
    """The metric of each edited run: [site, position|head, example], or [site, example] with each=None."""
    base: Float[Tensor, " example"]
    """The metric without an edit, on the prompts that were edited."""
    source: Float[Tensor, " example"]
    """The metric of the other prompts, where patched values come from."""
    mask: Bool[Tensor, "site *each example"]
    """False on cells past an example's length; `values` holds `base` there."""
    cost: Cost
    sites: tuple[str, ...]
    each: str | None
    edit: str
    metric: str
    unit: str
    prompts: str
    """The prompts that were edited: `corrupted` or `clean`."""

    @property
    def effects(self) -> Float[Tensor, "site *each example"]:
        """Change of the metric by the edit."""
        return self.values - self.base

    @property
    def mean(self) -> Float[Tensor, site * each]:
        """Mean effect over the examples that reach the cell; NaN where none does."""
        return (self.effects * self.mask).sum(-1) / self.mask.sum(-1)

    def __repr__(self) -> str:
        shape = ", ".join(f"{name} {size}" for name, size in zip(self._axes, self.values.shape, strict=True))
        return f"Scores({self.edit} on {self.prompts} prompts, {self.metric}: {shape}; {self.cost.describe()})"

    @property
    def _axes(self) -> tuple[str, ...]:
        return ("site", *([self.each] if self.each else []), "example")

    def _repr_html_(self) -> str:
        """A heat table of mean effects: sites down, positions or heads across."""
        table = self.mean if self.each else self.mean[:, None]
        top = float(table.nan_to_num().abs().max()) or 1.0
        heads = "".join(f"<th>{column}</th>" for column in range(table.shape[1])) if self.each else "<th>effect</th>"
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(site)}</th>{''.join(_cell(float(v), top) for v in row)}</tr>"
            for site, row in zip(self.sites, table, strict=True)
        )
        what = f"{self.edit} on {self.prompts} prompts, each {self.each or 'site'}"
        title = escape(f"Mean change of {self.metric} ({self.unit}): {what}")
        return (
            f"<table><caption>{title}</caption><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
            f"<p>{escape(self.cost.describe())}</p>"
        )


def _cell(value: float, top: float) -> str:
    if value != value:
        return "<td></td>"
    # Blue raises the metric, red lowers it; the number is there for those who do not see colours.
    tint = "33,102,172" if value >= 0 else "178,24,43"
    return f"<td style='text-align:right;background:rgba({tint},{min(abs(value) / top, 1) * 0.6:.3f})'>{value:.2f}</td>"


def sweep(
    model: Model,
    pairs: Pairs,
    *,
    sites: str | Site | Sequence[str | Site],
    each: str | None = None,
    edit: str = "patch",
    metric: Metric = logit_diff,
    base: str = "corrupted",
    budget: int = TOKENS_PER_BATCH,
    check: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    sink: Sink = silent,
) -> Scores:
    """Edit every site, one at a time, and measure every example.

    sites: names, globs or Sites (embed, and inside layers resid_pre, resid_post, attn_out, mlp_in, mlp_out, mlp_post,
    q, k, v, z; or module:<path>|in and |out of any network that maps token ids to logits [example, pos, vocab], by
    whole runs). `embed` is the first layer's input: with learned positions it holds token and position embedding.
    each: "position" edits one absolute token index at a time; "head" one head at all positions (sites z, q, k or v; on
    k and v key-value heads); None the whole site at all positions.
    edit: "patch" the other prompts' value at the same position; "zero"; "mean" over the other prompts' positions (the
    first position has its own mean, and is left alone when all prompts begin alike); "resample" the value of another
    example of the other prompts, drawn by `seed`.
    base: the prompts that are run and edited; the other prompts give the values.
    budget: tokens run together; memory grows with it, values do not depend on it. check: re-run two random cells
    plainly. out: folder that keeps finished sites, so that an interrupted sweep goes on where it was. sink: hears the
    estimated cost before the first edited run, then progress.

    Raises UnknownNameError for an unknown site, each, edit or base; InputError for a site that cannot be swept or
    that has no heads; NotFiniteError for a metric that is NaN or infinite; SelfCheckError when a plain run disagrees.
    """
    pairs = replace(pairs, decoder=model.begun(pairs.tokens("clean")).decoder)
    places = _checked(model, sites, each, edit, base, pairs)
    written = sorted({normal(site)[0] for site in places}, key=lambda site: site.order)
    other = PROMPTS[1 - PROMPTS.index(base)]
    runs = record(model, pairs.tokens(base), written), record(model, pairs.tokens(other), written)
    donor = donor_for(edit, *runs, places, seed)
    variants = {site: _variants(model, site, each, pairs) for site in places}
    mask = _mask(variants[places[0]], pairs)
    quote = estimate(runs[0], [v for site in places for v in variants[site]], donor, pairs.at + 1)
    reason = why_plain(runs[0], [variant for site in places for variant in variants[site]])
    if reason:
        sink(Event("note", "sweep", message=f"no replay: {reason}; every edited run is one whole forward"))
    sink(Event("note", "sweep", message=_bill(quote, mask.expand(len(places), -1, -1)).describe()))
    plan = {"model": model.content_hash if out else "", "pairs": pairs.content_hash, "each": each, "edit": edit,
            "metric": [metric.name, metric.unit], "base": base, "seed": seed, "budget": budget}  # fmt: skip
    blocks = Blocks(out, content_hash(plan), sink)
    results = _results(runs[0], variants, donor, pairs, metric, blocks, budget, check, seed, sink)
    return _scores(results, runs, mask, pairs, metric, [str(site) for site in places], each, edit, base)


def _checked(
    model: Model, sites: str | Site | Sequence[str | Site], each: str | None, edit: str, base: str, pairs: Pairs
) -> list[Site]:
    """The sites, resolved, when everything named is known."""
    if each is not None and each not in EACH:
        raise UnknownNameError("each", each, EACH, "None edits whole sites.")
    if edit not in EDITS:
        raise UnknownNameError("edit", edit, EDITS)
    if base not in PROMPTS:
        raise UnknownNameError("base", base, PROMPTS)
    listed = [sites] if isinstance(sites, str | Site) else list(sites)
    found = list(dict.fromkeys(site for name in listed for site in _resolved(model, name)))
    if not found:
        raise InputError('no sites to sweep; give sites= such as "layers.*.resid_post"')
    for site in found:
        normal(site)
    if each == "head":
        _check_heads(model, found)
    if each == "position" and pairs.decoder is not None and len({site.of_encoder for site in found}) > 1:
        raise InputError("positions of an encoder and of a decoder are not the same: sweep their sites apart")
    return found


def _resolved(model: Model, name: str | Site) -> list[Site]:
    found = model.sites(str(name)) if "*" in str(name) else [Site.parse(name)]
    for site in found:
        model.check_site(site)
    return found


def _check_heads(model: Model, sites: Sequence[Site]) -> None:
    for site in sites:
        if not {"head", "kv_head"} & set(site.axes):
            raise InputError(f'{site} has no heads to go through; each="head" takes whole z, q, k or v sites')
    if len({_heads(model, site) for site in sites}) > 1:
        raise InputError("query heads and key-value heads differ in number here: sweep z and q apart from k and v")


def _heads(model: Model, site: Site) -> int:
    layout = model.described[1]
    return layout.n_kv_heads if "kv_head" in site.axes else layout.n_heads


def _variants(model: Model, site: Site, each: str | None, pairs: Pairs) -> list[Variant]:
    if each == "head":
        return [Variant((site[head],)) for head in range(_heads(model, site))]
    if each == "position":
        return [Variant((site,), position) for position in range(pairs.tokens("clean").real_at(site).shape[1])]
    return [Variant((site,))]


def _mask(variants: Sequence[Variant], pairs: Pairs) -> Bool[Tensor, "variant example"]:
    """True where the example has the variant's position."""
    tokens = pairs.tokens("clean")
    return torch.stack([tokens.real_at(one.parts[0]).sum(1) > (one.position or 0) for one in variants])


def _bill(cost: Cost, mask: Tensor) -> Cost:
    """The cost with the base and source runs, and without the cells past an example's end, which nobody would run."""
    runs = 2.0 * mask.shape[-1]
    past = int((~mask).sum())
    return Cost(cost.spent + runs, cost.naive - past + runs, cost.skipped - past)


def _results(
    base: Record,
    variants: Mapping[Site, list[Variant]],
    donor: Donor,
    pairs: Pairs,
    metric: Metric,
    blocks: Blocks,
    budget: int,
    check: bool,
    seed: int,
    sink: Sink,
) -> list[Mapping[str, NDArray[Any]]]:
    """One block per site: values [variant, example] and what they cost."""
    pending = [site for site in variants if str(site) not in blocks]
    checked = pending[seed % len(pending)] if pending and check else None

    def compute(site: Site) -> dict[str, NDArray[Any]]:
        found = evaluate(base, variants[site], donor, pairs, metric, budget=budget, check=site == checked, seed=seed)
        cost = torch.tensor([found.cost.spent, found.cost.naive, found.cost.skipped], dtype=torch.float64)
        return {"values": found.values.cpu().numpy(), "cost": cost.numpy()}

    results: list[Mapping[str, NDArray[Any]]] = []
    sink(Event("start", "sweep", 0, len(variants)))
    for number, site in enumerate(variants):
        results.append(blocks.get(str(site), lambda site=site: compute(site)))  # type: ignore[misc]
        sink(Event("advance", "sweep", number + 1, len(variants)))
    sink(Event("end", "sweep", len(variants), len(variants)))
    return results


def _scores(
    results: Sequence[Mapping[str, NDArray[Any]]],
    runs: tuple[Record, Record],
    mask: Tensor,
    pairs: Pairs,
    metric: Metric,
    sites: Sequence[str],
    each: str | None,
    edit: str,
    base: str,
) -> Scores:
    values = torch.stack([torch.from_numpy(result["values"].copy()) for result in results])
    mask = mask.expand(len(sites), -1, -1)
    cost = sum((Cost(float(c[0]), float(c[1]), int(c[2])) for c in (r["cost"] for r in results)), Cost(0.0, 0.0, 0))
    plain = [base_values(run, pairs, metric, runs[0]) for run in runs]
    return Scores(
        values=values if each else values[:, 0],
        base=plain[0],
        source=plain[1],
        mask=mask if each else mask[:, 0],
        cost=_bill(cost, mask),
        sites=tuple(sites),
        each=each,
        edit=edit,
        metric=metric.name,
        unit=metric.unit,
        prompts=base,
    )
