"""What was planted is found: dictionaries of known features, linear maps, nested prefixes; errors in closed form."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vesalius.data import TensorSource
from vesalius.dictionaries import Dictionary, TrainConfig, train
from vesalius.dictionaries.training.fitter import make_fitter
from vesalius.dictionaries.training.layout import layout_of
from vesalius.dictionaries.training.microbatch import StepTotals
from vesalius.dictionaries.training.run import Processes
from vesalius.errors import InputError
from vesalius.jobs import silent
from vesalius.jobs.workers import Workers
from vesalius.toys import recovered, sparse_rows, unit_rows

D, FEATURES, LATENTS = 64, 128, 160


PLANTED = sparse_rows(40_000, D, FEATURES, active=3, seed=1)
TRUTH, X = PLANTED.features, PLANTED.x


def strengths(n: int, features: int, active: float, seed: int) -> Tensor:
    """[n, features]: each on with equal chance, independently, with a strength between .5 and 1.5."""
    return sparse_rows(n, features=torch.eye(features), active=active, seed=seed).strengths


def cosines(rows: Tensor) -> Tensor:
    """[feature, latent]"""
    return TRUTH @ torch.nn.functional.normalize(rows, dim=1).T


def trained(**fields: Any) -> Dictionary:
    base: dict[str, Any] = {
        "n_latents": LATENTS, "batch_size": 512, "steps": 700, "lr": 3e-3, "dead_after": 20_000, "bandwidth": 1.0,
    }  # fmt: skip
    found = train(X, TrainConfig(**{**base, **fields}))
    assert isinstance(found, Dictionary)
    return found


def test_random_dictionaries_have_a_mean_best_cosine_far_from_zero() -> None:
    assert float(cosines(unit_rows(FEATURES, D, seed=7)).max(1).values.mean()) == pytest.approx(0.317, abs=0.02)


def test_a_dictionary_of_planted_features_is_found() -> None:
    found = trained(k=4).W_dec
    assert float(cosines(found).max(1).values.mean()) > 0.99
    # One latent each: the best assignment, not the best latent, which several features could share.
    assert float(recovered(found, TRUTH).mean()) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "batchtopk", "k": 3},
        {"kind": "matryoshka", "k": 3, "groups": (64, LATENTS)},
        {"kind": "relu", "sparsity": 1.0},
        {"kind": "gated", "sparsity": 4.0},
        {"kind": "jumprelu", "sparsity": 2.0},
        {"kind": "jumprelu", "sparsity": 1.0, "penalty": "tanh"},
        {"kind": "topk", "k": 4, "precision": "bf16-screen"},
        {"kind": "topk", "k": 4, "precision": "bf16"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_kind_finds_it(fields: dict[str, Any]) -> None:
    assert float(recovered(trained(**fields).W_dec, TRUTH).mean()) > 0.95


def test_one_to_one_is_stricter_than_the_best_latent_and_is_scipys_assignment() -> None:
    directions = unit_rows(LATENTS, D, seed=7)
    all_cosines = cosines(directions)
    features, latents = linear_sum_assignment(-all_cosines.numpy())
    np.testing.assert_allclose(recovered(directions, TRUTH).numpy(), all_cosines.numpy()[features, latents], rtol=1e-5)
    assert float(recovered(directions, TRUTH).mean()) < float(all_cosines.max(1).values.mean())
    torch.testing.assert_close(recovered(5 * TRUTH.flip(0), TRUTH), torch.ones(FEATURES))
    with pytest.raises(InputError, match="128 features cannot be matched one to one to 100"):
        recovered(TRUTH[:100], TRUTH)


@pytest.mark.slow
def test_a_transcoder_of_a_sparse_relu_mlp_finds_its_neurons() -> None:
    """Hand-made: every neuron reads one feature and fires where that is there, which is rarely."""
    rows = sparse_rows(20_000, 32, 24, active=2, seed=3)
    reads = torch.linalg.pinv(rows.features).T  # what is along a feature, and nothing of the others
    writes = unit_rows(24, 32, seed=4)
    hidden = torch.relu(rows.x @ reads.T - 0.2)
    config = TrainConfig(kind="batchtopk", n_latents=48, k=3, batch_size=256, steps=900, lr=3e-3, dead_after=20_000)
    found = train((rows.x, hidden @ writes), config, sink=silent)
    assert isinstance(found, Dictionary) and found.history is not None
    assert float(recovered(found.W_dec, writes).mean()) > 0.95
    assert found.history["fvu"][-20:].mean() < 0.02
    rows_of = torch.nn.functional.normalize(found.W_dec, dim=1)
    active = found.encode(rows.x)[:, (writes @ rows_of.T).argmax(1)]
    assert np.mean([np.corrcoef(active[:, j], hidden[:, j])[0, 1] for j in range(24)]) > 0.95


@pytest.mark.slow
def test_a_transcoder_finds_features_and_the_map_between_them() -> None:
    """Features are read along one set of directions and written along another, of another width."""
    reads, writes = unit_rows(24, 32, seed=3), unit_rows(24, 20, seed=4)
    f = strengths(20_000, 24, active=2, seed=5)
    config = TrainConfig(kind="batchtopk", n_latents=32, k=2, batch_size=256, steps=700, lr=3e-3, dead_after=20_000)
    found = train((f @ reads, f @ writes), config)
    assert isinstance(found, Dictionary)
    rows = torch.nn.functional.normalize(found.W_dec, dim=1)
    assert float((writes @ rows.T).max(1).values.mean()) > 0.95
    active = found.encode(f @ reads)[:, (writes @ rows.T).argmax(1)]
    assert np.mean([np.corrcoef(active[:, j], f[:, j])[0, 1] for j in range(24)]) > 0.95
    assert found.history is not None
    assert found.history["fvu"][-20:].mean() < 0.05


@pytest.mark.slow
def test_a_skip_takes_a_linear_map_and_latents_the_rest() -> None:
    x = torch.randn(8000, 16, generator=torch.Generator().manual_seed(0))
    through = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    fields: dict[str, Any] = {"n_latents": 32, "k": 2, "batch_size": 512, "steps": 400, "lr": 1e-2}
    linear = train((x, x @ through), TrainConfig(skip=True, **fields))
    assert isinstance(linear, Dictionary)
    assert linear.skip is not None
    assert linear.history is not None
    assert linear.history["fvu"][-1] < 1e-3
    assert unexplained(x @ through, x @ linear.skip) < 0.1
    without = train((x, x @ through), TrainConfig(**fields))
    assert isinstance(without, Dictionary)
    assert without.history is not None
    assert without.history["fvu"][-1] > 0.2


@pytest.mark.slow
def test_a_cross_layer_transcoder_puts_a_feature_where_it_is_read() -> None:
    """Layer 0 reads features 0-11, layer 1 features 12-23; features 0-5 are written at layer 1 only."""
    f = strengths(20_000, 24, active=2, seed=5)
    reads = unit_rows(24, 32, seed=3)
    first, second = unit_rows(24, 20, seed=4), unit_rows(24, 20, seed=6)
    x0, x1 = f[:, :12] @ reads[:12], f[:, 12:] @ reads[12:]
    y0, y1 = f[:, 6:12] @ first[6:12], f @ second
    config = TrainConfig(n_latents=16, k=2, batch_size=512, steps=700, lr=3e-3, coder="cross_layer", dead_after=20_000)
    found = train((x0, x1, y0, y1), config)
    history = found.history  # type: ignore[attr-defined]
    assert history["fvu"][-20:].mean() < 0.1
    latents = found.encode((x0, x1))
    noise = 1e-6 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))  # some are constant
    best = np.corrcoef((latents + noise).T, f.T)[:32, 32:].argmax(0)
    assert (best[:12] < 16).all()
    assert (best[12:] >= 16).all()
    late = torch.stack([found.written(int(j), found.out_sites[0]) for j in best[:6]]).norm(dim=1)
    early = torch.stack([found.written(int(j), found.out_sites[1]) for j in best[:6]]).norm(dim=1)
    assert float(late.max()) < 0.1 * float(early.min())


@pytest.mark.slow
def test_prefixes_of_a_matryoshka_reconstruct_on_their_own() -> None:
    """Common features come first: a prefix explains more than as many latents of a dictionary without prefixes."""
    rates = torch.cat([torch.full((16,), 0.15), torch.full((112,), 0.01)])
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(30_000, FEATURES, generator=generator) < rates
    x = (on * (0.5 + torch.rand(on.shape, generator=generator))) @ TRUTH
    fields: dict[str, Any] = {
        "n_latents": LATENTS, "k": 4, "batch_size": 256, "steps": 500, "lr": 3e-3, "dead_after": 20_000,
    }  # fmt: skip
    nested = train(x, TrainConfig(kind="matryoshka", groups=(16, 64, LATENTS), **fields))
    plain = train(x, TrainConfig(kind="batchtopk", **fields))
    assert isinstance(nested, Dictionary)
    assert isinstance(plain, Dictionary)
    assert nested.groups == (16, 64, LATENTS)
    errors = [unexplained(x, reconstructed_from_first(nested, x, size)) for size in nested.groups]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2
    assert errors[0] < 0.6 < unexplained(x, reconstructed_from_first(plain, x, 16))


@pytest.mark.slow
@pytest.mark.parametrize("hierarchical", [False, True])
def test_a_child_feature_absorbs_its_parent(hierarchical: bool) -> None:
    """Chanin et al. 2024: where one feature implies another, the L1 penalty makes the parent's latent fall silent."""
    axes = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))[0][:4]
    on = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.25, 0.2, 0.2, 0.2])
    if hierarchical:
        on[:, 1] &= on[:, 0]
    x = on.float() @ axes
    config = TrainConfig(kind="relu", n_latents=4, k=1, batch_size=512, steps=700, lr=3e-3, sparsity=1.0, dead="none")
    found = train(x, config)
    assert isinstance(found, Dictionary)
    decoder = torch.nn.functional.normalize(found.W_dec, dim=1) @ axes.T
    parent, child, *others = decoder.argmax(0).tolist()
    child = int(decoder[:, 1].argmax())
    expected = torch.eye(4)
    if hierarchical:
        parent = int((decoder[:, 0] - decoder[:, 1]).argmax())
        expected[1, 0] = expected[1, 1] = 0.5**0.5
    torch.testing.assert_close(decoder[[parent, child, *others]], expected, atol=0.05, rtol=0.0)
    fires = (found.encode(x)[:, parent] > 0.05).float()
    assert float(fires[on[:, 0] & ~on[:, 1]].mean()) > 0.99
    together = float(fires[on[:, 0] & on[:, 1]].mean())
    assert together < 0.01 if hierarchical else together > 0.99
    reads_child = float(found.W_enc[:, parent] @ axes[1])
    assert reads_child < -0.3 if hierarchical else abs(reads_child) < 0.1


