"""A dictionary whose file is misread is an error that says what it should have been, and never a bad number."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.dictionaries import Dictionary, load, save, verify
from vesalius.dictionaries.evaluation import readings
from vesalius.errors import FileFormatError, InputError

verifying = sys.modules["vesalius.dictionaries.evaluation.verify"]
SITE = "layers.1.resid_post"
WORDS = ("the", "hens", "and", "fox", "said", "he", "12", "7", "in", "on", "a", "of")


def texts(n: int, seed: int) -> list[str]:
    draws = torch.randint(len(WORDS), (n, 40), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[int(word)] for word in row) for row in draws]


TEXTS = texts(40, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> vs.Model:
    return vs.load(tiny_folder(tmp_path_factory.mktemp("model")), sink=vs.silent)


@pytest.fixture(scope="module")
def trained(model: vs.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dictionary]:
    """TopK and JumpReLU-like (BatchTopK) dictionaries that do their work."""
    out = tmp_path_factory.mktemp("acts")
    store = vs.data.harvest(model, texts(120, seed=0), sites=[SITE], out=out, context=64, sink=vs.silent)
    found = {}
    for kind in ("topk", "batchtopk"):
        config = vs.TrainConfig(kind=kind, n_latents=96, k=8, steps=300, batch_size=256, lr=3e-3)
        coder = vs.dictionaries.train(store, config, sink=vs.silent)
        assert isinstance(coder, Dictionary)
        found[kind] = coder
    return found


@pytest.mark.parametrize(
    ("kind", "written"),
    [("topk", "vesalius"), ("topk", "sparsify"), ("batchtopk", "saelens"),
     *(pytest.param(*both, marks=pytest.mark.slow) for both in (("topk", "saelens"), ("batchtopk", "gemma_scope")))],
)  # fmt: skip
def test_what_was_written_and_read_back_is_what_it_was(
    trained: dict[str, Dictionary], model: vs.Model, tmp_path: Path, kind: str, written: str
) -> None:
    save(trained[kind], tmp_path / "x", format=written)
    coder = load(tmp_path / "x", model=model, texts=TEXTS, site=SITE)
    found = verify(coder, model, TEXTS, tokens=1000, sink=vs.silent)
    assert found.figures["fvu"].value < 0.5
    assert 4 <= found.figures["l0"].value <= 16
    assert found.claimed_l0 == (None if written == "gemma_scope" else pytest.approx(8, rel=0.2))
    assert found.figures["ce_increase"].value < found.figures["ce_increase_mean"].value
    assert repr(found).startswith("Verified(l0 ")


def misread(coder: Dictionary, model: vs.Model) -> str:
    with pytest.raises(FileFormatError) as caught:
        verify(coder, model, TEXTS, tokens=1000, sink=vs.silent)
    return str(caught.value)


def test_another_activation_function_is_an_error(trained: dict[str, Dictionary], model: vs.Model) -> None:
    told = misread(replace(trained["topk"], activation="relu", k=None), model)
    assert "where its file speaks of 8: it is misread. With TopK with k = 8 it would be" in told
    told = misread(replace(trained["batchtopk"], activation="relu", extras={}), model)
    assert "TopK with k = 8" in told


def test_inputs_in_other_units_are_an_error(trained: dict[str, Dictionary], model: vs.Model) -> None:
    """A factor that was folded twice, or not at all."""
    coder = trained["batchtopk"]
    scale = coder.metadata["trained_with"]["in_scale"][0]
    assert "inputs divided by" in misread(replace(coder, in_scale=(1 / scale,), out_scale=(1 / scale,)), model)
    assert "inputs multiplied by" in misread(replace(coder, in_scale=(scale,), out_scale=(scale,)), model)


def test_another_place_is_an_error_that_names_the_right_one(trained: dict[str, Dictionary], model: vs.Model) -> None:
    wrong = vs.Site.parse("layers.0.mlp_in")
    told = misread(replace(trained["topk"], in_sites=(wrong,), out_sites=(wrong,)), model)
    assert f"With activations of {SITE} it would be" in told


def test_weights_that_were_turned_or_belong_elsewhere_are_an_error(
    trained: dict[str, Dictionary], model: vs.Model
) -> None:
    coder = trained["topk"]
    mixed = coder.decoders[0][torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    assert "is misread" in misread(replace(coder, decoders=(mixed,)), model)
    assert "of the variance unexplained" in misread(replace(coder, encoders=(-coder.encoders[0],)), model)


def test_a_dictionary_of_another_model_is_an_error(trained: dict[str, Dictionary], model: vs.Model) -> None:
    narrow = vs.dictionaries.train(
        torch.randn(200, 12), vs.TrainConfig(n_latents=24, k=3, steps=3, batch_size=32), sink=vs.silent
    )
    assert isinstance(narrow, Dictionary)
    site = vs.Site.parse(SITE)
    assert "is of 12 numbers at layers.1.resid_post, where tiny has" in misread(
        replace(narrow, in_sites=(site,), out_sites=(site,)), model
    )
    far = vs.Site.parse("layers.7.resid_post")
    assert "tiny has 2 layers" in misread(replace(trained["topk"], in_sites=(far,), out_sites=(far,)), model)
    with pytest.raises(InputError, match="named no site"):
        lost = vs.Site("module", module="?")
        verify(replace(trained["topk"], in_sites=(lost,), out_sites=(lost,)), model, TEXTS, sink=vs.silent)


def test_all_readings_are_judged_on_the_same_rows(
    trained: dict[str, Dictionary], model: vs.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every site, with and without a token at the start, less the outliers of any of them."""
    judged: list[list[int]] = []
    at_sites: list[list[bool]] = []
    outliers = verifying.outliers

    def few_are_far(rows: tuple[torch.Tensor, ...], *others: Any) -> torch.Tensor:
        # Each store has outliers of its own: of the sites that it has, a tenth of the rows each.
        far = outliers(rows, *others) | (torch.arange(len(rows[0])) % 10 < len(rows) / 2)
        at_sites.append(far.tolist())
        return far

    def totals_of(reconstructor: Any, sample: Any) -> Any:
        judged.append([int(token) for context in sample.contexts for token in context.ids[context.kept]])
        assert len(judged[-1]) == len(sample) == len(sample.inputs[0])
        return totals(reconstructor, sample)

    totals = verifying.totals_of
    monkeypatch.setattr(verifying, "outliers", few_are_far)
    for module in (verifying, readings):
        monkeypatch.setattr(module, "totals_of", totals_of)
    found = verify(trained["topk"], model, TEXTS, tokens=1000, context=24, sink=vs.silent)
    assert len({tuple(tokens) for tokens in judged}) == 1
    assert len(judged) > 8
    assert 0 < found.rows == len(judged[0]) < min(len(far) - sum(far) for far in at_sites)
    assert "no token at the start of contexts" in [reading.words for reading in found.others]


