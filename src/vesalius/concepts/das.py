"""Distributed alignment search: the subspace whose exchange between runs does what a variable of a causal model would.

DAS (Geiger et al. 2023, arXiv:2303.02536) trains a rotation so that giving a base run the source run's coordinates in a
subspace gives the output that the causal model says. Boundless DAS (Wu et al. 2023, arXiv:2305.08809) also learns how
many dimensions it takes. High accuracy alone says little: the same search in a network with random weights, the best
set of single units, principal components, and what the network answers unedited stand beside it (Sutter et al. 2025,
arXiv:2507.08802), and a subspace may work by writing onto units that never vary (Makelov et al. 2023,
arXiv:2311.17030): `illusion_of` tests that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.concepts.effect import basis_of
from vesalius.directions import Subspace
from vesalius.errors import InputError
from vesalius.inputs import Inputs
from vesalius.intervention import Positions
from vesalius.jobs import Sink, track
from vesalius.jobs.progress import shown
from vesalius.model import Model
from vesalius.patching.tail import Tail, in_batches
from vesalius.seeds import generator_for
from vesalius.site import Site
from vesalius.stats import Measurement, measure_share


@dataclass(frozen=True, eq=False)
class Counterfactuals:
    """Pairs of runs and what exchanging a variable should make of them.

    base, source: prompts or other inputs, example by example. expected: [example] token or class that the base run
    should answer with the source's value of the variable. groups: for what is independent; default each example.

    Raises InputError for unequal numbers of examples.
    """

    base: Inputs
    source: Inputs
    expected: Int[Tensor, " example"]

    def __post_init__(self) -> None:
        counts = (len(self.base), len(self.source), len(self.expected))
        if len(set(counts)) > 1 or not counts[0]:
            raise InputError(f"counterfactuals need as many bases, sources and answers; got {counts}")

    def __len__(self) -> int:
        return len(self.expected)


@dataclass(frozen=True, eq=False)
class Exchange:
    """Counterfactuals as they were recorded at a site: the base runs, and the values of base and source there.

    rows: [example] of each pair, its number among the base runs.
    """

    tail: Tail
    base: Float[Tensor, "example width"]
    source: Float[Tensor, "example width"]
    expected: Int[Tensor, " example"]
    rows: Int[Tensor, " example"]

    @classmethod
    def of(cls, model: Model, data: Counterfactuals, site: Site | str, positions: Positions = "last") -> Exchange:
        """Record both. positions: one of each prompt, of base and source alike."""
        tail, source = (Tail.of(model, inputs, site, positions) for inputs in (data.base, data.source))
        return cls(tail, tail.values, source.values, data.expected, torch.arange(len(data)))

    def subset(self, rows: Int[Tensor, " row"]) -> Exchange:
        """Some of the pairs, from the same recordings."""
        return Exchange(self.tail, self.base[rows], self.source[rows], self.expected[rows], self.rows[rows])

    def logits(self, basis: Float[Tensor, "rank width"], rows: Int[Tensor, " row"], grad: bool = False) -> Tensor:
        """With the source's coordinates in a basis of orthonormal rows."""
        base = self.base[rows]
        return self.tail.logits(base + (self.source[rows] - base) @ basis.T @ basis, self.rows[rows], grad=grad)

    def right(self, basis: Float[Tensor, "rank width"]) -> Float[Tensor, " example"]:
        """[example] 1 where the answer is the expected one."""
        found = torch.zeros(len(self.expected))
        for rows in in_batches(len(found), 512):
            with torch.no_grad():
                found[rows] = (self.logits(basis, rows).argmax(-1).cpu() == self.expected[rows]).float()
        return found


def iia(exchange: Exchange, part: Subspace) -> Measurement:
    """Interchange intervention accuracy: share of pairs whose answer is the expected one, with the exact interval."""
    return measure_share("interchange intervention accuracy", exchange.right(basis_of(part).to(exchange.source)))


def agreement(exchange: Exchange) -> Measurement:
    """Share of pairs that the unedited base run answers as expected: what an exchange of nothing scores."""
    none = torch.zeros(0, exchange.source.shape[1]).to(exchange.source)
    return measure_share("expected answers without an edit", exchange.right(none))


