"""Alignment search: what is planted is found, single units and random networks are not it, and illusions are seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tiny
import vesalius as vs
from vesalius.concepts import (
    Counterfactuals,
    DasConfig,
    Exchange,
    agreement,
    baselines,
    best_units,
    iia,
    illusion_of,
    principal_components,
    train_das,
)
from vesalius.errors import InputError
from vesalius.inputs import Raw
from vesalius.patching.tail import Tail


class Two(nn.Module):
    """Two bits, read off a rotated hidden layer: the answer is bit one plus twice bit two."""

    def __init__(self, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.rotation = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x @ self.rotation))
        a, b = (hidden @ self.rotation.T)[:, :2].T
        signs = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
        return 3 * torch.stack([torch.tanh(3 * a), torch.tanh(3 * b)], 1) @ signs.T


def bits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g)
    which = torch.randint(0, 2, (n, 2), generator=g)
    x[:, :2] = (2 * which - 1) * (0.5 + torch.rand(n, 2, generator=g))
    return x, which


def exchange_of(model: vs.Model, n: int, seed: int, site: str = "module:first|out") -> Exchange:
    (base, own), (source, other) = bits(n, seed), bits(n, seed + 1000)
    expected = other[:, 0] + 2 * own[:, 1]
    return Exchange.of(model, Counterfactuals(Raw(base), Raw(source), expected), site, None)


@pytest.fixture(scope="module")
def two() -> vs.Model:
    return vs.Model(Two().eval())


def test_the_planted_direction_is_found_and_single_units_are_not_it(two: vs.Model) -> None:
    train, test = exchange_of(two, 2000, 0), exchange_of(two, 1000, 7)
    found = train_das(train, DasConfig(rank=1, steps=150, lr=0.05), sink=vs.silent)
    planted = two.module.rotation[0]
    assert abs(float(found.basis[0] @ planted)) > 0.99
    score = iia(test, found)
    assert score.estimate >= 0.99 and score.low is not None and score.low > 0.98
    beside = baselines(train, test, 1)
    assert beside["best units"].estimate < 0.85 and beside["principal components"].estimate < 0.8
    assert beside["no edit"].estimate == pytest.approx(0.5, abs=0.08)
    assert agreement(test).estimate == beside["no edit"].estimate
    assert not illusion_of(test, found).suspicious
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(1))


def test_a_boundless_search_finds_how_many_dimensions_it_takes(two: vs.Model) -> None:
    train, test = exchange_of(two, 2000, 0), exchange_of(two, 1000, 7)
    config = DasConfig(boundless=True, steps=400, lr=0.03, price=1.0)
    found = train_das(train, config, sink=vs.silent)
    assert iia(test, found).estimate > 0.95 and len(found.basis) <= 3


def test_exact_count_has_the_exact_interval(two: vs.Model) -> None:
    test = exchange_of(two, 1000, 7)
    whole = vs.Subspace("module:first|out", two.module.rotation[:1])
    score = iia(test, whole)
    assert score.estimate == 1.0 and score.low == pytest.approx(0.9963, abs=1e-4) and score.high == 1.0


class Illusion(nn.Module):
    """x -> (x, 0, x) -> 2 h2 + h3, the example of Makelov et al. (2023, section 3): unit 1 is read by nothing, unit 2
    never varies. The answer is whether the output is above .65."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x * torch.tensor([1.0, 0.0, 1.0], dtype=x.dtype))
        out = h @ torch.tensor([0.0, 2.0, 1.0], dtype=x.dtype)
        return torch.stack([torch.zeros_like(out) + 0.65, out], 1)


def test_the_published_illusion_is_seen_and_the_true_unit_is_not_accused() -> None:
    model = vs.Model(Illusion().eval())
    x, source = torch.full((4, 1), 0.3, dtype=torch.float64), torch.full((4, 1), 1.0, dtype=torch.float64)
    tail = Tail.of(model, Raw(x), "module:hidden|out", None)
    other = Tail.of(model, Raw(source), "module:hidden|out", None)
    directions = {"illusion": [1.0, 1.0, 0.0], "e1": [1.0, 0, 0], "e2": [0, 1.0, 0], "e3": [0, 0, 1.0]}
    patched = {}
    for name, vector in directions.items():
        unit = torch.tensor(vector, dtype=torch.float64)
        unit = unit / unit.norm()
        moved = tail.values + ((other.values - tail.values) @ unit)[:, None] * unit
        patched[name] = float(tail.logits(moved)[0, 1])
    wanted = {"illusion": 1.0, "e1": 0.3, "e2": 0.3, "e3": 1.0}
    assert patched == pytest.approx(wanted, abs=1e-9)
    low, high = (Raw(torch.linspace(*ends, 8, dtype=torch.float64)[:, None]) for ends in ((0.1, 0.5), (0.9, 1.3)))
    data = Counterfactuals(low, high, torch.ones(8).long())
    exchange = Exchange.of(model, data, "module:hidden|out", None)
    check = {name: illusion_of(exchange, vs.Subspace("module:hidden|out", torch.tensor([vector])))
             for name, vector in directions.items()}  # fmt: skip
    assert check["illusion"].whole_subspace == 1.0 and check["illusion"].suspicious
    assert check["illusion"].disconnected == check["illusion"].dormant == check["illusion"].others == 0.0
    assert check["e3"].whole_subspace == check["e3"].others == 1.0 and not check["e3"].suspicious
    assert check["e1"].whole_subspace == 0.0 and check["e3"].whole_site == 1.0


