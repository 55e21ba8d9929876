"""Small transformers built by hand, each with a mechanism that circuit discovery is known to get wrong.

    induction    two layers of attention: the last token's earlier occurrence, and what followed it
    backup       a mover, and two heads that move the same token only where the mover did not
    cancelling   a head whose direct effect another head takes back: its total effect is zero, its edges' are not
    saturated    a head that attends so sharply that queries and keys have no gradient
    and, or      a gate of two copied bits, all of whose edges are seen by cutting clean runs (and), or none (or)
    negative     a mover, and a weaker one that works against the answer
    xor          a sum of neurons in which either of two makes the circuit perfect

The stream has a dimension of its own for everything that is said. Under resampling the edges in `edges` are those whose
cutting alone changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from vesalius.errors import UnknownNameError
from vesalius.inputs import Pairs
from vesalius.model import Model
from vesalius.seeds import generator_for
from vesalius.toys.network import Weights, network

NAMES, PLACES, HEADS, DEPTH, NEURONS = 6, 6, 3, 8, 2
VOCAB = NAMES + 2
"""Names, a filler, and a token that prompts begin with."""
FILLER, BEGIN = NAMES, NAMES + 1
SHARP = 30.0

# Dimensions of the stream.
TOKEN, PLACE, MARK, PREVIOUS, OUT, FLAG, ONE = 0, 8, 14, 16, 24, 32, 34
WIDTH = 35


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A network with a known circuit, and pairs that need it.

    edges: (writer, reader) names. hidden: writers that single ablations miss.
    """

    model: Model
    pairs: Pairs
    edges: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...] = ()


Entries = Mapping[tuple[int, int], float]


class _Builder:
    """Weights by dimension; what is not set is zero."""

    def __init__(self, layers: int) -> None:
        self.tokens, self.places = torch.zeros(VOCAB, WIDTH), torch.zeros(PLACES, WIDTH)
        self.tokens[range(VOCAB), range(TOKEN, TOKEN + VOCAB)] = 1
        self.places[range(PLACES), range(PLACE, PLACE + PLACES)] = 1
        self.places[:, ONE] = 1
        wide, empty = HEADS * DEPTH, torch.zeros
        self.layers = [
            Weights(
                (empty(WIDTH, wide), empty(wide)),
                (empty(WIDTH, wide), empty(wide)),
                (empty(WIDTH, wide), empty(wide)),
                (empty(wide, WIDTH), empty(WIDTH)),
                (empty(WIDTH, NEURONS), empty(NEURONS)),
                (empty(NEURONS, WIDTH), empty(WIDTH)),
            )
            for _ in range(layers)
        ]

    def head(self, layer: int, head: int, q: Entries, k: Entries, v: Entries, out: Entries) -> None:
        """Entries (dimension of the stream, of the head) -> weight; of out the other way round."""
        own, first = self.layers[layer], head * DEPTH
        for matrix, entries in ((own.q[0], q), (own.k[0], k), (own.v[0], v)):
            for (stream, inner), value in entries.items():
                matrix[stream, first + inner] += value
        for (inner, stream), value in out.items():
            own.out[0][first + inner, stream] += value

    def neuron(
        self, layer: int, number: int, reads: Mapping[int, float], bias: float, writes: Mapping[int, float]
    ) -> None:
        own = self.layers[layer]
        for stream, value in reads.items():
            own.mlp_in[0][stream, number] = value
        own.mlp_in[1][number] = bias
        for stream, value in writes.items():
            own.mlp_out[0][number, stream] = value

    def mover(self, layer: int, head: int, place: int, strength: float, more: Entries | None = None) -> None:
        """From any token to a place; copies the name there to the output."""
        self.head(
            layer,
            head,
            {(ONE, 0): SHARP},
            {(PLACE + place, 0): 1.0},
            _names(TOKEN),
            _names(OUT, strength) | dict(more or {}),
        )

    def model(self, name: str, outputs: int = NAMES) -> Model:
        unembed = torch.zeros(outputs, WIDTH)
        unembed[range(outputs), range(OUT, OUT + outputs)] = 1
        return network(self.tokens, self.places, self.layers, unembed, HEADS, causal=True, name=name)


def _names(first: int, strength: float = 1.0) -> dict[tuple[int, int], float]:
    """Names as (dimension of the stream, of the head); from OUT on the other way round."""
    turned = first >= OUT
    return {(n, first + n) if turned else (first + n, n): strength for n in range(NAMES)}