@dataclass(frozen=True)
class DasConfig:
    """How a rotation is trained. rank: dimensions of the subspace; boundless: how many is learned, not given."""

    rank: int = 1
    steps: int = 300
    batch_size: int = 64
    lr: float = 0.01
    seed: int = 0
    boundless: bool = False
    price: float = 0.02
    """What the share of all dimensions that a boundless search takes adds to the loss."""

    def __post_init__(self) -> None:
        if min(self.rank, self.steps, self.batch_size) < 1 or not self.lr > 0:
            raise InputError(f"rank, steps and batch_size are at least 1 and lr is positive; got {self}")


def train_das(
    exchange: Exchange, config: DasConfig | None = None, *, label: str = "", sink: Sink | None = None
) -> Subspace:
    """The subspace at the exchange's site that training finds.

    The rotation is orthogonal by construction, the Q of a free matrix's QR decomposition. Only the layers after the
    site run, from recorded values. Raises InputError for a rank that is not under the width.
    """
    chosen = config or DasConfig()
    width = exchange.source.shape[1]
    if chosen.rank >= width:
        raise InputError(
            f"a subspace of rank {chosen.rank} at {exchange.tail.site}, whose width is {width}, is all of it"
        )
    search = _Search(width, chosen)
    generator = generator_for("das batches", chosen.seed)
    optimiser = torch.optim.Adam(search.free, lr=chosen.lr)
    with shown(sink) as progress:
        for step in track(range(chosen.steps), "distributed alignment search", sink=progress):
            rows = torch.randint(len(exchange.expected), (chosen.batch_size,), generator=generator)
            optimiser.zero_grad()
            with torch.enable_grad():
                _loss(exchange, search, rows, step / chosen.steps).backward()
            optimiser.step()
    return Subspace(exchange.tail.site, search.basis().detach().float(), label or "das")


def _loss(exchange: Exchange, search: _Search, rows: Tensor, done: float) -> Tensor:
    base = exchange.base[rows]
    values = base + search.shift(exchange.source[rows] - base, done)
    logits = exchange.tail.logits(values, exchange.rows[rows], grad=True)
    wanted = exchange.expected[rows].to(logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), wanted) + search.cost()


class _Search:
    """A subspace of fixed rank; or, boundless, a rotation of all dimensions of which the first are exchanged, up to a
    boundary that is learned."""

    def __init__(self, width: int, config: DasConfig) -> None:
        columns = width if config.boundless else config.rank
        start = torch.randn(width, columns, generator=generator_for("das", config.seed))
        # A free matrix of orthonormal columns: then QR is well conditioned, and stays so for a while.
        self.matrix = torch.linalg.qr(start)[0].requires_grad_()
        self.boundary = torch.tensor(0.5, requires_grad=True) if config.boundless else None
        self.price = config.price
        self.free = [self.matrix, *([] if self.boundary is None else [self.boundary])]

    def basis(self) -> Float[Tensor, "rank width"]:
        """Orthonormal rows of the subspace."""
        whole: Tensor = torch.linalg.qr(self.matrix)[0].T
        if self.boundary is None:
            return whole
        return whole[: max(1, round(float(self.boundary.detach().clamp(0, 1)) * len(whole)))]

    def shift(self, apart: Float[Tensor, "row width"], done: float) -> Float[Tensor, "row width"]:
        """What is added to the base's values. apart: the source's less the base's; done: share of the training."""
        whole = torch.linalg.qr(self.matrix)[0].T.to(apart)
        if self.boundary is None:
            return apart @ whole.T @ whole
        # From a gentle slope to a step: an edge that is sharp at once has no gradient.
        slope = max(0.5, len(whole) / 8 * (1 - done))
        place = torch.arange(len(whole), device=apart.device) + 0.5
        mask = torch.sigmoid((self.boundary.to(apart) * len(whole) - place) / slope)
        return (apart @ whole.T * mask) @ whole

    def cost(self) -> Tensor | float:
        """What is added to the loss."""
        return 0.0 if self.boundary is None else self.price * self.boundary.abs()


# Baselines


