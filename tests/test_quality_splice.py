"""A dictionary in the place of a model's own activations: identity, zeros, plain hooks, documents it never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import vesalius as vs
from planted_features import draw, unit
from vesalius.data import ActivationStore
from vesalius.data.packing import Context
from vesalius.dictionaries import Dictionary, TrainConfig, quality, train
from vesalius.dictionaries.evaluation.sample import Drawn
from vesalius.dictionaries.evaluation.sample import draw as draw_rows
from vesalius.dictionaries.evaluation.splice import Losses, _batches
from vesalius.dictionaries.held_out import evaluation_rows
from vesalius.errors import InputError
from vesalius.site import Site

SITE = Site.parse("layers.1.resid_post")
SITES = [f"layers.1.{kind}" for kind in ("mlp_in", "mlp_out", "z", "resid_post")]
D = 48


@pytest.fixture(scope="module")
def model() -> vs.Model:
    return tiny.model("llama")


@pytest.fixture(scope="module")
def store(model: vs.Model, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    documents = [torch.randint(2, tiny.VOCAB, (size,), generator=draw(size)).tolist() for size in range(12, 42)]
    folder = tmp_path_factory.mktemp("store") / "acts"
    return vs.data.harvest(model, documents, sites=SITES, out=folder, context=30)


def coder(weights: Tensor, site: Site = SITE, **changes: Any) -> Dictionary:
    n, d = weights.shape
    fields: dict[str, Any] = {
        "activation": "relu", "in_sites": (site,), "out_sites": (site,), "encoders": (weights.T.contiguous(),),
        "decoders": (weights,), "b_enc": torch.zeros(n), "b_dec": (torch.zeros(d),),
    }  # fmt: skip
    return Dictionary(**{**fields, **changes})


def identity(d: int = D, site: Site = SITE) -> Dictionary:
    return coder(torch.cat([torch.eye(d), -torch.eye(d)]), site)


def test_the_identity_recovers_all_of_the_loss_and_zeros_none(model: vs.Model, store: ActivationStore) -> None:
    same = quality(identity(), store, model=model, n=200)
    assert [same.figures[name].value for name in ("kl_recovered", "kl_recovered_mean")] == [1.0, 1.0]
    assert same.figures["ce_increase"].value == same.figures["kl"].value == 0
    nothing = replace(identity(), decoders=(torch.zeros(2 * D, D),))
    zero = quality(nothing, store, model=model, n=200)
    assert zero.figures["kl_recovered"].value == 0.0
    assert zero.figures["ce"].value == pytest.approx(
        zero.figures["ce_clean"].value + zero.figures["ce_increase_zero"].value
    )


def plainly(model: vs.Model, contexts: Sequence[Context], fn: Any) -> tuple[float, float]:
    """Cross-entropy and KL, by a hook on the layer itself and one context at a time."""
    losses, divergences = [], []
    for context in contexts:
        ids, kept = torch.from_numpy(context.ids)[None], torch.from_numpy(context.kept)

        def hook(_m: Any, _i: Any, out: Any, kept: Tensor = kept) -> Any:
            whole = out if isinstance(out, Tensor) else out[0]
            new = torch.where(kept[None, :, None], fn(whole), whole)
            return new if isinstance(out, Tensor) else (new, *out[1:])

        with torch.no_grad():
            clean = model.module(ids).logits.log_softmax(-1)[0]
            handle = model.module.model.layers[1].register_forward_hook(hook)
            edited = model.module(ids).logits.log_softmax(-1)[0]
            handle.remove()
        for at in range(ids.shape[1] - 1):
            if kept[at]:
                losses.append(-float(edited[at, ids[0, at + 1]]))
                divergences.append(float((clean[at].exp() * (clean[at] - edited[at])).sum()))
    return sum(losses) / len(losses), sum(divergences) / len(divergences)


def drawn(store: ActivationStore, n: int) -> Drawn:
    """What `quality` measures on."""
    return draw_rows(identity(), evaluation_rows(store, {}), store, n, 0)


def test_losses_are_those_of_plain_hooks_one_context_at_a_time(model: vs.Model, store: ActivationStore) -> None:
    dictionary, rows = coder(unit(60, D, 3), b_enc=torch.full((60,), -0.5)), drawn(store, 250)
    found = quality(dictionary, store, model=model, n=250, contexts=10**6, batch_tokens=100).figures
    mean = rows.fit[1][0].mean(0)
    ways = {"": dictionary.reconstruct, "_mean": lambda x: mean.expand_as(x), "_zero": torch.zeros_like}
    for name, fn in ways.items():
        ce, kl = plainly(model, rows.test.contexts, fn)
        increase = found[f"ce_increase{name}"].value
        assert found["ce_clean"].value + increase == pytest.approx(ce, abs=1e-5)
        assert found[f"kl{name}"].value == pytest.approx(kl, abs=1e-5)
    assert found["ce"].value == pytest.approx(found["ce_clean"].value + found["ce_increase"].value)


def test_rows_and_contexts_are_of_documents_that_were_not_trained_on(model: vs.Model, store: ActivationStore) -> None:
    own = ActivationStore.open(store.folder, sites=[SITE])
    dictionary = train(own, TrainConfig(n_latents=32, k=4, batch_size=64, steps=5, held_out=0.3))
    found = quality(dictionary, store, model=model, n=100)
    assert found.data["seen"] is False
    assert found.data["unit"] == "documents"
    first = own.trace(own.split(0.3)[1].rows.start).document
    assert f"documents {first} and later" in found.data["words"]
    whole = train(own, TrainConfig(n_latents=32, k=4, batch_size=64, steps=5, held_out=0))
    again = train(own, TrainConfig(n_latents=32, k=4, batch_size=64, steps=5, held_out=0.3, seed=1))
    words = [seed.compared.words for seed in quality(dictionary, own, n=100, others=[whole, again]).seeds]
    assert ["it was trained on some of these rows" in line for line in words] == [True, False]
    flattered = quality(whole, own, n=100)
    assert flattered.data["seen"] is True and "flatter" in flattered.data["words"]


def test_the_sample_holds_whole_contexts_with_their_rows(store: ActivationStore) -> None:
    found = drawn(store, 150)
    assert 150 <= len(found.test) < 180
    whole = torch.cat([rows[SITES.index(str(SITE))] for _, rows in store.in_order(64)])
    numbers = {tuple(row[:3].tolist()): number for number, row in enumerate(whole)}
    of = lambda rows: [numbers[tuple(row[:3].tolist())] for row in rows]  # noqa: E731
    wanted = [context.document for context in found.test.contexts for _ in range(context.rows)]
    assert [store.trace(number).document for number in of(found.test.inputs[0])] == wanted
    assert set(of(found.fit[0][0])) & set(of(found.test.inputs[0])) == set()
    owners = {int(group): document for group, document in zip(found.test.groups, wanted, strict=True)}
    assert [owners[int(group)] for group in found.test.groups] == wanted


def test_a_transcoder_is_spliced_from_one_site_to_another(model: vs.Model, store: ActivationStore) -> None:
    """One whose latents never fire writes zeros."""
    ins, outs = Site.parse("layers.1.mlp_in"), Site.parse("layers.1.mlp_out")
    dead = coder(unit(8, D), out_sites=(outs,), in_sites=(ins,), b_enc=torch.full((8,), -1e9))
    found = quality(dead, store, model=model, n=150)
    assert found.figures["kl_recovered"].value == 0.0
    assert found.figures["ce_increase"].value == found.figures["ce_increase_zero"].value


def test_heads_side_by_side_are_spliced_too(model: vs.Model, store: ActivationStore) -> None:
    site = Site.parse("layers.1.z")
    assert quality(identity(48, site), store, model=model, n=150).figures["kl_recovered"].value == 1.0


def test_another_model_than_the_activations_are_of_is_refused(store: ActivationStore) -> None:
    with pytest.raises(InputError, match="with other weights than LlamaForCausalLM has"):
        quality(identity(), store, model=tiny.model("llama", seed=1), n=100)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 10_000])
def test_batches_hold_each_context_once_and_no_more_tokens_than_asked(
    store: ActivationStore, batch_tokens: int
) -> None:
    contexts = [context for _, context in store.contexts()]
    batches = list(_batches(contexts, batch_tokens))
    assert sorted(row for batch in batches for row in batch) == [*range(len(contexts))]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(contexts[row].ids) for row in batch) <= batch_tokens


def test_a_folder_of_a_dictionary_and_one_of_activations_are_enough(store: ActivationStore, tmp_path: Path) -> None:
    vs.dictionaries.save(identity(), tmp_path / "d")
    assert quality(vs.dictionaries.load(tmp_path / "d"), ActivationStore.open(store.folder), n=100).fvu == 0


def losses(mean: float, spread: float, groups: int = 12) -> Losses:
    """Of 100 tokens a group: the dictionary adds .02 nats each, zeros 3, the mean about `mean`."""
    noise = torch.randn(groups, generator=draw(3)).double() * spread
    tokens = torch.full((groups,), 100.0, dtype=torch.float64)
    clean = 3.0 * tokens
    columns = [tokens, clean]
    for added, kl in ((torch.full_like(noise, 0.02), 0.1), (mean + noise, 0.2), (torch.full_like(noise, 3.0), 3.0)):
        columns += [clean + added * tokens, kl * tokens]
    return Losses(("dictionary", "mean", "zero"), torch.stack(columns, 1).numpy())


@pytest.mark.parametrize("groups", [3, 12])
def test_no_share_is_given_of_a_harm_that_may_be_none(groups: int) -> None:
    """975 % of mean ablation, where the mean activation hardly changes anything; nats say the same without dividing."""
    found = losses(0.003, 0.05, groups).figures("dictionary")
    assert "loss_recovered_mean" not in found
    assert found["ce_increase_mean"].value < 0.05
    assert found["ce_increase"].value == pytest.approx(0.02)
    assert found["loss_recovered"].value == pytest.approx(1 - 0.02 / 3)
    assert found["kl_recovered_mean"].value == pytest.approx(0.5)
    assert losses(0.5, 0.05, groups).figures("dictionary")["loss_recovered_mean"].value == pytest.approx(0.96, abs=0.01)
    less = losses(-0.5, 0.05, groups).figures("dictionary")
    assert "loss_recovered_mean" not in less  # the mean does good, and a share of that is no share of harm


def test_a_head_of_its_own_is_a_site_like_any_other(model: vs.Model, tmp_path: Path) -> None:
    """Documented, trained and then not judged: its own name was not found among the sites of its store."""
    documents = [torch.randint(2, tiny.VOCAB, (30,), generator=draw(size)).tolist() for size in range(16)]
    head = "layers.1.z[1]"
    sites = ["layers.1.z", head, "layers.0.z[1]"]
    own = vs.data.harvest(model, documents, sites=sites, out=tmp_path / "acts", context=40, sink=vs.silent)
    config = TrainConfig(n_latents=16, k=2, steps=10, batch_size=32, held_out=0.3, in_sites=(head,), out_sites=(head,))
    trained: Any = train(own, config, sink=vs.silent)
    assert trained.in_sites == (Site.parse(head),)
    found = quality(trained, own, model=model, contexts=4, sink=vs.silent)
    assert {"fvu", "ce_increase"} <= set(found.figures)
    assert {one.name for one in found.baselines} >= {"untrained", "neurons"}
    part = ActivationStore.open(tmp_path / "acts", sites=["layers.*.z[1]"])
    assert [str(site) for site in part.sites] == ["layers.1.z[1]", "layers.0.z[1]"]
    whole = ActivationStore.open(tmp_path / "acts", sites=["layers.1.z"])
    with pytest.raises(InputError, match=r"have no layers\.1\.z\[1\] of its own; they have layers\.1\.z\. Harvest it"):
        train(whole, config, sink=vs.silent)