def _pairs(name: str, n: int, make: Callable[[Tensor], tuple[list[int], list[int], int, int]]) -> Pairs:
    """Pairs from rows that are made of a random order of the names."""
    generator = generator_for("mechanism", name)
    rows = [make(torch.randperm(NAMES, generator=generator)) for _ in range(n)]
    clean, corrupted, answer, distractor = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Pairs(clean=clean, corrupted=corrupted, answer=answer, distractor=distractor, task=name)


def _moved(order: Tensor) -> tuple[list[int], list[int], int, int]:
    """A name in the second place, or none."""
    first, other = int(order[0]), int(order[1])
    return [BEGIN, first, FILLER, FILLER], [BEGIN, FILLER, FILLER, FILLER], first, other


def _induction(n: int) -> Mechanism:
    made = _Builder(2)
    before = {(PLACE + p, p - 1): SHARP for p in range(1, PLACES)}
    places = {(PLACE + p, p): 1.0 for p in range(PLACES)}
    every, copied = {(TOKEN + t, t): 1.0 for t in range(VOCAB)}, {(t, PREVIOUS + t): 1.0 for t in range(VOCAB)}
    made.head(0, 0, before, places, every, copied)
    same = {(TOKEN + t, t): SHARP for t in range(NAMES)}
    made.head(1, 0, same, {(PREVIOUS + t, t): 1.0 for t in range(NAMES)}, _names(TOKEN), _names(OUT))

    def rows(order: Tensor) -> tuple[list[int], list[int], int, int]:
        a, b, c, d, e, f = order.tolist()
        return [BEGIN, a, b, c, d, a], [BEGIN, e, f, a, b, e], b, f

    edges = (
        ("embed", "layers.0.v[0]"),
        ("layers.0.z[0]", "layers.1.k[0]"),
        ("embed", "layers.1.q[0]"),
        ("embed", "layers.1.v[0]"),
        ("layers.1.z[0]", "logits"),
    )
    return Mechanism(made.model("induction"), _pairs("induction", n, rows), edges)


def _backup(n: int) -> Mechanism:
    made = _Builder(2)
    made.mover(0, 0, 1, 1.0, {(name, FLAG): 1.0 for name in range(NAMES)})
    for head in (0, 1):
        # To the name, unless the flag says that it was moved.
        q = {(ONE, 0): SHARP, (FLAG, 0): -2 * SHARP}
        made.head(1, head, q, {(PLACE + 1, 0): 1.0}, _names(TOKEN), _names(OUT, 0.4))
    edges = (("embed", "layers.0.v[0]"), ("layers.0.z[0]", "logits"), ("layers.0.z[0]", "layers.1.q[0]"),
             ("layers.0.z[0]", "layers.1.q[1]"))  # fmt: skip
    return Mechanism(made.model("backup"), _pairs("backup", n, _moved), edges, ("layers.1.z[0]", "layers.1.z[1]"))


def _cancelling(n: int) -> Mechanism:
    made = _Builder(2)
    made.mover(0, 0, 1, 1.0, {(name, PREVIOUS + name): 1.0 for name in range(NAMES)})
    made.mover(0, 1, 1, 1.0)
    here = {(PLACE + p, p): 1.0 for p in range(PLACES)}
    sharp = {(PLACE + p, p): SHARP for p in range(PLACES)}
    made.head(1, 0, sharp, here, {(PREVIOUS + name, name): 1.0 for name in range(NAMES)}, _names(OUT, -1.0))
    edges = (
        ("embed", "layers.0.v[0]"), ("embed", "layers.0.v[1]"), ("layers.0.z[0]", "logits"),
        ("layers.0.z[1]", "logits"), ("layers.0.z[0]", "layers.1.v[0]"), ("layers.1.z[0]", "logits"),
    )  # fmt: skip
    # The first head's value edge has no effect of its own, because its consequences cancel.
    return Mechanism(made.model("cancelling"), _pairs("cancelling", n, _moved), edges[1:], ("layers.0.z[0]",))