def best_units(exchange: Exchange, rank: int, pairs: int = 512) -> Subspace:
    """The best set of single units, grown one by one on the first pairs: the localist baseline."""
    width = exchange.source.shape[1]
    few = exchange.subset(torch.arange(min(pairs, len(exchange.expected))))
    eye, chosen = torch.eye(width).to(exchange.source), list[int]()
    for _ in range(rank):
        others = [unit for unit in range(width) if unit not in chosen]
        scores = [float(few.right(eye[[*chosen, unit]]).mean()) for unit in others]
        chosen.append(others[int(torch.tensor(scores).argmax())])
    return Subspace(exchange.tail.site, eye[sorted(chosen)].cpu(), "best units")


def principal_components(exchange: Exchange, rank: int) -> Subspace:
    """The first principal components of base and source values."""
    values = torch.cat([exchange.base, exchange.source]).double()
    _, _, basis = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    return Subspace(exchange.tail.site, basis[:rank].float().cpu(), "principal components")


@dataclass(frozen=True)
class IllusionCheck:
    """Accuracy of exchanging a subspace, and its parts by unit: those that nothing reads (disconnected), those that do
    not vary (dormant), the others; and of exchanging the whole site. suspicious: it works, and the others alone do not.
    """

    whole_subspace: float
    disconnected: float
    dormant: float
    others: float
    whole_site: float
    unedited: float

    @property
    def suspicious(self) -> bool:
        """Whether more than half of what it gains over the unedited run is lost without dormant and disconnected
        units."""
        gain = self.whole_subspace - self.unedited
        return gain > 0.05 and self.others - self.unedited < gain / 2


def illusion_of(exchange: Exchange, part: Subspace, *, tolerance: float = 1e-3) -> IllusionCheck:
    """Exchange a subspace's parts: its projection onto units of each kind, as directions of their own.

    A unit is disconnected when no logit's gradient there is above `tolerance` of the largest unit's, dormant when its
    spread over base and source is not.
    """
    basis = basis_of(part).to(exchange.source)
    still, unread = dormant_units(exchange, tolerance), disconnected_units(exchange, tolerance)
    masks = {"disconnected": unread, "dormant": still & ~unread, "others": ~still & ~unread}
    scores = {name: float(exchange.right(_masked(basis, mask)).mean()) for name, mask in masks.items()}
    eye = torch.eye(basis.shape[1]).to(basis)
    return IllusionCheck(
        whole_subspace=float(exchange.right(basis).mean()),
        whole_site=float(exchange.right(eye).mean()),
        unedited=float(exchange.right(basis[:0]).mean()),
        **scores,
    )


def _masked(basis: Tensor, mask: Tensor) -> Tensor:
    """Orthonormal rows that span what a basis has in some units."""
    left = basis * mask.to(basis)
    _, sizes, rows = torch.linalg.svd(left, full_matrices=False)
    return rows[sizes > 1e-6]


def dormant_units(exchange: Exchange, tolerance: float) -> Tensor:
    """[width] whether a unit hardly varies over base and source runs."""
    spread = torch.cat([exchange.base, exchange.source]).std(0)
    return spread <= tolerance * spread.max()


def disconnected_units(exchange: Exchange, tolerance: float, examples: int = 64, draws: int = 8) -> Tensor:
    """[width] whether no logit changes with a unit, by gradients of random combinations of logits."""
    rows = torch.arange(min(examples, len(exchange.expected)))
    total, generator = torch.zeros(exchange.source.shape[1]).to(exchange.source), generator_for("illusion")
    # Between base and source, where the exchange goes; at rest a rectified unit may hide what it does.
    for weight in torch.linspace(0, 1, draws).tolist():
        start = exchange.base[rows] * (1 - weight) + exchange.source[rows] * weight
        values = start.detach().requires_grad_()
        with torch.enable_grad():
            logits = exchange.tail.logits(values, exchange.rows[rows], grad=True)
            mixed = logits * torch.randn(logits.shape, generator=generator).to(logits)
        total += torch.autograd.grad(mixed.sum(), values)[0].abs().mean(0)
    return total <= tolerance * total.max()


def baselines(exchange: Exchange, held_out: Exchange, rank: int) -> dict[str, Measurement]:
    """Accuracy on held-out pairs of the best units, of principal components, and of no edit at all."""
    return {
        "best units": iia(held_out, best_units(exchange, rank)),
        "principal components": iia(held_out, principal_components(exchange, rank)),
        "no edit": agreement(held_out),
    }
