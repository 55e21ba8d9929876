"""Project, Interchange, Freeze, Noise and Replace do what they say; every edit prints, hashes and survives a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from vesalius.errors import FileFormatError, InputError, InterventionError, UnknownNameError
from vesalius.intervention import Place, apply, from_json, load, save, tensors_of
from vesalius.parts import OneSite

SITE = vs.Site.parse("layers.1.resid_post")
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_post", "q", "k", "v", "z",
         "scores", "pattern")  # fmt: skip


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def model(request: pytest.FixtureRequest) -> vs.Model:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def tokens() -> vs.Tokens:
    return tiny.pairs().tokens("clean")


@pytest.fixture(scope="module")
def others() -> vs.Tokens:
    return tiny.pairs(seed=5).tokens("corrupted")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value(model: vs.Model, tokens: vs.Tokens, edit: Any, name: str) -> Tensor:
    return model.run(tokens, capture=[name], interventions=[edit])[name]


def editable(model: vs.Model) -> list[str]:
    outside = [str(site) for site in model.sites() if site.layer is None]
    return [*outside, *(f"layers.1.{kind}" for kind in KINDS)]


# -------------------------------------------------------------------------------------------------------------- project


def test_a_removed_subspace_cannot_be_read_and_the_rest_is_untouched(model: vs.Model, tokens: vs.Tokens) -> None:
    space = vs.Subspace(SITE, randn(5, 48))
    base = model.run(tokens, capture=[SITE])[SITE]
    removed = value(model, tokens, vs.Project(space), str(SITE))
    assert float(space.read(removed).abs().max()) < 1e-5 < float(space.read(base).abs().max())
    outside = torch.eye(48) - space.basis.T @ space.basis
    assert torch.allclose(removed @ outside, base @ outside, atol=1e-5)


def test_what_is_kept_and_what_is_removed_add_up_to_the_base(model: vs.Model, tokens: vs.Tokens) -> None:
    space = vs.Subspace(SITE, randn(5, 48))
    base = model.run(tokens, capture=[SITE])[SITE]
    kept = value(model, tokens, vs.Project(space, keep=True), str(SITE))
    removed = value(model, tokens, vs.Project(space), str(SITE))
    assert torch.allclose(kept + removed, base, atol=1e-5)
    assert torch.allclose(kept, base @ space.basis.T @ space.basis, atol=1e-5)


def test_with_a_centre_what_is_lost_is_replaced_by_the_mean(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    direction = vs.Direction(SITE, randn(48))
    reference = model.run(others, capture=[SITE])
    centre = torch.cat([row[:size] for row, size in zip(reference[SITE], others.lengths.tolist(), strict=True)]).mean(0)
    base = model.run(tokens, capture=[SITE])[SITE]
    removed = value(model, tokens, vs.Project(direction, centre=reference.activations), str(SITE))
    assert torch.allclose(removed @ direction.vector, (centre @ direction.vector).expand(6, 9), atol=1e-5)
    kept = value(model, tokens, vs.Project(direction, keep=True, centre=centre), str(SITE))
    along = (base - centre) @ direction.vector
    assert torch.allclose(kept, centre + along[..., None] * direction.vector, atol=1e-5)


def test_projecting_a_head_leaves_the_other_heads_alone(model: vs.Model, tokens: vs.Tokens) -> None:
    width = model.architecture[1].d_head
    base = model.run(tokens, capture=["layers.1.z"])["layers.1.z"]
    edited = value(model, tokens, vs.Project(vs.Direction(vs.Site("z", 1, 2), randn(width))), "layers.1.z")
    assert torch.equal(edited[:, :, [0, 1, 3]], base[:, :, [0, 1, 3]])
    assert not torch.equal(edited[:, :, 2], base[:, :, 2])


def test_only_directions_and_subspaces_are_projected() -> None:
    with pytest.raises(InputError, match=r"Project at layers.1.z needs a Direction or a Subspace"):
        vs.Project("layers.1.z")


# ---------------------------------------------------------------------------------------------------------- interchange


def test_an_interchange_takes_each_examples_value_from_its_own_source(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    source = model.run(others, capture=[SITE])
    order, at = torch.tensor([3, 3, 0, 5, 1, 2]), torch.tensor([0, 4, 2, 1, 5, 3])
    swap = vs.Interchange(SITE, source=source.activations, examples=order, source_positions=at, positions=4)
    edited, base = value(model, tokens, swap, str(SITE)), model.run(tokens, capture=[SITE])[SITE]
    for row in range(6):
        assert torch.equal(edited[row, 4], source[SITE][order[row], at[row]])
    assert torch.equal(edited[:, 5:], base[:, 5:])


def test_an_interchange_with_nothing_named_is_a_patch(model: vs.Model, tokens: vs.Tokens, others: vs.Tokens) -> None:
    source = model.run(others, capture=["layers.1.z", "layers.1.pattern"]).activations
    for name in ("layers.1.z[2]", "layers.1.pattern[1]"):
        swap, patch = (kind(name, source=source, positions=range(6)) for kind in (vs.Interchange, vs.Patch))
        assert torch.equal(*(model.run(tokens, interventions=[edit]).logits for edit in (swap, patch)))


def test_interchanging_all_dimensions_of_a_layer_gives_the_source_run(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    """The theorem behind distributed alignment search: a full-rank rotation swaps everything."""
    source = model.run(others, capture=["layers.0.resid_pre"])
    space = vs.Subspace(vs.Site("resid_pre", 0), randn(48, 48))
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    same = torch.stack([others.real[order], tokens.real]).all(0)
    how = {"source": source.activations, "examples": order, "positions": same}
    swapped = model.run(tokens, interventions=[vs.Interchange(space, **how)])
    plain = source.logits[order]
    assert torch.allclose(swapped.logits[same], plain[same], atol=1e-3)
    one = vs.Subspace(vs.Site("resid_pre", 0), randn(1, 48))
    part = model.run(tokens, interventions=[vs.Interchange(one, **how)])
    assert not torch.allclose(part.logits[same], plain[same], atol=1e-3)


def test_gradients_reach_the_basis_of_an_interchange(model: vs.Model, tokens: vs.Tokens, others: vs.Tokens) -> None:
    source = model.run(others, capture=[SITE]).activations
    basis = randn(3, 48).requires_grad_()
    swap = vs.Interchange(vs.Subspace(SITE, basis), source=source, positions=range(6))
    model.run(tokens, interventions=[swap], grad=True).logits[:, 4, 7].sum().backward()
    assert basis.grad is not None
    assert float(basis.grad.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"examples": torch.tensor([0, 1])}, InterventionError, r"examples= has shape \(2,\); this run has 6 examples"),
        ({"examples": torch.full((6,), 9)}, InputError, "source examples 9 to 9 of 6"),
        ({"source_positions": 20}, InputError, "source position 20 in source example 0, which has 9 tokens"),
    ],
)
def test_a_source_that_is_not_there_is_refused(
    model: vs.Model, tokens: vs.Tokens, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    source = model.run(tokens, capture=[SITE]).activations
    with pytest.raises(error, match=message):
        model.run(tokens, interventions=[vs.Interchange(SITE, source=source, **options)])


# --------------------------------------------------------------------------------------------------------------- freeze


def test_freezing_everything_after_an_edit_undoes_it(model: vs.Model, tokens: vs.Tokens) -> None:
    base = model.run(tokens, capture=["layers.*.z", "layers.*.mlp_out"])
    ablate = vs.Ablate("layers.0.z[1]")
    held = [vs.Freeze(site, source=base.activations) for site in base.activations if site.layer]
    direct = model.run(tokens, capture=["layers.2.resid_post"], interventions=[*held, ablate])["layers.2.resid_post"]
    lost = model.head_writes(0, base["layers.0.z"])[:, :, 1]
    mlp = vs.Freeze("layers.0.mlp_out", source=base.activations)
    frozen = model.run(tokens, capture=["layers.2.resid_post"], interventions=[ablate, *held, mlp])
    plain = model.run(tokens, capture=["layers.2.resid_post"])["layers.2.resid_post"]
    assert torch.allclose(frozen["layers.2.resid_post"], plain - lost, atol=1e-4)
    assert not torch.allclose(direct, plain - lost, atol=1e-4)


def test_freezing_refuses_a_run_of_other_prompts_and_a_site_that_was_not_captured(
    model: vs.Model, tokens: vs.Tokens
) -> None:
    short = model.run(tokens.ids[:2], capture=[SITE])
    with pytest.raises(InterventionError, match=r"recorded \(2, 9, 48\), this run has \(6, 9, 48\)"):
        model.run(tokens, interventions=[vs.Freeze(SITE, source=short.activations)])
    with pytest.raises(UnknownNameError, match=r"unknown captured site 'layers.0.z'"):
        vs.Freeze("layers.0.z", source=short.activations)


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_has_the_stated_size_and_is_independent_between_examples_and_tokens() -> None:
    net, ids = tiny.model("llama"), torch.full((40, 50), 7)
    base = net.run(ids, capture=["embed"])["embed"]
    drawn = value(net, vs.Tokens(ids), vs.Noise("embed", scale=3.0, std=0.5, seed=1), "embed") - base
    assert float(drawn.std()) == pytest.approx(1.5, rel=0.01)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.02)
    rows = drawn.flatten(1)
    assert float((torch.corrcoef(rows) - torch.eye(40)).abs().max()) < 0.15
    assert float((torch.corrcoef(drawn[0]) - torch.eye(50)).abs().max()) < 0.75


def test_noise_depends_on_the_example_and_its_tokens_not_on_its_neighbours(model: vs.Model, tokens: vs.Tokens) -> None:
    def drawn(inputs: vs.Tokens, **options: Any) -> Tensor:
        base = model.run(inputs, capture=[SITE])[SITE]
        return value(model, inputs, vs.Noise(SITE, scale=1.0, seed=4, **options), str(SITE)) - base

    together = drawn(tokens)
    order = torch.tensor([4, 0, 3])
    some = drawn(vs.Tokens(tokens.ids[order], tokens.real[order]), examples=order)
    assert torch.allclose(some, together[order], atol=1e-5)
    short = drawn(vs.Tokens(tokens.ids[:1, :4]))
    assert torch.allclose(short[0], together[0, :4], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-1)


def test_noise_is_the_seeds_doing_and_stays_where_it_is_put(model: vs.Model, tokens: vs.Tokens) -> None:
    runs = [
        value(model, tokens, vs.Noise(SITE, scale=2.0, seed=seed, positions=[2, 3]), str(SITE)) for seed in (0, 0, 1)
    ]
    base = model.run(tokens, capture=[SITE])[SITE]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0][:, [0, 1, 4, 5, 6, 7, 8]], base[:, [0, 1, 4, 5, 6, 7, 8]])
    assert bool((runs[0] != base)[:, 2:4].all())


def test_noise_in_a_direction_moves_that_coordinate_only(model: vs.Model, tokens: vs.Tokens) -> None:
    direction = vs.Direction(SITE, randn(48))
    base = model.run(tokens, capture=[SITE])[SITE]
    moved = value(model, tokens, vs.Noise(direction, scale=1.0), str(SITE)) - base
    along = moved @ direction.vector
    assert float(along.abs().max()) > 0.5
    assert torch.allclose(moved, along[..., None] * direction.vector, atol=1e-5)


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"scale": 1.0, "std": float("nan")}])
def test_noise_of_a_size_that_is_none_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needs scale >= 0 and a finite std"):
        vs.Noise(SITE, **options)


# -------------------------------------------------------------------------------------------------------------- replace


def test_replacing_an_mlp_by_itself_changes_nothing(model: vs.Model, tokens: vs.Tokens) -> None:
    """The splice of a perfect transcoder."""
    splice = vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", model.layer(1).mlp.forward, "itself")
    assert torch.equal(model.run(tokens, interventions=[splice]).logits, model.run(tokens).logits)
    half = vs.Replace("layers.1.mlp_in", "layers.1.mlp_out", lambda x: 0.5 * model.layer(1).mlp.forward(x), "half")
    base = model.run(tokens, capture=["layers.1.mlp_out"])["layers.1.mlp_out"]
    assert torch.allclose(value(model, tokens, half, "layers.1.mlp_out"), base / 2, atol=1e-6)


def test_a_replacement_reads_what_earlier_edits_left(model: vs.Model, tokens: vs.Tokens) -> None:
    shift = vs.Steer("layers.0.resid_post", scale=1.0, vector=torch.ones(48))
    splice = vs.Replace("layers.0.resid_post", "layers.2.mlp_out", lambda x: x - 1, "minus one", positions=[3])
    base = model.run(tokens, capture=["layers.0.resid_post"])["layers.0.resid_post"]
    run = model.run(tokens, capture=["layers.2.mlp_out"], interventions=[splice, shift])["layers.2.mlp_out"]
    assert torch.allclose(run[:, 3], base[:, 3], atol=1e-5)


def test_a_replacement_between_heads_and_on_its_own_site(model: vs.Model, tokens: vs.Tokens) -> None:
    base = model.run(tokens, capture=["layers.0.z", "layers.1.z"])
    copy = vs.Replace("layers.0.z[3]", "layers.1.z[1]", torch.clone, "copy")
    assert torch.equal(value(model, tokens, copy, "layers.1.z")[:, :, 1], base["layers.0.z"][:, :, 3])
    twice = vs.Replace("layers.1.z", "layers.1.z", lambda z: 2 * z, "twice")
    assert torch.equal(value(model, tokens, twice, "layers.1.z"), 2 * base["layers.1.z"])


def test_a_replacement_cannot_read_the_future_nor_what_is_no_tensor(model: vs.Model, tokens: vs.Tokens) -> None:
    late = vs.Replace("layers.2.mlp_out", "layers.1.mlp_out", torch.clone, "copy")
    with pytest.raises(InterventionError, match=r"reads layers.2.mlp_out, which this pass makes only after layers.1"):
        model.run(tokens, interventions=[late])
    with pytest.raises(InterventionError, match=r"layers.0.result is no tensor of the pass.*read layers.0.z"):
        model.run(tokens, interventions=[vs.Replace("layers.0.result", "layers.1.z", torch.clone, "copy")])
    with pytest.raises(InputError, match="needs ref="):
        vs.Replace("layers.0.z", "layers.1.z", torch.clone, "")
    with pytest.raises(InterventionError, match=r"Replace at layers.1.z: the new value has shape"):
        model.run(tokens, interventions=[vs.Replace("layers.0.mlp_out", "layers.1.z", torch.clone, "copy")])


# --------------------------------------------------------------------------------------------------- sites and position


def edits_at(name: str, width: int, source: vs.Activations) -> list[Any]:
    """One edit of every kind at a site, each of which changes something."""
    part = vs.Direction(vs.Site.parse(name), randn(width))
    return [
        vs.Patch(name, source=source), vs.Ablate(name), vs.Ablate(name, mode="resample", reference=source),
        vs.Steer(name, scale=1.0, vector=randn(width)), vs.Project(part), vs.Project(part, keep=True),
        vs.Interchange(name, source=source, examples=torch.tensor([1, 2, 3, 4, 5, 0])),
        vs.Freeze(name, source=source), vs.Noise(name, scale=1.0), vs.Replace(name, name, lambda x: x + 1, "plus one"),
    ]  # fmt: skip


def test_every_edit_acts_at_every_editable_site_and_only_at_its_positions(
    model: vs.Model, tokens: vs.Tokens, others: vs.Tokens
) -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1, 3] = mask[2, 5] = mask[4, 1] = True
    for name in editable(model):
        base = model.run(tokens, capture=[name, "layers.0.pattern"])[name]
        source = model.run(others, capture=[name]).activations
        axis = 2 if "pattern" in name or "scores" in name else 1
        for edit in edits_at(name, base.shape[-1], source):
            object.__setattr__(edit, "positions", mask)
            run = model.run(tokens, capture=[name, "layers.0.pattern"], interventions=[edit])
            there, before = run[name].movedim(axis, 1), base.movedim(axis, 1)
            exact = 1e-5 if "resid_mid" in name else 0.0
            assert float((there - before)[~mask].abs().max()) <= exact, (name, edit)
            changed = (there != before)[mask].flatten(1).any(1)
            same_embedding = name == "pos_embed" and not bool(changed.any())
            assert bool(changed.all()) or same_embedding, (name, edit)


@pytest.mark.parametrize("kind", ["Patch", "Ablate", "Steer", "Project", "Interchange", "Freeze", "Noise", "Replace"])
def test_edits_work_on_any_modules_input_and_output(kind: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    model, x = vs.Model(net), randn(5, 7, 4)
    for name in ("module:1|in", "module:1|out"):
        source = model.run(randn(5, 7, 4, seed=1), capture=[name]).activations
        base = model.run(x, capture=[name])[name]
        for edit in [e for e in edits_at(name, 6, source) if type(e).__name__ == kind and len(source[name]) != 6]:
            if kind == "Interchange":
                edit = vs.Interchange(name, source=source, examples=torch.tensor([1, 2, 3, 4, 0]))
            object.__setattr__(edit, "positions", [2])
            edited = model.run(x, capture=[name], interventions=[edit])[name]
            assert torch.equal(edited[:, [0, 1, 3]], base[:, [0, 1, 3]])
            assert bool((edited != base)[:, 2].any())


def test_positions_that_do_not_fit_the_tensor_are_refused(model: vs.Model, tokens: vs.Tokens) -> None:
    with pytest.raises(InterventionError, match=r"logits is \(6, 1, 61\) here, so positions of \(6, 9\)"):
        model.run(tokens, interventions=[vs.Ablate("logits", positions=[1])], last_logits=True)
    assert not model.run(tokens, interventions=[vs.Ablate("logits")], last_logits=True).logits.any()


def test_two_sites_on_one_tensor_are_edited_in_forward_order(model: vs.Model, tokens: vs.Tokens) -> None:
    """attn_out comes before the sum it enters, whatever the order of the list."""
    wipe, shift = vs.Ablate("layers.1.attn_out"), vs.Steer("layers.1.resid_mid", scale=1.0, vector=torch.ones(48))
    base = model.run(tokens, capture=["layers.1.resid_pre"])["layers.1.resid_pre"]
    for edits in ([wipe, shift], [shift, wipe]):
        run = model.run(tokens, capture=["layers.1.resid_mid", "layers.1.attn_out"], interventions=edits)
        assert torch.allclose(run["layers.1.resid_mid"], base + 1, atol=1e-5)
        assert not run["layers.1.attn_out"].any()


def test_values_go_to_where_the_tensor_is() -> None:
    """A layer on another device: everything an edit holds is moved there (torch's meta device stands for it)."""
    source = vs.Activations({SITE: randn(2, 5, 8)}, vs.Tokens(torch.ones(2, 5, dtype=torch.long)))
    whole, real = torch.zeros(2, 5, 8, device="meta"), torch.ones(2, 5, dtype=torch.bool)
    edits = edits_at(str(SITE), 8, source)
    swap = vs.Interchange(SITE, source=source, examples=torch.tensor([1, 0]), source_positions=torch.tensor([1, 2]))
    mean = vs.Ablate(SITE, mode="mean", reference=source)
    for edit in [*(e for e in edits if not isinstance(e, vs.Interchange | vs.Replace)), swap, mean]:
        chosen = torch.ones(2, 5, dtype=torch.bool)
        at = {site.whole: whole for site in (*edit.part.reads, *edit.part.writes)}
        assert {tensor.device.type for tensor in apply(edit, at, Place(real, chosen=chosen)).values()} == {"meta"}
        index = torch.arange(5).expand(2, -1)
        assert {t.device.type for t in apply(edit, at, Place(real, index, chosen)).values()} == {"meta"}


# ---------------------------------------------------------------------------------------------- print, JSON, hash, file


def every_edit(model: vs.Model, tokens: vs.Tokens) -> list[Any]:
    source = model.run(tokens, capture=[SITE, "layers.1.z"]).activations
    direction, space = vs.Direction(SITE, randn(48), "a"), vs.Subspace(SITE, randn(3, 48, seed=1), "b")
    return [
        vs.Patch("layers.1.z[2]", source=source, positions=torch.tensor([0, 1, 2, 3, 4, 5])),
        vs.Patch(SITE, source=randn(48)), vs.Freeze(SITE, source=source, positions=range(3)),
        vs.Interchange(space, source=source, examples=torch.tensor([1, 0, 2, 3, 4, 5]), source_positions=2),
        vs.Ablate("layers.1.z", mode="mean", reference=source), vs.Ablate(SITE, mode="resample", reference=source),
        vs.Ablate("layers.0.pattern", positions=torch.eye(6, 9).bool()), vs.Steer(direction, scale=-2.0, positions=-7),
        vs.Steer(SITE, scale=1.5, vector=randn(48).bfloat16()), vs.Project(space, keep=True, centre=randn(48)),
        vs.Project(direction, centre=source), vs.Noise("embed", scale=3.0, std=0.1, seed=2, positions=[1, 2]),
        vs.Replace(SITE, "layers.2.mlp_out", torch.tanh, "tanh"),
    ]  # fmt: skip


def test_edits_survive_a_file_and_do_the_same(model: vs.Model, tokens: vs.Tokens, tmp_path: Path) -> None:
    edits = every_edit(model, tokens)
    save(edits, tmp_path / "edits.json")
    again = load(tmp_path / "edits.json", functions={"tanh": torch.tanh})
    for before, after in zip(edits, again, strict=True):
        assert type(before) is type(after)
        assert before.content_hash == after.content_hash
        runs = [model.run(tokens, interventions=[edit]).logits for edit in (before, after)]
        assert torch.equal(*runs), before


def test_the_json_is_plain_and_needs_no_file_when_there_are_no_tensors(tmp_path: Path) -> None:
    edit = vs.Ablate("layers.1.z[2]", positions=[3])
    assert from_json(json.loads(json.dumps(edit.to_json()))).content_hash == edit.content_hash
    save([edit], tmp_path / "one.json")
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_the_hash_sees_everything_that_matters_and_nothing_else(model: vs.Model, tokens: vs.Tokens) -> None:
    vector = randn(48)
    base = vs.Steer(SITE, scale=1.0, vector=vector, positions=[1])
    same = vs.Steer(str(SITE), scale=1.0, vector=vector.clone(), positions=[1])
    assert base.content_hash == same.content_hash
    changes: list[dict[str, Any]] = [{"scale": 2.0}, {"vector": vector + 1e-6}, {"positions": [2]}, {"positions": None}]
    hashes = {
        vs.Steer(SITE, **{"scale": 1.0, "vector": vector, "positions": [1], **c}).content_hash for c in changes
    } | {vs.Steer("layers.0.resid_post", scale=1.0, vector=vector, positions=[1]).content_hash, base.content_hash}
    assert len(hashes) == 6
    assert len({edit.content_hash for edit in every_edit(model, tokens)}) == 13


def test_a_hash_stays_what_it_was() -> None:
    """Stored claims name edits by it; another release or machine must not change it."""
    ablate = vs.Ablate("layers.1.z[2]", positions=[3])
    steer = vs.Steer(SITE, scale=2.0, vector=torch.arange(4.0), positions="last")
    assert ablate.content_hash == "09c9f3d334d9116de49e39169567792d1afcbafd81cf4c2e71cd62e39b204ad4"
    assert steer.content_hash == "cdedf814e45a113d6d062292c29632ec5c9e1e60db3766ad0d36ed970458b210"


def test_edits_print_on_one_line(model: vs.Model, tokens: vs.Tokens) -> None:
    for edit in every_edit(model, tokens):
        text = repr(edit)
        assert text.startswith(f"{type(edit).__name__}(")
        assert "\n" not in text
        assert len(text) < 250
    assert repr(vs.Ablate("layers.1.z[2]")) == "Ablate(layers.1.z[2], mode=zero, seed=0)"
    assert "direction at layers.1.resid_post" in repr(vs.Steer(vs.Direction(SITE, randn(48)), scale=1.0))


def test_a_changed_tensor_file_is_found_and_missing_pieces_are_named(tmp_path: Path) -> None:
    edit = vs.Steer(SITE, scale=1.0, vector=randn(48))
    data, (name,) = edit.to_json(), tensors_of([edit])
    with pytest.raises(FileFormatError, match="does not match its hash"):
        from_json(data, {name: randn(48, seed=9)})
    with pytest.raises(InputError, match=r"the tensor .* is missing: pass tensors="):
        from_json(data)
    splice = vs.Replace(SITE, SITE, torch.tanh, "tanh").to_json()
    with pytest.raises(InputError, match=r"needs its function: pass functions=\{'tanh'"):
        from_json(splice)
    with pytest.raises(UnknownNameError, match="unknown edit 'melt'; known: ablate, erase, freeze, interchange"):
        from_json({**data, "edit": "melt"})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileFormatError, match="holds no stored interventions"):
        load(tmp_path / "bad.json")


