"""Fitted dictionaries: what each kind computes, what is refused, latents as parts, and the files."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vesalius as vs
from vesalius.dictionaries import Coder, Dictionary, History, load, save
from vesalius.errors import FileFormatError, InputError, NotFiniteError, UnknownNameError
from vesalius.parts import Part
from vesalius.site import Site

D, M, N = 6, 20, 30
A, B = Site.parse("layers.3.resid_post"), Site.parse("layers.4.mlp_out")
KINDS = ["relu", "gated", "jumprelu", "topk", "batchtopk"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def extras_of(activation: str) -> dict[str, Tensor]:
    return {
        "gated": {"r_mag": normal(M, seed=11), "b_mag": normal(M, seed=12)},
        "jumprelu": {"threshold": normal(M, seed=13).abs()},
        "batchtopk": {"threshold": torch.tensor(0.7)},
    }.get(activation, {})


def made(activation: str = "relu", **changes: Any) -> Dictionary:
    fields: dict[str, Any] = {
        "activation": activation, "in_sites": (A,), "out_sites": (A,), "encoders": (normal(D, M, seed=1),),
        "decoders": (normal(M, D, seed=2),), "b_enc": normal(M, seed=3), "b_dec": (normal(D, seed=4),),
        "extras": extras_of(activation), "k": 3 if activation == "topk" else None,
    }  # fmt: skip
    return Dictionary(**{**fields, **changes})


def crosscoder(activation: str = "relu", **changes: Any) -> Dictionary:
    return made(
        activation, in_sites=(A, B), out_sites=(A, B), encoders=(normal(D, M, seed=1), normal(4, M, seed=5)),
        decoders=(normal(M, D, seed=2), normal(M, 4, seed=6)), b_dec=(normal(D, seed=4), normal(4, seed=7)), **changes,
    )  # fmt: skip


def plainly(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Latents of one row at a time, each by its definition."""
    rows = []
    for row in x:
        pre = [float(row @ dictionary.W_enc[:, j] + dictionary.b_enc[j]) for j in range(dictionary.n_latents)]
        rows.append([latent_plainly(dictionary, pre, j) for j in range(dictionary.n_latents)])
    return torch.tensor(rows)


def latent_plainly(dictionary: Dictionary, pre: list[float], j: int) -> float:
    extras = {name: (t if t.ndim else t.expand(M)) for name, t in dictionary.extras.items()}
    if dictionary.activation == "gated":
        inside = pre[j] - float(dictionary.b_enc[j])
        return max(0.0, float(extras["r_mag"][j].exp()) * inside + float(extras["b_mag"][j])) if pre[j] > 0 else 0.0
    if dictionary.activation == "topk":
        assert dictionary.k is not None
        return max(0.0, pre[j]) if sorted(pre)[-dictionary.k] <= pre[j] else 0.0
    threshold = float(extras["threshold"][j]) if "threshold" in extras else 0.0
    return max(0.0, pre[j]) if pre[j] > threshold else 0.0


@pytest.mark.parametrize("activation", KINDS)
def test_each_kind_computes_its_definition(activation: str) -> None:
    dictionary, x = made(activation), normal(N, D)
    latents = dictionary.encode(x)
    torch.testing.assert_close(latents, plainly(dictionary, x))
    assert 0 < int((latents > 0).sum()) < latents.numel()


@pytest.mark.parametrize("activation", KINDS)
def test_sparse_and_dense_codes_are_the_same_and_decode_alike(activation: str) -> None:
    dictionary, x = made(activation), normal(N, D)
    dense = dictionary.encode(x)
    indices, values = dictionary.encode_sparse(x)
    assert bool((values.diff(dim=1) <= 0).all())
    assert values.shape[1] == int((dense > 0).sum(1).max())
    torch.testing.assert_close(torch.zeros_like(dense).scatter_add(1, indices, values), dense)
    torch.testing.assert_close(dictionary.decode_sparse(indices, values), dictionary.decode(dense))
    torch.testing.assert_close(dictionary.decode(dense), dense @ dictionary.W_dec + dictionary.b_dec[0])
    torch.testing.assert_close(dictionary.reconstruct(x), dictionary.decode(dense))


