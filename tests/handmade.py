"""A network whose mechanism is known, built by hand, and the task it solves; and runs whose figures are planted.

Prompts are [BOS X . Y . . S2 . END], where X and Y are a token of class A and one of class B in either order and S2 is
the B token again; the answer is the A token. Corrupted: S2 is the A token.

    0.0  previous-token          attends to the position before; writes nothing
    0.1  S-inhibition            END attends to S2 and writes its class onto a flag
    1.0  name mover              END attends to names, the flag turns it to A; copies the token
    1.1  copy suppression        END attends to S2 and takes its token's logit down
    1.2  negative mover          attends like the name mover and takes the token down, less
    0.2, 0.3, 1.3                do nothing
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
import vesalius as vs
from vesalius.describe import GOES_FIRST, ROLES, Descriptions, Discovery, claims_of, describe
from vesalius.patching.record import Recording
from vesalius.protocol import Claim
from vesalius.quantities import COPIES, Runs
from vesalius.quantities.direct_effect import frozen, written
from vesalius.site import Site

VOCAB, WIDTH, D_HEAD, HEADS = 40, 9, 48, 4
BOS, END, S2 = 0, 1, 6
CLASS_A, CLASS_B, FILLERS = range(2, 14), range(14, 26), range(26, 40)
POSITION, IS_A, IS_B, IS_END, FLAG, CONSTANT = 40, 50, 51, 52, 53, 54
SITES = {
    "previous": Site("z", 0, 0), "inhibition": Site("z", 0, 1), "mover": Site("z", 1, 0),
    "suppressor": Site("z", 1, 1), "negative": Site("z", 1, 2), "idle": Site("z", 1, 3),
}  # fmt: skip
PARTS = {name: vs.Unit(site) for name, site in SITES.items()}
MEMBERS = tuple(PARTS[name] for name in ("inhibition", "mover", "suppressor", "negative"))


def pairs(n: int = 36) -> vs.Pairs:
    """n pairs in each of the splits discovery and validation, which share no names and no templates."""
    rows: list[dict[str, Any]] = []
    for split, name in enumerate(("discovery", "validation")):
        for row in range(n):
            a = CLASS_A[6 * split + row % 6]
            b = CLASS_B[6 * split + (row + row // 6) % 6]
            template = row % 12
            dots = [
                FILLERS[7 * split + d] for d in (template % 7, (template * 3 + 1) % 7, (template // 7 + row // 12) % 7)
            ]
            x, y = (a, b) if row % 4 < 2 else (b, a)
            clean = [BOS, x, dots[0], y, dots[1], dots[0], b, dots[2], END]
            corrupted = [a if at == S2 else token for at, token in enumerate(clean)]
            rows.append({"clean": clean, "corrupted": corrupted, "answer": a, "distractor": b, "split": name,
                         "template": f"{name} {template}", "names": f"{a}|{b}"})  # fmt: skip
    columns = {key: torch.tensor([row[key] for row in rows]) for key in ("clean", "corrupted", "answer", "distractor")}
    groups = {key: tuple(row[key] for row in rows) for key in ("template", "names")}
    return vs.Pairs(**columns, groups=groups, splits=tuple(row["split"] for row in rows), corruption="swap")


class Builder:
    """Writes the weights of a two-layer, attention-only GPT-2 by residual dimension."""

    def __init__(self) -> None:
        width = D_HEAD * HEADS
        config = GPT2Config(vocab_size=VOCAB, n_layer=2, n_embd=width, n_head=HEADS, n_positions=WIDTH, n_inner=8,
                            bos_token_id=0, eos_token_id=1)  # fmt: skip
        self.net = GPT2LMHeadModel(config).eval()
        self.width = width
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            self._embed()

    def _embed(self) -> None:
        words, places = self.net.transformer.wte.weight, self.net.transformer.wpe.weight
        words[range(VOCAB), range(VOCAB)] = 1
        words[list(CLASS_A), IS_A], words[list(CLASS_B), IS_B], words[END, IS_END] = 1, 1, 1
        places[range(WIDTH), range(POSITION, POSITION + WIDTH)] = 1
        # A constant that dominates the norm: it makes every LayerNorm nearly the identity.
        places[:, CONSTANT], places[:, CONSTANT + 1] = (self.width / 2) ** 0.5, -((self.width / 2) ** 0.5)

    def set(self, site: Site, what: str, entries: dict[tuple[int, int], float]) -> None:
        """entries: (residual dimension, dimension of the head) -> weight, of "q", "k", "v" or "o"."""
        attention = self.net.transformer.h[site.layer].attn
        column = "qkvo".index(what) * self.width + site.index * D_HEAD
        with torch.no_grad():
            for (residual, inner), weight in entries.items():
                if what == "o":
                    attention.c_proj.weight[site.index * D_HEAD + inner, residual] = weight
                else:
                    attention.c_attn.weight[residual, column + inner] = weight

    def copy(self, site: Site, scale: float) -> None:
        names = [*CLASS_A, *CLASS_B]
        self.set(site, "v", {(name, inner): 1.0 for inner, name in enumerate(names)})
        self.set(site, "o", {(name, inner): scale for inner, name in enumerate(names)})

    def look_at_s2(self, site: Site, sharp: float = 60.0) -> None:
        self.set(site, "q", {(IS_END, 0): sharp})
        self.set(site, "k", {(POSITION + S2, 0): 1.0})

    def look_at_names(self, site: Site, sharp: float = 60.0) -> None:
        self.set(site, "q", {(IS_END, 0): sharp, (FLAG, 1): 20.0})
        self.set(site, "k", {(IS_A, 0): 1.0, (IS_B, 0): 1.0, (IS_A, 1): 1.0, (IS_B, 1): -1.0})


@cache
def network(*, mover: float = 3.0, looks: bool = True, suppressor: float = -2.0, negative: float = -1.0,
            flag: float = 1.0, noise: float = 0.002, seed: int = 0) -> vs.Model:  # fmt: skip
    """The network; each argument takes one ingredient away or turns it round."""
    build = Builder()
    build.set(SITES["previous"], "q", {(POSITION + p, p): 60.0 for p in range(WIDTH)})
    build.set(SITES["previous"], "k", {(POSITION + p, p + 1): 1.0 for p in range(WIDTH - 1)})
    build.look_at_s2(SITES["inhibition"])
    build.set(SITES["inhibition"], "v", {(IS_B, 0): 1.0, (IS_A, 0): -1.0})
    build.set(SITES["inhibition"], "o", {(FLAG, 0): flag})
    if looks:
        build.look_at_names(SITES["mover"])
    build.copy(SITES["mover"], mover)
    build.look_at_s2(SITES["suppressor"])
    build.copy(SITES["suppressor"], suppressor)
    build.look_at_names(SITES["negative"])
    build.copy(SITES["negative"], negative)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in build.net.transformer.h:
            for weight in (block.attn.c_attn.weight, block.attn.c_proj.weight):
                weight += noise * torch.randn(weight.shape, generator=generator)
    return vs.Model(build.net)


def runs(model: vs.Model, split: str = "discovery", n: int = 24) -> Runs:
    return Runs(model, pairs(n).split(split))


def described(discovery: Discovery) -> Descriptions:
    """Every member described by the role library, as in a study."""
    return describe(discovery, ROLES, GOES_FIRST)


def claims(discovery: Discovery) -> tuple[Claim, ...]:
    """What the roles of the members claim."""
    fits = [fit for fit in described(discovery).fits.values() if fit is not None]
    return tuple(claim for fit in fits for claim, _ in claims_of(fit, discovery))


@cache
def random_model() -> vs.Model:
    return tiny.model("gpt2")


@cache
def random_recording(n: int) -> Recording:
    return Runs(random_model(), pairs(n).split("discovery")).run("clean")


class Planted(Runs):
    """Runs of a random model whose figures are what the test says; whatever is not planted is zero or uniform."""

    def __init__(self, n: int = 12, data: vs.Pairs | None = None) -> None:
        super().__init__(random_model(), pairs(n).split("discovery") if data is None else data)
        # Its values and outputs are written to; the rest is shared.
        recording = random_recording(n)
        copied = {site: tensor.clone() for site, tensor in recording.sites.items()}
        values = tuple(value.clone() for value in recording.values)
        self._random, self._clean = recording.sites, replace(recording, values=values, sites=copied)
        for tensor in copied.values():
            tensor[torch.arange(self.n), self.pairs.at] = 0.0
        self.seen: dict[vs.Part, Tensor] = {}
        self.totals: dict[vs.Part, float] = {}
        self.turned: dict[vs.Part, float] = {}
        """Attention that patching this part moves from the answer to the distractor in every head that is watched."""

    def run(self, which: str, parts: Any = ()) -> Recording:
        return self._clean if which == "clean" else super().run(which, parts)

    def attend(self, part: vs.Part, query: Tensor, key: Tensor, mass: float) -> None:
        """At `query`, mass on `key` and the rest spread over the other visible positions."""
        pattern = self.seen.setdefault(part, uniform(self.n))
        for row in range(self.n):
            at, to = int(query[row]), int(key[row])
            pattern[row, at, : at + 1] = (1 - mass) / at
            pattern[row, at, to] = mass

    def pattern(self, part: vs.Part, which: str = "clean") -> Tensor:
        return self.seen.get(part, uniform(self.n))

    def total(self, corruption: str) -> Tensor:
        return torch.full((self.n,), 10.0)

    def effects(self, parts: Any, corruption: str, direction: str) -> Tensor:
        return torch.tensor([[self.totals.get(part, 0.0)] * self.n for part in parts])

    def shuffled_effects(self, parts: Any, corruption: str, direction: str) -> Tensor:
        return torch.zeros(len(parts), self.n)

    def copy(self, part: vs.Unit, key: str, amount: float) -> None:
        """Makes the value at `key` such that `copies` is `amount` for every prompt."""
        layer, index = part.site.layer, part.site.index
        assert layer is not None and index is not None
        rows, at = torch.arange(self.n), self.named_positions[key]
        token = self.pairs.answer if key == "answer" else self.pairs.distractor
        values = self._clean.values[layer]
        values[rows, index, at] = self.model.W_U[token] @ self.model.W_O(layer)[index].T
        values[rows, index, at] *= (amount / COPIES.measure(self, part, {"key": key}))[:, None]

    def write(self, part: vs.Unit, amount: float) -> None:
        """Makes the output at the read position such that `direct_effect` is `amount` for every prompt."""
        site, read = part.site.whole, (torch.arange(self.n), self.pairs.at)
        heads = slice(None) if part.site.index is None else part.site.index
        output = self._clean.sites[site]
        output[(*read, heads)] = self._random[site][(*read, heads)]
        output[(*read, heads)] *= (amount / frozen(self, "clean").of(written(self, part)))[:, None]

    def evaluate(self, variants: Any, base: Any, source: Any, task: str, watch: Any = ()) -> Any:
        watched = {}
        for site in watch:
            heads = torch.stack([self.pattern(vs.head(site.layer, h))[:, -1] for h in range(4)], 1)
            watched[site] = torch.stack([self._turn(heads, variant.parts[0]) for variant in variants])
        return SimpleNamespace(watched=watched)

    def _turn(self, heads: Tensor, part: vs.Part) -> Tensor:
        rows, moved = torch.arange(self.n), self.turned.get(part, 0.0)
        heads = heads.clone()
        heads[rows, :, self.named_positions["answer"]] -= moved
        heads[rows, :, self.named_positions["distractor_last"]] += moved
        return heads


def uniform(n: int) -> Tensor:
    causal = torch.ones(WIDTH, WIDTH).tril()
    return (causal / causal.sum(1, keepdim=True)).repeat(n, 1, 1)
