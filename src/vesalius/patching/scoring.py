"""From final residual vectors to a metric: the model's own final norm, and only the logits the metric reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import parameter, weight_of
from vesalius.errors import NotFiniteError
from vesalius.inputs import Pairs
from vesalius.metric import Metric, wide
from vesalius.model.attention import capped
from vesalius.patching.plain import base_logits, plain_metric
from vesalius.patching.record import Record


def base_values(record: Record, pairs: Pairs, metric: Metric, reference: Record) -> Float[Tensor, " example"]:
    """The metric of a recorded run without edits. reference: the run that metrics with a base are measured from."""
    rows = torch.arange(len(record))
    if record.reason:
        return plain_metric(base_logits(record), base_logits(reference), rows, pairs, metric)
    ends = [run.resid[-1][rows, pairs.at] for run in (record, reference)]
    return score(record, ends[0], rows, pairs, metric, ends[1])


def score(
    record: Record, hidden: Float[Tensor, "row d_model"], example: Int[Tensor, " row"], pairs: Pairs, metric: Metric,
    base_hidden: Float[Tensor, "example d_model"],
) -> Float[Tensor, " row"]:  # fmt: skip
    """Metric of rows from their final residual vectors; base_hidden: the base run's, of all examples."""
    chosen = pairs.subset(example.tolist())
    tokens = metric.tokens(pairs)
    wanted = None if tokens is None else tokens[example]
    base = _logits(record, base_hidden[example], wanted) if metric.needs.base else None
    with torch.no_grad():
        return metric.of(_logits(record, hidden, wanted), base, chosen)


def _logits(record: Record, hidden: Tensor, tokens: Tensor | None) -> Tensor:
    adapter, _ = record.model.architecture
    unembed = submodule(record.model.module, adapter.unembed)
    with torch.no_grad():
        normed = submodule(record.model.module, adapter.final_norm)(hidden)
        if tokens is None:
            logits = unembed(normed)
        else:
            weight, bias = weight_of(unembed), parameter(unembed, "bias")
            logits = torch.einsum("rd,rkd->rk", normed, weight[tokens])
            logits = logits if bias is None else logits + bias[tokens]
        return wide(capped(logits, getattr(record.model.module.config, adapter.cap) if adapter.cap else None))


def logit_range(record: Record, pairs: Pairs) -> float:
    """Spread of the first example's logits at its read position: what rounding is measured against."""
    end = pairs.read_at()[0]
    if record.logits is None:
        logits = _logits(record, record.resid[-1][:1, end], None)
    else:
        logits = record.logits[0] if record.logits.ndim == 2 else record.logits[0, end]
    return float(logits.max() - logits.min())


def refuse_nan(
    values: Float[Tensor, "variant example"], edited: str, where: Callable[[int], str] = lambda _: ""
) -> None:
    """Raise NotFiniteError naming the example, what was edited and, as `where(example)` tells, the first bad site."""
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        example = int(bad.nonzero()[0, 1])
        raise NotFiniteError(f"the metric is not finite for example {example} with {edited} edited{where(example)}")
