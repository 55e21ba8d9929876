"""Trains the small networks of `vesalius.toys.trained` and writes their weights.

    python tools/train_toys.py src/vesalius/toys/weights [induction brackets siit]

Some minutes each on one core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vesalius.toys.network import Weights, network
from vesalius.toys.trained import BRACKETS, INDUCTION, SIIT, balanced_rows, induction_rows, siit_label, siit_rows


def fresh(
    name: str, vocab: int, width: int, d: int, heads: int, layers: int, d_mlp: int, out: int, causal: bool
) -> nn.Module:
    draw = torch.Generator().manual_seed(0)

    def pair(one: int, two: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return torch.randn(one, two, generator=draw) * scale / one**0.5, torch.zeros(two)

    made = [
        Weights(pair(d, d), pair(d, d), pair(d, d), pair(d, d, 0.5), pair(d, d_mlp), pair(d_mlp, d, 0.5))
        for _ in range(layers)
    ]
    tokens, positions = (torch.randn(n, d, generator=draw) * 0.5 for n in (vocab, width))
    unembed = torch.randn(out, d, generator=draw) / d**0.5
    module: nn.Module = network(tokens, positions, made, unembed, heads, causal=causal, name=name).module
    return module.train().requires_grad_(True)


def trained(module: nn.Module, steps: int, loss_of: Callable[[int], Tensor], rate: float, decay: float) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.1)
    began = time.process_time()
    for step in range(steps):
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(step, f"loss {float(loss.detach()):.4f}", f"{time.process_time() - began:.0f} s", flush=True)


def arrays(module: nn.Module, heads: int) -> dict[str, np.ndarray]:
    found = {
        "token_embed": module.tokens.weight,
        "pos_embed": module.positions.weight,
        "unembed": module.unembed.weight,
    }
    for number, layer in enumerate(module.layers):
        own = {"query": layer.attention.q, "key": layer.attention.k, "value": layer.attention.v}
        own |= {"linear": layer.attention.out, "mlp_1": layer.mlp.up, "mlp_2": layer.mlp.down}
        for name, linear in own.items():
            found |= {f"{number}.{name}.weight": linear.weight.T, f"{number}.{name}.bias": linear.bias}
    made = {name: tensor.detach().numpy().astype(np.float32) for name, tensor in found.items()}
    return {**made, "heads": np.array(heads)}


def induction() -> dict[str, np.ndarray]:
    """Attention only: predicts tokens of a random sequence that is repeated after a random number of tokens."""
    module = fresh("induction", INDUCTION.vocab, INDUCTION.width, 48, 4, 2, 1, INDUCTION.vocab, True)
    for layer in module.layers:  # no MLPs
        for weight in (*layer.mlp.parameters(),):
            weight.data.zero_()
            weight.requires_grad_(False)
    draw = torch.Generator().manual_seed(1)

    def loss(_step: int) -> Tensor:
        rows, repeated = induction_rows(64, draw)
        logits = module(rows).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        return each[repeated[:, 1:]].mean()

    trained(module, 1800, loss, 4e-3, 0.01)
    return arrays(module, 4)


def brackets() -> dict[str, np.ndarray]:
    """Says at the beginning whether the brackets after it are balanced."""
    module = fresh("brackets", BRACKETS.vocab, BRACKETS.width, 32, 2, 2, 48, 2, False)
    draw = torch.Generator().manual_seed(2)

    def loss(_step: int) -> Tensor:
        rows, balanced = balanced_rows(128, draw)
        return nn.functional.cross_entropy(module(rows).logits[:, 0], balanced.long())

    trained(module, 2000, loss, 3e-3, 0.01)
    return arrays(module, 2)


def siit() -> dict[str, np.ndarray]:
    """Strict interchange intervention training (Gupta et al. 2024): two heads hold the two variables, the last MLP
    their conjunction, and nothing else matters."""
    module = fresh("siit", SIIT.vocab, 2 * SIIT.width, 32, 2, 2, 32, 2, True)
    draw = torch.Generator().manual_seed(3)
    strict = ("1.0", "1.1", "mlp 0")

    def run(rows: Tensor, patched: str = "", source: Tensor | None = None) -> Tensor:
        """Logits at the end, with one part's value from the run on other rows."""
        layer = module.layers[int(patched[-1] if patched.startswith("mlp") else patched[0])] if patched else None
        if layer is None:
            return module(rows).logits[:, -1]
        seen: list[Tensor] = []
        if patched.startswith("mlp"):
            with layer.mlp.register_forward_hook(lambda _m, _a, out: seen.append(out)):
                module(source)
            with layer.mlp.register_forward_hook(lambda _m, _a, _out: seen[0]):
                return module(rows).logits[:, -1]
        head = int(patched[2])
        with layer.attention.out.register_forward_pre_hook(lambda _m, args: seen.append(args[0])):
            module(source)

        def put(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            z, other = (one.unflatten(-1, (2, -1)) for one in (args[0], seen[0]))
            return (
                torch.cat(
                    [other[..., :1, :], z[..., 1:, :]] if head == 0 else [z[..., :1, :], other[..., 1:, :]], -2
                ).flatten(-2),
            )

        with layer.attention.out.register_forward_pre_hook(put):
            return module(rows).logits[:, -1]

    def loss(step: int) -> Tensor:
        base, source = siit_rows(128, draw), siit_rows(128, draw)
        total = nn.functional.cross_entropy(run(base), siit_label(base))
        for head in ("0.0", "0.1"):
            mixed = base.clone()
            place = 1 + int(head[2])
            mixed[:, place] = source[:, place]
            total = total + nn.functional.cross_entropy(run(base, head, source), siit_label(mixed))
        plain = run(base)
        for part in strict:
            # Of the logits themselves: answers alone leave room for what does not turn them round.
            total = total + (run(base, part, source) - plain).square().mean()
        del step
        return total / 6

    trained(module, 700, loss, 3e-3, 0.05)
    return arrays(module, 2)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for name, train in (("induction", induction), ("brackets", brackets), ("siit", siit)):
        if len(sys.argv) == 2 or name in sys.argv[2:]:
            np.savez_compressed(folder / f"{name}.npz", **train())
            print(name, (folder / f"{name}.npz").stat().st_size, "bytes", flush=True)


if __name__ == "__main__":
    main()
