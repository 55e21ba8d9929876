"""Transformers compiled from RASP programs, whose circuits are known exactly.

The compiler (Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability") turns a program
into weights; `tools/compile_programs.py` made the files beside this one. Sequences are a beginning token and five more;
all positions are read.

    reverse        the sequence backwards
    frac_prevs     the share of tokens so far that are "x"
    sort           the tokens in order; sort_unique: for sequences without repetition
    length         the number of tokens
    hist           how often each token occurs
    pair_balance   the share of "(" less that of ")" so far

The circuit of a program depends on what cut edges carry. `EDGES` counts the edges whose cutting alone changes an
output somewhere, found by cutting every one on random pairs and looking at all outputs. Those of `reverse` are the
published ones: 2 under resampling (Miller et al. 2024), and 11 under zeros, which are the 10 of Conmy et al. 2023 with
token and position embedding apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from vesalius.errors import UnknownNameError
from vesalius.inputs import Pairs
from vesalius.jobs.untrusted import read_npz
from vesalius.model import Model
from vesalius.seeds import generator_for
from vesalius.toys.network import Weights, network

EDGES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "reverse": {"resample": 2, "mean": 2, "zero": 11},
        "frac_prevs": {"resample": 3, "mean": 3, "zero": 7},
        "sort": {"resample": 7, "mean": 7, "zero": 15},
        "sort_unique": {"resample": 6, "mean": 6, "zero": 11},
        "length": {"resample": 0, "mean": 0, "zero": 6},
        "hist": {"resample": 4, "mean": 4, "zero": 6},
        "pair_balance": {"resample": 6, "mean": 6, "zero": 14},
    }
)
"""Program -> ablation -> edges in the circuit."""
PROGRAMS = tuple(EDGES)
_FOLDER = Path(__file__).parent / "programs"


def _arrays(name: str) -> dict[str, Tensor]:
    if name not in PROGRAMS:
        raise UnknownNameError("program", name, PROGRAMS)
    found = read_npz(_FOLDER / f"{name}.npz")
    return {key: torch.from_numpy(array) for key, array in found.items() if array.dtype.kind != "U"} | {
        "bos": torch.tensor(found["tokens"].tolist().index("BOS"))
    }


def compiled(name: str) -> Model:
    """The network of a program. Raises UnknownNameError for an unknown one."""
    given = _arrays(name)
    depth = sum(key.endswith(".query.weight") for key in given)
    both = lambda key: (given[f"{key}.weight"], given[f"{key}.bias"])  # noqa: E731
    parts = ("query", "key", "value", "linear", "mlp_1", "mlp_2")
    layers = [Weights(*(both(f"{layer}.{part}") for part in parts)) for layer in range(depth)]
    heads = int(given["heads"])
    return network(given["token_embed"], given["pos_embed"], layers, given["unembed"], heads, causal=False, name=name)


def compiled_checks(name: str) -> tuple[Tensor, Tensor]:
    """A few inputs [example, pos], and what the compiler's own network makes of them [example, pos, d_model]."""
    given = _arrays(name)
    return given["check_ids"], given["check_outputs"]


def compiled_pairs(name: str, n: int = 96, seed: int = 0) -> Pairs:
    """n pairs of random sequences, each read at one random position.

    The answer is the network's own output there, the distractor another output: the corrupted sequence's where that is
    another one. Of programs with one number as output both are fixed, so that their difference is the number; where it
    is not above zero they change places.
    """
    model, given = compiled(name), _arrays(name)
    generator = generator_for("compiled", name, seed)
    width, bos = len(given["pos_embed"]), int(given["bos"])
    words = [token for token in range(len(given["token_embed"])) if token != bos][: _vocabulary(given)]
    drawn = torch.randint(len(words), (2, n, width - 1), generator=generator)
    same = (drawn[0] == drawn[1]).all(1)
    drawn[1, same, 0] = (drawn[0, same, 0] + 1) % len(words)
    clean, corrupted = (torch.cat([torch.full((n, 1), bos), torch.tensor(words)[side]], 1) for side in drawn)
    read = torch.randint(width, (n,), generator=generator)
    rows = torch.arange(n)
    logits = [model.run(side).logits[rows, read] for side in (clean, corrupted)]
    answer, other = (one.argmax(-1) for one in logits)
    if logits[0].shape[1] > 2:
        others = torch.randint(1, logits[0].shape[1], (n,), generator=generator)
        distractor = torch.where(other == answer, (answer + others) % logits[0].shape[1], other)
    else:
        distractor = 1 - answer
    return Pairs(clean=clean, corrupted=corrupted, answer=answer, distractor=distractor, read=read, task=name)


def _vocabulary(given: Mapping[str, Tensor]) -> int:
    """Words without the beginning and the padding token."""
    return len(given["token_embed"]) - 2
