"""`vesalius probe`: verdicts on networks whose answer was planted, the report, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vesalius as vs
from pages import Page
from test_cli import Done
from test_cli import run as run
from tiny_folder import tiny_folder
from vesalius.concepts.effect import Behaviour, partners
from vesalius.errors import InputError, TokenizerError
from vesalius.inputs import Corpus, Tokens
from vesalius.quantities import CARRIES, MOVES, Runs
from vesalius.quantities.pseudo_values import auroc
from vesalius.toys.carrier import SITE, Carrier, carrier

WANTED = {"uses": vs.studies.USED, "ignores": vs.studies.UNUSED, "random": vs.studies.ABSENT}


def network(kind: str, seed: int) -> tuple[vs.Model, Carrier]:
    planted = carrier(used=kind != "ignores", seed=seed)
    return (vs.validate.reinitialised(planted.model, seed + 1) if kind == "random" else planted.model), planted


def concept_of(planted: Carrier, seed: int) -> vs.Concept:
    ids, bits = planted.sequences(seed)
    return vs.Concept("kind", ids, tuple("ab"[int(bit)] for bit in bits))


@pytest.mark.parametrize("kind", WANTED)
def test_the_verdict_is_the_planted_one_and_a_second_run_finds_it_done(kind: str, tmp_path: Path) -> None:
    model, planted = network(kind, 3)
    asked = vs.studies.probing(model, concept_of(planted, 3), sites=[SITE, "module:embed|out"], most=200)
    steps = vs.studies.PROBE[:4]
    done = vs.studies.probe(model, asked, out=tmp_path, sink=vs.silent, steps=steps)
    assert vs.studies.said_of(done.verdicts) == [WANTED[kind]]
    if kind == "uses":
        assert abs(done["choice"].directions[0].angle(planted.direction)) > 0.8
        assert done["choice"].best == SITE
    again = vs.studies.probe(model, asked, out=tmp_path, sink=vs.silent, steps=steps)
    assert again.answer == done.answer and not done["family"].exploratory
    with pytest.raises(InputError, match="another study"):
        other = vs.studies.probing(model, concept_of(planted, 3), sites=[SITE], most=200)
        vs.studies.probe(model, other, out=tmp_path, sink=vs.silent, steps=steps)


def test_quantities_agree_with_plain_runs() -> None:
    planted = carrier(True, 1)
    ids, bits = planted.sequences(1)
    few = slice(0, 60)
    corpus = Corpus(Tokens(ids[few]), {"group": tuple(map(str, range(60)))})
    texts = [digest[:16] for digest, bit in zip(corpus.example_hashes, bits, strict=False) if bit]
    runs, given = Runs(planted.model, corpus), {"texts": texts, "what": "b"}
    run = planted.model.run(ids[few], capture=SITE)
    values = run[SITE][:, -1].detach()
    some = bits[few].bool()
    along = values @ planted.direction.vector
    assert float(CARRIES.measure(runs, planted.direction, given).mean()) == pytest.approx(
        auroc(along[some], along[~some])[0], abs=1e-6
    )
    moved = MOVES.measure(runs, planted.direction, {**given, "answers": [[0], [1]]})
    partner = partners([str(bool(bit)) for bit in some], 0)
    patch = vs.Patch(planted.direction, source=along[partner][:, None].expand(-1, 4), positions="last")
    logits = planted.model.run(ids[few], interventions=[patch]).logits[:, -1].detach()
    level = Behaviour(((0,), (1,))).level
    change = level(logits) - level(run.logits[:, -1].detach())
    assert np.allclose(moved.numpy(), torch.where(some, -change, change).numpy(), atol=1e-5)
    assert "no Direction" in MOVES.refuses(runs, vs.neuron(0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("probe")
    tiny_folder(made)
    rows = [
        {"text": f"the {animal} number {n} ran on the mat", "kind": animal, "who": n}
        for animal in ("fox", "cat")
        for n in range(40)
    ]
    turned = [{**row, "text": "not " + str(row["text"])} for row in rows]
    for name, some in (("animals", rows), ("turned", turned)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return made


def command(folder: Path, out: Path, *more: Any) -> tuple[Any, ...]:
    columns = ("--label", "kind", "--group", "who", "--shifted", f"turned={folder / 'turned.jsonl'}")
    return ("probe", folder / "animals.jsonl", *columns, "--model", folder / "tiny", "--out", out, *more)


def test_the_command_writes_a_report_that_says_what_the_summary_says(
    run: Callable[..., Done], folder: Path, tmp_path: Path
) -> None:
    done = run(*command(folder, tmp_path / "out"))
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["schema"] == "vesalius/probe-study/1" and len(summary["claims"]) == 2
    assert {"verdict", "estimate", "interval", "n"} <= set(summary["claims"][0])
    assert set(summary["transfer"]) == {"discovery", "validation", "turned"}
    first = summary["probes"]["sites"][0]
    assert {"majority", "bag_of_words", "shuffled", "random_weights"} <= set(first["controls"])
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert not page.badly_closed and not page.open and not page.scripts
    assert summary["labels"][0]["verdict"] in page.text
    for sentence in summary["answer"]:
        assert sentence in page.text
    assert "random weights" in page.text and "scored on turned" in page.text
    assert all(one["reader"] in page.text for one in summary["after_erasure"])
    assert (tmp_path / "out" / "ledger.sqlite").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--answers", " yes"), "are two words"),
        (("--shifted", "turned"), "NAME=FILE"),
        (("--text", "sentence"), "unknown column"),
        (("--most", "10"), "at least 24"),
        (("--sites", "layers.7.resid_post"), "layers.7.resid_post"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Callable[..., Done], folder: Path, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    done = run(*command(folder, tmp_path / "out", *more))
    assert done.code == 2 and words in done.err.replace("\n", " ")


def test_too_few_examples_and_answers_of_several_tokens_are_refused(folder: Path) -> None:
    model = vs.load(folder / "tiny")
    few = vs.Concept("few", tuple(f"text {n}" for n in range(20)), ("a", "b") * 10)
    with pytest.raises(InputError, match="at least 24 in 12 groups"):
        vs.studies.probing(model, few)
    many = vs.Concept("many", tuple(f"text {n}" for n in range(120)), ("a", "b") * 60)
    with pytest.raises(TokenizerError, match="a single token"):
        vs.studies.probing(model, many, answers=(" entirely unknown words", " b"))
    with pytest.raises(InputError, match="names of classes"):
        vs.studies.probing(model, vs.Concept("degree", many.texts, tuple(float(n) for n in range(120))))
