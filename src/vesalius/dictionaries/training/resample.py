"""Resampling: dead latents begin again at rows that are rebuilt badly (Bricken et al. 2023, "Neuron resampling").

Rows are drawn with probability proportional to their squared loss. Encoder and decoder point to the drawn row's input
and output, the encoder with a fifth of the live encoders' mean norm, bias zero, moments zero; thresholds and gains are
the mean of the live ones'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vesalius.dictionaries.training.fitter import Fitter
from vesalius.dictionaries.training.microbatch import MicroBatch
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.seeds import generator_for

ROWS = 8192
_SHARE = 0.2


def resample(fitter: Fitter, rows: Sequence[Tensor]) -> int:
    """Give the fitter's dead latents new weights, in place; returns how many there were.

    rows: one tensor [n, width] per site of the source; the same in every process.
    """
    config, dead = fitter.run.config, fitter.silent >= fitter.run.config.dead_after
    if not bool(dead.any()):
        return 0
    alone = replace(fitter.run, ranks=Ranks())
    batch = MicroBatch(alone, fitter.parameters, [part.to(alone.device) for part in rows], 1 / len(rows[0]), 0.0)
    batch.forward()
    weights = batch.error.double().square().sum(1).square().cpu()
    for number in range(len(dead)):
        which = dead[number].nonzero()[:, 0]
        if len(which) and float(weights.sum()) > 0:
            generator = generator_for("resample", config.seed, fitter.steps, number)
            enough = int((weights > 0).sum()) >= len(which)
            drawn = torch.multinomial(weights, len(which), replacement=not enough, generator=generator)
            _begin_again(fitter, batch, number, which, drawn.to(alone.device))
    return int(dead.sum())


def _begin_again(fitter: Fitter, batch: MicroBatch, number: int, which: Tensor, drawn: Tensor) -> None:
    wiring, block = fitter.run.wiring.blocks[number], fitter.parameters.block(number)
    live = fitter.silent[number] < fitter.run.config.dead_after
    norm = block["W_enc"][live].norm(dim=1).mean() if bool(live.any()) else torch.ones(())
    outputs = batch.y[drawn, wiring.writes] - fitter.parameters.values["b_dec"][wiring.writes]
    block["W_enc"][which] = _unit(batch.x[drawn, wiring.reads]) * (_SHARE * norm)
    block["W_dec"][which] = _unit(outputs)
    block["b_enc"][which] = 0.0
    for name in set(block) - {"W_enc", "W_dec", "b_enc"}:
        block[name][which] = block[name][live].mean() if bool(live.any()) else block[name].mean()
    for moments in (fitter.parameters.means, fitter.parameters.squares):
        for name in block:
            moments[f"{number}.{name}"][which] = 0.0
    fitter.silent[number, which] = 0


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
