"""RAVEL (Huang et al. 2024, arXiv:2402.17700): entities, their attributes, and prompts that ask for one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vesalius.errors import FileFormatError, UnknownNameError

KINDS = ("city", "nobel_prize_winner", "occupation", "physical_object", "verb")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Entities:
    """prompts: attribute -> templates with one %s. values: entity -> attribute -> value. splits: entity -> split."""

    kind: str
    prompts: Mapping[str, tuple[str, ...]]
    values: Mapping[str, Mapping[str, str]]
    splits: Mapping[str, str]

    def known(self, attribute: str) -> None:
        """Raises UnknownNameError for an attribute that there is not."""
        if attribute not in self.prompts:
            raise UnknownNameError(f"attribute of {self.kind}", attribute, self.prompts)

    def of_split(self, split: str) -> tuple[str, ...]:
        """Entities of a split, in the order of the file. Raises UnknownNameError."""
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        return tuple(entity for entity in self.values if self.splits[entity] == split)


def load_ravel(folder: str | Path, kind: str = "city") -> Entities:
    """One kind of entity from the files of RAVEL, `ravel_<kind>_entity_attributes.json` and so on.

    Raises UnknownNameError for another kind, FileFormatError naming the file that is missing or not as it should be.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of entity", kind, KINDS)
    where = Path(folder)
    prompts = _read(where / f"ravel_{kind}_attribute_to_prompts.json", _lists)
    values = _read(where / f"ravel_{kind}_entity_attributes.json", _texts)
    splits = _read(where / f"ravel_{kind}_entity_to_split.json", str)
    once = {name: tuple(text for text in texts if text.count("%s") == 1) for name, texts in prompts.items()}
    unsplit = [entity for entity in values if splits.get(entity) not in SPLITS]
    if unsplit:
        raise FileFormatError(f"{where}: {unsplit[0]!r} has no split among {', '.join(SPLITS)}")
    return Entities(kind, once, values, splits)


def _read(path: Path, as_it_should: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        return {str(name): as_it_should(value) for name, value in found.items()}
    except FileNotFoundError as error:
        raise FileFormatError(f"there is no file {path.absolute()}; it is part of RAVEL's data") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path.absolute()} is not a table of RAVEL: {error}") from error


def _lists(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError("prompts must be lists of text")
    return tuple(value)


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()}
