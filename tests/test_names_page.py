"""docs/names.md: every TransformerLens name on the page is the site beside it, or is refused as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.errors import InputError, UnknownNameError
from vesalius.site import _NO_SITE, GLOBAL_KINDS, HOOKS, INDEX_AXIS, LAYER_KINDS, select

PAGE = (Path(__file__).parent.parent / "docs" / "names.md").read_text("utf-8")


def cells(table: str) -> list[list[str]]:
    (body,) = re.findall(rf"<!-- {table} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.strip().splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


ROWS = [(names(site)[0], names(lens)[0]) for site, lens, *_ in cells("names") if lens != "-"]
REFUSED = [name for lens, *_ in cells("refused") for name in names(lens)]


@pytest.mark.parametrize(("ours", "theirs"), ROWS)
def test_a_transformerlens_name_is_the_site_beside_it(ours: str, theirs: str) -> None:
    site = vs.Site.parse(theirs)
    assert (str(site), site.hook_name) == (ours, theirs)
    assert str(vs.Site.parse(f"base/{theirs}")) == f"base/{ours}"
    if site.kind in INDEX_AXIS:
        assert str(vs.Site.parse(f"{theirs}[2]")) == f"{ours}[2]"
        assert vs.Site.parse(ours)[2].hook_name == theirs
    else:
        with pytest.raises(InputError, match="takes no index"):
            vs.Site.parse(f"{theirs}[2]")


def test_the_page_has_every_site_of_a_decoder_and_every_name_that_is_understood() -> None:
    listed = {vs.Site.parse(names(site)[0]).kind for site, *_ in cells("names")}
    two_stacks = {kind for kind in LAYER_KINDS if kind.startswith("cross_") or kind == "resid_mid_cross"}
    assert listed == {*LAYER_KINDS, *GLOBAL_KINDS} - two_stacks
    assert {vs.Site.parse(ours).kind for ours, _ in ROWS} == set(HOOKS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_no_site_is_refused_with_what_to_write(name: str) -> None:
    (write,) = (names(row[2]) for row in cells("refused") if name in names(row[0]))
    with pytest.raises(InputError, match=rf"'{re.escape(name)}' stands for no site: ") as refusal:
        vs.Site.parse(name)
    said = str(refusal.value).replace("<number>", "3")
    assert [text for text in write if text.replace(r"\|", "|") not in said] == []


def test_the_page_lists_every_name_that_is_refused() -> None:
    assert {name.removeprefix("blocks.3.") for name in REFUSED} == set(_NO_SITE)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "blocks.3.hook_nothing",
            UnknownNameError,
            r"unknown TransformerLens name 'blocks.3.hook_nothing'; known: blo",
        ),
        ("blocks.3.hook_embed", UnknownNameError, "unknown TransformerLens name 'blocks.3.hook_embed'"),
        ("hook_resid_post", InputError, r"needs a layer: blocks.<number>.hook_resid_post, here layers.<number>.resid"),
        ("blocks.x.hook_z", UnknownNameError, "unknown TransformerLens name"),
        ("blocks.*.attn.hook_z", InputError, "is not a site name"),
        ("attn.hook_rot_q", InputError, r"before rotation, as layers.<number>.q and layers.<number>.k"),
    ],
)
def test_what_is_no_name_of_transformerlens_is_refused(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vs.Site.parse(name)


KNOWN = [vs.Site(kind, layer) for layer in (10, 2, 0) for kind in ("resid_post", "z")] + [vs.Site("embed")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.attn.hook_z", ["layers.0.z", "layers.2.z", "layers.10.z"]),
        ("blocks.*.attn.hook_z[3]", ["layers.0.z[3]", "layers.2.z[3]", "layers.10.z[3]"]),
        ("blocks.2.*", ["layers.2.z", "layers.2.resid_post"]),
        ("*hook_resid_post", ["layers.0.resid_post", "layers.2.resid_post", "layers.10.resid_post"]),
        ("blocks.10.hook_resid_post", ["layers.10.resid_post"]),
        ("hook_embed", ["embed"]),
    ],
)
def test_globs_over_transformerlens_names_select(pattern: str, expected: list[str]) -> None:
    assert [str(site) for site in select(pattern, KNOWN)] == expected


def test_a_glob_that_matches_nothing_says_why() -> None:
    with pytest.raises(InputError, match=r"'blocks.\*.attn.hook_rot_q' stands for no site: .*layers.\*.q"):
        select("blocks.*.attn.hook_rot_q", KNOWN)
    with pytest.raises(
        UnknownNameError, match=r"unknown site 'blocks.\*.mlp.hook_post'; known: embed, layers.\*.resid"
    ):
        select("blocks.*.mlp.hook_post", KNOWN)
    with pytest.raises(UnknownNameError, match=r"unknown TransformerLens name 'blocks.\*.hook_nothing'"):
        select("blocks.*.hook_nothing", KNOWN)


def test_our_globs_see_our_names_only() -> None:
    assert select("*b*", KNOWN) == [vs.Site("embed")]


def test_a_model_takes_them_wherever_it_takes_a_site() -> None:
    model = tiny.model("gpt2")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert model.sites("blocks.*.mlp.hook_post") == model.sites("layers.*.mlp_post")
    run = model.run(ids, capture=["blocks.1.attn.hook_z", "blocks.*.hook_resid_mid", "hook_pos_embed"])
    assert run["layers.1.z"] is run["blocks.1.attn.hook_z"]
    assert torch.equal(run["blocks.1.attn.hook_z[2]"], run["layers.1.z"][:, :, 2])
    edited = [
        model.run(ids, interventions=[vs.Ablate(name, mode="zero")]).logits
        for name in ("blocks.1.hook_mlp_out", "layers.1.mlp_out")
    ]
    assert torch.equal(*edited)
    pairs = vs.Pairs(ids, ids.flip(1), torch.tensor([1]), torch.tensor([2]))
    swept = [
        vs.sweep(model, pairs, sites=name, each="head", sink=vs.silent)
        for name in ("blocks.*.attn.hook_z", "layers.*.z")
    ]
    assert torch.equal(swept[0].values, swept[1].values)
    assert swept[0].sites == swept[1].sites
