"""What all tasks share: rows of text become checked Pairs, a bos token is put in front, items are drawn in balance.

A task writes `Row`s (text and labels) and `build_pairs` turns them into token ids. It refuses whatever would make a
patching experiment meaningless: answers of several tokens, prompts that do not line up, edits in the wrong places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from vesalius.data.positions import named_positions
from vesalius.data.tables import read_each
from vesalius.errors import InputError, PairsError, TokenizerError, UnknownNameError
from vesalius.inputs import Pairs, pad_rows
from vesalius.inputs.beginning import begun, bos_token

T = TypeVar("T")

SPLITS = ("discovery", "validation")
MOST_TOKENS = 8
"""Tokens of an answer."""


class HasTokenizer(Protocol):
    """All that a task needs of a model."""

    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One pair as text: `answer` and `distractor` are written as they follow the prompt, with their leading space.

    edits: how many token positions are meant to differ between clean and corrupted; None: any number. where: the
    place to name in errors, such as "line 3 of pairs.jsonl".
    """

    clean: str
    corrupted: str
    answer: str
    distractor: str
    groups: Mapping[str, str] = field(default_factory=dict)
    split: str = ""
    edits: int | None = None
    where: str = ""


@dataclass(frozen=True)
class Encoded:
    """One pair as token ids, without the bos token."""

    clean: Sequence[int]
    corrupted: Sequence[int]
    answer: Sequence[int]
    distractor: Sequence[int]
    groups: Mapping[str, str]
    split: str


def tokenizer_of(model: HasTokenizer) -> Any:
    """The model's tokenizer. Raises TokenizerError when it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise TokenizerError(
            f"{type(model).__name__} has no tokenizer, and text needs one: load it with vesalius.load(...), "
            "give it a tokenizer, or make vesalius.Pairs(clean=, corrupted=, answer=, distractor=) from token ids"
        )
    return tokenizer


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with nothing added before or after."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def show(tokenizer: Any, ids: Iterable[int]) -> str:
    """Tokens as a reader sees them, for error messages."""
    return str([tokenizer.decode([token]) for token in ids])


def continuation(tokenizer: Any, text: str, more: str, before: Sequence[int] | None = None) -> list[int] | None:
    """Token ids of `more` where it follows `text` (ids `before`); None when it merges with the text's last token."""
    before, both = list(before or encode(tokenizer, text)), encode(tokenizer, text + more)
    return both[len(before) :] if both[: len(before)] == before else None


def _answer_ids(tokenizer: Any, row: Row, name: str, clean: Sequence[int], where: str) -> list[int]:
    text = getattr(row, name)
    ids = continuation(tokenizer, row.clean, text, clean)
    if ids is None:
        raise TokenizerError(
            f"{where}: {name} {text!r} merges with the end of the prompt {row.clean[-20:]!r}: end the prompt without a "
            f"space and begin the {name} with one (' Anna', not 'Anna')"
        )
    spaced = continuation(tokenizer, row.clean, f" {text}", clean)
    if spaced is not None and len(ids) > len(spaced):
        raise TokenizerError(
            f"{where}: {name} {text!r} is {show(tokenizer, ids)} to this tokenizer, which counts the leading space as "
            f"part of the word: write {f' {text}'!r}, which is {show(tokenizer, spaced)}"
        )
    if not 1 <= len(ids) <= MOST_TOKENS or tokenizer.unk_token_id in ids:
        raise TokenizerError(
            f"{where}: {name} {text!r} is {show(tokenizer, ids)} to this tokenizer; give 1 to {MOST_TOKENS} tokens, "
            "all of them known"
        )
    return ids


def _check_text(row: Row, where: str) -> None:
    for name in ("clean", "corrupted", "answer", "distractor"):
        text = getattr(row, name)
        if not isinstance(text, str):
            raise InputError(f"{where}: {name} must be text, got {text!r} ({type(text).__name__})")
        if not text.strip():
            raise InputError(f"{where}: {name} is empty")
    if row.answer == row.distractor:
        raise PairsError(f"{where}: answer equals distractor ({row.answer!r}); the metric would be 0 for every model")
    if row.clean == row.corrupted:
        raise PairsError(f"{where}: clean and corrupted prompts are identical: {row.clean!r}")


def _check_aligned(tokenizer: Any, row: Row, clean: Sequence[int], corrupted: Sequence[int], where: str) -> None:
    edits = sum(a != b for a, b in zip(clean, corrupted, strict=False))
    if len(clean) != len(corrupted):
        what = (
            f"clean has {len(clean)} tokens and corrupted {len(corrupted)}; they must line up position by position, so "
            "exchange words for words of as many tokens"
        )
    elif edits == 0:
        what = "clean and corrupted prompts are identical to this tokenizer"
    elif row.edits not in (None, edits):
        what = f"{edits} token positions differ where {row.edits} should"
    else:
        return
    raise PairsError(f"{where}: {what}. clean {show(tokenizer, clean)}, corrupted {show(tokenizer, corrupted)}")


