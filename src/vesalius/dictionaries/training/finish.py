"""From a fitter to the frozen coder that its parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesalius.dictionaries.cross_layer import CrossLayerTranscoder
from vesalius.dictionaries.dictionary import Dictionary
from vesalius.dictionaries.history import COLUMNS, History
from vesalius.dictionaries.training.fitter import Fitter

Fitted = Dictionary | CrossLayerTranscoder


def fitted(fitter: Fitter, about: Mapping[str, Any]) -> Fitted:
    """A coder with copies of the fitter's parameters, its scales folded in when the config says so."""
    run = fitter.run
    columns = np.array(fitter.rows, dtype=np.float64).reshape(-1, len(COLUMNS))
    history = History({name: columns[:, place].copy() for place, name in enumerate(COLUMNS)})
    coder: Fitted = _layers(fitter) if run.wiring.coder == "cross_layer" else _one(fitter, 0)
    fold = len(run.wiring.in_sites) == len(run.wiring.out_sites) == 1 if run.config.fold is None else run.config.fold
    coder = coder.folded() if fold else coder
    scales = {"in_scale": list(run.in_scale), "out_scale": list(run.out_scale)}
    ends = {"steps": fitter.steps, "tokens": fitter.steps * run.config.batch_size, **history.last()}
    origin = {**about, "coder": run.wiring.coder, "trained_with": scales, "summary": ends}
    if isinstance(coder, Dictionary):
        return replace(coder, about=origin, history=history)
    return replace(coder, about=origin, history=history)


def _one(fitter: Fitter, number: int, biased: bool = True) -> Dictionary:
    """The dictionary of one block; with a decoder's bias of zero unless `biased`."""
    run, block = fitter.run, fitter.parameters.block(number)
    wiring, whole = run.wiring.blocks[number], len(run.wiring.blocks) == 1
    ins = slice(None) if whole else slice(number, number + 1)
    outs = slice(None) if whole else slice(number, None)
    biases = _split(fitter.parameters.values["b_dec"][wiring.writes], wiring.out_widths, 0)
    skip = fitter.parameters.values.get("W_skip")
    extras = run.kind.fitted(block, _threshold(fitter))
    return Dictionary(
        run.kind.activation, run.wiring.in_sites[ins], run.wiring.out_sites[outs],
        encoders=_split(block["W_enc"].T, wiring.in_widths, 0), decoders=_split(block["W_dec"], wiring.out_widths, 1),
        b_enc=block["b_enc"].clone(), b_dec=biases if biased else tuple(torch.zeros_like(bias) for bias in biases),
        extras={name: tensor.clone() for name, tensor in extras.items()},
        k=run.config.k if run.kind.activation == "topk" else None,
        skip=None if skip is None else skip.T.contiguous(), apply_b_dec_to_input=run.wiring.centred,
        in_scale=run.in_scale[ins], out_scale=run.out_scale[outs],
        groups=run.config.prefixes if len(run.config.prefixes) > 1 else (),
    )  # fmt: skip


def _layers(fitter: Fitter) -> CrossLayerTranscoder:
    run = fitter.run
    layers = tuple(_one(fitter, number, biased=False) for number in range(len(run.wiring.blocks)))
    biases = _split(fitter.parameters.values["b_dec"], run.wiring.out_widths, 0)
    return CrossLayerTranscoder(layers, tuple(b / scale for b, scale in zip(biases, run.out_scale, strict=True)))


def _split(tensor: Tensor, widths: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """Copies of the parts of each site."""
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in tensor.split(list(widths), dim=dim))


def _threshold(fitter: Fitter) -> Tensor:
    """Running mean of the smallest chosen pre-activation; 0 before the first step."""
    total, weight = fitter.threshold
    return (total / weight.clamp(min=1e-12)).to(fitter.run.device, torch.float32)
