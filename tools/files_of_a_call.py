"""How many files of the package one call runs through, and how the package is cut up: for the architecture page.

python tools/files_of_a_call.py          the counts
python tools/files_of_a_call.py --list   and the files
"""

from __future__ import annotations

import ast
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vesalius as vs

ROOT = Path(vs.__file__).parent


def visited(call: Callable[[], Any]) -> list[str]:
    """Files of the package whose functions run in a call; importing them, in a call before, does not count."""
    call()
    found: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    inside = [Path(name) for name in found if Path(name).is_relative_to(ROOT)]
    return sorted(path.relative_to(ROOT).as_posix() for path in inside)


def calls() -> dict[str, Callable[[], Any]]:
    """The three calls of the page: a sweep of a language model, a training, a study of a planted circuit."""
    model = vs.load("smollm2-135m-instruct")
    pairs = vs.data.ioi(model, n=4, seed=0).split("discovery")
    planted = vs.toys.planted_induction(0)
    question = vs.studies.Question("planted induction", "What follows?", vs.toys.planted_pairs(36, 0))
    rows, config = torch.randn(512, 32), vs.TrainConfig(n_latents=64, k=4, batch_size=64, steps=5)
    return {
        "sweep": lambda: vs.sweep(model, pairs, sites="layers.2*.resid_post", each="position", sink=vs.silent),
        "train": lambda: vs.dictionaries.train(rows, config, sink=vs.silent),
        "run_study": lambda: vs.studies.run_study(
            question, planted, options=vs.studies.Options(random_sets=9), sink=vs.silent
        ),
    }


def imports() -> dict[Path, set[str]]:
    """File -> modules of the package that it imports from."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        found[path] = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names if node.module} | {
            str(node.module) for node in nodes
        }
    return found


def module(path: Path) -> str:
    return ".".join(("vesalius", *path.relative_to(ROOT).with_suffix("").parts))


def one_importer() -> int:
    """Files that exactly one other file imports from."""
    graph = imports()
    count = Counter(name for names in graph.values() for name in names)
    return sum(count[module(path)] == 1 for path in graph if path.name != "__init__.py")


def main() -> None:
    files = sorted(ROOT.rglob("*.py"))
    texts = [path.read_text("utf-8") for path in files]
    lines = sum(text.count("\n") for text in texts)
    anys = sum(isinstance(node, ast.Name) and node.id == "Any" for text in texts for node in ast.walk(ast.parse(text)))
    comments = sum(line.lstrip().startswith("#") for text in texts for line in text.splitlines())
    skips = sum(text.count("# fmt: skip") for text in texts)
    print(f"lines {lines:,}; files {len(files)}; files with one importer {one_importer()}")
    print(f"`Any` per 1,000 lines {1000 * anys / lines:.1f}; comments {comments / lines:.1%}; fmt: skip {skips}")
    for name, call in calls().items():
        found = visited(call)
        print(f"{name}: {len(found)} files")
        if "--list" in sys.argv:
            print("   ", *found)


if __name__ == "__main__":
    main()
