"""How a model's readers take their input from the residual stream: through which norm, and by which weights.

No adapter says which norm stands before attention; a few tokens are run, and the module whose input is the stream and
whose output the projections read is found. What is found is held to the run, and a model in which something else
stands between the stream and its readers is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.activations import Activations
from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain, split_heads
from vesalius.circuits.graph import ATTENTION, Graph, graph_of
from vesalius.errors import InputError
from vesalius.inputs import Tokens
from vesalius.model import Model
from vesalius.model.hooks import Tap, tapped
from vesalius.model.parity import probe_tokens
from vesalius.model.weights import dtype_of, linear_of
from vesalius.parts import At
from vesalius.site import Site

_CLOSE = 1e-4
"""Relative difference of tensors that are the same; 1e-2 in half precision."""


@dataclass(frozen=True, eq=False)
class Wiring:
    """A model's graph, and the way from the stream to each reader.

    attention, mlp: per layer the norm before the projections and before the MLP; None where they read the stream.
    projections: (layer, "q") and so on -> weights [head, d_head, d_model] and bias [head, d_head]; outputs: per layer
    the output projection [head, d_head, d_model] and bias [d_model].
    """

    model: Model
    graph: Graph
    attention: tuple[nn.Module | None, ...]
    mlp: tuple[nn.Module | None, ...]
    projections: Mapping[tuple[int, str], tuple[Tensor, Tensor | None]]
    outputs: tuple[tuple[Tensor, Tensor | None], ...]

    @property
    def captured(self) -> list[Site]:
        """Sites from which the writers' shares are computed."""
        found = [Site("embed"), *([Site("pos_embed")] if self.graph.positions else [])]
        for layer in range(self.graph.n_layers):
            found += [Site("z", layer)] if self.graph.n_heads else []
            found += [Site("mlp_out", layer)] if self.graph.mlps else []
        return found

    @property
    def last(self) -> Site:
        """The stream that the logits are read from."""
        return Site("resid_post", self.graph.n_layers - 1)

    def writes(self, run: At) -> Float[Tensor, "example pos writer d_model"]:
        """What every writer adds to the stream. run: holds `captured`."""
        first = run[Site("embed")]
        made = first.new_empty(*first.shape[:2], len(self.graph.writers), first.shape[-1])
        made[:, :, 0] = first
        if self.graph.positions:
            made[:, :, 1] = run[Site("pos_embed")]
        at = self.graph.outside
        for layer in range(self.graph.n_layers):
            if self.graph.n_heads:
                made[:, :, at : at + self.graph.n_heads] = self.head_writes(layer, run[Site("z", layer)])
                at += self.graph.n_heads
            if self.graph.mlps:
                made[:, :, at] = run[Site("mlp_out", layer)]
                at += 1
        return made

    def head_writes(
        self, layer: int, z: Float[Tensor, "example pos head d_head"]
    ) -> Float[Tensor, "example pos head d_model"]:
        """As `Model.head_writes`, also while the model's modules are tapped."""
        adapter, layout = self.model.architecture
        matrix, bias = self.outputs[layer]
        made = torch.einsum("ephk,hkd->ephd", z, matrix) * layout.residual_scale
        if not adapter.attn_norm:
            return made
        norm = submodule(self.model.layer(layer), adapter.attn_norm)
        total = made.sum(2) if bias is None else made.sum(2) + bias * layout.residual_scale
        scale = frozen_scale(adapter.norm, norm, total) * gain(adapter.norm, norm).to(z)
        return made * scale.unsqueeze(2)

    def normed(self, layer: int, mlp: bool, stream: Tensor) -> Tensor:
        """What the readers of a layer see of a stream [..., pos, d_model]."""
        norm = (self.mlp if mlp else self.attention)[layer]
        return stream if norm is None else norm(stream)


def wiring(model: Model) -> Wiring:
    """How a model is wired, found by a run of a few tokens.

    Raises InputError for a model without one residual stream, or with more than a norm between stream and readers.
    """
    model.check_evaluating()
    adapter = model.architecture[0]
    graph = graph_of(model, parallel=False)
    tokens = probe_tokens(model) or Tokens(torch.zeros(1, 1, dtype=torch.long))
    kinds = [kind for kind in ("resid_pre", "attn_out", "mlp_in", "resid_post") if kind in adapter.sites]
    asked = [Site(kind, layer) for layer in range(graph.n_layers) for kind in kinds]
    attention: list[nn.Module | None] = []
    mlp: list[nn.Module | None] = []
    parallel = []
    with torch.no_grad():
        seen = _Seen(model)
        with tapped(seen.taps()):
            captured = Wiring(model, graph, (), (), {}, ()).captured
            run = model.run(tokens, capture=[*asked, *captured]).activations
        for layer in range(graph.n_layers):
            stream = run[Site("resid_pre", layer)]
            if graph.n_heads:
                reads = {kind: seen.inputs[layer, adapter.sites[kind].path] for kind in ATTENTION}
                attention.append(seen.between(layer, stream, reads))
            if graph.mlps:
                after = stream + run[Site("attn_out", layer)] if graph.n_heads else stream
                norm, beside = _mlp_norm(seen, layer, (after, stream), run[Site("mlp_in", layer)])
                mlp.append(norm)
                parallel.append(beside)
        graph = graph_of(model, parallel=any(parallel))
        made = Wiring(model, graph, tuple(attention), tuple(mlp), _projections(model, graph), _outputs(model, graph))
        _check_sum(made, run)
    return made


