"""Tensors of a model taken apart into latents and what a dictionary leaves over, or into the neurons of an MLP.

These are the nodes of sparse feature circuits (Marks et al. 2025): x = sum_i f_i d_i + b + e, exactly, where f are the
latents of a dictionary, d their rows, b its bias and e what it leaves unexplained, the error node. A transcoder takes
an MLP's output apart by what it reads at its input. Of neurons nothing is left over.

Ablated, a node has another value: what it is in the other prompts' run at the same position ("resample"), the mean of
that over the other prompts, position by position ("mean"), or nothing ("zero").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.circuits.cutting import ABLATIONS, TOKENS_PER_BATCH
from vesalius.dictionaries import Dictionary, Latent, Unexplained
from vesalius.errors import InputError, UnknownNameError
from vesalius.inputs import Pairs, Tokens
from vesalius.intervention import Intervention, Replace
from vesalius.metric import Metric
from vesalius.model import Model
from vesalius.parts import At, Part, Unit
from vesalius.patching.targets import PROMPTS
from vesalius.site import Site


@dataclass(frozen=True, eq=False)
class Apart:
    """One tensor [example, pos, d], taken apart. coder: the dictionary that does so; None: the tensor's own neurons."""

    site: Site
    coder: Dictionary | None = None

    @property
    def read(self) -> Site:
        """The site that the values of its nodes are computed from."""
        return self.site if self.coder is None else self.coder.in_sites[0]

    @property
    def name(self) -> str:
        """A name, also where several dictionaries take one tensor apart."""
        return str(self.site) if self.coder is None else f"{self.site} {self.coder.content_hash[:12]}"

    def units(self, at: At) -> Float[Tensor, "example pos unit"]:
        """Values of the latents or neurons."""
        return at[self.read] if self.coder is None else self.coder.encode(at[self.read]).to(at[self.read])

    def left(self, at: At) -> Float[Tensor, "example pos d"]:
        """What is left over; zeros of neurons."""
        return torch.zeros_like(at[self.site]) if self.coder is None else Unexplained(self.coder).value(at)

    def pushed(self, change: Float[Tensor, "example pos some"], units: Tensor) -> Float[Tensor, "example pos d"]:
        """What changes of some units do to the tensor."""
        if self.coder is None:
            raise InputError("changes of neurons are changes of their tensor")
        return change @ self.coder.decoder_rows()[units].to(change)

    def pulled(self, gradient: Float[Tensor, "example pos d"], units: Tensor) -> Float[Tensor, "example pos some"]:
        """Gradients at some units, from those at the tensor."""
        if self.coder is None:
            return gradient[..., units]
        return gradient @ self.coder.decoder_rows()[units].to(gradient).T

    def part(self, unit: int) -> Part:
        """A latent, or a neuron."""
        return Unit(self.site[unit]) if self.coder is None else self.coder.latent(unit)

    def number(self, part: Part) -> int | None:
        """The number of a latent or neuron among its units; None where it is none of them."""
        if self.coder is None:
            return part.site.index if isinstance(part, Unit) and part.site.whole == self.site else None
        return part.index if isinstance(part, Latent) and part.coder is self.coder else None


def taken_apart(model: Model, what: object) -> tuple[Apart, ...]:
    """What tensors are taken apart into, in the order of the forward pass.

    what: dictionaries that write one site, names or globs of `mlp_post` sites, or several of either. Raises InputError
    for others and for a tensor that is taken apart twice.
    """
    listed = [what] if isinstance(what, str | Site | Dictionary) else list(what)  # type: ignore[call-overload]
    found: list[Apart] = []
    for one in listed:
        found += [_of_dictionary(model, one)] if isinstance(one, Dictionary) else _of_neurons(model, one)
    sites = [one.site for one in found]
    if not found or len(set(sites)) < len(sites):
        raise InputError(f"give dictionaries or mlp_post sites, one for each tensor; got {', '.join(map(str, sites))}")
    return tuple(sorted(found, key=lambda one: one.site.order))


