"""The medical case and the comparison by design: what is planted is found; pages, commands; tables from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import vesalius as vs
from pages import Page
from tables_support import linear_table
from test_cli import Done
from test_cli import run as run
from vesalius.cli import tabular
from vesalius.concepts import fit_rows
from vesalius.errors import InputError, UnknownNameError
from vesalius.quantities import REPAIRS
from vesalius.quantities.table_rows import other_coordinates
from vesalius.report.by_design_page import render_by_design
from vesalius.report.shortcut_page import render_shortcut
from vesalius.studies import shortcut
from vesalius.studies.by_design import fidelity_of
from vesalius.studies.cytology import CONCEPTS, ELSEWHERE, MARK
from vesalius.studies.shortcut import COLUMN_HELD, ERASED, erasing


def outcomes(done: vs.studies.Study) -> dict[str, str]:
    return {claim.statement: verdict.outcome for claim, verdict in zip(done.claims, done.verdicts, strict=True)}


@pytest.fixture(scope="module")
def cheap() -> None:
    """Fewer explanations of single patients, which cost the most and decide nothing."""
    shortcut.EXPLAINED, shortcut.METHODS = 2, ("integrated_gradients",)


@pytest.fixture(scope="module")
def case(cheap: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[vs.studies.Study, Path]:
    folder = tmp_path_factory.mktemp("case")
    return vs.studies.run_shortcut(out=folder, sink=vs.silent), folder


def test_the_planted_mark_is_found_and_taking_it_away_repairs(case: tuple[vs.studies.Study, Path]) -> None:
    done, _ = case
    found = outcomes(done)
    accuracy = done["comparison"].accuracy["network"]
    assert accuracy["validation"].estimate > 0.95 > 0.87 > accuracy[ELSEWHERE].estimate
    assert found[f"{MARK}: {shortcut.RESTS}"] == "SUPPORTED"
    assert found[f"{MARK}: {shortcut.PUT_ON}"] == "SUPPORTED"
    assert found[f"{MARK}: {shortcut.USED}"] == "SUPPORTED"
    for how in (COLUMN_HELD.format("network"), COLUMN_HELD.format("additive model"), ERASED.format(shortcut.BY_PAIRS)):
        assert found[how] == "SUPPORTED"
    assert found[ERASED.format(shortcut.BY_LABELS)] != "SUPPORTED"
    assert done["inspection"].attributed["integrated_gradients"][0][0] == MARK
    assert done["audit"].aurocs[0][0] == MARK
    assert not done["family"].exploratory


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_planted(cheap: None) -> None:
    done = vs.studies.run_shortcut(vs.studies.shortcut_question(planted=False), sink=vs.silent)
    found = outcomes(done)
    assert found[f"{MARK}: {shortcut.RESTS}"] != "SUPPORTED"
    assert all(one != "SUPPORTED" for words, one in found.items() if "of the other hospital are right" in words)
    assert done["audit"].aurocs[0][0] != MARK


def test_the_page_says_it_is_no_advice_and_what_would_be_needed(case: tuple[vs.studies.Study, Path]) -> None:
    done, folder = case
    summary = vs.studies.summarise_shortcut(done, command="vesalius study shortcut", timings={})
    page = vs.report.write_shortcut(summary, folder)
    text = page.read_text()
    assert render_shortcut(json.loads((folder / "summary.json").read_text())) == text
    assert "Nothing on this page is medical advice" in text and "before real use" in text
    assert "Plain baseline" in text and len(text) < 200_000
    assert not Page(text).badly_closed
    row = summary["claims"][0]
    assert {"verdict", "estimate", "interval", "n", "split"} <= set(row) and "values" not in row
    again = vs.studies.run_shortcut(out=folder, sink=vs.silent)
    assert again.answer == done.answer


def test_an_eraser_as_a_direction_does_what_the_eraser_does() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(80, 16, generator=generator).relu()
    labels = (rows[:, 0] > rows[:, 1]).long()
    eraser = fit_rows(rows.numpy(), labels.numpy(), "leace")
    part, given = erasing(eraser, "erased")
    held = vs.quantities.table_rows.held_at(part, torch.tensor(given["value"]), given["along"])
    assert torch.allclose(held(rows), eraser(rows), atol=1e-4)
    with pytest.raises(InputError, match="1 coordinates; got 2 values"):
        vs.quantities.table_rows.held_at(part, torch.zeros(2))


def test_repairs_counts_rows_that_become_right() -> None:
    table = linear_table(60)
    net = torch.nn.Linear(3, 2, bias=False).requires_grad_(False)
    net.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [2.0, -1.0, 6.0]]))
    runs = vs.Runs(vs.Model(net), table)
    third = vs.quantities.column_part(table, "third")
    assert float(REPAIRS.measure(runs, third, {"value": [0.0]}).mean()) > 0.1
    both = vs.quantities.column_part(table, "first", "second")
    assert other_coordinates(both) == ()
    wide = replace(table, values=table.values.repeat(1, 3), columns=tuple("abcdefghi"))
    drawn = other_coordinates(vs.quantities.column_part(wide, "a", "b"))
    assert len(drawn) == 8 and all(float(one.basis.abs().sum()) == 2.0 for one in drawn)  # type: ignore[union-attr]


@pytest.mark.slow
def test_models_are_compared_on_tables_of_ones_own(tmp_path: Path) -> None:
    tables = {"numbers": linear_table(120, classes=False), "classes": linear_table(160, seed=1)}
    asked = vs.studies.by_design_question(tables)
    done = vs.studies.run_by_design(asked, out=tmp_path, sink=vs.silent)
    summary = vs.studies.summarise_by_design(done, command="vesalius study by-design", timings={})
    by = {(one["table"], one["model"]): one for one in summary["models"]}
    assert by["numbers", "linear"]["score"]["estimate"] > 0.95
    assert by["numbers", "linear"]["fidelity"]["estimate"] > 0.99
    assert by["numbers", "linear"]["to_read"] == 3 < by["numbers", "MLP"]["to_read"]
    assert not any(one["refuted"] for one in summary["models"])
    assert sum(one["supported"] for one in summary["models"]) > 10
    page = vs.report.write_by_design(summary, tmp_path)
    assert render_by_design(json.loads((tmp_path / "summary.json").read_text())) == page.read_text()
    assert not Page(page.read_text()).badly_closed
    with pytest.raises(InputError, match="no tables"):
        vs.studies.by_design_question({})
    with pytest.raises(UnknownNameError, match="table 'titanic'"):
        vs.studies.by_design_question(["titanic"])


def test_fidelity_is_what_curves_of_columns_can_tell() -> None:
    """A product of two columns is no sum of curves of each."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    table = vs.Table(x, ("u", "v"), (x[:, 0] * x[:, 1])).divided()
    fit, fresh = table.split("discovery"), table.split("validation")
    curved, box = vs.interpretable.fit_gam(fit), vs.interpretable.fit_mlp(fit)
    assert fidelity_of(curved, fit, fresh).estimate > 0.95
    assert fidelity_of(box, fit, fresh).estimate < 0.5


