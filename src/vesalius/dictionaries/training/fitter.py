"""Fitter: a dictionary in training. Mutable; `fitted` gives a frozen one at any step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vesalius.data import Source
from vesalius.dictionaries.config import TrainConfig
from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.history import COLUMNS, History
from vesalius.dictionaries.kinds import TRAINABLE
from vesalius.dictionaries.training.dead import RESAMPLED_ROWS, add_aux_gradients, dead_latents, resample
from vesalius.dictionaries.training.encode import DENSE_SHARE
from vesalius.dictionaries.training.layout import Layout
from vesalius.dictionaries.training.microbatch import MicroBatch, StepTotals
from vesalius.dictionaries.training.parameters import Parameters, initial_parameters, update
from vesalius.dictionaries.training.run import Processes, Run
from vesalius.errors import InputError, NotFiniteError
from vesalius.jobs.workers import Workers

SAMPLE = 16_384
"""Rows from which scales and the decoder's bias are taken."""
PROBED = 512
"""Rows of them that are encoded once before the first step."""
DENSE_ROWS = 1024
"""Rows that are taken together while codes are dense."""
WATCHED, DIVERGED = 10, 100.0
"""Steps in a row whose error is so many times what it was at the first step (or the variance): diverged."""
MEMORY = 0.99
"""Of the running mean of the threshold."""
Fitted = Dictionary | CrossLayerTranscoder


