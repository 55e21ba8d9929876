"""Dead latents: an auxiliary loss that helps them, or new weights in their place.

AuxK (Gao et al. 2024, appendix A.2): of each row's dead latents the `aux_k` largest positive ones reconstruct the error
of the live ones, which is held fixed. Their squared error counts relative to that error's own size, as a share
`aux_coef` of a loss in which the variance is 1; so it is as strong when the error is small.

Resampling (Bricken et al. 2023, "Neuron resampling"): dead latents begin again at rows with a large error, drawn with
probability proportional to their squared loss. Encoder and decoder point to the drawn row's input and output, the
encoder with a fifth of the live encoders' mean norm, bias zero, moments zero; thresholds and gains are the mean of the
live ones'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.dictionaries.training.microbatch import MicroBatch, StepTotals
from vesalius.dictionaries.training.parameters import Parameters
from vesalius.dictionaries.training.run import Processes, Run
from vesalius.model.products import linear
from vesalius.seeds import generator_for

MOST_HELPED = 2048
"""Dead latents that AuxK helps in one step; with more of them, others come in the next."""
RESAMPLED_ROWS = 8192
"""Rows among which those with a large error are looked for."""
_ENCODER_NORM = 0.2
"""Of a resampled latent, relative to the live ones' mean."""


def dead_latents(rows_since_fired: Int[Tensor, " latent"], dead_after: int, step: int) -> Int[Tensor, " dead"]:
    """Numbers of the dead latents that are helped at this step."""
    dead = (rows_since_fired >= dead_after).nonzero()[:, 0]
    # Another window of the dead ones in every step, so that all get their turn.
    return dead if len(dead) <= MOST_HELPED else dead.roll(-step * MOST_HELPED)[:MOST_HELPED].sort().values


def add_aux_gradients(batch: MicroBatch, number: int, dead: Tensor, totals: StepTotals) -> Float[Tensor, ""]:
    """Add AuxK's gradients for a block's dead latents; returns its loss. totals: over all processes."""
    config, block, layout = batch.run.config, batch.blocks[number], batch.run.layout.blocks[number]
    into = batch.parameters.block_gradients(number)
    encoder, bias, decoder = (block[name][dead] for name in ("W_enc", "b_enc", "W_dec"))
    scale = config.aux_coef * totals.variance / max(float(totals.squared_error), 1e-12)
    k = min(config.aux_k, len(dead))

    def chunk(cut: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, error = batch.x[cut, layout.reads], batch.error[cut, layout.writes]
        latents = linear(x.contiguous(), encoder, bias).relu()
        if k < len(dead):
            # Zeros are never above a positive k-th value, so that at most k of a row stay.
            latents *= latents >= latents.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        # error is reconstruction minus target, so what the live latents left over is its negative.
        miss = linear(latents, decoder.T) + error
        output_gradient = miss * (2 * scale * batch.weight)
        pre = linear(output_gradient, decoder) * (latents > 0)
        loss = miss.square().sum(dtype=torch.float64) * scale
        gradients = linear(latents.T.contiguous(), output_gradient.T), linear(pre.T.contiguous(), x.T), pre.sum(0)
        return *gradients, loss

    parts = batch.run.workers.map(chunk, batch.cuts)
    *gradients, loss = (torch.stack(of).sum(0) for of in zip(*parts, strict=True))
    for name, gradient in zip(("W_dec", "W_enc", "b_enc"), gradients, strict=True):
        into[name][dead] += gradient
    return loss


def resample(
    run: Run, parameters: Parameters, rows_since_fired: Int[Tensor, "block latent"], step: int, rows: Sequence[Tensor]
) -> int:
    """Give the dead latents new weights, in place; returns how many there were.

    rows: one tensor [n, width] per site of the source; the same in every process.
    """
    dead = rows_since_fired >= run.config.dead_after
    if not bool(dead.any()):
        return 0
    # Every process has all of these rows and computes the same; nothing may be summed over them.
    alone = replace(run, processes=Processes())
    batch = MicroBatch(alone, parameters, [part.to(run.device) for part in rows], 1 / len(rows[0]), 0.0)
    batch.forward()
    weights = batch.error.double().square().sum(1).square().cpu()
    for number in range(len(dead)):
        which = dead[number].nonzero()[:, 0]
        if len(which) and float(weights.sum()) > 0:
            generator = generator_for("resample", run.config.seed, step, number)
            # Without replacement, so that two latents don't begin at the same row, as long as there are enough rows.
            enough = int((weights > 0).sum()) >= len(which)
            drawn = torch.multinomial(weights, len(which), replacement=not enough, generator=generator)
            _begin_again(batch, number, which, drawn.to(run.device), ~dead[number])
            rows_since_fired[number, which] = 0
    return int(dead.sum())


def _begin_again(batch: MicroBatch, number: int, which: Tensor, drawn: Tensor, live: Tensor) -> None:
    layout, parameters, block = batch.run.layout.blocks[number], batch.parameters, batch.blocks[number]
    norm = block["W_enc"][live].norm(dim=1).mean() if bool(live.any()) else torch.ones(())
    outputs = batch.y[drawn, layout.writes] - parameters.values["b_dec"][layout.writes]
    block["W_enc"][which] = _unit(batch.x[drawn, layout.reads]) * (_ENCODER_NORM * norm)
    block["W_dec"][which] = _unit(outputs)
    block["b_enc"][which] = 0.0
    for name in set(block) - {"W_enc", "W_dec", "b_enc"}:
        block[name][which] = block[name][live].mean() if bool(live.any()) else block[name].mean()
    for moments in (parameters.means, parameters.squares):
        for name in block:
            moments[f"{number}.{name}"][which] = 0.0


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