class Sum(OneSite):
    """A part of one's own: the sum over a site's dimensions, written by shifting all of them."""

    site = SITE

    def read(self, whole: Tensor) -> Tensor:
        return whole.sum(-1)

    def write(self, whole: Tensor, value: Tensor) -> Tensor:
        return whole + ((value - whole.sum(-1)) / whole.shape[-1])[..., None]

    @property
    def ref(self) -> dict[str, Any]:
        return {"kind": "sum", "site": str(self.site)}


def test_a_part_that_is_kept_elsewhere_is_found_by_its_reference(
    model: vs.Model, tokens: vs.Tokens, tmp_path: Path
) -> None:
    part = Sum()
    edits = [vs.Ablate(part, positions=[2]), vs.Replace([part, SITE], SITE, lambda a, b: b + a[..., None], "add")]
    run = model.run(tokens, capture=[SITE], interventions=edits[:1])
    assert float(run[SITE][:, 2].sum(-1).abs().max()) < 1e-3
    save(edits, tmp_path / "edits.json")
    again = load(tmp_path / "edits.json", functions={"add": edits[1].fn}, parts=[part])
    assert [edit.content_hash for edit in again] == [edit.content_hash for edit in edits]
    for before, after in zip(edits, again, strict=True):
        assert torch.equal(*(model.run(tokens, interventions=[edit]).logits for edit in (before, after)))
    assert repr(edits[0]) == "Ablate(sum at layers.1.resid_post, mode=zero, positions=[2], seed=0)"
    with pytest.raises(UnknownNameError, match=r"unknown kind of part 'sum'.*load\(\.\.\., parts=\[part\]\)"):
        load(tmp_path / "edits.json", functions={"add": edits[1].fn})


