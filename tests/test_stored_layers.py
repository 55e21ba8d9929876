"""Cross-layer transcoders on disk: the same function as in memory, and nothing is read that is not needed."""

from __future__ import annotations

import json
import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import format_files as files
import vesalius as vs
from format_files import LAYERS, D, M, normal, rows
from vesalius.dictionaries import Coder, CrossLayerTranscoder, Dictionary, StoredLayer, load
from vesalius.errors import FileFormatError, InputError
from vesalius.parts import Part


def opened(folder: Path, style: str = "circuit_tracer") -> CrossLayerTranscoder:
    coder = load(files.cross_layer(folder, style).path)
    assert isinstance(coder, CrossLayerTranscoder)
    return coder


def in_memory(coder: CrossLayerTranscoder) -> CrossLayerTranscoder:
    return replace(coder, layers=tuple(layer.whole() for layer in coder.layers if isinstance(layer, StoredLayer)))


def inputs() -> list[Tensor]:
    return list(rows(LAYERS * D).chunk(LAYERS, dim=1))


@pytest.mark.parametrize("style", ["circuit_tracer", "gemma_scope_2"])
def test_on_disk_is_the_same_as_in_memory(tmp_path: Path, style: str) -> None:
    disk, memory = opened(tmp_path, style), None
    memory = in_memory(disk)
    x = inputs()
    latents = memory.encode(x)
    torch.testing.assert_close(disk.encode(x), latents)
    wanted = [2, M + 7, 3 * M - 1, 5]
    torch.testing.assert_close(disk.encode(x, latents=wanted), latents[:, wanted])
    for one, other in zip(disk.encode_sparse(x), memory.encode_sparse(x), strict=True):
        torch.testing.assert_close(one, other)
    for pairs in (
        zip(disk.decode(latents), memory.decode(latents), strict=True),
        zip(disk.decode_sparse(*disk.encode_sparse(x)), memory.decode_sparse(*memory.encode_sparse(x)), strict=True),
        zip(disk.reconstruct(x), memory.reconstruct(x), strict=True),
        zip(disk.decode(latents * 0), memory.decode(latents * 0), strict=True),
    ):
        for one, other in pairs:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert disk.content_hash == memory.content_hash
    assert disk.decodes_alone == memory.decodes_alone == (style == "circuit_tracer")


def test_a_layer_is_a_coder_and_its_latents_are_parts(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    layer, memory = disk.layers[1], in_memory(disk).layers[1]
    assert isinstance(layer, StoredLayer)
    assert isinstance(memory, Dictionary)
    assert isinstance(layer, Coder)
    assert (layer.n_latents, layer.settings, set(layer.tensors)) == (M, memory.settings, set(memory.tensors))
    latent, same = disk.latent(M + 4), memory.latent(4)
    assert isinstance(latent, Part)
    at = {site: rows().reshape(4, 10, D) for site in (*latent.reads, *latent.writes)}
    torch.testing.assert_close(latent.value(at), same.value(at))
    moved, expected = (one.written(at, torch.ones(4, 10)) for one in (latent, same))
    assert list(moved) == list(expected) == list(latent.writes)
    torch.testing.assert_close(list(moved.values()), list(expected.values()))
    site = vs.Site("mlp_out", layer=2)
    torch.testing.assert_close(disk.written(M + 4, site), memory.written(4, site))
    torch.testing.assert_close(disk.direction(M + 4, site).vector, memory.direction(4, site).vector)
    for bad in (lambda: layer.encode(rows(), latents=[M]), lambda: layer.written(M), lambda: layer.decode(rows())):
        with pytest.raises(InputError):
            bad()
    half = layer.to(torch.float64)
    assert half.encode(rows()).dtype == torch.float64
    assert f"{M} latents" in repr(layer)


def test_encoding_reads_no_decoder(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    expected = disk.encode(inputs())
    for path in tmp_path.glob("W_dec_*"):
        path.unlink()
    torch.testing.assert_close(disk.encode(inputs()), expected)
    disk.encode_sparse(inputs())
    with pytest.raises(FileFormatError, match=r"W_dec_0\.safetensors can no longer be read"):  # decoding does
        disk.reconstruct(inputs())


def test_one_layer_needs_no_other(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    x = inputs()
    expected = disk.encode(x)[:, M : 2 * M]
    for number in (0, 2):
        (tmp_path / f"W_enc_{number}.safetensors").unlink()
    torch.testing.assert_close(disk.layers[1].encode(x[1]), expected)
    with pytest.raises(FileFormatError, match=r"W_enc_0\.safetensors can no longer be read"):
        disk.encode(x)


def test_decoding_reads_the_rows_of_active_latents_and_no_others(tmp_path: Path) -> None:
    disk = opened(tmp_path)
    one = torch.zeros(1, 3 * M)
    one[0, M + 4] = 2.0
    expected = disk.decode(one)
    tensors = load_file(tmp_path / "W_dec_1.safetensors")
    rotten = torch.full_like(tensors["W_dec_1"], torch.nan)
    rotten[4] = tensors["W_dec_1"][4]
    save_file({"W_dec_1": rotten}, tmp_path / "W_dec_1.safetensors")
    for found, wanted in zip(disk.decode(one), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    with pytest.raises(FileFormatError, match=r"W_dec_1 holds NaN or infinity"):  # its neighbour is rotten
        disk.decode(one.roll(1, dims=1))


def test_a_decoder_larger_than_what_is_used_of_it(tmp_path: Path) -> None:
    """A decoder of 1 GB, of which the file system stores nothing: a few rows of it cost a few rows of memory."""
    written = files.cross_layer(tmp_path, jumprelu=False)
    many, wide = 40_000, 2048
    for path in tmp_path.glob("W_*"):
        path.unlink()
    for number, sites in ((0, 2), (1, 1)):
        own = {"W_enc": normal(many, 8, seed=number), "b_enc": torch.full((many,), -11.0), "b_dec": torch.ones(wide)}
        save_file({f"{name}_{number}": t for name, t in own.items()}, tmp_path / f"W_enc_{number}.safetensors")
        size = many * sites * wide * 4
        head = json.dumps(
            {f"W_dec_{number}": {"dtype": "F32", "shape": [many, sites, wide], "data_offsets": [0, size]}}
        )
        with (tmp_path / f"W_dec_{number}.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head.encode())
            stream.truncate(8 + len(head) + size)
    coder = load(written.path)
    assert isinstance(coder, CrossLayerTranscoder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = [normal(4, 8, seed=10 + number) for number in range(2)]
    indices, _ = coder.encode_sparse(x)
    reconstruction = coder.reconstruct(x)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    assert 0 < indices.shape[1] < 100
    torch.testing.assert_close(reconstruction[1], torch.ones(4, wide))
    assert grown < 400, f"{grown:.0f} MB for a few rows of a decoder of 1 GB"
