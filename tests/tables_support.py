"""Tables whose truth is planted."""

from __future__ import annotations

import torch

import vesalius as vs

CONCEPTS = {"size": "yes", "shape": "yes", "texture": "yes"}


def planted_concepts(n: int, seed: int, hidden: bool = False) -> vs.Table:
    """Three concepts of two columns each, and an answer that is their majority; hidden: and that of a fourth one,
    which nobody has labelled."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    concepts = torch.stack([x[:, 0] + x[:, 1] > 0, x[:, 2] - x[:, 3] > 0, x[:, 4] + x[:, 5] > 0], 1)
    total = concepts.sum(1).float() + (1.5 * (x[:, 6] > 0).float() if hidden else 0)
    noise = 0.3 * torch.randn(n, generator=generator)
    answer = (total + noise > (2.2 if hidden else 1.5)).long()
    labels = {
        name: tuple("yes" if one else "no" for one in concepts[:, number].tolist())
        for number, name in enumerate(CONCEPTS)
    }
    return vs.Table(x, tuple(f"c{number}" for number in range(8)), answer, ("no", "yes"), labels=labels, name="planted")


def linear_table(n: int = 400, seed: int = 0, classes: bool = True) -> vs.Table:
    """A target that rests on the first column, against the second, and not on the third."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator)
    score = 2 * x[:, 0] - x[:, 1]
    columns = ("first", "second", "third")
    if not classes:
        return vs.Table(x, columns, score + 0.1 * torch.randn(n, generator=generator), name="numbers")
    drawn = torch.rand(n, generator=generator) < score.sigmoid()
    return vs.Table(x, columns, drawn.long(), ("no", "yes"), name="planted")
