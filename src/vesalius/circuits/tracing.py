"""From a model, transcoders and a prompt to its attribution graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vesalius.adapters import submodule
from vesalius.circuits.active import LayerLatents
from vesalius.circuits.attribution_graph import AttributionGraph, Node
from vesalius.circuits.replacement import Into, Replacement, Target, replaced
from vesalius.circuits.wired import Wiring, wiring
from vesalius.errors import InputError, SelfCheckError
from vesalius.inputs import Tokens
from vesalius.inputs.beginning import speller
from vesalius.model import Model
from vesalius.parts import Unit
from vesalius.site import Site

PROBABILITY, LOGITS = 0.95, 10
MOST = 4000
_CLOSE = 1e-3


def attribution_graph(
    model: Model | Wiring,
    transcoders: object,
    prompt: str | Tokens | Tensor,
    *,
    targets: Sequence[int | str] | None = None,
    probability: float = PROBABILITY,
    logits: int = LOGITS,
    most: int = MOST,
) -> AttributionGraph:
    """The attribution graph of one prompt, with every edge.

    transcoders: dictionaries that read `mlp_in` (or `resid_mid`) of a layer and write its `mlp_out`, or a cross-layer
    transcoder; MLPs without one are errors. prompt: a text, or tokens [1, pos]. targets: tokens whose logits are nodes,
    by number or text; default the likeliest next tokens that together have this `probability`, at most `logits` of
    them. most: latents that are nodes; of more, those that write most, and the others count as errors.

    Raises InputError for a model without a graph of edges, several prompts, or what is no transcoder of the model;
    SelfCheckError where sources do not add up to a node's value: something else stands between them.
    """
    wired = model if isinstance(model, Wiring) else wiring(model)
    wired.model.check_evaluating()
    tokens = prompt if isinstance(prompt, Tokens) else wired.model.called_with(prompt)[2]
    if tokens is None:
        raise InputError("an attribution graph takes a prompt: a text, tokens or their ids")
    made = _fewer(replaced(wired, tokens, transcoders), most)
    chosen, values, probabilities, reads = _logits(made, targets, probability, logits)
    last = torch.full((len(chosen),), made.n_positions - 1, device=reads.device)
    asked = [Target(group.layer, group.read.kind, group.position, group.slope) for group in made.latents]
    found = made.into([*asked, Target(wired.graph.n_layers, "logits", last, reads)])
    own = torch.cat([*(group.constant for group in made.latents), values.new_zeros(len(chosen))]).cpu()
    constants = found.constant.cpu() + own
    nodes = _nodes(made, chosen, values, probabilities)
    return _checked(made, nodes, found, constants, prompt)


def _fewer(made: Replacement, most: int) -> Replacement:
    """With the latents that write most, the others as errors."""
    if most < 1:
        raise InputError(f"most= counts latents, at least 1; got {most}")
    if not made.latents:
        return made
    norms = [
        torch.stack([rows.norm(dim=1) for rows in group.writes.values()]).sum(0) * group.value.abs()
        for group in made.latents
    ]
    every = torch.cat(norms)
    if len(every) <= most:
        return made
    least = every.sort(descending=True).values[most - 1]
    kept = [group.take((size >= least).nonzero()[:, 0]) for group, size in zip(made.latents, norms, strict=True)]
    return replace(made, latents=tuple(kept))


def _logits(
    made: Replacement, targets: Sequence[int | str] | None, probability: float, most: int
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Tokens, their logits less the mean, their probabilities, and what each reads after the final norm."""
    model = made.wired.model
    with torch.no_grad():
        raw = model.run(made.tokens, last_logits=True).logits[0, -1]
    chance = raw.double().softmax(-1)
    if targets is None:
        ordered = chance.sort(descending=True)
        count = int((ordered.values.cumsum(0) < probability).sum()) + 1
        chosen = ordered.indices[: min(count, most)].tolist()
    else:
        chosen = [_token(model, one) for one in targets]
    unembedding, scale = model.unembedding, model.architecture[1].logit_scale
    rows = unembedding.matrix.float()
    reads = (rows[chosen] - rows.mean(0)) * scale
    values = _normed(made) @ reads.T
    return chosen, values, chance[chosen], reads


def _normed(made: Replacement) -> Tensor:
    """What the unembedding reads, at the last position."""
    model, stream = made.wired.model, made.run[made.wired.last][0, -1]
    with torch.no_grad():
        norm = submodule(model.module, model.architecture[0].final_norm)
        normed: Tensor = norm(stream.to(next(model.module.parameters())))
    return normed.to(stream)


def _token(model: Model, one: int | str) -> int:
    if isinstance(one, int):
        return one
    ids = model.tokenizer.encode(one, add_special_tokens=False) if model.tokenizer is not None else []
    if len(ids) != 1:
        raise InputError(f"targets are single tokens; {one!r} is {len(ids)}")
    return int(ids[0])


def _nodes(made: Replacement, chosen: Sequence[int], values: Tensor, probabilities: Tensor) -> list[Node]:
    spell = speller(made.wired.model.tokenizer)
    ids, width = made.tokens.ids[0].tolist(), made.n_positions
    found = [node for group in made.latents for node in _latents(group)]
    layers = range(made.wired.graph.n_layers)
    found += [Node("error", at, layer, part=Unit(Site("mlp_out", layer))) for layer in layers for at in range(width)]
    found += [Node("token", at, None, one, text=spell(one), part=Unit(Site("embed"))) for at, one in enumerate(ids)]
    rows = zip(chosen, values.tolist(), probabilities.tolist(), strict=True)
    logits = Unit(Site("logits"))
    return found + [Node("logit", width - 1, None, one, v, p, spell(one), logits) for one, v, p in rows]


def _latents(group: LayerLatents) -> list[Node]:
    rows = zip(group.position.tolist(), group.index.tolist(), group.value.tolist(), strict=True)
    return [Node("latent", at, group.layer, i, v, part=group.part(n)) for n, (at, i, v) in enumerate(rows)]


def _checked(made: Replacement, nodes: list[Node], found: Into, constants: Tensor, prompt: object) -> AttributionGraph:
    sources = torch.cat([*found.latents, found.errors.flatten(1), found.tokens], 1).cpu()
    latents = sum(node.kind == "latent" for node in nodes)
    weights = sources.new_zeros(len(nodes), len(nodes))
    weights[:latents, : sources.shape[1]] = sources[:latents]
    weights[sources.shape[1] :, : sources.shape[1]] = sources[latents:]
    whole = sources.new_zeros(len(nodes))
    whole[:latents], whole[sources.shape[1] :] = constants[:latents], constants[latents:]
    graph = AttributionGraph(
        nodes=tuple(nodes),
        weights=weights,
        constants=whole,
        inputs=weights.abs().sum(1),
        prompt=prompt if isinstance(prompt, str) else "".join(node.text for node in nodes if node.kind == "token"),
        texts=tuple(node.text for node in nodes if node.kind == "token"),
        n_layers=made.wired.graph.n_layers,
        model=made.wired.model.name,
        transcoders=tuple(dict.fromkeys(group.owner[0].content_hash for group in made.latents)),
    )
    value = torch.tensor([node.value for node in nodes], dtype=weights.dtype)
    made_up = torch.tensor([node.kind in ("latent", "logit") for node in nodes])
    off = float((weights.sum(1) + whole - value)[made_up].abs().max())
    if off > _CLOSE * max(1.0, float(value.abs().max())):
        raise SelfCheckError(
            f"the sources of a node add up to its value but for {off:.2g}: {made.wired.model.name} does something to "
            "values or to the stream that this linear model leaves out"
        )
    return graph
