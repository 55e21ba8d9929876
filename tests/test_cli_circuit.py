"""`vesalius circuit`: a circuit file, a page that works alone, and figures on prompts that the search has not seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vesalius as vs
from pages import Page
from test_cli import Done, jsonl, rows_for
from test_cli import run as run
from tiny_folder import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("circuit")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tiny_folder(folder)


@pytest.fixture(scope="module")
def pairs(folder: Path, model: Path) -> Path:
    return jsonl(folder / "mine.jsonl", rows_for(model))


def test_a_circuit_is_found_tested_and_drawn(
    run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "found"
    words = ("circuit", pairs, "--model", model, "--out", out, "--shortlist", 30, "--drawn", 10, "--size", 20)
    done = run(*words)
    assert done.code == 0, done.err
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert summary["schema"] == "vesalius/circuit/1"
    assert summary["answer"][0] in " ".join(done.out.split())
    circuit = vs.circuits.load_circuit(out / "circuit.json", vs.load(model))
    assert len(circuit.edges) == 20
    # What lowers the metric when it is cut helps.
    effects = {(str(e.source), str(e.target)): effect for e, effect in circuit.edges.items()}
    drawn = {(e["source"], e["target"]): e["weight"] for e in summary["circuit"]["edges"]}
    straight = [pair for pair in drawn if pair[1] == "logits"]
    total = circuit.setting["total"]
    assert summary["circuit"]["total_effect"] == total
    assert straight
    assert all(drawn[pair] == pytest.approx(-effects[pair] / total, abs=1e-9) for pair in straight)
    # The same figures by hand, on the prompts that the search did not see.
    loaded = vs.load(model)
    fresh = vs.data.load_pairs(pairs, loaded).split("validation")
    grid = vs.circuits.faithfulness(loaded, circuit, fresh)
    assert len(summary["faithfulness"]) == len(grid) == 6
    for row in summary["faithfulness"]:
        assert row["estimate"] == pytest.approx(grid[row["level"], row["ablation"]].estimate, abs=1e-5)
    page = Page((out / "circuit.html").read_text())
    assert (page.badly_closed, page.open) == ([], [])
    assert "of the effect" in page.text or "keep on fresh prompts" in page.text
    assert (out / "circuit.html").read_text().count('class="node ') == sum(
        member["kind"] != "embed" for member in summary["circuit"]["members"]
    )
    # What was measured is kept: again, and nothing is measured anew.
    assert run(*words).code == 0
    again = json.loads((out / "summary.json").read_text())
    assert again["circuit"]["edges"] == summary["circuit"]["edges"]


def test_what_cannot_be_searched_is_one_message(
    run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path
) -> None:
    def refused(*words: object) -> str:
        done = run("circuit", *words, "--model", model, "--out", tmp_path / "no")
        assert done.code == 2, done.out
        return done.words

    assert "unknown method 'magic'; known: acdc, atp_star" in refused(pairs, "--method", "magic")
    assert "unknown ablation 'noise'" in refused(pairs, "--ablation", "noise")
    assert "there is no file" in refused(tmp_path / "nothing.jsonl")
    assert "a share between 0 and 1" in refused(pairs, "--smallest", "2")
    wrong = jsonl(tmp_path / "wrong.jsonl", rows_for(model, right=False))
    assert "does not do this task" in refused(wrong)
    assert not (tmp_path / "no" / "circuit.html").exists()


def test_a_circuit_without_edges_has_a_page_that_says_so() -> None:
    """`length`: under resampling no edge changes anything."""
    model, pairs = vs.toys.compiled("length"), vs.toys.compiled_pairs("length", 8)
    wired = vs.circuits.wiring(model)
    found = vs.circuits.discover(wired, pairs, "exact", sink=vs.silent)
    assert not found.edges
    summary = vs.studies.summarise_edges("length", wired, found, pairs, searched=8, command="", timings={})
    page = Page(vs.report.render_edges(summary))
    assert (page.badly_closed, page.open) == ([], [])
    assert "the circuit is empty" in page.text


def test_members_are_described_and_tested(run: Callable[..., Done], model: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "described"
    words = (
        "circuit",
        pairs,
        "--model",
        model,
        "--out",
        out,
        "--method",
        "eap",
        "--drawn",
        5,
        "--size",
        6,
        "--describe",
    )
    done = run(*words)
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    members = summary["members"]
    assert set(members["answer"]) <= set(summary["answer"])
    assert {one["component"] for one in members["members"]} == {
        one["component"] for one in summary["circuit"]["members"]
    }
    assert all(
        claim["verdict"] in ("SUPPORTED", "REFUTED", "NOT SPECIFIC", "INCONCLUSIVE") for claim in members["claims"]
    )
    page = Page((out / "circuit.html").read_text())
    assert (page.badly_closed, page.open) == ([], [])
    assert "What its members do" in page.text
    assert (out / "members" / "ledger.sqlite").exists()