@pytest.mark.parametrize("activation", KINDS)
def test_some_latents_are_what_they_are_among_all(activation: str) -> None:
    dictionary, x = made(activation), normal(N, D)
    torch.testing.assert_close(dictionary.encode(x, latents=[7, 2]), dictionary.encode(x)[:, [7, 2]])


@pytest.mark.parametrize("activation", KINDS)
def test_scales_fold_into_the_weights(activation: str) -> None:
    dictionary, x = made(activation, in_scale=(3.0,), out_scale=(3.0,), apply_b_dec_to_input=True), normal(N, D)
    folded = dictionary.folded()
    assert (folded.in_scale, folded.out_scale) == ((1.0,), (1.0,))
    torch.testing.assert_close(folded.reconstruct(x), dictionary.reconstruct(x))
    torch.testing.assert_close(folded.encode(x), dictionary.encode(x) / 3.0)
    torch.testing.assert_close(folded.W_dec, dictionary.W_dec)


def test_scales_of_several_sites_fold_too() -> None:
    dictionary = crosscoder(in_scale=(2.0, 5.0), out_scale=(2.0, 5.0), apply_b_dec_to_input=True)
    x = (normal(N, D), normal(N, 4, seed=9))
    for one, other in zip(dictionary.folded().reconstruct(x), dictionary.reconstruct(x), strict=True):
        torch.testing.assert_close(one, other)
    skipping = made(out_sites=(B,), in_scale=(2.0,), out_scale=(5.0,), skip=normal(D, D, seed=8))
    torch.testing.assert_close(skipping.folded().reconstruct(x[0]), skipping.reconstruct(x[0]))


def test_scales_and_the_subtracted_bias_act_as_written() -> None:
    dictionary, x = made(in_scale=(2.0,), out_scale=(4.0,), apply_b_dec_to_input=True), normal(N, D)
    latents = ((2 * x - dictionary.b_dec[0]) @ dictionary.W_enc + dictionary.b_enc).relu()
    torch.testing.assert_close(dictionary.encode(x), latents)
    torch.testing.assert_close(dictionary.decode(latents), (latents @ dictionary.W_dec + dictionary.b_dec[0]) / 4)


def test_a_crosscoder_sums_over_sites_and_reconstructs_each() -> None:
    dictionary, x, y = crosscoder(), normal(N, D), normal(N, 4, seed=9)
    latents = (x @ dictionary.encoders[0] + y @ dictionary.encoders[1] + dictionary.b_enc).relu()
    torch.testing.assert_close(dictionary.encode([x, y]), latents)
    torch.testing.assert_close(dictionary.encode({A: x, B: y}), latents)
    torch.testing.assert_close(dictionary.encode({"layers.4.mlp_out": y, "layers.3.resid_post": x}), latents)
    reconstruction = dictionary.reconstruct([x, y])
    assert [tuple(part.shape) for part in reconstruction] == [(N, D), (N, 4)]
    torch.testing.assert_close(reconstruction[1], latents @ dictionary.decoders[1] + dictionary.b_dec[1])


def test_leading_axes_stay_and_heads_count_as_one_width() -> None:
    dictionary, x = made(), normal(2, 5, D)
    assert dictionary.encode(x).shape == (2, 5, M)
    assert dictionary.encode_sparse(x)[0].shape[:2] == (2, 5)
    assert dictionary.reconstruct(x).shape == (2, 5, D)
    torch.testing.assert_close(dictionary.encode(x.view(2, 5, 2, 3)), dictionary.encode(x))
    torch.testing.assert_close(dictionary.encode(normal(3000, D))[2999], dictionary.encode(normal(3000, D)[2999]))