def reconstructed_from_first(dictionary: Dictionary, x: Tensor, size: int) -> Tensor:
    latents = dictionary.encode(x)
    latents[:, size:] = 0
    reconstruction = dictionary.decode(latents)
    assert isinstance(reconstruction, Tensor)
    return reconstruction


def unexplained(x: Tensor, reconstruction: Tensor) -> float:
    return float((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum())


# The error that training reports


def totals_of(x: Tensor, reconstruction: Tensor) -> StepTotals:
    n, x, reconstruction = torch.tensor(float(len(x)), dtype=torch.float64), x.double(), reconstruction.double()
    squared = (x - reconstruction).square().sum()
    return StepTotals(n, squared, squared, x.sum(0), x.square().sum(), [torch.zeros(1)])


def test_the_unexplained_variance_is_as_worked_by_hand() -> None:
    x, reconstruction = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert 1 - totals_of(x, reconstruction).fvu == pytest.approx(0.8, abs=1e-9)
    assert totals_of(x, x.mean(0).expand_as(x)).fvu == pytest.approx(1.0, abs=1e-9)
    assert totals_of(10 * x, 10 * reconstruction).fvu == pytest.approx(totals_of(x, reconstruction).fvu, abs=1e-9)
    halves = [totals_of(x[:1], reconstruction[:1]), totals_of(x[1:], reconstruction[1:])]
    assert StepTotals.added(halves).fvu == pytest.approx(0.2, abs=1e-9)
    assert totals_of(torch.ones(2, 2), torch.ones(2, 2)).fvu == 0.0


def test_the_reported_error_is_that_of_the_rows() -> None:
    x = X[:600]
    config = TrainConfig(n_latents=LATENTS, k=4, batch_size=600, dead="none")
    source = TensorSource(x)
    with Workers(1) as workers:
        fitter = make_fitter(source, config, layout_of(source, config), workers, Processes(), torch.device("cpu"))
        values = {name: value.clone() for name, value in fitter.parameters.values.items()}
        (batch,) = next(islice(source.batches(600, seed=0), 1))
        fitter.step([batch])
    y = batch * fitter.run.out_scale[0]
    pre = (y - values["b_dec"]) @ values["0.W_enc"].T
    latents = torch.zeros_like(pre).scatter(1, pre.topk(4, 1).indices, pre.topk(4, 1).values.relu())
    reconstruction = latents @ values["0.W_dec"] + values["b_dec"]
    assert fitter.history[0][1] == pytest.approx(unexplained(y, reconstruction), rel=1e-4)