def encode_row(tokenizer: Any, row: Row, where: str) -> Encoded:
    """A row as token ids. Raises InputError, PairsError or TokenizerError, naming the row, when it is not a pair."""
    _check_text(row, where)
    clean, corrupted = encode(tokenizer, row.clean), encode(tokenizer, row.corrupted)
    _check_aligned(tokenizer, row, clean, corrupted, where)
    answer, distractor = (_answer_ids(tokenizer, row, name, clean, where) for name in ("answer", "distractor"))
    if answer == distractor:
        raise PairsError(f"{where}: answer {row.answer!r} and distractor {row.distractor!r} are the same tokens")
    return Encoded(clean, corrupted, answer, distractor, row.groups, row.split)


def build_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    bos: str = "auto",
    corruption: str = "corrupted",
    task: str = "",
) -> Pairs:
    """Pairs from rows of text, every row checked against the tokenizer.

    rows carry all the same groups, and either all or none a split. The metric reads at the last token.
    Answers of several tokens are scored as sequences (see `Pairs`). Raises InputError (empty or non-text field),
    PairsError (prompts that do not line up) or TokenizerError (an answer without its space, unknown bos), naming the
    row; several bad rows are listed in one error.
    """
    encoded = read_each(
        enumerate(rows),
        lambda item: encode_row(tokenizer, item[1], item[1].where or f"pair {item[0]}"),
        "rows",
        "pairs",
    )
    return assemble(encoded, tokenizer, bos=bos, corruption=corruption, task=task)


def assemble(rows: Sequence[Encoded], tokenizer: Any, *, bos: str, corruption: str, task: str) -> Pairs:
    """Pairs from rows of token ids, with the bos token in front and the named positions that any pair has.

    Raises InputError for no rows.
    """
    if not rows:
        raise InputError("no pairs: give at least one row")
    first = bos_token(tokenizer, bos)
    head = None if first == "none" else int(tokenizer.convert_tokens_to_ids(first))
    pad = tokenizer.pad_token_id or 0
    clean, lengths = pad_rows([begun(row.clean, head) for row in rows], pad)
    corrupted, _ = pad_rows([begun(row.corrupted, head) for row in rows], pad)
    splits = tuple(row.split for row in rows)
    pairs = Pairs(
        clean=clean,
        corrupted=corrupted,
        answer=_padded([row.answer for row in rows]),
        distractor=_padded([row.distractor for row in rows]),
        lengths=lengths,
        groups={name: tuple(row.groups[name] for row in rows) for name in rows[0].groups},
        splits=splits if all(splits) else (),
        corruption=corruption,
        task=task,
        bos=first,
    )
    return replace(pairs, named_positions=named_positions(pairs, tokenizer))


def _padded(rows: Sequence[Sequence[int]]) -> Int[Tensor, "example token"]:
    """Answers as rows of one width, -1 after the last token."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def split_sizes(
    n: int, n_validation: int | None, most: Mapping[str, int], task: str, corruption: str, known: Sequence[str]
) -> dict[str, int]:
    """How many pairs each split has: n, and n_validation (None: n too) in the validation split.

    most: how many can be made. Raises InputError for a number that can't be, UnknownNameError for a corruption.
    """
    if corruption not in known:
        raise UnknownNameError(f"corruption of {task}", corruption, known)
    shared = n_validation is None
    sizes = {"discovery": n, "validation": n if n_validation is None else n_validation}
    for name, (split, size) in zip(("n", "n" if shared else "n_validation"), sizes.items(), strict=True):
        maximum = min(most.values()) if shared else most[split]
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= maximum:
            where = "per split" if shared else f"in the {split} split"
            raise InputError(
                f"{name} is {size!r}; {task} can make 1 to {maximum} distinct pairs {where} with this tokenizer"
            )
    return sizes


def single_tokens(tokenizer: Any, words: Sequence[str], need: int, what: str) -> tuple[str, ...]:
    """The words that are one token after a space. Raises TokenizerError when fewer than `need` are."""
    kept = tuple(word for word in words if _is_single(tokenizer, word))
    if len(kept) < need:
        raise too_few(len(kept), len(words), need, what)
    return kept


def too_few(kept: int, of: int, need: int, what: str) -> TokenizerError:
    return TokenizerError(
        f"only {kept} of {of} {what} are single tokens of this tokenizer and {need} are needed; this built-in task "
        "does not fit it. Give your own pairs: `vesalius study pairs.jsonl`"
    )


def _is_single(tokenizer: Any, word: str) -> bool:
    ids = continuation(tokenizer, "and", f" {word}")
    return ids is not None and len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def words(text: str) -> tuple[str, ...]:
    """A list of words, written as one text."""
    return tuple(text.split())


def shuffled(items: Sequence[T], generator: torch.Generator) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


class BalancedSampler(Generic[T]):
    """Draws items so that all are used about equally often; ties are broken at random."""

    def __init__(self, items: Sequence[T], generator: torch.Generator) -> None:
        self.items = tuple(items)
        self.uses: Counter[T] = Counter()
        self._generator = generator

    def draw(
        self, exclude: Container[T] = (), only: Container[T] | None = None, cost: Callable[[T], int] = lambda _: 0
    ) -> T:
        """The allowed item of least cost, among these the least used. Raises LookupError when none is allowed."""
        allowed = [item for item in self.items if item not in exclude and (only is None or item in only)]
        if not allowed:
            raise LookupError(f"none of {len(self.items)} items is left to draw")
        best = min(shuffled(allowed, self._generator), key=lambda item: (cost(item), self.uses[item]))
        self.uses[best] += 1
        return best
