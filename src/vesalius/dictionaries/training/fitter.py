"""Fitter: a dictionary in training. Mutable; `dictionary()` gives a frozen one at any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vesalius.data import Source
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.kinds import TRAINED
from vesalius.dictionaries.training.auxiliary import dead_at, help_dead
from vesalius.dictionaries.training.encode import DENSE_SHARE
from vesalius.dictionaries.training.facts import Facts
from vesalius.dictionaries.training.microbatch import MicroBatch, Run
from vesalius.dictionaries.training.parameters import Parameters, first_parameters
from vesalius.dictionaries.training.ranks import Ranks
from vesalius.dictionaries.training.update import update
from vesalius.dictionaries.training.wiring import Wiring
from vesalius.errors import NotFiniteError
from vesalius.jobs.workers import Workers

SAMPLE = 16_384
"""Rows from which scales and the decoder's bias are taken."""
PROBED = 512
"""Rows of them that are encoded once before the first step."""
DENSE_ROWS = 1024
"""Rows that are taken together while codes are dense."""
MEMORY = 0.99
"""Of the running mean of the threshold."""


class Fitter:
    """Parameters, moments and counters of one training run. Feed it batches with `step`."""

    def __init__(self, run: Run, parameters: Parameters) -> None:
        self.run, self.parameters = run, parameters
        self.steps = 0
        blocks, n_latents = len(run.wiring.blocks), run.config.n_latents
        self.silent = torch.zeros(blocks, n_latents, dtype=torch.long, device=run.device)
        """[block, latent] rows since each last fired."""
        self.threshold = torch.zeros(2, dtype=torch.float64)
        """Running sum of the smallest chosen pre-activation, and of its weights."""
        self.rows: list[list[float]] = []
        """One list per step: loss, fvu, l0, dead, lr."""

    def step(self, batch: Sequence[Tensor]) -> None:
        """One step on a batch: one tensor [rows, width] per site of the source, all rows of all processes.

        Raises NotFiniteError when the loss is no number any more.
        """
        run, config = self.run, self.run.config
        rate, share = config.rate(self.steps), 1 / len(batch[0])
        mine = [rows[run.ranks.share(len(rows))].to(run.device) for rows in batch]
        micro = [rows.tensor_split(self._micro_batches(len(batch[0]) // run.ranks.size)) for rows in mine]
        found = [self._micro_batch(rows, share, number > 0) for number, rows in enumerate(zip(*micro, strict=True))]
        for gradient in self.parameters.gradients.values():
            run.ranks.sum(gradient)
        facts = Facts.total(found)
        if not bool(torch.isfinite(facts.loss)):
            raise NotFiniteError(f"the loss at step {self.steps + 1} is no number: lower lr ({config.lr}) or clip_norm")
        update(run, self.parameters, self.steps)
        self._count(facts, len(batch[0]))
        dead = float((self.silent >= config.dead_after).double().mean())
        self.rows.append([float(facts.loss) * share, facts.fvu, facts.l0, dead, rate])
        self.steps += 1

    def _micro_batches(self, n_rows: int) -> int:
        """In how many pieces a batch is taken: as the config says, and more where dense codes would fill the memory."""
        last = self.rows[-1][2] if self.rows else torch.inf
        dense = last > DENSE_SHARE * self.silent.numel() and self.run.kind.selection == "local"
        return self.run.config.accumulate * (max(1, n_rows // self.run.config.accumulate // DENSE_ROWS) if dense else 1)

    def _micro_batch(self, rows: Sequence[Tensor], share: float, add: bool) -> Facts:
        config = self.run.config
        batch = MicroBatch(self.run, self.parameters, rows, share, config.pressure(self.steps))
        facts = batch.forward().over(self.run.ranks)
        batch.backward(add)
        if batch.least is not None:
            self.threshold = self.threshold * MEMORY + torch.tensor([float(batch.least), 1.0], dtype=torch.float64)
        if config.dead_rule == "auxk":
            for number in range(len(self.silent)):
                dead = dead_at(self.silent[number], config.dead_after, self.steps)
                if len(dead):
                    facts.loss += self.run.ranks.sum(help_dead(batch, number, dead, facts))
        return facts

    def _count(self, facts: Facts, n_rows: int) -> None:
        fired = torch.stack(facts.fired) > 0
        self.silent = torch.where(fired, 0, self.silent + n_rows)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step, for a checkpoint."""
        rows = torch.tensor(self.rows, dtype=torch.float64).view(-1, 5)
        return {**self.parameters.all(), "silent": self.silent, "threshold": self.threshold, "rows": rows}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Go back (or on) to what `tensors` gave."""
        self.parameters.restore(stored)
        self.silent.copy_(stored["silent"])
        self.threshold = stored["threshold"].clone()
        self.rows = stored["rows"].tolist()
        self.steps = len(self.rows)


def make_fitter(
    source: Source, config: TrainConfig, wiring: Wiring, workers: Workers, ranks: Ranks, device: torch.device
) -> Fitter:
    """A fitter at step 0: scales and means from a sample of the source, random directions from the seed."""
    sample = source.sample(SAMPLE, seed=config.seed)
    scales = [_scale(rows) if config.normalise else 1.0 for rows in sample]
    in_scale = tuple(scales[place] for place in wiring.in_places)
    out_scale = tuple(scales[place] for place in wiring.out_places)
    means = [sample[place].double().mean(0).float() * scales[place] for place in wiring.out_places]
    inputs = [sample[place][:PROBED].float() * scales[place] for place in wiring.in_places]
    run = Run(wiring, config, TRAINED[config.kind], in_scale, out_scale, workers, ranks, device)
    return Fitter(run, first_parameters(wiring, config, torch.cat(inputs, 1), torch.cat(means), device))


def _scale(rows: Tensor) -> float:
    """Factor that brings rows to mean norm sqrt(width); 1 for rows that are all zero."""
    mean = float(rows.double().norm(dim=1).mean())
    return float(rows.shape[1] ** 0.5) / mean if mean > 0 else 1.0