def test_every_edit_reports_how_far_it_went(model: vs.Model, tokens: vs.Tokens, others: vs.Tokens) -> None:
    tokens = vs.Tokens(tokens.ids)
    source = model.run(vs.Tokens(others.ids), capture=[SITE]).activations
    for edit in edits_at(str(SITE), 48, source):
        (found,) = model.run(tokens, interventions=[edit]).diagnostics
        assert found["intervention"]["edit"] == type(edit).__name__.lower()
        assert found["norm_ratio"] >= 0
        assert found["z_rms"] > 0
    far, near = (model.run(tokens, interventions=[vs.Noise(SITE, scale=s)]).diagnostics[0] for s in (50.0, 0.01))
    assert far["norm_ratio"] > 5 > 1.1 > near["norm_ratio"]


def test_the_same_edit_given_twice_acts_and_reports_twice(model: vs.Model, tokens: vs.Tokens) -> None:
    shift = vs.Steer(SITE, scale=1.0, vector=torch.ones(48))
    run = model.run(tokens, capture=[SITE], interventions=[shift, shift])
    base = model.run(tokens, capture=[SITE])[SITE]
    assert torch.allclose(run[SITE] - base, torch.full((6, 9, 48), 2.0), atol=1e-5)
    assert len(run.diagnostics) == 2