def test_files_become_tables_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    rows = [f"{n},{'red' if n % 2 else 'blue'},{n % 3},p{n},{'yes' if n % 4 else 'no'}" for n in range(40)]
    path = tmp_path / "rows.csv"
    path.write_text("size,colour,count,patient,sick\n" + "\n".join(rows))
    table, encoding = vs.data.load_rows(path, "sick", groups=["patient"])
    assert table.columns == ("size", "count", "colour=blue", "colour=red") and table.classes == ("no", "yes")
    assert table.values[1].tolist() == [1.0, 1.0, 0.0, 1.0] and table.groups["patient"][3] == "p3"
    later = tmp_path / "later.csv"
    later.write_text("size,colour,count,patient,sick\n1,green,2,q,yes\n")
    with pytest.raises(InputError, match="row 1: colour 'green' was not there"):
        vs.data.load_rows(later, "sick", encoding=encoding)
    later.write_text("size,colour,count,patient,sick\n1,red,2,q,perhaps\n")
    with pytest.raises(InputError, match="sick 'perhaps' was not there"):
        vs.data.load_rows(later, "sick", encoding=encoding)
    later.write_text("size,colour,count,patient,sick\n,red,2,q,yes\n")
    with pytest.raises(InputError, match="row 1 has no 'size'"):
        vs.data.load_rows(later, "sick", encoding=encoding)
    later.write_text("size,colour,count,patient,sick\nbig,red,2,q,yes\n")
    with pytest.raises(InputError, match="'size' is a column of numbers, and holds 'big'"):
        vs.data.load_rows(later, "sick", encoding=encoding)
    with pytest.raises(UnknownNameError, match="column 'ill'"):
        vs.data.encoding_of([{"a": 1}], "ill")
    with pytest.raises(InputError, match="different words"):
        vs.data.encoding_of([{"name": f"n{n}", "y": n} for n in range(60)], "y")
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "y": [0.5, 1.5, 2.5]})
    assert vs.data.table_from_frame(frame, "y").target.tolist() == [0.5, 1.5, 2.5]


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "iris", "wine"])
def test_tables_that_come_along_are_there(name: str) -> None:
    table = vs.data.builtin_table(name)
    assert len(table) > 100 and bool(table.classes) == (name != "diabetes")


def test_the_command_refuses_at_once(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("study", "shortcut", "--control", "random-weights", "--out", tmp_path / "a")
    assert done.code == 2 and "--control no-mark" in " ".join(done.err.split())
    assert tabular.Request("by-design", 0, None, None, "").folder == Path("runs/by-design")


@pytest.mark.slow
def test_the_command_writes_the_page_in_three_minutes(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("study", "shortcut", "--out", tmp_path / "case")
    assert done.code == 0, done.err
    assert (tmp_path / "case" / "report.html").exists() and "SUPPORTED" in done.out
    assert set(CONCEPTS) == {"size", "irregularity", "texture"}
