"""Dictionaries that normalise each row: what that makes them blind to, and that it is undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vesalius as vs
from format_files import D, M, normal, rows
from vesalius.dictionaries import Dictionary, load, save
from vesalius.errors import InputError, UnknownNameError

A = vs.Site.parse("layers.3.resid_post")
NORMS = ["layer_norm", "constant_norm"]


def made(row_norm: str, **changes: Any) -> Dictionary:
    fields: dict[str, Any] = {
        "in_sites": (A,), "out_sites": (A,), "encoders": (normal(D, M, seed=1),), "decoders": (normal(M, D, seed=2),),
        "b_enc": normal(M, seed=3), "b_dec": (normal(D, seed=4),), "row_norm": row_norm,
    }  # fmt: skip
    return Dictionary("relu", **{**fields, **changes})


@pytest.mark.parametrize("row_norm", NORMS)
def test_latents_do_not_see_the_size_of_a_row_and_its_reconstruction_has_it(row_norm: str) -> None:
    dictionary, x = made(row_norm), rows()
    # What is added to the standard deviation against division by zero makes the difference that is left.
    torch.testing.assert_close(dictionary.encode(x * 50), dictionary.encode(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(dictionary.reconstruct(x * 50), dictionary.reconstruct(x) * 50, atol=1e-2, rtol=1e-3)
    plain = made("none")
    assert float((plain.encode(x * 50) - plain.encode(x)).abs().max()) > 1  # others do see it


def test_layer_norm_does_not_see_the_mean_of_a_row() -> None:
    x = rows()
    dictionary = made("layer_norm")
    torch.testing.assert_close(dictionary.encode(x + 7), dictionary.encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dictionary.reconstruct(x + 7), dictionary.reconstruct(x) + 7, atol=1e-4, rtol=1e-4)
    other = made("constant_norm")
    assert float((other.encode(x + 7) - other.encode(x)).abs().max()) > 0.1


@pytest.mark.parametrize("row_norm", NORMS)
def test_decoding_needs_the_rows(row_norm: str) -> None:
    dictionary, x = made(row_norm), rows().reshape(4, 10, D)
    latents = dictionary.encode(x)
    torch.testing.assert_close(dictionary.decode(latents, of=x), dictionary.reconstruct(x))
    torch.testing.assert_close(dictionary.decode_sparse(*dictionary.encode_sparse(x), of=x), dictionary.reconstruct(x))
    assert not dictionary.decodes_alone
    with pytest.raises(InputError, match=r"decode\(latents, of=activations\), or reconstruct"):
        dictionary.decode(latents)
    with pytest.raises(InputError, match=r"rows \(4, 10\) and the activations they are of \(40,\)"):
        dictionary.decode(latents, of=rows())


@pytest.mark.parametrize("row_norm", NORMS)
def test_a_latent_is_written_in_units_of_its_row(row_norm: str) -> None:
    dictionary, x = made(row_norm), rows().reshape(4, 10, D)
    latents = dictionary.encode(x)
    changed = latents.clone()
    changed[..., 5] += 2.0
    latent = dictionary.latent(5)
    moved = latent.written({latent.site: x}, changed[..., 5])[latent.site]
    # The rest of the row, the error of the reconstruction, stays.
    expected = x + dictionary.decode(changed, of=x) - dictionary.decode(latents, of=x)
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row_norm", NORMS)
def test_scales_fold_and_files_keep_it(tmp_path: Path, row_norm: str) -> None:
    dictionary, x = made(row_norm, in_scale=(2.0,), out_scale=(2.0,)), rows()
    torch.testing.assert_close(dictionary.folded().reconstruct(x), dictionary.reconstruct(x), atol=1e-5, rtol=1e-5)
    again = load(save(dictionary, tmp_path))
    assert again.row_norm == row_norm
    assert again.content_hash == dictionary.content_hash != made("none", in_scale=(2.0,), out_scale=(2.0,)).content_hash
    torch.testing.assert_close(again.reconstruct(x), dictionary.reconstruct(x))


def test_rows_without_any_size_are_reconstructed_as_numbers() -> None:
    for row_norm in NORMS:
        assert bool(torch.isfinite(made(row_norm).reconstruct(torch.zeros(2, D))).all())


def test_what_cannot_be_normalised_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="known: centred, constant_norm, layer_norm, none"):
        made("batch_norm")
    with pytest.raises(InputError, match="rows are normalised only by dictionaries that reconstruct what they read"):
        made("layer_norm", out_sites=(vs.Site("mlp_out", layer=3),))