@pytest.mark.slow
def test_quality_of_a_foreign_file_checks_it_first(
    run: Callable[..., Done], trained: dict[str, Dictionary], tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path)
    vs.data.harvest(
        vs.load(folder, sink=vs.silent), TEXTS, sites=[SITE], out=tmp_path / "acts", context=64, sink=vs.silent
    )
    save(trained["topk"], tmp_path / "sae", format="saelens")
    config: dict[str, Any] = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    config["architecture"] = "standard"
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    done = run("quality", tmp_path / "sae", tmp_path / "acts", "--model", folder, "--out", tmp_path / "page")
    assert done.code == 2
    assert "it is misread" in done.words
    assert not (tmp_path / "page").exists()
    assert "Measured all the same with --no-check" in done.words
    done = run("quality", tmp_path / "sae", tmp_path / "acts", "--model", folder, "--out", tmp_path / "page",
               "--no-check", "--rows", 200, "--contexts", 4)  # fmt: skip
    assert done.code == 0, done.words
    assert (tmp_path / "page" / "quality.html").exists()


@pytest.mark.filterwarnings("ignore:.*is a pickle")
def test_quality_takes_what_its_errors_ask_for(
    run: Callable[..., Done], trained: dict[str, Dictionary], model: vs.Model, tmp_path: Path
) -> None:
    vs.data.harvest(model, TEXTS, sites=[SITE], out=tmp_path / "acts", context=64, sink=vs.silent)
    coder = trained["topk"]
    state = {"W_enc": coder.W_enc.T, "W_dec": coder.W_dec.T, "b_enc": coder.b_enc, "b_dec": coder.b_dec[0],
             "notes": torch.zeros(2)}  # fmt: skip
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "layer7.sae.pt"
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, path)
    options: list[object] = []
    for asked, more in (
        ("--unpickle", ["--unpickle"]), ("--ignore", ["--ignore", "notes"]), ("--k", ["--k", 8]),
        ("which the dictionary reads", ["--site", SITE]),
    ):  # fmt: skip
        done = run("quality", path, tmp_path / "acts", "--rows", 200, "--out", tmp_path / "page", *options)
        assert done.code == 2
        assert asked in done.words
        options += more
    done = run("quality", path, tmp_path / "acts", "--rows", 200, "--out", tmp_path / "page", *options)
    assert done.code == 0, done.words
    done = run("quality", path, tmp_path / "acts", *options, "--in-scale", 2)
    assert done.code == 2
    assert "in_scale is for files of openmoss, saelens" in done.words