def test_a_dictionary_is_a_frozen_coder() -> None:
    dictionary = made()
    assert isinstance(dictionary, Coder)
    with pytest.raises(FrozenInstanceError):
        dictionary.k = 5  # type: ignore[misc]
    assert repr(made("topk")) == "Dictionary(topk, k=3, 20 latents, layers.3.resid_post)"
    assert repr(made(out_sites=(B,))).endswith("layers.3.resid_post -> layers.4.mlp_out)")
    assert made().to(torch.float64).encode(normal(N, D)).dtype == torch.float64


# What is refused


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.encode(normal(N, D + 1)), r"layers\.3\.resid_post have width 7 .*expects 6"),
        (lambda d: d.encode([normal(N, D)] * 2), r"2 tensor\(s\) given for 1 site"),
        (lambda d: d.encode({B: normal(N, D)}), r"no activations at layers\.3\.resid_post; given: layers\.4\.mlp_out"),
        (lambda d: d.encode(normal(N, D), latents=[M]), r"no latent 20: this dictionary has 20"),
        (lambda d: d.decode(normal(N, M + 1)), r"21 latents .* has 20"),
        (lambda d: d.latent(-1), r"no latent -1"),
        (lambda d: d.direction(0, B), r"does not write at layers\.4\.mlp_out"),
    ],
)
def test_activations_that_do_not_fit_are_refused(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(made())


def test_rows_that_are_not_aligned_are_refused() -> None:
    with pytest.raises(InputError, match=r"rows \(30,\) and those at layers\.4\.mlp_out \(29,\)"):
        crosscoder().encode([normal(N, D), normal(N - 1, 4)])


def test_nan_is_refused() -> None:
    x = normal(N, D)
    x[3, 2] = float("nan")
    with pytest.raises(NotFiniteError, match=r"layers\.3\.resid_post hold NaN"):
        made().encode(x)
    with pytest.raises(NotFiniteError, match=r"W_enc\.0 holds NaN"):
        made(encoders=(torch.full((D, M), float("inf")),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoders": (normal(D, M + 1),)}, r"encoder of layers\.3\.\w+ must have shape \[any, 20\]; got \(6, 21\)"),
        ({"decoders": (normal(D, M),)}, r"decoder of .* must have shape \[20, any\]"),
        ({"b_dec": (normal(D + 1),)}, r"b_dec of .* must have shape \[6\]"),
        ({"b_dec": ()}, r"0 of b_dec for 1 site"),
        ({"activation": "topk", "k": None}, r"needs k between 1 and that; got None"),
        ({"activation": "jumprelu", "extras": {}}, r"jumprelu dictionary needs extras with threshold"),
        ({"activation": "batchtopk", "extras": {"threshold": normal(3)}}, r"threshold must have shape \[20\]"),
        ({"skip": normal(D, 2)}, r"skip must have shape \[6, 6\]"),
        ({"b_enc": normal(2, 2)}, r"b_enc must be \[latent\]"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        made(**changes)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"activation 'tanh'; known: batchtopk, gated, jumprelu, relu, topk"):
        made("tanh")
    with pytest.raises(UnknownNameError, match=r"vector of a relu dictionary 'threshold'"):
        made(extras={"threshold": torch.tensor(1.0)})
    with pytest.raises(UnknownNameError, match=r"kind of dictionary 'vae'; known: batchtopk, gated, .*topk"):
        vs.TrainConfig(kind="vae")


def test_one_matrix_is_not_asked_of_several_sites() -> None:
    with pytest.raises(
        InputError, match=r"W_enc is for dictionaries with one site there; this one has 2: see encoders"
    ):
        _ = crosscoder().W_enc


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_latents", 0), ("k", -1), ("k", 2.5), ("batch_size", 0), ("steps", 0), ("lr", 0.0), ("lr", float("nan")),
     ("seed", -1), ("decay", 1.5), ("betas", (0.9, 1.0)), ("clip_norm", 0.0), ("accumulate", 0), ("sparsity", -1.0),
     ("bandwidth", 0.0), ("dead_after", 0), ("aux_coef", -1.0), ("skip", 1), ("fold", "yes"), ("warmup", -1)],
)  # fmt: skip
def test_config_values_out_of_range_are_refused_naming_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"TrainConfig\.{field} must be .*; got "):
        vs.TrainConfig(**{field: value})


