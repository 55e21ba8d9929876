"""Total, direct and indirect effects: the direct one is what is left when everything downstream is frozen by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import families
import tiny
import vesalius as vs
from vesalius.describe import EffectSplit, split_effects
from vesalius.errors import InputError, UnknownNameError
from vesalius.model.direct import frozen_norm


def split(model: vs.Model, parts: Sequence[object], **how: object) -> EffectSplit:
    return split_effects(model, tiny.pairs(), parts, sink=vs.silent, **how)  # type: ignore[arg-type]


def by_hand(model: vs.Model, part: vs.Part, base: str = "clean") -> Tensor:
    """The effect with every later attention and MLP held at the base run by interventions."""
    pairs = tiny.pairs()
    outs = [*model.sites("layers.*.attn_out"), *model.sites("layers.*.mlp_out")]
    site = part.writes[0]
    first = model.run(pairs.tokens(base), capture=[*outs, site.whole])
    other = model.run(pairs.tokens("corrupted" if base == "clean" else "clean"), capture=[site.whole])
    attention = site.kind in ("q", "k", "v", "z", "pattern", "attn_out")
    own = {"attn_out"} if attention else {"mlp_out"} if site.kind.startswith("mlp") else {"attn_out", "mlp_out"}
    before = -1 if site.layer is None else site.layer
    later = [out for out in outs if out.layer > before or (out.layer == before and out.kind not in own)]
    if site.kind == "resid_post":
        later = [out for out in outs if out.layer > before]
    edits = [vs.Patch(part, source=other.activations), *(vs.Freeze(out, source=first.activations) for out in later)]
    return vs.logit_diff(model.run(pairs.tokens(base), interventions=edits).logits, pairs) - vs.logit_diff(
        first.logits, pairs
    )


PARTS = ["embed", "layers.0.z[1]", "layers.0.mlp_out", "layers.1.attn_out", "layers.0.mlp_post[3]", "layers.0.v",
         "layers.0.resid_post"]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "granite", "cohere", "olmo2", "opt", "qwen2_moe"])
def test_the_direct_effect_is_what_is_left_with_everything_downstream_frozen(name: str) -> None:
    model = families.model(name)
    known = {str(site) for site in model.sites("*")}
    parts = [vs.Unit(vs.Site.parse(part)) for part in PARTS if str(vs.Site.parse(part).whole) in known]
    parts += [vs.Direction("layers.0.mlp_out", torch.arange(1.0, 49.0)), vs.Group("layers.0.z", (0, 2))]
    for base in ("clean", "corrupted"):
        found = split(model, parts, freeze_norm=False, base=base)
        for number, part in enumerate(parts):
            expected = by_hand(model, part, base)
            assert torch.allclose(found.direct[number], expected, atol=2e-4), (part, base)
            assert torch.allclose(found.total[number], found.direct[number] + found.indirect[number])
        assert float(found.direct.abs().mean()) > 1e-3


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_with_the_norm_frozen_it_is_path_patching_and_a_difference_of_attributions(family: str) -> None:
    model, pairs = tiny.model(family), tiny.pairs()
    senders = ["layers.0.z[1]", "layers.1.z[2]", "layers.1.mlp_out", "layers.2.mlp_out"]
    found = split(model, senders)
    paths = vs.path_patching(model, pairs, senders=senders, receivers="logits", sink=vs.silent)
    assert torch.allclose(found.direct, paths.effects, atol=1e-4)
    last, rows = "layers.2.mlp_out", torch.arange(len(pairs))
    clean, corrupted = (
        model.run(pairs.tokens(which), [last, "layers.2.resid_post"]) for which in ("clean", "corrupted")
    )
    frozen = frozen_norm(model, clean["layers.2.resid_post"][rows, pairs.at], pairs.answer, pairs.distractor)
    moved = frozen.of((corrupted[last] - clean[last])[rows, pairs.at])
    assert torch.allclose(found.direct[3], moved, atol=1e-4)


def test_the_last_mlp_has_no_indirect_effect_and_an_early_one_is_mostly_indirect() -> None:
    model = tiny.model("llama")
    last = split(model, ["layers.2.mlp_out"], freeze_norm=False)
    assert float(last.indirect.abs().max()) < 1e-4 < float(last.direct.abs().max())
    assert last.blind_spot < 1e-3
    early = split(model, ["layers.0.v"], freeze_norm=False)
    assert early.blind_spot > 0.2
    # At another position than the read one, all that a part does is indirect.
    whole = split(model, ["embed"], freeze_norm=False)
    assert float(whole.direct.abs().max()) == 0.0
    assert whole.blind_spot == 1.0


def test_any_metric_of_the_read_position_and_measurements_with_diagnostics() -> None:
    model = tiny.model("gpt2")
    found = split(model, ["layers.1.z[0]", "layers.2.mlp_out"], metric=vs.kl_divergence, freeze_norm=False)
    assert float(found.indirect[1].abs().max()) < 1e-4
    one = found.measurement("layers.1.z[0]", "total")
    assert one.values == tuple(found.total[0].double().tolist())
    assert set(one.diagnostics["off_distribution"]) == {"norm_ratio", "z_rms"}
    assert one.unit == "nats"


def test_a_split_is_a_table_and_a_page() -> None:
    pandas = pytest.importorskip("pandas")
    found = split(tiny.model("llama"), ["layers.1.z[0]", "layers.2.mlp_out"])
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 12
    assert (frame.total - frame.direct - frame.indirect).abs().max() < 1e-5
    assert "layers.1.z[0]" in found._repr_html_()
    assert "of the effects are indirect" in repr(found)


def test_what_has_no_direct_effect_is_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(InputError, match="BertForMaskedLM has no direct effects"):
        split(families.model("bert"), ["layers.0.mlp_out"])
    with pytest.raises(InputError, match="next_token_loss reads all positions"):
        split(model, ["layers.0.mlp_out"], metric=vs.next_token_loss)
    with pytest.raises(InputError, match="logits is not written onto the residual stream"):
        split(model, ["logits"])
    with pytest.raises(UnknownNameError, match="unknown base 'dirty'"):
        split(model, ["layers.0.mlp_out"], base="dirty")
    with pytest.raises(InputError, match="no parts"):
        split(model, [])
    with pytest.raises(UnknownNameError, match="unknown kind of effect 'other'; known: direct, indirect, total"):
        split(model, ["layers.0.mlp_out"]).measurement("layers.0.mlp_out", "other")
    both = vs.Together((vs.Direction("layers.0.resid_post", torch.ones(48)),
                        vs.Direction("layers.1.resid_post", torch.ones(48))))  # fmt: skip
    with pytest.raises(InputError, match="at several sites, one after the other"):
        split(model, [both])