# ------------------------------------------------------------------------------------------------- several sites read


def test_a_replacement_reads_several_sites(model: vs.Model, tokens: vs.Tokens) -> None:
    """The sum of what two layers' heads and MLPs wrote, put in a third's place, at two positions."""
    reads = ["layers.0.attn_out", "layers.1.mlp_out", vs.Site("attn_out", 1)]
    base = model.run(tokens, capture=[*reads, "layers.2.mlp_out"])
    sum_up = vs.Replace(reads, "layers.2.mlp_out", lambda a, b, c: a + 2 * b - c, "sum", positions=[1, 4])
    found = value(model, tokens, sum_up, "layers.2.mlp_out")
    expected = base["layers.0.attn_out"] + 2 * base["layers.1.mlp_out"] - base["layers.1.attn_out"]
    assert torch.allclose(found[:, [1, 4]], expected[:, [1, 4]], atol=1e-5)
    assert torch.equal(found[:, [0, 2, 3]], base["layers.2.mlp_out"][:, [0, 2, 3]])


def test_several_parts_are_read_after_earlier_edits_and_with_the_site_itself(
    model: vs.Model, tokens: vs.Tokens
) -> None:
    wipe = vs.Ablate("layers.0.z[1]")
    mix = vs.Replace(["layers.0.z[1]", "layers.1.z[0]", "layers.1.z[2]"], "layers.1.z[2]",
                     lambda a, b, own: a + b + own, "mix")  # fmt: skip
    run = model.run(tokens, capture=["layers.1.z"], interventions=[wipe, mix])["layers.1.z"]
    base = model.run(tokens, capture=["layers.1.z"], interventions=[wipe])["layers.1.z"]
    assert torch.allclose(run[:, :, 2], base[:, :, 0] + base[:, :, 2], atol=1e-5)