@pytest.mark.parametrize("field", ["coder", "precision", "penalty", "decoder_norm", "dead"])
def test_config_names_that_do_not_exist_are_refused(field: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"unknown {field} 'none_such'; known: "):
        vs.TrainConfig(**{field: "none_such"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"k": 9, "n_latents": 8}, "more than n_latents"), ({"steps": 5, "warmup": 6}, "more than steps"),
     ({"batch_size": 4, "accumulate": 5}, "more than batch_size"),
     ({"groups": (4, 8), "kind": "matryoshka"}, r"must rise to n_latents \(8192\)"),
     ({"groups": (4, 8192)}, "is for kind='matryoshka'")],
)  # fmt: skip
def test_config_values_that_contradict_each_other_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        vs.TrainConfig(**fields)


def test_rates_rise_stay_and_fall() -> None:
    config = vs.TrainConfig(steps=100, lr=1.0, warmup=9, decay=0.2)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == pytest.approx([left / 21 for left in range(20, 0, -1)])


def test_prefixes_of_a_matryoshka_end_at_all_latents() -> None:
    assert vs.TrainConfig(kind="matryoshka", n_latents=64).prefixes == (2, 4, 8, 16, 32, 64)
    assert vs.TrainConfig(kind="matryoshka", n_latents=8, k=2, groups=(3, 8)).prefixes == (3, 8)
    assert vs.TrainConfig(n_latents=64).prefixes == (64,)


# Latents as parts


@pytest.mark.parametrize("activation", KINDS)
def test_a_latent_is_read_and_written_as_a_part(activation: str) -> None:
    dictionary, whole = made(activation, in_scale=(2.0,), out_scale=(2.0,)), normal(2, 5, D)
    latent = dictionary.latent(7)
    assert isinstance(latent, Part)
    at = {A: whole}
    value = latent.value(at)
    torch.testing.assert_close(value, dictionary.encode(whole)[..., 7])
    assert torch.equal(latent.written(at, value)[A], whole)
    moved = latent.written(at, torch.full_like(value, 5.0))[A]
    change = (5.0 - value)[..., None] * dictionary.W_dec[7] / 2.0
    torch.testing.assert_close(moved, whole + change)
    assert latent.ref == {
        "kind": "latent", "reads": ["layers.3.resid_post"], "writes": ["layers.3.resid_post"], "index": 7,
        "dictionary": dictionary.content_hash,
    }  # fmt: skip
    assert vs.resolve(latent.ref, dictionary) == latent


def test_removing_every_latent_leaves_bias_and_error() -> None:
    dictionary, whole = made("topk"), normal(2, 5, D)
    latents, left = dictionary.encode(whole), whole
    for index in range(M):
        left = left - latents[..., index : index + 1] * dictionary.latent(index).row
    torch.testing.assert_close(left - dictionary.b_dec[0], whole - dictionary.reconstruct(whole), atol=1e-5, rtol=1e-5)


