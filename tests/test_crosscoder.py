"""Crosscoders tell shared features from exclusive ones, and latent scaling tells exclusive ones from artefacts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vesalius.data import TensorSource
from vesalius.dictionaries import Dictionary, TrainConfig, latent_scaling, relative_norms, train
from vesalius.errors import InputError
from vesalius.site import Site

D, SHARED, ONLY = 32, 12, 6
A, B = Site.parse("base/layers.3.resid_post"), Site.parse("chat/layers.3.resid_post")
KIND_OF = ["shared"] * SHARED + ["a"] * ONLY + ["b"] * ONLY
EXPECTED = {"shared": 0.5, "a": 0.0, "b": 1.0}


def unit_rows(n: int, seed: int) -> Tensor:
    rows = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def planted(n: int = 20_000, scale_b: float = 5.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations of two models of different scale, and what each feature writes in them."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(n, len(KIND_OF), generator=generator) < 0.08
    f = on * (0.5 + torch.rand(n, len(KIND_OF), generator=generator))
    in_a = unit_rows(len(KIND_OF), 1) * torch.tensor([[float(kind != "b")] for kind in KIND_OF])
    in_b = unit_rows(len(KIND_OF), 2) * torch.tensor([[float(kind != "a")] for kind in KIND_OF])
    return f @ in_a, scale_b * f @ in_b, in_a, scale_b * in_b


def matched(crosscoder: Dictionary, in_a: Tensor, in_b: Tensor) -> tuple[list[int], Tensor]:
    """For each feature the latent whose decoder is most like it over both sites, and that cosine."""
    scales = crosscoder.metadata["trained_with"]["out_scale"]
    rows = torch.cat([part * scale for part, scale in zip(folded_out(crosscoder), scales, strict=True)], 1)
    truth = torch.cat([in_a * scales[0], in_b * scales[1]], 1)
    cosines = torch.nn.functional.normalize(truth, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
    return cosines.argmax(1).tolist(), cosines.max(1).values


def folded_out(crosscoder: Dictionary) -> list[Tensor]:
    return [d / scale for d, scale in zip(crosscoder.decoders, crosscoder.out_scale, strict=True)]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "batchtopk", "k": 2},
        pytest.param({"kind": "relu", "sparsity": 0.3, "dead": "none"}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: str(fields["kind"]),
)
def test_relative_norms_of_planted_features(fields: dict[str, Any]) -> None:
    a, b, in_a, in_b = planted()
    config = TrainConfig(n_latents=40, batch_size=256, steps=800, lr=3e-3, coder="crosscoder", **fields)
    crosscoder = train(TensorSource(a, b, sites=[A, B]), config)
    assert isinstance(crosscoder, Dictionary)
    best, cosines = matched(crosscoder, in_a, in_b)
    assert float(cosines.mean()) > 0.95
    for dictionary in (crosscoder, crosscoder.folded()):
        norms = relative_norms(dictionary)[best]
        for latent, kind in zip(norms.tolist(), KIND_OF, strict=True):
            assert latent == pytest.approx(EXPECTED[kind], abs=0.05)


def by_hand() -> tuple[Dictionary, Tensor, Tensor]:
    """Four features along axes. 0 is shared; 1 is in B only; 2 is shared, but its A side was shrunk to zero; 3 is
    shared, but two latents (3 and 4) took one side each.
    """
    n = 4000
    f = (torch.rand(n, 4, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    in_a = torch.eye(4) * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    zero = torch.zeros(4)
    a_rows = torch.stack([in_a[0], zero, zero, zero, in_a[3]])
    b_rows = torch.stack([*torch.eye(4), zero])
    encoder_b = torch.cat([torch.eye(4), torch.eye(4)[:, 3:]], 1)
    dictionary = Dictionary(
        "relu", (A, B), (A, B), (torch.zeros(4, 5), encoder_b), (a_rows, b_rows), torch.zeros(5), (zero, zero)
    )
    return dictionary, f @ in_a, f


def test_latent_scaling_tells_exclusive_latents_from_artefacts() -> None:
    dictionary, a, b = by_hand()
    assert relative_norms(dictionary).tolist() == [0.5, 1.0, 1.0, 1.0, 0.0]
    found = latent_scaling(dictionary, TensorSource(a, b, sites=[A, B]))
    assert found.latents.tolist() == [1, 2, 3, 4]
    assert found.error.tolist() == pytest.approx([0.0, 1.0, 0.0, 0.0], abs=0.02)
    assert found.reconstruction.tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=0.02)
    assert found.exclusive.tolist() == [True, False, False, False]
    assert latent_scaling(dictionary, TensorSource(a, b, sites=[A, B]), [0]).exclusive.tolist() == [False]


def test_scaling_is_the_same_with_and_without_scales_in_the_weights() -> None:
    dictionary, a, b = by_hand()
    scaled = Dictionary(
        "relu", (A, B), (A, B), dictionary.encoders, dictionary.decoders, dictionary.b_enc, dictionary.b_dec,
        in_scale=(2.0, 0.5), out_scale=(2.0, 0.5),
    )  # fmt: skip
    source = TensorSource(a / 2, b * 2, sites=[A, B])
    one, other = latent_scaling(dictionary, TensorSource(a, b, sites=[A, B])), latent_scaling(scaled, source)
    torch.testing.assert_close(one.error, other.error)
    torch.testing.assert_close(one.reconstruction, other.reconstruction)


def test_sides_that_are_not_clear_are_refused() -> None:
    dictionary, a, b = by_hand()
    with pytest.raises(InputError, match=r"base/layers\.9\.z is none of the sites"):
        relative_norms(dictionary, a=["base/layers.9.z"], b=[B])
    single = Dictionary("relu", (A,), (A,), (torch.eye(4),), (torch.eye(4),), torch.zeros(4), (torch.zeros(4),))
    with pytest.raises(InputError, match="which sites are compared"):
        relative_norms(single)
    with pytest.raises(InputError, match="needs sides of equal widths"):
        latent_scaling(
            Dictionary(
                "relu", (A,), (A, B), (torch.eye(4),), (torch.eye(4), torch.eye(4)[:, :3]), torch.zeros(4),
                (torch.zeros(4), torch.zeros(3)),
            ),
            TensorSource(a, b[:, :3], sites=[A, B]),
        )  # fmt: skip
    assert relative_norms(dictionary, a=[B], b=[A]).tolist() == [0.5, 0.0, 0.0, 0.0, 1.0]
