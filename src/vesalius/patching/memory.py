"""What a sweep takes of memory, and how many tokens fit into a given amount."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vesalius.errors import InputError
from vesalius.jobs import Estimate, Event
from vesalius.model import Model
from vesalius.patching.cost import Cost
from vesalius.patching.record import Record
from vesalius.patching.variants import KEYS_PER_TOKEN

# Copies of the residual stream and of an MLP's inner width that are alive at once in a layer.
_STREAMS, _INNER = 8, 3


def bytes_per_token(model: Model) -> int:
    """Bytes that one live token of a batch takes at the peak, float32: one layer's tensors, and its share of the keys
    and values that are copied for its row."""
    layout = model.architecture[1]
    widths = [module.out_features for module in model.layer(0).modules() if isinstance(module, nn.Linear)]
    inner = max(widths, default=4 * layout.d_model)
    keys = 2 * KEYS_PER_TOKEN * layout.n_kv_heads * layout.d_head
    return 4 * (_STREAMS * layout.d_model + _INNER * inner + keys)


def tokens_in(model: Model, memory: int) -> int:
    """Live tokens of a batch that fit into `memory` bytes. Raises InputError when not even a prompt's would."""
    if model.adapter is None or model.adapter.stack_names != ("",):
        raise InputError("memory= needs a model of one stack of layers; give budget= (tokens run together)")
    tokens = memory // bytes_per_token(model)
    if tokens < 1:
        raise InputError(f"memory={memory} bytes hold no token of this model, of {bytes_per_token(model)} bytes each")
    return int(tokens)


def memory_of(runs: Sequence[Record], budget: int) -> int:
    """Bytes: the weights, the recorded runs, and one batch of a replay."""
    model = runs[0].model
    weights = sum(p.numel() * p.element_size() for p in model.module.parameters())
    held = sum(t.numel() * t.element_size() for run in runs for t in _tensors(run))
    return weights + held + (0 if runs[0].reason else budget * bytes_per_token(model))


def announcement(task: str, quote: Cost, runs: Sequence[Record], seconds: float, budget: int) -> Event:
    """A note of what is to come, before the first edited run. seconds: of one forward pass of one example."""
    needs = Estimate(quote.spent * seconds, memory_bytes=memory_of(runs, budget))
    return Event("note", task, message=f"{task}: {quote.describe()}; {needs.describe()}")


def _tensors(run: Record) -> list[Tensor]:
    logits = [] if run.logits is None else [run.logits]
    return [*run.resid, *run.queries, *run.keys, *run.values, *run.sites.values(), *logits]
