"""Estimates of edges that go round what gradients get wrong: rules of relevance, and AtP*.

**RelP** (Jafari et al. 2025, section 3) backpropagates relevance by rules that keep it from being lost or blown up:
a norm's scale is a constant; an activation function passes on its output over its input; of a product of two factors
(a gated MLP) each gets half; attention patterns are constants. Queries and keys then get nothing: what moves attention
is not seen by these rules.

**AtP*** (Kramar et al. 2024, sections 3.1 and 3.2) does two things. Changes of queries and keys go through the softmax
itself, so that saturated attention is seen: only what follows the pattern is linear. And every gradient is taken once
for each layer with that layer's own contribution dropped; the mean of their sizes survives where a direct and an
indirect effect cancel. Its sign is the plain estimate's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vesalius.adapters import submodule
from vesalius.circuits.cutting import Ablation
from vesalius.circuits.gradients import Differentiated, differentiated, held, products, stream_of
from vesalius.errors import InputError
from vesalius.intervention import Replace
from vesalius.model.hooks import Tap, tapped
from vesalius.site import Site


def relp(cut: Ablation, _steps: int, positions: bool) -> Tensor:
    """Effects [edge, *pos, example] by rules of relevance.

    Raises InputError for a model whose MLPs call their activation as a function, where no rule can be put in its place.
    """
    held = [Replace(site, site, Tensor.detach, "held") for site in _queries_and_keys(cut)]
    with tapped(_Rules(cut).taps()):
        run = replace(differentiated(cut, cut.tokens, held), norms_held=True)
    return products(cut.wired.graph, cut.change, run.gradients(without=("q", "k")), positions)


def _queries_and_keys(cut: Ablation) -> list[Site]:
    graph = cut.wired.graph
    layers = range(graph.n_layers if graph.n_heads else 0)
    return [Site(kind, layer) for layer in layers for kind in ("q", "k")]


class _Rules:
    """Taps that leave every value as it is and change what gradients make of it."""

    def __init__(self, cut: Ablation) -> None:
        self._wired = cut.wired
        self._kind = cut.wired.model.architecture[0].norm
        self._given: dict[int, Tensor] = {}

    def taps(self) -> list[Tap]:
        adapter, found = self._wired.model.architecture[0], []
        norms = [*self._wired.attention, *self._wired.mlp, submodule(self._wired.model.module, adapter.final_norm)]
        for norm in dict.fromkeys(norms):
            if norm is not None and not isinstance(norm, nn.Identity):
                found += self._pair(norm, self._norm)
        for layer in range(self._wired.graph.n_layers if self._wired.graph.mlps else 0):
            found += self._mlp(layer)
        return found

    def _pair(self, module: nn.Module, rule: Callable[[nn.Module, Tensor], Tensor]) -> list[Tap]:
        def before(given: Tensor) -> None:
            self._given[id(module)] = given

        def after(made: Tensor) -> Tensor:
            passed = rule(module, self._given[id(module)])
            return made.detach() + (passed - passed.detach())

        return [Tap(module, "in", before), Tap(module, "out", after)]

    def _norm(self, norm: nn.Module, given: Tensor) -> Tensor:
        return held(self._kind, norm, given)

    def _mlp(self, layer: int) -> list[Tap]:
        adapter = self._wired.model.architecture[0]
        root = submodule(self._wired.model.layer(layer), adapter.sites["mlp_out"].path)
        root = root if [*root.children()] else self._wired.model.layer(layer)
        activations = [m for m in root.modules() if _is_activation(m)]
        if not activations:
            raise InputError(
                f"{self._wired.model.name} calls the activation of its MLPs as a function, so that relp has no module "
                "to put its rule on; take another method"
            )
        taps = [tap for module in activations for tap in self._pair(module, _share)]
        linears = sum(isinstance(m, nn.Linear) for m in root.modules())
        if linears > 2 and "mlp_post" in adapter.sites:
            access = adapter.sites["mlp_post"]
            inside = submodule(self._wired.model.layer(layer), access.path)
            taps.append(Tap(inside, access.side, lambda made: (made.detach() + made) / 2))
        return taps


def _share(activation: nn.Module, given: Tensor) -> Tensor:
    """Output over input as a constant."""
    with torch.no_grad():
        # By the function alone: the module's own taps are in place.
        made = type(activation).forward(activation, given)
        ratio = torch.where(given.abs() > 1e-6, made / given, 0.0)
    return ratio * given


def _is_activation(module: nn.Module) -> bool:
    known = type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations"))
    return known and not [*module.children()]


def atp_star(cut: Ablation, _steps: int, positions: bool) -> Tensor:
    """Effects [edge, example] by AtP*.

    Raises InputError with positions, because what changes of keys do to a pattern does not add up over them, and for a
    model whose attention patterns are not read.
    """
    graph, adapter = cut.wired.graph, cut.wired.model.architecture[0]
    if positions:
        raise InputError("atp_star is of whole edges: what changed keys do to a pattern is no sum over positions")
    if graph.n_heads and not adapter.attention:
        raise InputError(f"atp_star reads attention scores, which the {adapter.family} adapter does not reach")
    layers = range(graph.n_layers if graph.n_heads else 0)
    patterns = [Site(kind, layer) for layer in layers for kind in ("scores", "pattern")]
    run = differentiated(cut, cut.tokens, also=patterns)
    change = cut.change
    moved = [_pattern_changes(run, layer, change) for layer in layers]
    plain, total = _effects(run, change, moved), torch.zeros(())
    for layer in range(graph.n_layers):
        outputs = [site for site in cut.wired.captured if site.layer == layer]
        dropped = [Replace(site, site, Tensor.detach, "dropped") for site in outputs]
        without = differentiated(cut, cut.tokens, dropped, also=patterns)
        total = total.to(change) + _effects(without, change, moved).abs() / max(1, graph.n_layers - 1)
    return torch.where(plain < 0, -total, total)


def _effects(run: Differentiated, change: Tensor, moved: Sequence[Tensor]) -> Float[Tensor, "edge example"]:
    """Change times gradient, and for queries and keys the pattern's change times the pattern's gradient."""
    graph = run.cut.wired.graph
    sites = [Site("pattern", layer) for layer in range(len(moved))]
    onto: Sequence[Tensor | None] = torch.autograd.grad(
        run.value.sum(), [run.run[site] for site in sites], retain_graph=True, allow_unused=True
    )
    found = products(graph, change, run.gradients(keep=True), False)
    per_layer = graph.n_heads + 2 * graph.n_kv_heads + graph.mlps
    for layer, (gradient, pattern) in enumerate(zip(onto, moved, strict=True)):
        if gradient is None:
            continue
        first, writers = layer * per_layer, int(graph.counts[layer * per_layer])
        # [head, example, query, key, writer, q or k]
        both = torch.einsum("heqswr,ehqs->rhwe", pattern, gradient)
        keys = both[1].unflatten(0, (graph.n_kv_heads, -1)).sum(1)
        own = torch.cat([both[0], keys]).flatten(0, 1)
        start = int(graph.starts[first])
        assert len(own) == (graph.n_heads + graph.n_kv_heads) * writers
        found[start : start + len(own)] = own
    return found


def _pattern_changes(
    run: Differentiated, layer: int, change: Float[Tensor, "example pos writer d_model"]
) -> Float[Tensor, "head example query key before 2"]:
    """What an edge into a head's queries, or into its keys, does to its pattern, through the softmax."""
    wired = run.cut.wired
    stream, scores = stream_of(wired, run.run, layer, False).detach(), run.run[Site("scores", layer)]
    writers = int(wired.graph.counts[layer * (wired.graph.n_heads + 2 * wired.graph.n_kv_heads + wired.graph.mlps)])
    with torch.no_grad():
        given = stream[:, :, None] + change[:, :, :writers]
        moved = wired.normed(layer, False, given) - wired.normed(layer, False, stream)[:, :, None]
        queries, keys = (
            torch.einsum("epwd,hkd->ephwk", moved, wired.projections[layer, kind][0]) for kind in ("q", "k")
        )
    before, found = scores.detach().softmax(-1), []
    for head in range(wired.graph.n_heads):
        shared = head // (wired.graph.n_heads // wired.graph.n_kv_heads)
        by_query = _slopes(run, layer, "q", head, head)
        by_key = _slopes(run, layer, "k", head, shared)
        shifts = (
            torch.einsum("eqwk,eqsk->eqsw", queries[:, :, head], by_query),
            torch.einsum("eswk,eqsk->eqsw", keys[:, :, shared], by_key),
        )
        own = scores.detach()[:, head, :, :, None]
        after = [(own + shift).softmax(2) - before[:, head, :, :, None] for shift in shifts]
        found.append(torch.stack(after, -1))
    return torch.stack(found)


def _slopes(
    run: Differentiated, layer: int, kind: str, head: int, index: int
) -> Float[Tensor, "example query key d_head"]:
    """Of a head's scores in its queries, or in its keys; scores are linear in either."""
    scores, given = run.run[Site("scores", layer)][:, head], run.run[Site(kind, layer)]
    axis = 2 if kind == "q" else 1
    rows = [
        torch.autograd.grad(scores.select(axis, at).sum(), given, retain_graph=True)[0][:, :, index]
        for at in range(scores.shape[axis])
    ]
    return torch.stack(rows, axis)