def _of_dictionary(model: Model, coder: Dictionary) -> Apart:
    if len(coder.in_sites) != 1 or len(coder.out_sites) != 1:
        raise InputError(
            f"{coder!r} reads or writes several sites; circuits of latents take dictionaries of one. For cross-layer "
            "transcoders: vs.circuits.attribution_graph"
        )
    if coder.row_norm != "none":
        raise InputError(f"{coder!r} normalises each row, so that its latents are not in units of the activations")
    site = Unexplained(coder).site
    for one in (site, coder.in_sites[0]):
        model.check_site(one)
        if one.index is not None or one.axes[2:] != site.axes[2:] or len(one.axes) != 3:
            raise InputError(f"circuits of latents take dictionaries of whole sites [example, pos, width]; got {one}")
    return Apart(site, coder)


def _of_neurons(model: Model, name: object) -> list[Apart]:
    if not isinstance(name, str | Site):
        raise InputError(f"give dictionaries or mlp_post sites; got {type(name).__name__}")
    sites = model.sites(str(name))
    wrong = [site for site in sites if site.kind != "mlp_post"]
    if wrong:
        raise InputError(f"{wrong[0]} has no neurons; give mlp_post sites, or a dictionary of {wrong[0]}")
    return [Apart(site) for site in sites]