class Fitter:
    """Parameters, moments and counters of one training run. Give it batches with `step`."""

    def __init__(self, run: Run, parameters: Parameters) -> None:
        self.run, self.parameters = run, parameters
        self.steps = 0
        blocks, n_latents = len(run.layout.blocks), run.config.n_latents
        self.rows_since_fired = torch.zeros(blocks, n_latents, dtype=torch.long, device=run.device)
        """[block, latent] rows since each last fired."""
        self.threshold = torch.zeros(2, dtype=torch.float64)
        """Running sum of the smallest chosen pre-activation, and of its weights."""
        self.history: list[list[float]] = []
        """One list per step, in the order of `history.COLUMNS`: loss, fvu, l0, dead, lr."""

    def step(self, batch: Sequence[Tensor]) -> None:
        """One step on a batch: one tensor [rows, width] per site of the source, all rows of all processes.

        Raises NotFiniteError when the loss is NaN or infinite.
        """
        run, config = self.run, self.run.config
        weight = 1 / len(batch[0])
        mine = [rows[run.processes.share(len(rows))].to(run.device) for rows in batch]
        micro = [rows.tensor_split(self._micro_batches(len(batch[0]) // run.processes.size)) for rows in mine]
        found = [self._micro_batch(rows, weight, number > 0) for number, rows in enumerate(zip(*micro, strict=True))]
        for gradient in self.parameters.gradients.values():
            run.processes.sum(gradient)
        totals = StepTotals.added(found)
        if not bool(torch.isfinite(totals.loss)):
            raise NotFiniteError(
                f"the loss at step {self.steps + 1} is NaN or infinite: lower lr ({config.lr}) or clip_norm"
            )
        update(run, self.parameters, self.steps)
        self.rows_since_fired = torch.where(torch.stack(totals.fired) > 0, 0, self.rows_since_fired + len(batch[0]))
        # Before so many rows have passed that a latent can count as dead, one that never fired is not alive either.
        known = min(config.dead_after, (self.steps + 1) * len(batch[0]))
        dead = float((self.rows_since_fired >= known).double().mean())
        rate = config.lr_at(self.steps)
        self.history.append([float(totals.loss) * weight, totals.fvu, totals.l0, dead, rate])
        self.steps += 1
        self._check_divergence()

    def _check_divergence(self) -> None:
        """Raises NotFiniteError once the error is far beyond both the variance and what it was at the start."""
        place, config = COLUMNS.index("fvu"), self.run.config
        # The first row was measured before any step was taken.
        started, now = self.history[0][place], min(row[place] for row in self.history[-WATCHED:])
        if self.steps > WATCHED and now > DIVERGED * max(started, 1.0):
            raise NotFiniteError(
                f"training diverged: at step {self.steps} the error is {now:.3g} times the variance, and was "
                f"{started:.3g} times at the start. Lower lr ({config.lr}), or set clip_norm ({config.clip_norm})"
            )

    def _micro_batches(self, n_rows: int) -> int:
        """Into how many micro-batches a batch is cut: as the config says, and more where dense codes would fill the
        memory.
        """
        last_l0 = self.history[-1][COLUMNS.index("l0")] if self.history else torch.inf
        # Only kinds without a count can be dense, and only their last step says whether they are.
        dense = last_l0 > DENSE_SHARE * self.rows_since_fired.numel() and self.run.kind.selection == "threshold"
        return self.run.config.accumulate * (max(1, n_rows // self.run.config.accumulate // DENSE_ROWS) if dense else 1)

    def _micro_batch(self, rows: Sequence[Tensor], weight: float, add: bool) -> StepTotals:
        config = self.run.config
        batch = MicroBatch(self.run, self.parameters, rows, weight, config.sparsity_at(self.steps))
        totals = batch.forward().over(self.run.processes)
        batch.backward(add)
        if batch.smallest_chosen is not None:
            new = torch.tensor([float(batch.smallest_chosen), 1.0], dtype=torch.float64)
            # A running mean that begins with the first batch and not with zero: its weight decays along with it.
            self.threshold = self.threshold * MEMORY + new
        if config.dead_rule == "auxk":
            for number in range(len(self.rows_since_fired)):
                dead = dead_latents(self.rows_since_fired[number], config.dead_after, self.steps)
                if len(dead):
                    totals.loss += self.run.processes.sum(add_aux_gradients(batch, number, dead, totals))
        return totals

    def resample(self, source: Source) -> None:
        """New weights for dead latents, when it is the step for it."""
        config = self.run.config
        if config.dead_rule == "resample" and self.steps % config.resample_every == 0:
            rows = source.sample(RESAMPLED_ROWS, seed=config.seed + self.steps)
            resample(self.run, self.parameters, self.rows_since_fired, self.steps, rows)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step, for a checkpoint."""
        history = torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS))
        # Names in files stay what they were when the first checkpoints were written.
        own = {"silent": self.rows_since_fired, "threshold": self.threshold, "rows": history}
        return {**self.parameters.all(), **own}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Go back (or on) to what `tensors` gave."""
        self.parameters.restore(stored)
        self.rows_since_fired.copy_(stored["silent"])
        self.threshold = stored["threshold"].clone()
        self.history = stored["rows"].tolist()
        self.steps = len(self.history)

    def fitted(self, metadata: Mapping[str, Any]) -> Fitted:
        """A frozen coder with copies of the parameters, its scales folded in when the config says so.

        metadata: where it comes from; how training ended is added.
        """
        run, layout = self.run, self.run.layout
        columns = np.array(self.history, dtype=np.float64).reshape(-1, len(COLUMNS))
        history = History({name: columns[:, place].copy() for place, name in enumerate(COLUMNS)})
        coder: Fitted = self._layers() if layout.coder == "cross_layer" else self._one(0)
        fold = len(layout.in_sites) == len(layout.out_sites) == 1 if run.config.fold is None else run.config.fold
        # With one site the latents come in units of the activations, as other libraries' files have them.
        coder = coder.folded() if fold else coder
        scales = {"in_scale": list(run.in_scale), "out_scale": list(run.out_scale)}
        ends = {"steps": self.steps, "tokens": self.steps * run.config.batch_size, **history.last()}
        known = {**metadata, "coder": layout.coder, "trained_with": scales, "summary": ends}
        if isinstance(coder, Dictionary):
            return replace(coder, metadata=known, history=history)
        return replace(coder, metadata=known, history=history)

    def _one(self, number: int, biased: bool = True) -> Dictionary:
        """The dictionary of one block; with a decoder's bias of zero unless `biased`."""
        run, values, block = self.run, self.parameters.values, self.parameters.block(number)
        layout, whole = run.layout.blocks[number], len(run.layout.blocks) == 1
        ins = slice(None) if whole else slice(number, number + 1)
        outs = slice(None) if whole else slice(number, None)
        biases = _split(values["b_dec"][layout.writes], layout.out_widths, 0)
        extras = run.kind.fitted_extras(block, self._mean_threshold())
        return Dictionary(
            run.kind.activation,
            run.layout.in_sites[ins],
            run.layout.out_sites[outs],
            encoders=_split(block["W_enc"].T, layout.in_widths, 0),
            decoders=_split(block["W_dec"], layout.out_widths, 1),
            b_enc=block["b_enc"].clone(),
            b_dec=biases if biased else tuple(torch.zeros_like(bias) for bias in biases),
            extras={name: tensor.clone() for name, tensor in extras.items()},
            k=run.config.k if run.kind.activation == "topk" else None,
            skip=values["W_skip"].T.contiguous() if "W_skip" in values else None,
            apply_b_dec_to_input=run.layout.apply_b_dec_to_input,
            in_scale=run.in_scale[ins],
            out_scale=run.out_scale[outs],
            groups=run.config.prefixes if len(run.config.prefixes) > 1 else (),
        )

    def _layers(self) -> CrossLayerTranscoder:
        layout = self.run.layout
        layers = tuple(self._one(number, biased=False) for number in range(len(layout.blocks)))
        # One bias for each output site; if every layer had its own, their sum would be what counts.
        biases = _split(self.parameters.values["b_dec"], layout.out_widths, 0)
        scaled = tuple(bias / scale for bias, scale in zip(biases, self.run.out_scale, strict=True))
        return CrossLayerTranscoder(layers, scaled)

    def _mean_threshold(self) -> Float[Tensor, ""]:
        """Running mean of the smallest chosen pre-activation; 0 before the first step."""
        total, weight = self.threshold
        return (total / weight.clamp(min=1e-12)).to(self.run.device, torch.float32)


def make_fitter(
    source: Source, config: TrainConfig, layout: Layout, workers: Workers, processes: Processes, device: torch.device
) -> Fitter:
    """A fitter at step 0: scales and means from a sample of the source, random directions from the seed."""
    sample = source.sample(SAMPLE, seed=config.seed)
    if len(sample[0]) < 2:
        raise InputError("a dictionary is not trained on one row, which has no variance to explain; give more")
    # On one of the workers, whose sums don't depend on how many there are.
    (fitter,) = workers.map(lambda rows: _first(rows, config, layout, workers, processes, device), [sample])
    return fitter


def _first(
    sample: Sequence[Tensor], config: TrainConfig, layout: Layout, workers: Workers, processes: Processes,
    device: torch.device,
) -> Fitter:  # fmt: skip
    scales = [_scale(rows) if config.normalise else 1.0 for rows in sample]
    in_scale = tuple(scales[number] for number in layout.in_numbers)
    out_scale = tuple(scales[number] for number in layout.out_numbers)
    # In float64: a sum of 16 thousand float32 rows would lose the last digits of the mean.
    means = [sample[number].double().mean(0).float() * scales[number] for number in layout.out_numbers]
    inputs = [sample[number][:PROBED].float() * scales[number] for number in layout.in_numbers]
    run = Run(layout, config, TRAINABLE[config.kind], in_scale, out_scale, workers, processes, device)
    return Fitter(run, initial_parameters(layout, config, torch.cat(inputs, 1), torch.cat(means), device))


def _scale(rows: Float[Tensor, "n width"]) -> float:
    """Factor that brings rows to mean norm sqrt(width); 1 for rows that are all zero."""
    mean = float(rows.double().norm(dim=1).mean())
    return float(rows.shape[1] ** 0.5) / mean if mean > 0 else 1.0


def _split(tensor: Tensor, widths: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """Copies of the parts of each site."""
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in tensor.split(list(widths), dim=dim))