def test_latents_of_heads_and_of_a_tensor_with_heads() -> None:
    one = made(in_sites=(Site.parse("layers.3.z[1]"),), out_sites=(Site.parse("layers.3.z[1]"),))
    z = normal(2, 5, 3, D)
    at = {Site.parse("layers.3.z"): z}
    torch.testing.assert_close(one.latent(2).value(at), one.encode(z[:, :, 1])[..., 2])
    written = one.latent(2).written(at, torch.zeros(2, 5))[Site.parse("layers.3.z")]
    assert torch.equal(written[:, :, [0, 2]], z[:, :, [0, 2]])
    assert not torch.equal(written[:, :, 1], z[:, :, 1])
    whole = Site.parse("layers.3.z")
    both = made(in_sites=(whole,), out_sites=(whole,))
    moved = both.latent(2).written({whole: z[..., :3, :2]}, torch.zeros(2, 5))
    assert moved[whole].shape == (2, 5, 3, 2)


def test_a_transcoders_latent_is_read_at_one_site_and_written_at_another() -> None:
    transcoder, read, out = made(out_sites=(B,)), normal(2, 5, D), normal(2, 5, D, seed=1)
    latent, at = transcoder.latent(3), {A: read, B: out}
    assert (latent.reads, latent.writes) == ((A,), (B,))
    value = latent.value(at)
    torch.testing.assert_close(value, transcoder.encode(read)[..., 3])
    # Only its own contribution moves: the other latents' and the error stay in the output.
    moved = latent.written(at, value + 2.0)
    assert list(moved) == [B]
    torch.testing.assert_close(moved[B], out + 2.0 * latent.row)


def test_a_crosscoders_latent_moves_every_site_it_writes() -> None:
    dictionary, at = crosscoder(), {A: normal(2, 5, D), B: normal(2, 5, 4, seed=1)}
    latent = dictionary.latent(3)
    assert latent.reads == latent.writes == (A, B)
    value = latent.value(at)
    torch.testing.assert_close(value, dictionary.encode([at[A], at[B]])[..., 3])
    moved = latent.written(at, torch.zeros_like(value))
    for number, site in enumerate((A, B)):
        torch.testing.assert_close(moved[site], at[site] - value[..., None] * dictionary.decoders[number][3])


def test_directions_are_decoder_rows() -> None:
    dictionary = crosscoder()
    direction = dictionary.direction(4, B)
    assert (direction.site, direction.label) == (B, "latent 4")
    torch.testing.assert_close(direction.vector, dictionary.decoders[1][4] / dictionary.decoders[1][4].norm())


# Files


@pytest.mark.parametrize("activation", KINDS)
def test_what_was_saved_is_loaded(tmp_path: Path, activation: str) -> None:
    history = History({name: np.arange(4.0) for name in ("loss", "fvu", "l0", "dead", "lr")})
    dictionary = made(activation, metadata={"from": "a test"}, history=history, groups=(5, M))
    assert save(dictionary, tmp_path / "sae") == tmp_path / "sae"
    found = vs.dictionaries.load(tmp_path / "sae")
    assert isinstance(found, Dictionary)
    assert (found.settings, found.metadata, found.content_hash) == (
        dictionary.settings, {"from": "a test"}, dictionary.content_hash,
    )  # fmt: skip
    assert torch.equal(found.encode(normal(N, D)), dictionary.encode(normal(N, D)))
    assert found.history is not None
    assert found.history["fvu"].tolist() == [0.0, 1.0, 2.0, 3.0]
    save(found, tmp_path / "sae")