@dataclass(frozen=True, eq=False)
class Nodes:
    """A model, prompts and a metric, with tensors taken apart; and what ablated nodes are.

    prompts: whose run is edited; the other side gives resampled values and means. means: per tensor those of its units
    and of what is left over, [1, pos, ...].
    """

    model: Model
    pairs: Pairs
    metric: Metric
    apart: tuple[Apart, ...]
    kind: str = "resample"
    prompts: str = "clean"
    means: tuple[tuple[Tensor, Tensor], ...] | None = None

    @property
    def tokens(self) -> Tokens:
        """The prompts that are run."""
        return self.pairs.tokens(self.prompts)

    @property
    def sites(self) -> list[Site]:
        """What is read of a run."""
        return list(dict.fromkeys(site for one in self.apart for site in (one.read, one.site)))

    def batches(self, budget: int = TOKENS_PER_BATCH) -> Iterator[tuple[list[int], Nodes]]:
        """Row numbers and the nodes on them, of at most about `budget` tokens."""
        size = max(1, budget // self.pairs.clean.shape[1])
        for first in range(0, len(self.pairs), size):
            rows = list(range(first, min(first + size, len(self.pairs))))
            yield rows, self if len(rows) == len(self.pairs) else replace(self, pairs=self.pairs.subset(rows))

    @cached_property
    def base(self) -> Mapping[Site, Tensor]:
        """Tensors of the run without edits."""
        return self._seen(self.prompts)[0]

    @cached_property
    def other(self) -> Mapping[Site, Tensor]:
        """Tensors of the other prompts' run."""
        return self._seen(PROMPTS[1 - PROMPTS.index(self.prompts)])[0]

    def plain(self) -> Float[Tensor, "2 example"]:
        """The metric of the run without edits, and of the other prompts' run."""
        other = PROMPTS[1 - PROMPTS.index(self.prompts)]
        return torch.stack([self._seen(which)[1] for which in (self.prompts, other)]).cpu()

    def _seen(self, which: str) -> tuple[Mapping[Site, Tensor], Tensor]:
        with torch.no_grad():
            run = self.model.run(self.pairs.tokens(which), capture=self.sites)
            return {site: run[site] for site in self.sites}, self.score(run.logits)

    def score(self, logits: Float[Tensor, "example pos vocab"]) -> Float[Tensor, " example"]:
        """The metric. Raises InputError for one that compares with a base run."""
        return self.metric(logits, self.pairs)

    def ablated(self, number: int) -> tuple[Tensor, Tensor]:
        """Values of the units and of what is left over of a tensor, once ablated; examples may be 1, for all."""
        one = self.apart[number]
        if self.kind == "resample":
            return one.units(self.other), one.left(self.other)
        if self.means is not None:
            return self.means[number]
        return torch.zeros_like(one.units(self.base)[:1]), torch.zeros_like(one.left(self.base)[:1])

    def changes(self, number: int) -> tuple[Tensor, Tensor]:
        """What ablating changes: [example, pos, unit] and [example, pos, d]; nothing on padding."""
        one, real = self.apart[number], self.tokens.real.to(self.model.device)[..., None]
        gone = self.ablated(number)
        return tuple(  # type: ignore[return-value]
            torch.where(real, new - old, 0.0)
            for new, old in zip(gone, (one.units(self.base), one.left(self.base)), strict=True)
        )

    def moved(self, number: int) -> Float[Tensor, "example pos d"]:
        """What ablating all nodes of a tensor changes in it."""
        units, left = self.changes(number)
        one = self.apart[number]
        return units if one.coder is None else one.pushed(units, torch.arange(units.shape[-1])) + left

    def metric_with(self, edits: Sequence[Intervention]) -> Float[Tensor, " example"]:
        """The metric of a run with edits."""
        with torch.no_grad():
            return self.score(self.model.run(self.tokens, interventions=list(edits)).logits).cpu()


def nodes_of(
    model: Model, pairs: Pairs, what: object, metric: Metric, kind: str = "resample", prompts: str = "clean"
) -> Nodes:
    """The setting. Raises UnknownNameError for an unknown ablation or side, InputError for what cannot be taken apart,
    for answers of several tokens and for a metric that compares with a base run."""
    if kind not in ABLATIONS:
        raise UnknownNameError("ablation", kind, ABLATIONS)
    if prompts not in PROMPTS:
        raise UnknownNameError("prompts", prompts, PROMPTS)
    metric.check_one_token(pairs)
    model.check_evaluating()
    made = Nodes(model, pairs, metric, taken_apart(model, what), kind, prompts)
    return replace(made, means=_means(made)) if kind == "mean" else made


def _means(made: Nodes) -> tuple[tuple[Tensor, Tensor], ...]:
    """Means over the other prompts that reach a position."""
    totals: list[list[Tensor]] = [[] for _ in made.apart]
    real = made.pairs.real
    for rows, part in made.batches():
        here = real[rows].to(made.model.device)[..., None]
        for one, total in zip(made.apart, totals, strict=True):
            summed = [
                torch.where(here, v, 0.0).sum(0, keepdim=True) for v in (one.units(part.other), one.left(part.other))
            ]
            total[:] = [a + b for a, b in zip(total, summed, strict=True)] if total else summed
    counts = real.sum(0).clamp_min(1)[None, :, None]
    return tuple((units / counts.to(units), left / counts.to(left)) for units, left in totals)


def with_nodes(
    nodes: Nodes, circuits: Sequence[Sequence[Part]], *, errors: bool = False
) -> Float[Tensor, "circuit example"]:
    """The metric with all nodes ablated but those of a circuit, whose values are recomputed on the way.

    errors: what dictionaries leave over stays, all of it, whether it is in a circuit or not. The embeddings, and what
    is not taken apart, are left alone.
    """
    found = []
    for _, part in nodes.batches():
        gone = [part.ablated(number) for number in range(len(part.apart))]
        found.append(torch.stack([part.metric_with(_kept(part, gone, set(one), errors)) for one in circuits]))
    return torch.cat(found, 1)


def _kept(nodes: Nodes, gone: Sequence[tuple[Tensor, Tensor]], members: set[Part], errors: bool) -> list[Intervention]:
    edits: list[Intervention] = []
    for one, ablated in zip(nodes.apart, gone, strict=True):
        keep = torch.zeros(ablated[0].shape[-1], dtype=torch.bool)
        numbers = [one.number(part) for part in members]
        keep[[number for number in numbers if number is not None]] = True
        left = errors or (one.coder is not None and Unexplained(one.coder) in members)
        made = _Made(one, keep.to(nodes.model.device), left, *ablated)
        reads = list(dict.fromkeys((one.read, one.site)))
        edits.append(Replace(reads, one.site, made, f"nodes of {one.name}"))
    return edits


@dataclass(frozen=True, eq=False)
class _Made:
    """The tensor with some nodes as they are in this run, the others ablated. keep: [unit]; left: what is left over."""

    apart: Apart
    keep: Tensor
    left: bool
    units: Tensor
    error: Tensor

    def __call__(self, *given: Tensor) -> Tensor:
        read, there = given[0], given[-1]
        at = {self.apart.read: read, self.apart.site: there}
        if self.apart.coder is None:
            return torch.where(self.keep, there, self.units.to(there))
        change = torch.where(self.keep, 0.0, self.units - self.apart.units(at))
        made = there + self.apart.pushed(change, torch.arange(change.shape[-1]))
        return made if self.left else made + (self.error - self.apart.left(at))
