"""A network of units whose activations on text are planted: what a description of one says can be held to the truth.

A unit's value is what its words, its topic and its habits make of a token, plus noise of standard deviation 1 that is a
fixed function of the last tokens and the unit, so that a run can be repeated. A word after which the next token is
likelier to be a certain one gives the units something to do: what they write is what the logits know of it.

    value  = strength * (the token is one of the unit's words, or LOUD where it is one of its loud words)
           + topic * (the text is on the topic) + noise
    logits = log frequencies of words + sum over units of writes * value, on the unit's target word
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.adapters import Access, Adapter
from vesalius.model import Model
from vesalius.seeds import generator_for

WORDS, UNITS = 64, 12
"""Words of the vocabulary, and units of the network; those that are not given fire on nothing."""
TOPIC = 0
"""The word that texts on the topic begin with."""
LOUD = 4.0
"""How much more strongly a unit fires on its loud words: they fill its top examples, and hide the others."""
LOOKS_BACK = 4
"""Tokens that the noise depends on."""
FOLLOWS = 0.5
"""How often a planted word is followed by its target."""


@dataclass(frozen=True)
class PlantedUnit:
    """What a unit does. words: token ids that it fires on, by `strength` standard deviations of its noise. loud: others
    that it fires on `LOUD` times as strongly. topic: what it adds on every token of texts on the topic. writes: what a
    value of 1 adds to the logit of `target`. copy_of: the number of a unit whose value it has, noise and all."""

    words: tuple[int, ...] = ()
    strength: float = 0.0
    loud: tuple[int, ...] = ()
    topic: float = 0.0
    writes: float = 0.0
    target: int = 1
    copy_of: int | None = None


@dataclass(frozen=True)
class PlantedText:
    """How texts are drawn. frequency: of the planted words together, outside the topic. on_topic: how many times as
    frequent they are in texts on the topic, which every second text is."""

    words: tuple[int, ...] = (2, 3)
    frequency: float = 0.01
    on_topic: float = 1.0
    target: int = 1

    def draw(self, texts: int, length: int, seed: int) -> Int[Tensor, "text pos"]:
        """Token ids; the first of each text tells whether it is on the topic."""
        generator = generator_for("planted text", seed)
        topic = torch.arange(texts) % 2 == 0
        chances = torch.stack([self._chances(1.0), self._chances(self.on_topic)])[topic.long()]
        ids = torch.multinomial(chances, length, replacement=True, generator=generator)
        ids[:, 0] = torch.where(topic, TOPIC, 4)
        follows = torch.rand(ids.shape, generator=generator) < FOLLOWS
        planted = torch.isin(ids, torch.tensor(self.words))
        ids[:, 1:] = torch.where(planted[:, :-1] & follows[:, 1:], self.target, ids[:, 1:])
        return ids

    def _chances(self, times: float) -> Float[Tensor, " word"]:
        chances = _frequencies()
        chances[list(self.words)] = 0.0
        share = self.frequency * times
        chances *= (1 - share) / chances.sum()
        chances[list(self.words)] = share / len(self.words)
        return chances


def text_network(units: Sequence[PlantedUnit], seed: int = 0) -> Model:
    """A model of one layer, whose `layers.0.mlp_post` are the planted units and, up to `UNITS`, units of noise."""
    given = [*units, *[PlantedUnit()] * (UNITS - len(units))]
    return Model(_Network(given, seed).eval(), tokenizer=WordTokenizer(), adapter=_ADAPTER, name="planted text")


class WordTokenizer:
    """One token a word: " w0", " w1", ...; a text is words with a space before each."""

    all_special_tokens: tuple[str, ...] = ()
    bos_token = eos_token = None

    def __call__(self, texts: Sequence[str], **_options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{int(token)}" for token in ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002 - as tokenizers are called
        return [int(word.removeprefix("w")) for word in text.split()]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        return self.encode(tokens)[0] if isinstance(tokens, str) else [self.encode(token)[0] for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        return {f" w{token}": token for token in range(WORDS)}


class _Units(nn.Module):
    table: Tensor
    topic: Tensor
    same: Tensor

    def __init__(self, units: Sequence[PlantedUnit], seed: int) -> None:
        super().__init__()
        table = torch.zeros(WORDS, len(units))
        for number, unit in enumerate(units):
            table[list(unit.words), number] = unit.strength
            table[list(unit.loud), number] = LOUD * unit.strength
        self.register_buffer("table", table)
        self.register_buffer("topic", torch.tensor([unit.topic for unit in units]))
        same = [number if unit.copy_of is None else unit.copy_of for number, unit in enumerate(units)]
        self.register_buffer("same", torch.tensor(same))
        self.seed = seed

    def forward(self, ids: Tensor) -> Tensor:
        on_topic = (ids[:, :1] == TOPIC).float()[..., None] * self.topic
        values: Tensor = self.table[ids] + on_topic + noise(ids, self.table.shape[1], self.seed)
        return values[..., self.same]


def noise(ids: Int[Tensor, "text pos"], units: int, seed: int) -> Float[Tensor, "text pos unit"]:
    """Standard normal numbers that are the same wherever the last tokens and the position are the same."""
    state = _mixed(torch.arange(ids.shape[1], device=ids.device) + 1 + 7_919 * seed).expand_as(ids)
    for back in range(LOOKS_BACK):
        before = torch.nn.functional.pad(ids + 1, (back, 0))[:, : ids.shape[1]]
        state = _mixed(state * 31 + before)
    number = _mixed(torch.arange(units, device=ids.device) * 7_368_787 + 1)
    uniform = (_mixed(state[..., None] ^ number) & 0xFFFFFF).double() / 2**24 + 2.0**-25
    return (2**0.5 * torch.erfinv(2 * uniform - 1)).float()


def _mixed(x: Tensor) -> Tensor:
    """31 bits that look random (the finaliser of MurmurHash3, within what int64 holds)."""
    x = x & 0x7FFFFFFF
    for factor in (0x45D9F3B, 0x45D9F3B):
        x = ((x >> 16) ^ x) * factor & 0x7FFFFFFF
    return (x >> 16) ^ x


class _Mlp(nn.Module):
    def __init__(self, units: Sequence[PlantedUnit], seed: int) -> None:
        super().__init__()
        self.units = _Units(units, seed)
        self.down = nn.Linear(len(units), WORDS, bias=False)
        self.down.weight.data.zero_()
        for number, unit in enumerate(units):
            self.down.weight.data[unit.target, number] = unit.writes

    def forward(self, ids: Tensor) -> Tensor:
        added: Tensor = self.down(self.units(ids))
        return added


class _Layer(nn.Module):
    def __init__(self, units: Sequence[PlantedUnit], seed: int) -> None:
        super().__init__()
        self.mlp = _Mlp(units, seed)

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        changed: Tensor = hidden + self.mlp(ids)
        return changed


class _Plain(nn.Module):
    """In the place of the final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WORDS))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _Network(nn.Module):
    """The residual stream has a dimension for each word, and is the logits."""

    def __init__(self, units: Sequence[PlantedUnit], seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(layers=1, heads=1, width=WORDS, words=WORDS)
        self.embed = nn.Embedding(WORDS, WORDS)
        self.embed.weight.data[:] = _frequencies().log()
        self.layers = nn.ModuleList([_Layer(units, seed)])
        self.norm, self.unembed = _Plain(), nn.Linear(WORDS, WORDS, bias=False)
        self.unembed.weight.data[:] = torch.eye(WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:  # noqa: ARG002 - reads backwards only
        hidden = self.layers[0](self.embed(input_ids), input_ids)
        return SimpleNamespace(logits=self.unembed(self.norm(hidden)))


def _frequencies() -> Float[Tensor, " word"]:
    """Of words, as 1 / rank."""
    chances = 1 / torch.arange(1, WORDS + 1).double()
    return (chances / chances.sum()).float()


_ADAPTER = Adapter(
    family="planted text",
    classes=("_Network",),
    layers="layers",
    sites={
        "resid_pre": Access("", side="in"),
        "mlp_post": Access("mlp.down", side="in"),
        "mlp_out": Access("mlp"),
        "resid_post": Access(""),
    },
    outside={"embed": Access("embed"), "final_norm": Access("norm"), "logits": Access("unembed")},
    o_proj="mlp.down",
    final_norm="norm",
    unembed="unembed",
    norm="layer",
    config={"n_layers": "layers", "n_heads": "heads", "d_model": "width", "vocab": "words"},
    direct=False,
    positions=False,
    call={},
)
