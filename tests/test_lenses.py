"""Lenses: at the last layer they are the model, and what they say of other layers is what plain torch says."""

from __future__ import annotations

import pytest
import torch

import families
import tiny
import vesalius as vs
from vesalius.describe import LogitLens
from vesalius.errors import InputError, SelfCheckError, UnknownNameError
from vesalius.model.readout import unembedded

LENSED = sorted(name for name, family in families.FAMILIES.items() if family.direct)
REFUSED = sorted(name for name, family in families.FAMILIES.items() if not family.direct)


def tokens() -> vs.Tokens:
    return tiny.pairs().tokens("clean")


@pytest.mark.parametrize("name", LENSED)
def test_at_the_last_layer_the_lens_is_the_model(name: str) -> None:
    model = families.model(name)
    last = model.sites("layers.*.resid_post")[-1]
    run = model.run(tokens(), capture=[last])
    found = LogitLens(model).logits(last, run[last])
    real = tokens().real
    assert torch.allclose(found[real], run.logits[real].float(), atol=1e-4)
    read = LogitLens(model).read(tokens())
    assert float(read.kl[-1].nan_to_num().abs().max()) < 1e-4
    assert float(read.kl[0].nanmean()) > 1e-3  # and it does not say so of every layer


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_logits_are_no_readout_of_the_stream_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="has no lens"):
        LogitLens(families.model(name))


def test_what_it_says_is_what_plain_torch_says() -> None:
    net = tiny.llama()
    model, rows = vs.Model(net), tokens()
    with torch.no_grad():
        out = net(rows.ids, attention_mask=rows.real.long(), output_hidden_states=True)
        at_1 = net.lm_head(net.model.norm(out.hidden_states[2])).log_softmax(-1)
        final = out.logits.log_softmax(-1)
    read = LogitLens(model, "layers.1.resid_post").read(rows, k=3)
    real = rows.real
    kl = (final.exp() * (final - at_1)).sum(-1)
    assert torch.allclose(read.kl[0][real], kl[real], atol=1e-5)
    assert torch.allclose(read.entropy[0][real], -(at_1.exp() * at_1).sum(-1)[real], atol=1e-5)
    assert torch.equal(read.top[0][real], at_1.topk(3, -1).indices[real])
    following = rows.ids.roll(-1, 1)
    inner = real & torch.nn.functional.pad(real[:, 1:], (0, 1))
    assert torch.equal(read.target[inner], following[inner])
    assert bool((read.target[~inner] == -1).all())
    own = at_1.gather(2, following[..., None])
    assert torch.allclose(read.target_probability[0][inner], own[..., 0].exp()[inner], atol=1e-6)
    assert torch.equal(read.rank[0][inner], (at_1 > own).sum(-1)[inner])
    assert bool(read.kl[0][~real].isnan().all())


def test_targets_are_the_model_s_own_or_given_and_others_are_refused() -> None:
    model, rows = tiny.model("gpt2"), tokens()
    read = LogitLens(model).read(rows, targets="model")
    assert bool((read.rank[-1][rows.real] == 0).all())
    answer = torch.full((len(rows),), 7)
    given = LogitLens(model).read(rows, targets=answer)
    assert bool((given.target[rows.real] == 7).all())
    with pytest.raises(UnknownNameError, match="unknown targets 'last'; known: model, next"):
        LogitLens(model).read(rows, targets="last")
    with pytest.raises(InputError, match=r"targets are int64 token ids \[6\] or \[6, 9\]"):
        LogitLens(model).read(rows, targets=torch.zeros(3, dtype=torch.long))
    with pytest.raises(InputError, match="a lens reads the residual stream"):
        LogitLens(model, "layers.1.mlp_out")


def test_batches_do_not_change_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.model("llama"), tokens()
    whole = LogitLens(model).read(rows)
    monkeypatch.setattr("vesalius.describe.lenses.BATCH", 10)
    monkeypatch.setattr("vesalius.describe.lenses.ROWS", 4)
    parts = LogitLens(model).read(rows)
    assert torch.allclose(whole.kl, parts.kl, atol=1e-5, equal_nan=True)
    assert torch.equal(whole.top, parts.top)


def test_an_edited_run_is_read_with_its_diagnostic() -> None:
    model, rows = tiny.model("llama"), tokens()
    plain = LogitLens(model).read(rows)
    edited = LogitLens(model).read(rows, interventions=vs.Ablate("layers.1.mlp_out"))
    assert torch.allclose(plain.top_probability[0], edited.top_probability[0], equal_nan=True)
    assert not torch.allclose(plain.top_probability[1], edited.top_probability[1], equal_nan=True)
    assert {"norm_ratio", "z_rms"} <= set(edited.diagnostics[0])
    assert edited.measurement("layers.1.resid_post").diagnostics["off_distribution"]


def test_a_readout_that_is_not_the_model_s_is_found() -> None:
    model = families.model("granite")
    object.__setattr__(model.layout, "logit_scale", 1.0)
    with pytest.raises(SelfCheckError, match=r"give logits that differ by .* lacks a scale or a norm"):
        LogitLens(model).read(tokens())


def test_a_reading_is_a_table_and_a_page() -> None:
    pandas = pytest.importorskip("pandas")
    read = LogitLens(tiny.model("llama"), ["layers.0.resid_mid", "layers.*.resid_post"]).read(tokens())
    frame = read.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 4 * int(tokens().real.sum())
    assert frame.site.unique().tolist()[:2] == ["layers.0.resid_mid", "layers.0.resid_post"]
    assert read._repr_html_().count("<tr>") >= 2 * 4
    with pytest.raises(UnknownNameError, match=r"unknown site of this lens 'layers.0.resid_pre'"):
        read.measurement("layers.0.resid_pre")


@pytest.mark.demo_model
def test_on_the_demo_model_the_lens_is_the_model_at_the_end_and_far_from_it_before(demo: vs.Model) -> None:
    read = LogitLens(demo, ["layers.5.resid_post", "layers.20.resid_post", "layers.29.resid_post"]).read(
        ["The capital of France is", "The hen sat on her eggs until they hatched"]
    )
    early, late, last = (read.measurement(site).estimate for site in read.sites)
    assert early > late > 100 * abs(last)
    run = demo.run(["The capital of France is"], capture="layers.29.resid_post")
    assert torch.allclose(unembedded(demo, run["layers.29.resid_post"]), run.logits, atol=1e-4)