def test_a_replacement_of_several_reads_survives_a_file(model: vs.Model, tokens: vs.Tokens, tmp_path: Path) -> None:
    direction = vs.Direction(vs.Site.parse("layers.0.resid_post"), randn(48))

    def push(coordinate: Tensor, stream: Tensor) -> Tensor:
        return stream + coordinate[..., None]

    edit = vs.Replace([direction, "layers.1.resid_post"], "layers.2.mlp_out", push, "push", positions="last")
    save([edit], tmp_path / "edit.json")
    (again,) = load(tmp_path / "edit.json", functions={"push": push})
    assert again.content_hash == edit.content_hash
    assert [part["kind"] for part in edit.to_json()["read"]] == ["direction", "unit"]
    assert torch.equal(*(model.run(tokens, interventions=[e]).logits for e in (edit, again)))
    one = vs.Replace(["layers.0.z"], "layers.1.z", torch.clone, "copy")
    assert one.content_hash == vs.Replace("layers.0.z", "layers.1.z", torch.clone, "copy").content_hash


def test_every_site_that_is_read_must_come_first(model: vs.Model, tokens: vs.Tokens) -> None:
    late = vs.Replace(["layers.0.mlp_out", "layers.2.mlp_out"], "layers.1.mlp_out", lambda a, b: a + b, "sum")
    with pytest.raises(InterventionError, match=r"reads layers.2.mlp_out, which this pass makes only after layers.1"):
        model.run(tokens, interventions=[late])
    with pytest.raises(InputError, match="reads nothing: give read="):
        vs.Replace([], "layers.1.mlp_out", torch.clone, "copy")


