"""The public names are explicit, sorted, loadable, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vesalius as vs

SOURCE = ast.parse(Path(vs.__file__).read_text("utf-8"))


def typed_names() -> dict[str, str]:
    """Names in the TYPE_CHECKING block, with the module they are imported from."""
    block = next(node for node in SOURCE.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    return {alias.name: str(node.module).removeprefix("vesalius.") for node in imports for alias in node.names}


def test_public_names_are_sorted_and_unique() -> None:
    assert vs.__all__ == sorted(set(vs.__all__))
    assert set(vs.__all__) == set(vs._HOME) | set(vs._ROOMS)
    assert list(vs._HOME) == sorted(vs._HOME)
    assert list(vs._ROOMS) == sorted(vs._ROOMS)


@pytest.mark.parametrize("name", sorted(vs._HOME))
def test_every_name_loads_from_its_home(name: str) -> None:
    assert getattr(vs, name) is getattr(import_module(f"vesalius.{vs._HOME[name]}"), name)


@pytest.mark.parametrize("name", sorted(vs._ROOMS))
def test_every_room_loads(name: str) -> None:
    assert getattr(vs, name).__name__ == f"vesalius.{name}"


def test_type_checkers_are_told_the_same_homes() -> None:
    assert typed_names() == vs._HOME


def test_dir_lists_the_public_names() -> None:
    assert dir(vs) == vs.__all__


def test_an_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'modle'; public names: .*Model, .*sweep"):
        _ = vs.modle


def test_importing_the_package_is_light() -> None:
    heavy = ["torch", "transformers", "numpy", "scipy", "jaxtyping"]
    code = f"import sys, vesalius; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_prints_nothing_and_importing_a_name_works_afresh() -> None:
    code = "import vesalius as vs; vs.Site.parse('layers.5.z[3]'); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_loading_and_sweeping_wait_with_transformers_model_code_until_a_model_is_opened() -> None:
    """That code takes as long as torch and transformers together."""
    code = "import sys, vesalius as vs; vs.load, vs.sweep; sys.exit('transformers.modeling_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
