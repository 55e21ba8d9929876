"""Small transformers that were trained, and what is known of them; `tools/train_toys.py` made the weights beside this.

induction   two layers of attention alone, on sequences that repeat after a random number of tokens (Olsson et al. 2022)
brackets    says at the beginning whether the brackets that follow are balanced
siit        strict interchange intervention training (Gupta et al. 2024): layer 0's first head holds whether the
            first number is odd, its second head whether the second is, the last MLP makes both into the answer, and
            no other part matters
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vesalius.errors import UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs.untrusted import read_npz
from vesalius.model import Model
from vesalius.seeds import generator_for
from vesalius.toys.network import Weights, network

_FOLDER = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Trained:
    """Sizes of one network. causal: no position reads a later one."""

    vocab: int
    width: int
    causal: bool


INDUCTION = Trained(32, 24, True)
BRACKETS = Trained(3, 11, False)
SIIT = Trained(8, 4, True)
TRAINED: Mapping[str, Trained] = MappingProxyType({"induction": INDUCTION, "brackets": BRACKETS, "siit": SIIT})


def trained(name: str) -> Model:
    """A trained network. Raises UnknownNameError for an unknown one."""
    if name not in TRAINED:
        raise UnknownNameError("trained network", name, TRAINED)
    given = {key: torch.from_numpy(array) for key, array in read_npz(_FOLDER / f"{name}.npz").items()}
    depth = sum(key.endswith(".query.weight") for key in given)
    both = lambda key: (given[f"{key}.weight"], given[f"{key}.bias"])  # noqa: E731
    parts = ("query", "key", "value", "linear", "mlp_1", "mlp_2")
    layers = [Weights(*(both(f"{layer}.{part}") for part in parts)) for layer in range(depth)]
    return network(
        given["token_embed"], given["pos_embed"], layers, given["unembed"], int(given["heads"]),
        causal=TRAINED[name].causal, name=name,
    )  # fmt: skip


def induction_rows(n: int, draw: torch.Generator) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, "n pos"]]:
    """Random tokens that repeat after a random number of them; and which have been there before.

    The period is another one in each row, so that a position says nothing of it.
    """
    width, position = INDUCTION.width, torch.arange(INDUCTION.width)
    period = torch.randint(5, 12, (n, 1), generator=draw)
    drawn = torch.rand(n, INDUCTION.vocab, generator=draw).argsort(1)[:, :width]
    rows = drawn.gather(1, position[None] % period)
    # The token that follows is known from the second one of the repetition on.
    return rows, position[None] > period


def balanced_rows(n: int, draw: torch.Generator) -> tuple[Int[Tensor, "n pos"], Bool[Tensor, " n"]]:
    """A beginning (2) and ten brackets, "(" 0 and ")" 1: half are balanced, in the others one or two are turned."""
    half = (BRACKETS.width - 1) // 2
    rows = torch.stack([_balanced(half, draw) for _ in range(n)])
    changed = torch.rand(n, generator=draw) < 0.5
    for row in changed.nonzero()[:, 0].tolist():
        for at in torch.randperm(2 * half, generator=draw)[: 1 + int(torch.randint(2, (), generator=draw))].tolist():
            rows[row, at] = 1 - rows[row, at]
    return torch.cat([torch.full((n, 1), 2), rows], 1), is_balanced(rows)


def _balanced(half: int, draw: torch.Generator) -> Int[Tensor, " pos"]:
    """A random balanced row: each bracket opens with a chance that keeps the rest closable."""
    found, depth, left = [], 0, half
    for _ in range(2 * half):
        opens = left > 0 and (depth == 0 or float(torch.rand((), generator=draw)) < 0.5)
        found.append(0 if opens else 1)
        depth, left = depth + (1 if opens else -1), left - int(opens)
    return torch.tensor(found)


def is_balanced(rows: Int[Tensor, "n bracket"]) -> Bool[Tensor, " n"]:
    """Whether no bracket closes before it was opened, and all are closed."""
    depth = (1 - 2 * rows).cumsum(1)
    return (depth[:, -1] == 0) & (depth >= 0).all(1)


def siit_rows(n: int, draw: torch.Generator) -> Int[Tensor, "n pos"]:
    """A beginning (7), and three numbers from 0 to 6."""
    return torch.cat([torch.full((n, 1), 7), torch.randint(7, (n, SIIT.width - 1), generator=draw)], 1)


def siit_label(rows: Int[Tensor, "n pos"]) -> Int[Tensor, " n"]:
    """1 where the first and the second number are odd."""
    return (rows[:, 1] % 2) * (rows[:, 2] % 2)


def trained_pairs(name: str, n: int = 64, seed: int = 0) -> Pairs:
    """n pairs of rows with different answers, read where the network answers.

    induction: the corrupted prompt repeats another sequence; brackets: a row that is balanced against one that is not;
    siit: another first or second number. Raises UnknownNameError for an unknown network.
    """
    if name not in TRAINED:
        raise UnknownNameError("trained network", name, TRAINED)
    draw = generator_for("trained", name, seed)
    return {"induction": _induction_pairs, "brackets": _bracket_pairs, "siit": _siit_pairs}[name](n, draw)


def _induction_pairs(n: int, draw: torch.Generator) -> Pairs:
    """The token that follows the earlier occurrence of the last one is another one in the corrupted prompt."""
    width, position, rows = INDUCTION.width, torch.arange(INDUCTION.width), torch.arange(n)
    period = torch.randint(5, 12, (n, 1), generator=draw)
    drawn = torch.rand(n, INDUCTION.vocab, generator=draw).argsort(1)
    clean = drawn[:, :width].gather(1, position[None] % period)
    # Read one step before the end of the second period: what follows has been there once.
    at = (2 * period - 2)[:, 0].clamp_max(width - 1)
    answer, other = clean[rows, at + 1 - period[:, 0]], drawn[:, -1]
    corrupted = torch.where(clean == answer[:, None], other[:, None], clean)
    keep = position[None] <= at[:, None]
    return Pairs(
        clean=torch.where(keep, clean, 0), corrupted=torch.where(keep, corrupted, 0), answer=answer, distractor=other,
        lengths=at + 1, task="trained induction",
    )  # fmt: skip


def _bracket_pairs(n: int, draw: torch.Generator) -> Pairs:
    rows, balanced = balanced_rows(8 * n, draw)
    right, wrong = rows[balanced][:n], rows[~balanced][:n]
    swap = torch.rand(n, generator=draw) < 0.5
    clean, corrupted = torch.where(swap[:, None], wrong, right), torch.where(swap[:, None], right, wrong)
    answer = (~swap).long()
    read = torch.zeros(n, dtype=torch.long)
    return Pairs(clean=clean, corrupted=corrupted, answer=answer, distractor=1 - answer, read=read, task="brackets")


def _siit_pairs(n: int, draw: torch.Generator) -> Pairs:
    clean, corrupted = siit_rows(40 * n, draw), siit_rows(40 * n, draw)
    fits = siit_label(clean) != siit_label(corrupted)
    # As many of either answer.
    odd = siit_label(clean).bool()
    chosen = torch.cat([(fits & odd).nonzero()[: n // 2, 0], (fits & ~odd).nonzero()[: n - n // 2, 0]])
    answer = siit_label(clean[chosen])
    return Pairs(clean=clean[chosen], corrupted=corrupted[chosen], answer=answer, distractor=1 - answer, task="siit")


def induction_scores(patterns: Float[Tensor, "example head query key"], tokens: Int[Tensor, "example pos"]) -> Tensor:
    """Per head, its attention from repeated tokens to what came after their last occurrence, [head]."""
    width, position = tokens.shape[1], torch.arange(tokens.shape[1])
    same = (tokens[:, :, None] == tokens[:, None]) & (position[None, :, None] > position[None, None])
    last = torch.where(same, position[None, None], -1).amax(2)
    rows, query = (last >= 0).nonzero(as_tuple=True)
    seen = patterns[rows, :, query, (last[rows, query] + 1).clamp_max(width - 1)]
    return seen.mean(0)