# --------------------------------------------------------------------------------------------------- positions by name


def marked(tokens: vs.Tokens) -> vs.Tokens:
    """`subject` is another token in every prompt and none in the third; `span` two tokens, or one."""
    return vs.Tokens(tokens.ids, tokens.mask, named_positions={
        "subject": torch.tensor([1, 2, -1, 0, 4, 3]),
        "span": torch.tensor([[1, 2], [2, 3], [0, -1], [3, 4], [1, 1], [-1, 5]]),
    })  # fmt: skip


def mask(rows: list[list[int]]) -> Tensor:
    found = torch.zeros(6, 9, dtype=torch.bool)
    for row, numbers in enumerate(rows):
        found[row, numbers] = True
    return found


@pytest.mark.parametrize(
    ("positions", "rows"),
    [
        ("subject", [[1], [2], [], [0], [4], [3]]),
        ("span", [[1, 2], [2, 3], [0], [3, 4], [1], [5]]),
        (["subject", "span"], [[1, 2], [2, 3], [0], [0, 3, 4], [1, 4], [3, 5]]),
        (["subject", 5], [[1, 5], [2, 5], [5], [0, 5], [4, 5], [3, 5]]),
        ("first", [[0]] * 6),
    ],
)
@pytest.mark.parametrize("kind", ["resid_post", "z", "pattern", "resid_mid"])
def test_named_positions_are_each_prompts_own(
    model: vs.Model, tokens: vs.Tokens, positions: Any, rows: list[list[int]], kind: str
) -> None:
    name = f"layers.1.{kind}"
    by_name = model.run(marked(tokens), interventions=[vs.Ablate(name, positions=positions)])
    by_mask = model.run(tokens, interventions=[vs.Ablate(name, positions=mask(rows))])
    assert torch.equal(by_name.logits, by_mask.logits)
    assert not torch.equal(by_name.logits, model.run(tokens).logits)


