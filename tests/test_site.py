"""A Site's name and the Site say the same thing; what is no site is refused with the known ones."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vesalius as vs
from vesalius.errors import InputError, UnknownNameError
from vesalius.site import GLOBAL_KINDS, INDEX_AXIS, LAYER_KINDS, STEP, select

TAGS = st.sampled_from(["", "base", "tuned-2", "a.b"])
STACKS = st.sampled_from(["", "encoder", "decoder"])


@st.composite
def sites(draw: st.DrawFn) -> vs.Site:
    tag = draw(TAGS)
    kind = draw(st.sampled_from([*LAYER_KINDS, *GLOBAL_KINDS, "module"]))
    if kind == "module":
        path = draw(st.from_regex(r"[a-z_]+(\.[a-z0-9_]+){0,3}", fullmatch=True))
        return vs.Site("module", module=path, side=draw(st.sampled_from(["in", "out"])), tag=tag)
    layer = draw(st.integers(0, 200)) if kind in LAYER_KINDS else None
    index = draw(st.none() | st.integers(0, 5000)) if kind in INDEX_AXIS else None
    return vs.Site(kind, layer, index, stack=draw(STACKS), tag=tag)


@settings(deadline=None)
@given(sites())
def test_a_site_survives_its_name(site: vs.Site) -> None:
    assert vs.Site.parse(str(site)) == site
    assert vs.Site.parse(site) is site


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_site_or_an_input_error(text: str) -> None:
    try:
        site = vs.Site.parse(text)
    except InputError as error:
        assert str(error)
    else:
        assert vs.Site.parse(str(site)) == site


def test_sites_sort_as_a_forward_pass_makes_them() -> None:
    names = ["embed", "layers.0.resid_pre", "layers.0.q", "layers.0.pattern", "layers.0.z", "layers.0.attn_out",
             "layers.0.resid_mid", "layers.0.mlp_post", "layers.0.resid_post", "layers.1.z[0]", "layers.1.z[2]",
             "layers.10.resid_pre", "final_norm", "logits"]  # fmt: skip
    parsed = [vs.Site.parse(name) for name in names]
    assert [str(site) for site in sorted(reversed(parsed), key=lambda site: site.order)] == names
    assert set(STEP) == set(LAYER_KINDS)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("layers.5.resid_post", ("batch", "pos", "d_model")),
        ("layers.5.z", ("batch", "pos", "head", "d_head")),
        ("layers.5.z[3]", ("batch", "pos", "d_head")),
        ("layers.5.k", ("batch", "pos", "kv_head", "d_head")),
        ("layers.5.pattern[1]", ("batch", "query_pos", "key_pos")),
        ("layers.5.mlp_post[7]", ("batch", "pos")),
        ("logits", ("batch", "pos", "vocab")),
        ("module:features.3|out", ()),
    ],
)
def test_an_index_takes_its_axis_away(name: str, axes: tuple[str, ...]) -> None:
    assert vs.Site.parse(name).axes == axes


def test_indexing_and_taking_the_whole_undo_each_other() -> None:
    site = vs.Site.parse("layers.5.z")
    assert str(site[3]) == "layers.5.z[3]"
    assert site[3].whole == site


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("layers.5.zz", UnknownNameError, "unknown site inside a layer 'zz'; known: attn_out, .*, z."),
        ("embedding", UnknownNameError, "unknown site 'embedding'; known: .*embed, .*logits"),
        ("layers.1.logits", UnknownNameError, "unknown site inside a layer 'logits'"),
        ("z", InputError, r"'z' needs a layer: layers.<number>.z"),
        ("final_norm[3]", InputError, "'final_norm' takes no index"),
        ("layers.x.z", InputError, "is not a site name. Examples: layers.5.resid_post"),
        ("layers.-1.z", InputError, "is not a site name"),
        ("layers.5.z[-1]", InputError, "is not a site name"),
        ("module:features.3", InputError, r"is not a site name.*module:features.3\|out"),
        ("", InputError, "is not a site name"),
    ],
)
def test_what_is_no_site_is_refused(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vs.Site.parse(name)


KNOWN = [vs.Site(kind, layer) for layer in (10, 2, 0) for kind in ("resid_post", "z")] + [vs.Site("embed")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers.*.z", ["layers.0.z", "layers.2.z", "layers.10.z"]),
        ("layers.*.z[3]", ["layers.0.z[3]", "layers.2.z[3]", "layers.10.z[3]"]),
        ("layers.2.*", ["layers.2.z", "layers.2.resid_post"]),
        ("layers.10.z", ["layers.10.z"]),
        ("*.resid_post", ["layers.0.resid_post", "layers.2.resid_post", "layers.10.resid_post"]),
        (vs.Site("embed"), ["embed"]),
    ],
)
def test_globs_select_in_forward_order(pattern: str | vs.Site, expected: list[str]) -> None:
    assert [str(site) for site in select(pattern, KNOWN)] == expected


def test_a_glob_that_matches_nothing_lists_kinds_not_hundreds_of_names() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown site 'layers.\*.q'; known: embed, layers.\*.resid_post, layers.\*.z."
    ):
        select("layers.*.q", KNOWN)