def _saturated(n: int) -> Mechanism:
    made = _Builder(1)
    made.tokens[range(NAMES // 2, NAMES), MARK] = 1
    # A name of the second half is marked, and stands for the one of the first half as well.
    half = NAMES // 2
    values = {(TOKEN + name, name % half): 1.0 for name in range(NAMES)}
    made.head(0, 0, {(ONE, 0): 2 * SHARP}, {(MARK, 0): 1.0}, values, {(name, OUT + name): 1.0 for name in range(half)})

    def rows(order: Tensor) -> tuple[list[int], list[int], int, int]:
        a, b = [name for name in order.tolist() if name < half][:2]
        return [BEGIN, a + half, b, FILLER], [BEGIN, a, b + half, FILLER], a, b

    edges = (("embed", "layers.0.k[0]"), ("layers.0.z[0]", "logits"))
    return Mechanism(made.model("saturated"), _pairs("saturated", n, rows), edges)


def _gate(kind: str, n: int) -> Mechanism:
    made = _Builder(1)
    for head in (0, 1):
        made.head(0, head, {(ONE, 0): SHARP}, {(PLACE + 1 + head, 0): 1.0}, {(TOKEN, 0): 1.0}, {(0, FLAG + head): 1.0})
    both = {FLAG: 1.0, FLAG + 1: 1.0}
    made.places[:, OUT + 1] = 0.5
    if kind == "and":
        made.neuron(0, 0, both, -1.0, {OUT: 1.0})
    else:
        made.neuron(0, 0, both, 0.0, {OUT: 1.0})
        made.neuron(0, 1, both, -1.0, {OUT: -1.0})

    def rows(_order: Tensor) -> tuple[list[int], list[int], int, int]:
        return [BEGIN, 0, 0, FILLER], [BEGIN, FILLER, FILLER, FILLER], 0, 1

    each = (("embed", "layers.0.v[0]"), ("embed", "layers.0.v[1]"), ("layers.0.z[0]", "layers.0.mlp_in"),
            ("layers.0.z[1]", "layers.0.mlp_in"))  # fmt: skip
    hidden = () if kind == "and" else ("layers.0.z[0]", "layers.0.z[1]")
    edges = (*(each if kind == "and" else ()), ("layers.0.mlp_out", "logits"))
    return Mechanism(made.model(kind), _pairs(kind, min(n, 2), rows), edges, hidden)


def _negative(n: int) -> Mechanism:
    made = _Builder(1)
    made.mover(0, 0, 1, 1.5)
    made.mover(0, 1, 1, -0.5)
    edges = tuple(
        edge for head in (0, 1) for edge in (("embed", f"layers.0.v[{head}]"), (f"layers.0.z[{head}]", "logits"))
    )
    return Mechanism(made.model("negative"), _pairs("negative", n, _moved), edges)


def _xor(_n: int) -> Mechanism:
    made = _Builder(3)
    made.tokens.zero_()
    for token, bits in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        made.tokens[token, FLAG], made.tokens[token, FLAG + 1] = bits
    both = {FLAG: 1.0, FLAG + 1: 1.0}
    made.neuron(0, 0, both, 0.0, {OUT: 1.0})
    made.neuron(1, 0, both, -1.0, {OUT: -2.0})
    made.neuron(2, 0, both, -1.0, {OUT: -2.0})
    made.places[:, OUT + 1] = 0.5
    ids = torch.tensor([[0], [1], [2], [3]])
    answer = torch.tensor([1, 0, 0, 1])
    pairs = Pairs(clean=ids, corrupted=ids[[1, 3, 0, 2]], answer=answer, distractor=1 - answer, task="xor")
    edges = tuple(
        edge
        for layer in range(3)
        for edge in (("embed", f"layers.{layer}.mlp_in"), (f"layers.{layer}.mlp_out", "logits"))
    )
    return Mechanism(made.model("xor", 2), pairs, edges)


_MAKERS: Mapping[str, Callable[[int], Mechanism]] = MappingProxyType(
    {
        "induction": _induction,
        "backup": _backup,
        "cancelling": _cancelling,
        "saturated": _saturated,
        "and": lambda n: _gate("and", n),
        "or": lambda n: _gate("or", n),
        "negative": _negative,
        "xor": _xor,
    }
)
MECHANISMS: Sequence[str] = tuple(_MAKERS)


def mechanism(name: str, n: int = 24) -> Mechanism:
    """A network by name, with n pairs (fewer where there are no more). Raises UnknownNameError for an unknown name."""
    if name not in _MAKERS:
        raise UnknownNameError("mechanism", name, MECHANISMS)
    return _MAKERS[name](n)