def test_the_last_token_has_a_name_in_prompts_of_any_length(model: vs.Model, tokens: vs.Tokens) -> None:
    edits = [vs.Ablate("layers.1.z", positions=where) for where in ("last", tokens.lengths - 1)]
    assert torch.equal(*(model.run(tokens, interventions=[edit]).logits for edit in edits))


def test_names_mean_the_same_tokens_under_padding_on_the_left(model: vs.Model, tokens: vs.Tokens) -> None:
    ids, real = torch.zeros_like(tokens.ids), torch.zeros_like(tokens.real)
    for row, size in enumerate(tokens.lengths.tolist()):
        ids[row, 9 - size :], real[row, 9 - size :] = tokens.ids[row, :size], True
    left = vs.Tokens(ids, real, named_positions=marked(tokens).named_positions)
    edit = vs.Ablate("layers.1.resid_post", positions=["span", "last"])
    right = model.run(marked(tokens), interventions=[edit]).logits
    found = model.run(left, interventions=[edit]).logits
    for row, size in enumerate(tokens.lengths.tolist()):
        assert torch.allclose(found[row, 9 - size :], right[row, :size], atol=1e-4)


def test_names_hold_while_a_model_writes(model: vs.Model, tokens: vs.Tokens) -> None:
    steer = {"scale": 2.0, "vector": randn(48)}
    for positions, rows in (("span", [[1, 2], [2, 3], [0], [3, 4], [1], [5]]),
                            (["subject", 10], [[1, 10], [2, 10], [10], [0, 10], [4, 10], [3, 10]])):  # fmt: skip
        wide = torch.zeros(6, 12, dtype=torch.bool)
        for row, numbers in enumerate(rows):
            wide[row, numbers] = True
        by_name = model.generate(marked(tokens), 4, [vs.Steer(SITE, **steer, positions=positions)])  # type: ignore[arg-type]
        by_mask = model.generate(tokens, 4, [vs.Steer(SITE, **steer, positions=wide)])  # type: ignore[arg-type]
        assert by_name.new == by_mask.new
        assert torch.equal(by_name.logits, by_mask.logits)
    last = [model.generate(tokens, 3, [vs.Steer(SITE, **steer, positions=where)])  # type: ignore[arg-type]
            for where in ("last", tokens.lengths - 1)]  # fmt: skip
    assert torch.equal(last[0].logits, last[1].logits)


