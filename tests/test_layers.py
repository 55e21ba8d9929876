"""The house stands on one rule: a module imports only rows above its own, and siblings never import each other."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "vesalius"
# A room (folder) stands on its row as one; inside a room modules may import each other.
ROWS = [
    "errors",
    "stats seeds",
    "jobs",
    "protocol",
    "site",
    "inputs",
    "activations parts",
    "directions",
    "refs",
    "metric intervention adapters coder",
    "model",
    "patching",
    "agents data toys",
    "concepts",
    "quantities",
    "dictionaries",
    "describe circuits",
    "interpretable validate",
    "attribution images",
    "studies",
    "report",
    "cli",
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row.split()}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
MAX_FILE, MAX_FUNCTION = 350, 80
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    """Rooms of the package that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        names = [f"vesalius.{a.name}" for a in node.names] if node.module == "vesalius" else [node.module]
    else:
        return []
    parts = [name.split(".") for name in names if name != "vesalius.__version__"]
    return [(name[1] if len(name) > 1 else "") for name in parts if name[0] == "vesalius"]


def broken_rules(path: Path, source: ast.Module) -> list[str]:
    home = room(path)
    found = []
    for node in ast.walk(source):
        for other in imported(node):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if other == "":
                # The front door leads to every room, so only the last row may use it.
                found += [f"{where} imports the whole package; name the room"] if home != "cli" else []
            elif other not in ROW:
                found.append(f"{where} imports vesalius.{other}, which has no row in this table")
            elif other != home and ROW[other] >= ROW[home]:
                found.append(f"{where} imports {other}, which is not above {home}")
    return found


Graph = dict[str, set[str]]


def imported_files(source: ast.Module, files: set[str]) -> set[str]:
    """Files of the package that a module imports from, for type checking too, as paths below its root.

    A package that is only passed through (`vesalius.a` in `from vesalius.a.b import c`) does not count.
    """
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for parts in (name.split(".")[1:] for name in names if name.split(".")[0] == "vesalius"):
            places = ["/".join(parts[:length]) for length in range(len(parts), 0, -1)]
            wanted = [path for place in places for path in (f"{place}.py", f"{place}/__init__.py")]
            found.update([path for path in wanted if path in files][:1])
    return found


def graph_of_files(sources: dict[str, ast.Module]) -> Graph:
    return {path: imported_files(source, set(sources)) - {path} for path, source in sources.items()}


def graph_of_entries(graph: Graph, folder: str) -> Graph:
    """The graph of the files and folders of a folder, each folder as one."""
    depth = len(Path(folder).parts)
    inside = {path for path in graph if Path(path).parts[:depth] == Path(folder).parts}
    entry = {path: Path(path).parts[depth] for path in inside}
    entries: Graph = {name: set() for name in entry.values()}
    for path in inside:
        entries[entry[path]] |= {entry[other] for other in graph[path] & inside} - {entry[path]}
    return entries


def circles(graph: Graph) -> list[set[str]]:
    """Groups of nodes that reach each other."""
    reached = {start: reachable(graph, start) for start in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return [set(group) for group in sorted(groups, key=sorted) if group]


def reachable(graph: Graph, start: str) -> set[str]:
    """Nodes at the end of some way of one import or more."""
    found: set[str] = set()
    ways = list(graph[start])
    while ways:
        node = ways.pop()
        if node not in found:
            found.add(node)
            ways += graph[node]
    return found


def package() -> dict[str, ast.Module]:
    return {path.relative_to(ROOT).as_posix(): tree(path) for path in FILES}


def circles_of_entries(graph: Graph) -> dict[str, list[set[str]]]:
    folders = {parent.as_posix() for path in graph for parent in Path(path).parents}
    found = {folder: circles(graph_of_entries(graph, folder)) for folder in sorted(folders)}
    return {folder: rings for folder, rings in found.items() if rings}


def functions(source: ast.Module) -> list[Function]:
    return [node for node in ast.walk(source) if isinstance(node, Function)]


def test_the_scan_finds_the_house() -> None:
    assert {"errors", "site", "model", "patching", "protocol"} <= {room(path) for path in FILES}


def test_every_module_has_a_row() -> None:
    assert sorted({room(path) for path in FILES} - set(ROW)) == []


def test_a_module_imports_only_rows_above_its_own() -> None:
    assert [line for path in FILES for line in broken_rules(path, tree(path))] == []


@pytest.mark.parametrize(
    "line",
    ["from vesalius.model import Model", "import vesalius.model", "from vesalius import model", "import vesalius",
     "from vesalius.parts import Unit", "def f():\n    from vesalius.cli import main"],
)  # fmt: skip
def test_an_import_against_the_rule_is_found(line: str) -> None:
    assert broken_rules(ROOT / "activations.py", ast.parse(line)) != []


def test_the_version_and_the_rows_above_may_be_imported() -> None:
    allowed = "from vesalius import __version__\nfrom vesalius.site import Site\nfrom vesalius.errors import InputError"
    assert broken_rules(ROOT / "activations.py", ast.parse(allowed)) == []
    assert broken_rules(ROOT / "cli" / "sites.py", ast.parse("import vesalius as vs")) == []


def test_no_file_imports_itself_through_others() -> None:
    assert circles(graph_of_files(package())) == []


def test_no_entry_of_a_folder_imports_itself_through_others() -> None:
    assert circles_of_entries(graph_of_files(package())) == {}


def test_a_planted_circle_of_files_is_found() -> None:
    sources = {
        "room/one.py": "from vesalius.room.two import f",
        "room/two.py": "from vesalius.room import three",
        "room/three.py": "if TYPE_CHECKING:\n    from vesalius.room.one import g",
        "room/four.py": "from vesalius.room.one import h",
    }
    graph = graph_of_files({path: ast.parse(source) for path, source in sources.items()})
    assert circles(graph) == [{"room/one.py", "room/two.py", "room/three.py"}]
    graph["room/three.py"] = set()
    assert circles(graph) == []


def test_a_planted_circle_of_folders_without_one_of_files_is_found() -> None:
    sources = {
        "room/a/low.py": "",
        "room/a/high.py": "from vesalius.room.b.middle import f",
        "room/b/middle.py": "from vesalius.room.a.low import g",
        "room/top.py": "from vesalius.room.a import high",
    }
    graph = graph_of_files({path: ast.parse(source) for path, source in sources.items()})
    assert circles(graph) == []
    assert circles_of_entries(graph) == {"room": [{"a", "b"}]}


def test_nothing_of_the_package_is_imported_inside_a_function() -> None:
    inside = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for function in functions(tree(path))
        for node in ast.walk(function)
        if imported(node)
    ]
    assert inside == []


def test_no_relative_imports() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if room(path) != "cli"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert printing == []


def test_only_hooks_registers_hooks() -> None:
    registering = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path.relative_to(ROOT).as_posix() != "model/hooks.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and node.attr.endswith("_hook")
    ]
    assert registering == []


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert [str(path) for path in FILES if drawers & set(path.relative_to(ROOT).with_suffix("").parts)] == []


def test_files_and_functions_stay_small() -> None:
    long_files = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in FILES
        if (lines := len(path.read_text("utf-8").splitlines())) > MAX_FILE
    ]
    long_functions = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {lines} lines"
        for path in FILES
        for f in functions(tree(path))
        if (lines := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION
    ]
    assert (long_files, long_functions) == ([], [])