def _projections(model: Model, graph: Graph) -> dict[tuple[int, str], tuple[Tensor, Tensor | None]]:
    adapter, layout = model.architecture
    found = {}
    for layer in range(graph.n_layers if graph.n_heads else 0):
        for kind in ATTENTION:
            access = replace(adapter.sites[kind], flat=False)
            module = submodule(model.layer(layer), access.path)
            linear = linear_of(module, layout.d_model, dtype_of(model.module))
            weights = split_heads(linear.matrix.T[None], access, layout)[0].movedim(0, 2)
            bias = None if linear.bias is None else split_heads(linear.bias[None, None], access, layout)[0, 0]
            found[layer, kind] = weights, bias
    return found


def _outputs(model: Model, graph: Graph) -> tuple[tuple[Tensor, Tensor | None], ...]:
    adapter, layout = model.architecture
    found = []
    for layer in range(graph.n_layers if graph.n_heads else 0):
        module = submodule(model.layer(layer), adapter.o_proj)
        linear = linear_of(module, layout.n_heads * layout.d_head, dtype_of(model.module))
        found.append((linear.matrix.T.unflatten(0, (layout.n_heads, -1)), linear.bias))
    return tuple(found)


def _mlp_norm(seen: _Seen, layer: int, streams: Sequence[Tensor], reads: Tensor) -> tuple[nn.Module | None, bool]:
    """The norm, and whether the MLP reads the stream before attention."""
    try:
        return seen.between(layer, streams[0], {"mlp_in": reads}), False
    except InputError:
        return seen.between(layer, streams[1], {"mlp_in": reads}), True


class _Seen:
    """Inputs and outputs of the modules of every layer that have no modules inside."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self._outputs: dict[tuple[int, str], Tensor] = {}

    def taps(self) -> list[Tap]:
        found = []
        for layer in range(self._model.architecture[1].n_layers):
            leaves = [(name, m) for name, m in self._model.layer(layer).named_modules() if name and not [*m.children()]]
            projections = {access.path for kind, access in self._model.architecture[0].sites.items() if kind in "qkv"}
            asked = {name: module for name, module in leaves if _may_be_norm(module) or name in projections}
            asked |= {path: submodule(self._model.layer(layer), path) for path in projections}
            for name, module in asked.items():
                found.append(Tap(module, "in", self._keeper(self.inputs, layer, name)))
                found.append(Tap(module, "out", self._keeper(self._outputs, layer, name)))
        return found

    def _keeper(self, where: dict[tuple[int, str], Tensor], layer: int, name: str) -> _Keep:
        return _Keep(where, (layer, name))

    def between(self, layer: int, stream: Tensor, reads: Mapping[str, Tensor]) -> nn.Module | None:
        """The module from the stream to what is read; None where that is the stream itself."""
        if all(_same(stream, one) for one in reads.values()):
            return None
        for (number, name), given in self.inputs.items():
            out = self._outputs.get((number, name))
            fits = number == layer and out is not None and _same(given, stream)
            if fits and all(_same(out, one) for one in reads.values()):
                return submodule(self._model.layer(layer), name)
        raise InputError(
            f"{self._model.name} has no graph of edges: {', '.join(reads)} of layer {layer} read neither the residual "
            "stream nor one norm of it"
        )


@dataclass(frozen=True, eq=False)
class _Keep:
    where: dict[tuple[int, str], Tensor]
    key: tuple[int, str]

    def __call__(self, tensor: Tensor) -> None:
        self.where[self.key] = tensor.detach().clone()


def _may_be_norm(module: nn.Module) -> bool:
    """Norms have at most a vector of weights, and are called with one tensor."""
    return all(weight.ndim <= 1 for weight in module.parameters()) and "orm" in type(module).__name__


def _same(one: Tensor | None, other: Tensor) -> bool:
    if one is None or one.numel() != other.numel():
        return False
    one = one.reshape(other.shape)  # some modules see [batch * pos, ...]
    close = _CLOSE if one.dtype in (torch.float32, torch.float64) else 1e-2
    return float((one - other).norm()) <= close * float(other.norm())


def _check_sum(found: Wiring, run: Activations) -> None:
    """Raises InputError where the stream is not the sum of what the writers add, and of the heads' output biases."""
    total = found.writes(run).sum(2)
    for layer in range(found.graph.n_layers if found.graph.n_heads else 0):
        total = total + found.model.attention_shares(layer, run[Site("z", layer)])[1]
    if not _same(total, run[found.last]):
        off = float((total - run[found.last]).norm() / run[found.last].norm())
        raise InputError(
            f"{found.model.name} has no graph of edges: its last residual stream is not the sum of embeddings, heads, "
            f"MLPs and output biases ({off:.1%} of it is left over)"
        )
