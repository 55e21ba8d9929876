"""Latents of every kind of dictionary as parts: edited in runs, swept, found again by reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.dictionaries import CrossLayerTranscoder, Dictionary
from vesalius.errors import InputError, UnknownNameError
from vesalius.jobs import silent

D, M = 48, 12
FAMILIES = sorted(tiny.FAMILIES)
KINDS = ("sae", "transcoder", "skip over layers", "crosscoder", "cross-layer")
SITE = {
    "sae": (("layers.1.resid_post",), ("layers.1.resid_post",)),
    "transcoder": (("layers.1.mlp_in",), ("layers.1.mlp_out",)),
    "skip over layers": (("layers.0.resid_post",), ("layers.2.attn_out",)),
    "crosscoder": (("layers.0.resid_post", "layers.2.mlp_out"), ("layers.0.resid_post", "layers.2.mlp_out")),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dictionary(kind: str) -> Any:
    if kind == "cross-layer":
        return CrossLayerTranscoder(tuple(map(layer, range(3))), b_dec=tuple(torch.zeros(D) for _ in range(3)))
    reads, writes = (tuple(map(vs.Site.parse, names)) for names in SITE[kind])
    return made(reads, writes, seed=0)


def made(reads: tuple[vs.Site, ...], writes: tuple[vs.Site, ...], seed: int) -> Dictionary:
    return Dictionary(
        "relu", reads, writes,
        encoders=tuple(normal(D, M, seed=seed + 10 + number) / 3 for number in range(len(reads))),
        decoders=tuple(normal(M, D, seed=seed + 20 + number) for number in range(len(writes))),
        b_enc=torch.full((M,), 0.1), b_dec=tuple(torch.zeros(D) for _ in writes),
    )  # fmt: skip


def layer(number: int) -> Dictionary:
    """Reads one MLP's input and writes the outputs of it and of all later ones."""
    outs = tuple(vs.Site("mlp_out", later) for later in range(number, 3))
    return made((vs.Site("mlp_in", number),), outs, seed=100 * (number + 1))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def pairs() -> vs.Pairs:
    return tiny.pairs(4)


def latent(kind: str) -> Any:
    # Of the cross-layer transcoder one of its second layer.
    return vs.latent(dictionary(kind), M + 3 if kind == "cross-layer" else 3)


def sites(part: vs.Part) -> list[vs.Site]:
    return list(dict.fromkeys((*part.reads, *part.writes)))


# ---------------------------------------------------------------------------------------------------------- edited runs


