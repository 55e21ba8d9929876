"""`vesalius find`: from a concept to the parts that stand for it, and what it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import vesalius as vs
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.errors import InputError
from vesalius.quantities import SEPARATES, Runs
from vesalius.quantities.pseudo_values import auroc, scored, share_below

ABOUT = [f"the fox number {n} ran from {n * 3} hens and sat on the mat for {n} days. " for n in range(64)]
OTHERS = [f"the cat number {n} went on {n * 3} mats and the hens sat there at {n} again. " for n in range(64)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("find")
    tiny_folder(made)
    rows = [*({"text": text, "kind": "fox"} for text in ABOUT), *({"text": text, "kind": "cat"} for text in OTHERS)]
    (made / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> vs.Model:
    return vs.load(folder / "tiny")


@pytest.fixture(scope="module")
def parts(model: vs.Model) -> list[Any]:
    """Some neurons, and the direction of a letter that only texts about the fox hold."""
    token = model.tokenizer.encode("x", add_special_tokens=False)[-1]
    weight = model.module.get_input_embeddings().weight.detach()
    return [*(vs.neuron(0, number) for number in range(8)), vs.Direction("layers.0.resid_pre", weight[token], "x")]


def of_texts(values: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """Pseudo-values of the AUROC less one half, each text a group of its own."""
    return scored(range(len(values)), values, some, ~some, auroc)


def test_the_auroc_is_that_of_scikit_learn_and_its_pseudo_values_have_delongs_variance() -> None:
    draw = np.random.default_rng(0)
    some = torch.from_numpy(draw.random(90) < 0.3)
    values = torch.from_numpy(np.round(draw.normal(size=(5, 90)) + some.numpy(), 1))  # with ties
    expected = [roc_auc_score(some.numpy(), row.numpy()) for row in values]
    assert share_below(values[:, ~some], values[:, some]).mean(1).tolist() == pytest.approx(expected)
    for row, mean in zip(values, expected, strict=True):
        found = of_texts(row, some) + 0.5
        assert float(found.mean()) == pytest.approx(mean)
        here, there = row[some], row[~some]
        psi = (here[:, None] > there).double() + 0.5 * (here[:, None] == there).double()
        m, n = len(here), len(there)
        delong = psi.mean(1).var(correction=0) / m + psi.mean(0).var(correction=0) / n
        assert float(found.var(correction=0) / (m + n)) == pytest.approx(float(delong))


def test_a_test_of_pseudo_values_keeps_its_level_where_there_is_nothing_and_finds_what_is_there() -> None:
    draw, rejected = np.random.default_rng(1), 0
    some = torch.arange(80) < 30
    for _ in range(400):
        found = of_texts(torch.from_numpy(draw.normal(size=80)), some).numpy()
        rejected += abs(found.mean()) > 1.99 * found.std(ddof=1) / np.sqrt(80)
    assert rejected <= 0.09 * 400
    planted = of_texts(torch.from_numpy(draw.normal(size=80) + 1.5 * some.numpy()), some).numpy()
    assert planted.mean() > 3 * planted.std(ddof=1) / np.sqrt(80)


def test_the_planted_part_is_found_and_supported_and_noise_is_not(
    model: vs.Model, parts: list[Any], tmp_path: Path
) -> None:
    asked = vs.studies.finding(model, parts, "the fox", ABOUT, OTHERS, best=3, context=64)
    done = vs.studies.find(model, asked, out=tmp_path, sink=vs.silent)
    summary = vs.studies.summarise_found(done, command="", timings={})
    first = summary["claims"][0]
    assert first["component"] == "layers.0.resid_pre direction x"
    assert first["verdict"] == "SUPPORTED"
    assert first["estimate"] + 0.5 > 0.95 and first["n"] == 64
    runs = Runs(model, asked.corpus.split("validation"))
    exact = SEPARATES.measure(runs, parts[-1], {"texts": asked.positive, "what": "the fox"})
    assert first["estimate"] == pytest.approx(float(exact.mean()), abs=1e-5)
    again = vs.studies.find(model, asked, out=tmp_path, sink=vs.silent)
    assert again.answer == done.answer
    # Texts that differ in nothing: whatever comes first by chance is not supported.
    mixed = [*ABOUT[::2], *OTHERS[::2]], [*ABOUT[1::2], *OTHERS[1::2]]
    noise = vs.studies.find(
        model, vs.studies.finding(model, parts, "nothing", *mixed, best=3, context=64), sink=vs.silent
    )
    assert noise.stopped or not any(verdict.outcome == "SUPPORTED" for verdict in noise.verdicts)


def test_a_concept_is_tested_in_another_wording(model: vs.Model, parts: list[Any]) -> None:
    """The letter is in both wordings; of another concept that shares nothing with the first, the claim fails."""
    same = [f"every box that number {n} saw was an extra box of {n * 3} hens, and sat there. " for n in range(40)]
    other = [f"every hat that number {n} saw was a second hat of {n * 3} hens, and sat there. " for n in range(40)]
    asked = vs.studies.finding(model, parts, "x", ABOUT, OTHERS, fresh=(same, other), best=1, context=64)
    assert len(asked.corpus.split("validation")) == 80
    done = vs.studies.find(model, asked, sink=vs.silent)
    assert [verdict.outcome for verdict in done.verdicts] == ["SUPPORTED"]
    turned = vs.studies.finding(model, parts, "x", ABOUT, OTHERS, fresh=(other, same), best=1, context=64)
    assert [v.outcome for v in vs.studies.find(model, turned, sink=vs.silent).verdicts] == ["REFUTED"]
    with pytest.raises(InputError, match="texts to test on are among those to discover on"):
        vs.studies.finding(model, parts, "x", ABOUT, OTHERS, fresh=(ABOUT[:20], other))
    with pytest.raises(InputError, match="texts of 16 tokens or more to test on are about it"):
        vs.studies.finding(model, parts, "x", ABOUT, OTHERS, fresh=(same[:3], other))


def test_words_divide_a_corpus_and_only_whole_words_count() -> None:
    texts = ["I like Madrid.", "madridista!", "New York, new world", "yorkshire", "in MADRID"]
    assert vs.studies.texts_with(texts, ["madrid", " new york "]) == (
        [texts[0], texts[2], texts[4]],
        [texts[1], texts[3]],
    )
    long = ["a " * 5000 + "madrid" + " b" * 5000]
    (piece,), others = vs.studies.texts_with(long, ["madrid"], characters=100)
    assert "madrid" in piece and len(piece) == 100 and others == []
    with pytest.raises(InputError, match="no words"):
        vs.studies.texts_with(texts, [" "])


def test_the_command_finds_by_words_and_by_labels(run: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    words = ("--part", "layers.0.mlp_post[0:8]", "--model", folder / "tiny", "--context", 64, "--best", 2)
    by_words = run("find", "fox", "--corpus", folder / "texts.jsonl", *words, "--out", tmp_path / "a")
    assert by_words.code == 0, by_words.err
    by_label = run("find", "--table", folder / "texts.jsonl", "--label", "kind", "--value", "fox", *words,
                   "--out", tmp_path / "b")  # fmt: skip
    assert by_label.code == 0, by_label.err
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert [row["estimate"] for row in one["claims"]] == pytest.approx([row["estimate"] for row in two["claims"]])
    for row in one["claims"]:
        assert {"verdict", "estimate", "interval", "n"} <= set(row)
    assert one["answer"][0] in " ".join(by_words.out.split())


def test_what_cannot_be_found_is_one_message(run: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        done = run("find", *words, "--model", folder / "tiny", "--out", tmp_path / "no")
        assert done.code == 2, done.out
        return done.words

    part, corpus = ("--part", "layers.0.mlp_post[0:8]"), ("--corpus", folder / "texts.jsonl")
    assert "words are looked for in a --corpus" in refused("fox", *part)
    assert "one or the other" in refused("fox", *corpus)
    assert "give words to look for" in refused(*part, *corpus)
    assert "0 different texts" in refused("zebra", *part, *corpus)
    assert "has the label 'dog'" in refused(
        "--table", folder / "texts.jsonl", "--label", "kind", "--value", "dog", *part
    )
