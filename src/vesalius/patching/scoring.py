"""From final residual vectors to a metric: the model's own final norm, and only the logits the metric reads."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.adapters.base import parameter, weight_of
from vesalius.inputs import Pairs
from vesalius.metric import Metric
from vesalius.model.readout import finished
from vesalius.model.weights import is_plain
from vesalius.patching.record import Recording


def score(
    base: Recording,
    hidden: Float[Tensor, "row read d_model"],
    example: Int[Tensor, " row"],
    pairs: Pairs,
    metric: Metric,
    base_hidden: Float[Tensor, "example read d_model"],
) -> Float[Tensor, " row"]:
    """Metric of rows, on the CPU, from their final residual vectors at the positions it reads; base_hidden: the base
    run's."""
    normed = final_norm(base, hidden)
    reference = final_norm(base, base_hidden[example]) if metric.needs.base else normed
    return score_normed(base, normed, example, pairs, metric, reference)


def score_normed(
    base: Recording,
    normed: Float[Tensor, "row read d_model"],
    example: Int[Tensor, " row"],
    pairs: Pairs,
    metric: Metric,
    base_normed: Float[Tensor, "row read d_model"],
) -> Float[Tensor, " row"]:
    """As `score`, from vectors after the final norm; base_normed: the base run's, of the same rows."""
    tokens = metric.tokens(pairs)
    wanted = None if tokens is None else tokens[example].to(normed.device)
    found = [logits_of(base, some, wanted) for some in (normed, *([base_normed] if metric.needs.base else []))]
    with torch.no_grad():
        return metric.of(found[0], found[1] if metric.needs.base else None, pairs.subset(example.tolist())).cpu()


def final_norm(base: Recording, hidden: Tensor, grad: bool = False) -> Tensor:
    """The model's own final norm of residual vectors. grad: keep the graph."""
    with torch.set_grad_enabled(grad):
        normed: Tensor = submodule(base.model.module, base.model.architecture[0].final_norm)(hidden)
        return normed


def logits_of(
    base: Recording, normed: Float[Tensor, "row read d_model"], tokens: Tensor | None, grad: bool = False
) -> Tensor:
    """[row, token] of one read position, [row, read, token] of several; all tokens where none are named."""
    model = base.model
    unembed = submodule(model.module, model.architecture[0].unembed)
    if normed.shape[1] == 1:
        normed = normed[:, 0]
    with torch.set_grad_enabled(grad):
        if tokens is None:
            logits = unembed(normed)
        elif not is_plain(unembed):
            logits = unembed(normed).gather(1, tokens)
        else:
            weight, bias = weight_of(unembed), parameter(unembed, "bias")
            logits = torch.einsum("rd,rkd->rk", normed, weight[tokens])
            logits = logits if bias is None else logits + bias[tokens]
        return finished(model, logits)


def at_reads(base: Recording, pairs: Pairs) -> Float[Tensor, "example read d_model"]:
    """A recorded run's final residual vectors where the metric reads."""
    reads = pairs.reads
    return base.resid[-1][torch.arange(len(reads))[:, None], reads]


def base_logits(base: Recording) -> Float[Tensor, "example *pos vocab"]:
    return base.model.run(base.inputs).logits if base.logits is None else base.logits


def plain_metric(
    logits: Tensor, base: Tensor, example: Int[Tensor, " row"], pairs: Pairs, metric: Metric
) -> Float[Tensor, " row"]:
    """Metric of some examples' runs, on the CPU. logits: [row, pos, vocab]; base: [example, pos, vocab], of all."""
    return metric(logits, pairs.subset(example.tolist()), base[example] if metric.needs.base else None).cpu()


def base_values(run: Recording, pairs: Pairs, metric: Metric, reference: Recording) -> Float[Tensor, " example"]:
    """The metric of a recorded run without edits. reference: the run that metrics with a base are measured from."""
    rows = torch.arange(len(run))
    if run.reason:
        return plain_metric(base_logits(run), base_logits(reference), rows, pairs, metric)
    return score(run, at_reads(run, pairs), rows, pairs, metric, at_reads(reference, pairs))


def logit_range(base: Recording, pairs: Pairs) -> float:
    """Spread of the first example's logits at its read position: what rounding is measured against."""
    end = pairs.read_at()[0]
    if base.logits is None:
        logits = logits_of(base, final_norm(base, base.resid[-1][:1, end][:, None]), None)
    else:
        logits = base.logits[0] if base.logits.ndim == 2 else base.logits[0, end]
    return float(logits.max() - logits.min())
