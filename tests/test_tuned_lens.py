"""The tuned lens: it begins as the logit lens, ends no further from the model, and an interruption changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.describe import LogitLens, TunedLens, TunedLensFitter, fit_tuned_lens
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import Event

SMALL: dict[str, Any] = {"steps": 60, "batch_size": 64, "lr": 3e-3, "context": 24, "sink": vs.silent}


def texts(n: int = 120, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, tiny.VOCAB, (20,), generator=generator).tolist() for _ in range(n)]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_on_new_text_it_is_no_further_from_the_model_than_the_logit_lens_at_any_layer(family: str) -> None:
    model = tiny.model(family)
    sites = ["layers.0.resid_mid", "layers.*.resid_post"]
    lens = fit_tuned_lens(model, texts(), sites=sites, **SMALL)
    fresh = vs.Tokens(torch.tensor(texts(30, seed=1)))
    logit, tuned = (one.read(fresh).kl.flatten(1).nanmean(1) for one in (LogitLens(model, sites), lens))
    assert bool((tuned <= logit + 1e-6).all())
    assert bool((tuned[:3] < 0.95 * logit[:3]).all())  # and it did learn
    assert float(tuned[3].abs()) < 1e-4
    assert set(lens.translators) == set(lens.sites[:3])
    said = lens.metadata["kl_of_unseen_rows"]["layers.0.resid_mid"]
    assert said["tuned_lens"] < said["logit_lens"]


def test_untrained_it_is_the_logit_lens_and_is_then_not_kept() -> None:
    model = tiny.model("llama")
    run = model.run(tiny.pairs().tokens("clean"), capture="layers.*.resid_post")
    rows = [run[site].flatten(0, 1) for site in model.sites("layers.*.resid_post")]
    fitter = TunedLensFitter(model, model.sites("layers.*.resid_post")[:2], torch.ones(2), 1e-3, 10)
    lens = fitter.fitted(fitter.sites, rows[:2], rows[2], {})
    assert not lens.translators
    assert torch.equal(
        lens.logits("layers.1.resid_post", rows[1]), LogitLens(model).logits("layers.1.resid_post", rows[1])
    )


def test_a_step_is_the_one_that_adam_takes() -> None:
    model = tiny.model("llama")
    run = model.run(tiny.pairs().tokens("clean"), capture="layers.*.resid_post")
    row, final = (run[f"layers.{n}.resid_post"].flatten(0, 1) for n in (0, 2))
    fitter = TunedLensFitter(model, model.sites("layers.0.resid_post"), torch.ones(1), 1e-2, 10**9)
    weight = torch.zeros(48, 48, requires_grad=True)
    bias = torch.zeros(48, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=1e-2)
    target = LogitLens(model).logits("layers.2.resid_post", final).log_softmax(-1).detach()
    for _ in range(3):
        fitter.update([row], final)
        adam.zero_grad()
        found = LogitLens(model).logits("layers.0.resid_post", row + row @ weight.T + bias).log_softmax(-1)
        (target.exp() * (target - found)).sum(-1).mean().backward()
        adam.step()
    assert torch.allclose(fitter.weight[0], torch.cat([weight, bias[:, None]], 1), atol=1e-5)


def test_saved_and_read_again_and_refused_for_another_model(tmp_path: Path) -> None:
    model = tiny.model("llama")
    lens = fit_tuned_lens(model, texts(), **{**SMALL, "steps": 3}, out=tmp_path / "lens")
    again = TunedLens.load(tmp_path / "lens", model)
    residual = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    for site in lens.sites:
        assert torch.equal(lens.logits(site, residual), again.logits(site, residual))
    assert again.metadata["steps"] == 3
    with pytest.raises(InputError, match=r"belongs to LlamaForCausalLM with weights \w{12}; LlamaForCausalLM has"):
        TunedLens.load(tmp_path / "lens", tiny.model("llama", seed=1))
    weights = tmp_path / "lens" / "lens.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(FileFormatError, match=r"lens\.safetensors is truncated or was altered"):
        TunedLens.load(tmp_path / "lens", model)
    (tmp_path / "lens" / "config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="is not the description of a tuned lens"):
        TunedLens.load(tmp_path / "lens", model)
    with pytest.raises(FileFormatError, match="is not the description of a tuned lens"):
        TunedLens.load(tmp_path / "nowhere", model)


class StoppedError(Exception):
    """Stands for a kill."""


def test_stopped_anywhere_it_goes_on_and_the_lens_is_the_same_to_the_bit(tmp_path: Path) -> None:
    model, how = tiny.model("llama"), {**SMALL, "steps": 12, "checkpoint_every": 3}
    whole = fit_tuned_lens(model, texts(), **how)
    heard: list[Event] = []
    for stop in (5, 7, 10):

        def sink(event: Event, stop: int = stop) -> None:
            heard.append(event)
            if event.kind == "advance" and event.done == stop:
                raise StoppedError

        with pytest.raises(StoppedError):
            fit_tuned_lens(model, texts(), **{**how, "sink": sink}, out=tmp_path)
    lens = fit_tuned_lens(model, texts(), **how, out=tmp_path)
    for site, translator in whole.translators.items():
        assert torch.equal(translator.weight, lens.translators[site].weight)
        assert torch.equal(translator.bias, lens.translators[site].bias)
    assert any("going on after step 6" in event.message for event in heard)
    assert any(event.message.startswith("expected cost: about") for event in heard)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "lens.safetensors"]
    finished = fit_tuned_lens(model, texts(), **how, out=tmp_path)
    assert finished.metadata == lens.metadata
    with pytest.raises(InputError, match="holds a lens of another run"):
        fit_tuned_lens(model, texts(), **{**how, "steps": 13}, out=tmp_path)


def test_a_stream_and_a_store_are_sources_and_others_are_refused(tmp_path: Path) -> None:
    model, other = tiny.model("llama"), tiny.model("llama", seed=1)
    sites = ["layers.1.resid_post", "layers.2.resid_post"]
    how = {**SMALL, "steps": 4, "sites": ["layers.1.resid_post"]}
    streamed = fit_tuned_lens(model, vs.data.stream(model, texts(), sites=sites, context=24), **how)
    store = vs.data.harvest(model, texts(), sites=sites, out=tmp_path / "acts", context=24, sink=vs.silent)
    stored = fit_tuned_lens(model, store, **how)
    assert streamed.sites == stored.sites == tuple(model.sites("layers.1.resid_post"))
    with pytest.raises(InputError, match="are of LlamaForCausalLM with other weights than those of"):
        fit_tuned_lens(other, store, **how)
    with pytest.raises(InputError, match=r"these activations lack layers\.0\.resid_post; they are of layers\.1"):
        fit_tuned_lens(model, store, **{**how, "sites": "layers.0.resid_post"})
    with pytest.raises(InputError, match=r"nothing to train: at layers\.2\.resid_post every lens is the model"):
        fit_tuned_lens(model, store, **{**how, "sites": "layers.2.resid_post"})
    with pytest.raises(InputError, match="steps must be at least 1; got 0"):
        fit_tuned_lens(model, store, **{**how, "steps": 0})
    with pytest.raises(UnknownNameError, match=r"unknown site of this lens 'layers\.0\.resid_post'"):
        stored.logits("layers.0.resid_post", torch.zeros(48))
