"""What the README says is what happens: its Python runs, its JSON line is a pair, its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.main import get_command

import vesalius as vs
from vesalius.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.demo_model
def test_the_ten_lines_of_python_run_and_print_what_they_say(
    demo: vs.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "torch.Size([8, " in printed
    assert "forward equivalents" in printed
    scores = names["scores"]
    assert isinstance(scores, vs.Scores)
    assert scores.values.shape[:2] == (1, demo.architecture[1].n_heads)


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_python_on_the_page_about_sweeps_runs(demo: vs.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vs, "load", lambda _: demo)
    page = (ROOT / "docs" / "sweeps.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile("\n".join(code), "sweeps.md", "exec"), names)
    assert isinstance(names["agreement"], vs.Agreement)


@pytest.mark.demo_model
def test_the_json_line_is_a_pair_that_can_be_loaded(demo: vs.Model, tmp_path: Path) -> None:
    (line,) = blocks("json")
    row = json.loads(line)
    rows = [{**row, "template": f"t{number}", "clean": row["clean"] + " " * 0} for number in range(4)]
    for number, (name, other) in enumerate([("Ann", "Bob"), ("Tom", "Kate"), ("Mark", "Lisa"), ("Paul", "Jane")]):
        for key, value in rows[number].items():
            rows[number][key] = value.replace("Ann", name).replace("Bob", other)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert len(vs.data.load_pairs(path, demo)) == 4


def test_no_file_that_people_read_holds_the_marks_of_an_unfinished_merge() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    marked = [path.name for path in pages if re.search(r"^(<{7}|>{7}|={7}$)", path.read_text(), re.MULTILINE)]
    assert not marked


def test_every_command_on_the_pages_exists_with_the_options_it_shows() -> None:
    command = get_command(app)
    lines = [line for page in PAGES for line in re.findall(r"(?:\.venv/bin/)?vesalius ([a-z]+[^\n`|]*)", page)]
    assert len(lines) > 4
    known = set(command.commands)  # type: ignore[attr-defined]
    for line in lines:
        words = line.split()
        if words[0] not in known:
            continue
        options = {name for parameter in command.commands[words[0]].params for name in parameter.opts}  # type: ignore[attr-defined]
        shown = {word for word in words if word.startswith("--")}
        assert shown <= options or words[0] == "ledger", f"vesalius {line}"