def test_the_tail_of_a_transformer_is_what_plain_runs_give() -> None:
    model = tiny.model("llama")
    g = torch.Generator().manual_seed(0)
    base, source = (torch.randint(2, tiny.VOCAB, (12, 6), generator=g) for _ in range(2))
    data = Counterfactuals(vs.Tokens(base), vs.Tokens(source), torch.randint(0, tiny.VOCAB, (12,), generator=g))
    exchange = Exchange.of(model, data, "layers.1.resid_post")
    part = vs.Subspace("layers.1.resid_post", torch.randn(3, 48, generator=g))
    run = model.run(vs.Tokens(source), "layers.1.resid_post").activations
    plain = model.run(vs.Tokens(base), interventions=[vs.Patch(part, source=run, positions="last")]).logits[:, -1]
    assert torch.allclose(exchange.logits(part.basis, torch.arange(12)), plain.detach(), atol=1e-4)
    found = train_das(exchange, DasConfig(rank=4, steps=60, lr=0.05, batch_size=12), sink=vs.silent)
    assert iia(exchange, found).estimate >= iia(exchange, principal_components(exchange, 4)).estimate
    assert len(best_units(exchange.subset(torch.arange(4)), 1).basis) == 1


def test_what_cannot_be_searched_is_refused(two: vs.Model) -> None:
    with pytest.raises(InputError, match="is all of"):
        train_das(exchange_of(two, 8, 0), DasConfig(rank=8), sink=vs.silent)
    with pytest.raises(InputError, match="as many bases"):
        Counterfactuals(Raw(torch.zeros(3, 8)), Raw(torch.zeros(2, 8)), torch.zeros(3).long())
    with pytest.raises(InputError, match="at least 1"):
        DasConfig(steps=0)


def equality(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four objects [example, 4 * 4]; whether the first two, and the last two, are equal [example, 2]."""
    equal = torch.rand(n, 2, generator=generator) < 0.5
    x = torch.rand(n, 4, 4, generator=generator) * 2 - 1
    x[:, 1] = torch.where(equal[:, :1], x[:, 0], x[:, 1])
    x[:, 3] = torch.where(equal[:, 1:], x[:, 2], x[:, 3])
    return x.flatten(1), equal


def perceptron(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 2))


def equality_network(seed: int = 0, steps: int = 8000) -> nn.Sequential:
    """Hidden size 16, three layers: whether both pairs are equal, or both are not."""
    net, g = perceptron(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
    for _ in range(steps):
        x, equal = equality(512, g)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), (equal[:, 0] == equal[:, 1]).long()).backward()
        optimiser.step()
        schedule.step()
    return net.eval()


@pytest.mark.slow
def test_hierarchical_equality_is_aligned_and_a_random_network_is_not() -> None:
    """Geiger et al. 2023, section 4: 1.00 at the first layer with 8 dimensions; the best units far less."""
    g = torch.Generator().manual_seed(1)
    net = equality_network()
    x, equal = equality(5000, g)
    assert ((net(x).argmax(1) == 1) == (equal[:, 0] == equal[:, 1])).float().mean() > 0.999

    def data(model: vs.Model, n: int) -> Exchange:
        (base, own), (source, other) = equality(n, g), equality(n, g)
        return Exchange.of(model, Counterfactuals(Raw(base), Raw(source), (other[:, 0] == own[:, 1]).long()),
                           "module:1|out", None)  # fmt: skip

    scores = {}
    for name, module in (("trained", net), ("random", perceptron(5).eval())):
        model = vs.Model(module)
        train, test = data(model, 16_000), data(model, 1000)
        config = DasConfig(rank=8, steps=800, batch_size=256, lr=0.01)
        found = train_das(train, config, sink=vs.silent)
        scores[name] = iia(test, found).estimate
        if name == "trained":
            beside = baselines(train, test, 8)
            assert not illusion_of(test, found).suspicious
    assert scores["trained"] >= 0.99
    assert beside["best units"].estimate < 0.85 and scores["random"] < 0.65
