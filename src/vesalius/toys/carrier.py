"""A network whose first token has a hidden kind, carried along one direction, and used for the output or ignored.

Every symbol has two bits, drawn at random: `kind` and `other`, each along a direction of its own in the embeddings. The
sequence is a symbol and some fillers; a mean over the past brings the symbol's vector to the last position. The output
reads `kind` where it is used, and `other` where it is ignored: then kind can be read off, and nothing depends on it.
Symbols of validation are other ones than those of discovery, so that random weights, which know no bits, carry nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vesalius.directions import Direction
from vesalius.model import Model
from vesalius.site import Site

SYMBOLS, FILLERS, WIDTH, LENGTH, OUTPUTS = 480, 16, 32, 4, 24
SIZE, LOUDNESS = 1.0, 0.6
"""Size of a bit in the embeddings, beside noise of spread 1; and of everything else in the output weights."""
SITE = Site("module", module="mix")


class CarrierNetwork(nn.Module):
    """Embeddings, a causal mean and a residual layer (`mix`), output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + FILLERS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.unembed = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos output"]:
        """Logits at every position."""
        x = self.embed(ids)
        past = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[None, :, None]
        logits: Tensor = self.unembed(torch.tanh(self.mix(past)))
        return logits


@dataclass(frozen=True, eq=False)
class Carrier:
    """The network as a model, the kind of each symbol [symbol], and the direction that carries it at `SITE`."""

    model: Model
    kind: Int[Tensor, " symbol"]
    direction: Direction

    def sequences(self, seed: int = 0) -> tuple[Int[Tensor, "example pos"], Int[Tensor, " example"]]:
        """One sequence for each symbol, and its kind."""
        generator = torch.Generator().manual_seed(seed)
        fillers = torch.randint(SYMBOLS, SYMBOLS + FILLERS, (SYMBOLS, LENGTH - 1), generator=generator)
        return torch.cat([torch.arange(SYMBOLS)[:, None], fillers], 1), self.kind


def carrier(used: bool, seed: int = 0) -> Carrier:
    """A network that uses the kind, or carries it and ignores it. seed: for everything that is drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        net = CarrierNetwork().eval()
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0].T
    bits = torch.randint(0, 2, (2, SYMBOLS), generator=generator)
    with torch.no_grad():
        # Embeddings without the two directions, then the bits along them.
        table = torch.randn(SYMBOLS + FILLERS, WIDTH, generator=generator)
        table -= table @ basis[:2].T @ basis[:2]
        for number in range(2):
            table[:SYMBOLS] += (2 * bits[number, :, None] - 1) * SIZE * LENGTH * basis[number]
        net.embed.weight.copy_(table)
        # A rotation that the tanh leaves coordinates of: unit t of the hidden layer reads basis vector t.
        net.mix.weight.copy_(basis * 0.5)
        net.mix.bias.zero_()
        out = LOUDNESS * torch.randn(OUTPUTS, WIDTH, generator=generator)
        out[:, :2] = 0.0
        out[:, 0 if used else 1] = 1.5 * torch.randn(OUTPUTS, generator=generator)
        net.unembed.weight.copy_(out)
        net.unembed.bias.zero_()
    name = f"carrier that {'uses' if used else 'ignores'} the kind, {seed}"
    direction = Direction(SITE, torch.eye(WIDTH)[0], "kind")
    return Carrier(Model(net, name=name), bits[0], direction)