def test_a_folder_whose_metadata_has_the_name_of_earlier_versions_is_loaded(tmp_path: Path) -> None:
    config = json.loads((save(made(metadata={"from": "a test"}), tmp_path) / "config.json").read_text())
    config["about"] = config.pop("metadata")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load(tmp_path)
    assert isinstance(found, Dictionary)
    assert found.metadata == {"from": "a test"}
    save(found, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["metadata"] == {"from": "a test"}


def test_skips_scales_and_several_sites_are_kept(tmp_path: Path) -> None:
    one = made(out_sites=(B,), skip=normal(D, D, seed=8), in_scale=(2.0,), out_scale=(0.3,))
    assert load(save(one, tmp_path / "one")).content_hash == one.content_hash
    both = crosscoder(apply_b_dec_to_input=True)
    assert load(save(both, tmp_path / "both")).content_hash == both.content_hash


def test_the_hash_follows_weights_and_settings() -> None:
    hashes = [
        made().content_hash, made(in_scale=(2.0,)).content_hash, made(b_enc=normal(M, seed=99)).content_hash,
        made(out_sites=(B,)).content_hash, made(apply_b_dec_to_input=True).content_hash,
    ]  # fmt: skip
    assert len(set(hashes)) == 5
    assert made(metadata={"x": 1}).content_hash == made().content_hash


def test_a_folder_with_another_dictionary_is_not_overwritten(tmp_path: Path) -> None:
    save(made(), tmp_path)
    with pytest.raises(InputError, match="holds another dictionary"):
        save(made("topk"), tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["dictionary.safetensors", "history.npz"])
def test_files_that_were_damaged_are_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    history = History({column: np.zeros(2) for column in ("loss", "fvu", "l0", "dead", "lr")})
    save(made(history=history), tmp_path)
    data = (tmp_path / name).read_bytes()
    if damage == "remove":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(
            data[:-9] if damage == "truncate" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        )
    with pytest.raises(FileFormatError, match=name):
        load(tmp_path)


def test_an_altered_description_is_found(tmp_path: Path) -> None:
    save(made("topk"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["settings"]["k"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(FileFormatError, match=r"config\.json was altered"):
        load(tmp_path)
    path.write_text(json.dumps({**config, "version": 2}))
    with pytest.raises(FileFormatError, match="version 2; this package reads version 1"):
        load(tmp_path)
    path.write_text("{")
    with pytest.raises(FileFormatError, match="holds no dictionary"):
        load(tmp_path)
    with pytest.raises(FileFormatError, match="there is no file or folder"):
        load(tmp_path / "none")


def test_a_history_draws_its_curve() -> None:
    columns = {name: np.ones(300) for name in ("loss", "l0", "dead", "lr")}
    history = History({**columns, "fvu": np.geomspace(1.0, 0.01, 300)})
    page = made(history=history)._repr_html_()
    assert page.count("<svg") == 1
    assert "300 steps: fvu 0.01" in page
    heights = [float(point.split(",")[1]) for point in page.split('points="')[1].split('"')[0].split()]
    assert heights == sorted(heights)
    assert "no steps yet" in History({name: np.zeros(0) for name in ("loss", "fvu", "l0", "dead", "lr")})._repr_html_()
    with pytest.raises(FileFormatError, match="columns loss, fvu, l0, dead, lr"):
        History({"loss": np.zeros(2)})


def test_fields_can_be_replaced_by_making_another() -> None:
    assert replace(made("topk"), k=5).encode_sparse(normal(N, D))[0].shape[1] <= 5


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0)])
def test_no_rows_are_encoded_as_none(activation: str, lead: tuple[int, ...]) -> None:
    coder, x = made(activation), torch.zeros(*lead, D)
    assert coder.encode(x).shape == (*lead, M)
    assert coder.encode(x, latents=[3, 1]).shape == (*lead, 2)
    indices, values = coder.encode_sparse(x)
    assert indices.shape == values.shape
    assert indices.shape[:-1] == lead
    for found in (coder.decode(coder.encode(x)), coder.decode_sparse(indices, values), coder.reconstruct(x)):
        assert isinstance(found, Tensor)
        assert found.shape == (*lead, D)
    several = crosscoder(activation).reconstruct([x, torch.zeros(*lead, 4)])
    assert [part.shape for part in several] == [(*lead, D), (*lead, 4)]


def test_rows_in_which_nothing_is_active_are_decoded_to_the_bias() -> None:
    coder = made("relu", b_enc=torch.full((M,), -1e6))
    x = normal(5, D)
    found = coder.decode_sparse(*coder.encode_sparse(x))
    assert isinstance(found, Tensor)
    assert torch.equal(found, coder.b_dec[0].expand(5, D))