def test_named_positions_print_serialise_and_hash() -> None:
    edit = vs.Ablate("layers.1.z", positions=["subject", 3])
    again = from_json(json.loads(json.dumps(edit.to_json())))
    assert again.positions == ["subject", 3]
    assert again.content_hash == edit.content_hash != vs.Ablate("layers.1.z", positions=["subject"]).content_hash
    assert "positions=['subject', 3]" in repr(edit)


def test_pairs_hand_their_named_positions_on() -> None:
    pairs = tiny.pairs()
    named = replace(pairs, named_positions={"changed": torch.tensor([2, 3, 2, 3, 2, 3])})
    assert named.subset([4, 1]).tokens("clean").named_positions["changed"].tolist() == [2, 3]
    assert named.content_hash == pairs.content_hash  # how places are called is no property of the prompts


@pytest.mark.parametrize(
    ("named_positions", "message"),
    [
        ({"a": torch.tensor([0, 1])}, r"named position 'a' must be int64 \[6\] or \[6, n\]; got torch.int64 \(2,\)"),
        ({"a": torch.zeros(6)}, r"named position 'a' must be int64 \[6\] or \[6, n\]; got torch.float32"),
        (
            {"a": torch.tensor([0, 0, 40, 0, 0, 0])},
            r"named position 'a' of prompt 2 is 40, but the prompt has \d tokens",
        ),
        ({"a": torch.full((6,), -2)}, r"named position 'a' of prompt 0 is -2"),
    ],
)
def test_named_positions_that_are_no_positions_are_refused(
    tokens: vs.Tokens, named_positions: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        vs.Tokens(tokens.ids, tokens.mask, named_positions=named_positions)


def test_a_name_that_the_prompts_do_not_have_lists_those_they_have(model: vs.Model, tokens: vs.Tokens) -> None:
    edit = vs.Ablate("layers.1.z", positions="object")
    for inputs, known in ((marked(tokens), "first, last, span, subject"), (tokens, "first, last")):
        with pytest.raises(UnknownNameError, match=rf"unknown position 'object'; known: {known}\. Name your own"):
            model.run(inputs, interventions=[edit])
        with pytest.raises(UnknownNameError, match="unknown position 'object'"):
            model.generate(inputs, 2, [edit])
