"""An untrained dictionary is like the trained one in everything but what training gives."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import vesalius as vs
from vesalius.dictionaries import Dictionary, untrained
from vesalius.errors import InputError

SITE = vs.Site.parse("layers.0.resid_post")
WIDTH, LATENTS = 16, 40


def made(activation: str, **options: Any) -> Dictionary:
    draw = torch.manual_seed(3)
    decoder = torch.randn(LATENTS, WIDTH, generator=draw)
    extras = {
        "jumprelu": {"threshold": torch.rand(LATENTS, generator=draw)},
        "batchtopk": {"threshold": torch.tensor(0.7)},
        "gated": {name: torch.randn(LATENTS, generator=draw) / 4 for name in ("r_mag", "b_mag")},
    }
    return Dictionary(
        activation=activation,
        in_sites=(SITE,),
        out_sites=(SITE,),
        encoders=(decoder.T + 0.1,),
        decoders=(decoder,),
        b_enc=torch.randn(LATENTS, generator=draw) - 4,
        b_dec=(torch.randn(WIDTH, generator=draw),),
        extras=extras.get(activation, {}),
        k=5 if activation == "topk" else None,
        **options,
    )


@pytest.mark.parametrize("activation", sorted(vs.dictionaries.ACTIVATIONS))
@pytest.mark.parametrize("subtracted", [False, True])
def test_norms_and_densities_are_kept_and_directions_are_not(activation: str, subtracted: bool) -> None:
    trained, rows = made(activation, apply_b_dec_to_input=subtracted), torch.randn(500, WIDTH) + 0.5
    twin = untrained(trained, rows, seed=1)
    for ours, theirs, dim in ((twin.W_enc, trained.W_enc, 0), (twin.W_dec, trained.W_dec, 1)):
        assert torch.allclose(ours.norm(dim=dim), theirs.norm(dim=dim), rtol=1e-5)
        assert float(torch.cosine_similarity(ours, theirs, dim=dim).abs().mean()) < 0.4
    assert float(torch.cosine_similarity(twin.W_enc.T, twin.W_dec, dim=1).min()) > 0.999  # tied, as training begins
    density = [(one.encode(rows) != 0).double().mean(0) for one in (trained, twin)]
    if activation == "topk":
        assert density[0].sum() == pytest.approx(float(density[1].sum()), rel=0.1)
    elif activation == "gated":  # its values are cut at 0 a second time
        assert bool((density[1] >= density[0] - 1e-9).all())
    else:
        assert torch.allclose(density[0], density[1], atol=1.5 / 500)
    assert untrained(trained, rows, seed=1).content_hash == twin.content_hash
    assert untrained(trained, rows, seed=2).content_hash != twin.content_hash


def test_a_transcoder_has_both_sides_drawn_and_no_skip() -> None:
    other = vs.Site.parse("layers.0.mlp_out")
    skipping = replace(made("topk"), out_sites=(other,), skip=torch.eye(WIDTH))
    twin = untrained(skipping, torch.randn(50, WIDTH))
    assert twin.skip is None
    assert float(torch.cosine_similarity(twin.W_enc.T, twin.W_dec, dim=1).abs().mean()) < 0.4


def test_many_latents_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, rows = made("jumprelu"), torch.randn(200, WIDTH)
    whole = untrained(trained, rows)
    monkeypatch.setattr(sys.modules[untrained.__module__], "TOGETHER", 7)
    assert torch.allclose(untrained(trained, rows).b_enc, whole.b_enc, atol=1e-5)


def test_no_rows_are_refused() -> None:
    with pytest.raises(InputError, match="no rows"):
        untrained(made("relu"), torch.zeros(0, WIDTH))
