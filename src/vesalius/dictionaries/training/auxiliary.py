"""AuxK: dead latents learn to rebuild what the live ones left over (Gao et al. 2024, appendix A.2).

Of each row's dead latents the `aux_k` largest positive ones rebuild the error, which is held fixed. Their squared error
counts relative to the error's own size, as a share `aux_coef` of a loss in which the variance is 1; so it is as strong
when the error is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vesalius.dictionaries.training.facts import Facts
from vesalius.dictionaries.training.microbatch import MicroBatch
from vesalius.model.products import linear

MOST = 2048
"""Dead latents that are helped in one step; with more of them, others come in the next."""


def dead_at(silent: Tensor, dead_after: int, step: int) -> Tensor:
    """Numbers of the dead latents that are helped at this step."""
    dead = (silent >= dead_after).nonzero()[:, 0]
    return dead if len(dead) <= MOST else dead.roll(-step * MOST)[:MOST].sort().values


def help_dead(batch: MicroBatch, number: int, dead: Tensor, facts: Facts) -> Tensor:
    """Add the gradients of a block's dead latents; returns the loss. facts: of the micro-batch in all processes."""
    config, block = batch.run.config, batch.blocks[number]
    wiring, held = batch.run.wiring.blocks[number], batch.parameters.block_gradients(number)
    encoder, bias, decoder = (block[name][dead] for name in ("W_enc", "b_enc", "W_dec"))
    scale = config.aux_coef * facts.variance / max(float(facts.squared), 1e-12)
    k = min(config.aux_k, len(dead))

    def piece(cut: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, error = batch.x[cut, wiring.reads], batch.error[cut, wiring.writes]
        latents = linear(x.contiguous(), encoder, bias).relu()
        if k < len(dead):
            latents *= latents >= latents.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        # error is rebuilt minus target, so what is left over is its negative.
        miss = linear(latents, decoder.T) + error
        push = miss * (2 * scale * batch.share)
        pre = linear(push, decoder) * (latents > 0)
        loss = miss.square().sum(dtype=torch.float64) * scale
        return linear(latents.T.contiguous(), push.T), linear(pre.T.contiguous(), x.T), pre.sum(0), loss

    parts = batch.run.workers.map(piece, batch.cuts)
    sums = [torch.stack([part[place] for part in parts]).sum(0) for place in range(4)]
    for name, gradient in zip(("W_dec", "W_enc", "b_enc"), sums[:3], strict=True):
        held[name][dead] += gradient
    return sums[3]