@pytest.mark.parametrize("kind", KINDS)
def test_an_ablated_latent_leaves_its_error_and_the_other_latents(model: vs.Model, kind: str) -> None:
    part, tokens = latent(kind), tiny.pairs(4).tokens("clean")
    base = model.run(tokens, capture=sites(part))
    edited = model.run(tokens, capture=sites(part), interventions=[vs.Ablate(part)])
    value = part.value(base)
    assert float(value.max()) > 0.1
    for site in part.writes:
        expected = base[site] - value[..., None] * part.rows[site]
        torch.testing.assert_close(edited[site][tokens.real], expected[tokens.real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_steered_latent_moves_along_its_rows(model: vs.Model, kind: str) -> None:
    part, tokens = latent(kind), tiny.pairs(4).tokens("clean")
    base = model.run(tokens, capture=sites(part))
    chosen = torch.tensor([2, 3, 2, 3])
    edited = model.run(tokens, capture=sites(part), interventions=[vs.Steer(part, scale=1.5, positions=chosen)])
    for site in part.writes:
        moved = edited[site] - base[site]
        rows = torch.arange(4)
        torch.testing.assert_close(moved[rows, chosen], (1.5 * part.rows[site]).expand(4, -1), atol=1e-4, rtol=1e-4)
        assert float(moved[:, :2].abs().max()) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_latent_has_the_other_runs_value(model: vs.Model, pairs: vs.Pairs, kind: str) -> None:
    part = latent(kind)
    clean = model.run(pairs.tokens("clean"), capture=sites(part)).activations
    tokens = pairs.tokens("corrupted")
    base = model.run(tokens, capture=sites(part))
    edited = model.run(tokens, capture=sites(part), interventions=[vs.Patch(part, source=clean)])
    change = (part.value(clean) - part.value(base))[..., None]
    for site in part.writes:
        expected = base[site] + change * part.rows[site]
        torch.testing.assert_close(edited[site][tokens.real], expected[tokens.real], atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------------- sweeps


def by_hand(model: vs.Model, pairs: vs.Pairs, part: Any, new: Any) -> Tensor:
    """The metric of a run in which every site that a latent writes is overwritten by hand."""
    tokens = pairs.tokens("corrupted")
    base = model.run(tokens, capture=sites(part))
    change = (new(part) - part.value(base)) * pairs.real
    edits = [vs.Patch(site, source=base[site] + change[..., None] * part.rows[site]) for site in part.writes]
    return vs.logit_diff(model.run(tokens, interventions=edits).logits, pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", ["patch", "zero", "steer"])
def test_a_sweep_of_latents_equals_plain_runs(model: vs.Model, pairs: vs.Pairs, kind: str, edit: str) -> None:
    coder = dictionary(kind)
    scores = vs.sweep(model, pairs, sites=coder, each="latent", edit=edit, scale=2.0, sink=silent)
    assert len(scores.items) == scores.values.shape[1] == coder.n_latents
    for index in (0, 3, coder.n_latents - 1):
        part: Any = coder.latent(index)
        assert scores.items[index] == part
        runs = {which: model.run(pairs.tokens(which), capture=sites(part)) for which in ("clean", "corrupted")}
        new = {
            "patch": lambda p, runs=runs: p.value(runs["clean"]),
            "zero": lambda p, runs=runs: torch.zeros_like(p.value(runs["clean"])),
            "steer": lambda p, runs=runs: p.value(runs["corrupted"]) + 2.0,
        }[edit]
        torch.testing.assert_close(scores.values[0, index], by_hand(model, pairs, part, new), atol=2e-4, rtol=2e-4)
    assert float(scores.effects.abs().max()) > 1e-2


def test_parts_of_every_kind_in_one_sweep(model: vs.Model, pairs: vs.Pairs) -> None:
    direction = vs.Direction(vs.Site("resid_post", 0), normal(D, seed=5), "one")
    parts = [*map(latent, KINDS), "layers.1.mlp_post[7]", direction, vs.Group("layers.0.z", (0, 2))]
    scores = vs.sweep(model, pairs, sites=parts, sink=silent)
    for row, part in enumerate(scores.items):
        alone = vs.sweep(model, pairs, sites=[part], sink=silent)
        torch.testing.assert_close(alone.values[0], scores.values[row], atol=1e-4, rtol=1e-4)
    clean = model.run(pairs.tokens("clean"), capture=["layers.0.z"]).activations
    edits = [vs.Patch("layers.0.z[0]", source=clean), vs.Patch("layers.0.z[2]", source=clean)]
    plain = vs.logit_diff(model.run(pairs.tokens("corrupted"), interventions=edits).logits, pairs)
    torch.testing.assert_close(scores.values[-1], plain, atol=1e-4, rtol=1e-4)


def test_latents_and_units_together(model: vs.Model, pairs: vs.Pairs) -> None:
    together = vs.Together((vs.latent(dictionary("sae"), 1), vs.latent(dictionary("transcoder"), 2)))
    scores = vs.sweep(model, pairs, sites=[together], edit="zero", sink=silent)
    edits = [vs.Ablate(part) for part in together.parts]
    plain = vs.logit_diff(model.run(pairs.tokens("corrupted"), interventions=edits).logits, pairs)
    torch.testing.assert_close(scores.values[0], plain, atol=1e-4, rtol=1e-4)


def test_attribution_patching_takes_parts(model: vs.Model, pairs: vs.Pairs) -> None:
    """Exact where the metric is linear: what a direction of the last layer writes, up to the final norm."""
    part = vs.latent(dictionary("transcoder"), 3)
    direction = vs.Direction(vs.Site("resid_post", 0), normal(D, seed=5))
    exact = vs.sweep(model, pairs, sites=[part, direction], sink=silent)
    many = vs.attribution_patching(model, pairs, sites=[part, direction], steps=16)
    torch.testing.assert_close(many.values, exact.values, atol=0.02 * float(exact.effects.abs().max()), rtol=0.02)
    with pytest.raises(InputError, match="writes several sites"):
        vs.attribution_patching(model, pairs, sites=[latent("crosscoder")])


# ----------------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_gives_the_latent_back(kind: str) -> None:
    coder = dictionary(kind)
    part = coder.latent(5)
    assert vs.resolve(part.ref, coder) == part
    # What was named by its ref in this process needs no dictionary while that is alive.
    assert vs.resolve(part.ref) == part
    ref = part.ref
    del coder, part
    with pytest.raises(InputError, match="names what is kept elsewhere: give the dictionary as well"):
        vs.resolve(ref)
    assert vs.resolve(ref, dictionary(kind)).ref == ref


def test_references_of_all_parts(tmp_path: Path) -> None:
    direction = vs.Direction(vs.Site("resid_post", 0), normal(D, seed=5), "one")
    space = vs.Subspace(vs.Site("resid_post", 0), normal(3, D, seed=6), "three")
    parts: list[Any] = [
        vs.Unit(vs.Site("z", 1, 2)), vs.Unit(vs.Site.parse("module:a.b|out")), vs.Group("layers.0.mlp_post", (4, 2)),
        direction, space, vs.Together((direction, vs.Unit(vs.Site("mlp_post", 1, 3)))), latent("crosscoder"),
    ]  # fmt: skip
    for part in parts:
        assert isinstance(part, vs.Part)
        assert vs.resolve(part.ref) == part
    assert vs.resolve(direction.ref, direction.vector) == direction
    with pytest.raises(UnknownNameError, match="unknown kind of part 'neuron'; known: channel, direction, group"):
        vs.resolve({"kind": "neuron"})
    with pytest.raises(InputError, match="give the direction, or its numbers as a tensor"):
        vs.resolve({**direction.ref, "sha256": "0" * 64})


def test_a_group_is_several_units_of_one_tensor(model: vs.Model) -> None:
    group, tokens = vs.Group("layers.1.z", (3, 0)), tiny.pairs(4).tokens("clean")
    base = model.run(tokens, capture=["layers.1.z"])
    torch.testing.assert_close(group.value(base), base["layers.1.z"][:, :, [3, 0]])
    edited = model.run(tokens, capture=["layers.1.z"], interventions=[vs.Ablate(group)])["layers.1.z"]
    assert float(edited[:, :, [0, 3]].abs().max()) == 0.0
    torch.testing.assert_close(edited[:, :, 1], base["layers.1.z"][:, :, 1])
    for bad, message in (((), "needs units"), ((1, 1), "each listed once")):
        with pytest.raises(InputError, match=message):
            vs.Group("layers.1.z", bad)
    with pytest.raises(InputError, match="a group is of a whole site with numbered units"):
        vs.Group("layers.1.z[2]", (0,))
