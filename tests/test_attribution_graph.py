"""Attribution graphs: every edge against an intervention, scores against published values, files against schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import families
import tiny
import vesalius as vs
from vesalius.adapters import submodule
from vesalius.adapters.base import frozen_scale, gain
from vesalius.circuits import (
    AttributionGraph,
    Node,
    Replacement,
    attribution_graph,
    graph_from_json,
    graph_json,
    load_graph,
    replaced,
    save_graph,
    wiring,
)
from vesalius.dictionaries import CrossLayerTranscoder, Dictionary
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.inputs import Tokens
from vesalius.model.hooks import Tap, tapped

# Norms before and after, LayerNorm, parallel blocks, grouped heads, position embeddings, scales, experts.
FROZEN = ["llama", "gemma2", "phi", "opt", "gpt_neox", "granite", "olmo2", "mixtral"]
IDS = torch.randint(2, 50, (1, 6), generator=torch.Generator().manual_seed(3))
M = 20


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transcoder(model: vs.Model, layer: int, last: int | None = None, **extra: Any) -> Dictionary:
    """Of one layer, or one that writes to all layers up to the last one given."""
    width, outs = model.architecture[1].d_model, range(layer, (layer if last is None else last) + 1)
    settings = {"activation": "relu", "read": "mlp_in", **extra}
    activation, read = settings.pop("activation"), settings.pop("read")
    return Dictionary(
        activation, (vs.Site(read, layer),), tuple(vs.Site("mlp_out", out) for out in outs),
        encoders=(normal(width, M, seed=layer) / 4,),
        decoders=tuple(normal(M, width, seed=9 + out) / 5 for out in outs),
        b_enc=torch.full((M,), -0.1), b_dec=tuple(normal(width, seed=out) / 9 for out in outs), **settings,
    )  # fmt: skip


def cross_layer(model: vs.Model) -> CrossLayerTranscoder:
    layout = model.architecture[1]
    layers = tuple(transcoder(model, layer, layout.n_layers - 1) for layer in range(layout.n_layers))
    return CrossLayerTranscoder(layers, tuple(normal(layout.d_model, seed=50 + n) for n in range(layout.n_layers)))


def coders(model: vs.Model, kind: str) -> Any:
    """All layers, or some: a layer in the middle has none, and its MLP is an error."""
    if kind == "cross-layer":
        return cross_layer(model)
    width = model.architecture[1].d_model
    return [
        transcoder(model, 0, skip=normal(width, width, seed=77) / 9, in_scale=(0.7,), out_scale=(1.4,)),
        transcoder(model, model.architecture[1].n_layers - 1, activation="topk", k=5),
    ]


class Frozen:
    """The model itself with attention patterns, norms' scales and MLPs' outputs held; an independent implementation."""

    def __init__(self, made: Replacement) -> None:
        self.made, self.model = made, made.wired.model
        layers = range(made.wired.graph.n_layers)
        self.sites = [vs.Site(kind, n) for n in layers for kind in ("pattern", "mlp_out", "mlp_in", "attn_out")]
        self.given: dict[nn.Module, Tensor] = {}
        with tapped([Tap(norm, "in", self._keeper(norm)) for norm in self._norms()]):
            self.base = self._run([])

    def _norms(self) -> list[nn.Module]:
        wired, adapter = self.made.wired, self.model.architecture[0]
        found = [*wired.attention, *wired.mlp, submodule(self.model.module, adapter.final_norm)]
        if adapter.attn_norm:
            found += [submodule(self.model.layer(n), adapter.attn_norm) for n in range(wired.graph.n_layers)]
        return [norm for norm in dict.fromkeys(found) if norm is not None]

    def _keeper(self, norm: nn.Module) -> Any:
        def keep(given: Tensor) -> None:
            self.given[norm] = given.detach().clone()

        return keep

    def _run(self, edits: list[Any]) -> vs.Run:
        with torch.no_grad():
            return self.model.run(self.made.tokens, capture=[*self.sites, "embed"], interventions=edits)

    def _held(self, norm: nn.Module) -> list[Tap]:
        kind, seen = self.model.architecture[0].norm, {}

        def before(given: Tensor) -> None:
            seen["x"] = given

        def after(_made: Tensor) -> Tensor:
            change = seen["x"] - self.given[norm]
            if kind == "layer":
                change = change - change.mean(-1, keepdim=True)
            scale = frozen_scale(kind, norm, self.given[norm]) * gain(kind, norm)
            normed: Tensor = self._plain[norm] + change * scale
            return normed

        return [Tap(norm, "in", before), Tap(norm, "out", after)]

    def changed(self, changes: dict[vs.Site, Tensor]) -> vs.Run:
        """The run with these added to the embeddings or to what MLPs say."""
        self._plain = {norm: norm(self.given[norm]).detach() for norm in self.given}
        held = [vs.Freeze(site, source=self.base.activations) for site in self.sites if site.kind == "pattern"]
        said = {site: self.base[site] for site in self.sites if site.kind == "mlp_out"}
        said |= {site: self.base[site] + change for site, change in changes.items()}
        with tapped([tap for norm in self.given for tap in self._held(norm)]):
            return self._run([*held, *(vs.Patch(site, source=value) for site, value in said.items())])


def measured(frozen: Frozen, changes: dict[vs.Site, Tensor], graph: AttributionGraph) -> Tensor:
    """What changes do to every latent's reading and every logit."""
    run, found = frozen.changed(changes), torch.zeros(len(graph.nodes))
    at = 0
    for group in frozen.made.latents:
        moved = (run[group.read] - frozen.base[group.read])[0]
        found[at : at + len(group.value)] = (group.slope * moved[group.position]).sum(1)
        at += len(group.value)
    moved = run.logits[0, -1] - frozen.base.logits[0, -1]
    logits = graph.numbers("logit").tolist()
    found[logits] = torch.stack([moved[graph.nodes[n].index] - moved.mean() for n in logits])
    return found


# --- exactness


@pytest.mark.parametrize("kind", ["some layers", "cross-layer"])
@pytest.mark.parametrize("name", FROZEN)
def test_an_edge_is_what_ablating_its_source_does_in_the_frozen_model(name: str, kind: str) -> None:
    model = families.model(name)
    uncapped(model)
    given = coders(model, kind)
    graph, made = attribution_graph(model, given, IDS), replaced(wiring(model), Tokens(IDS), given)
    frozen = Frozen(made)
    for source, change in ablations(made, graph):
        found = measured(frozen, change, graph)
        # A skip reads the stream, so that what it passes on is no part of the frozen MLP's output.
        if kind == "cross-layer" or source in graph.numbers("error").tolist()[-6:]:
            torch.testing.assert_close(found, -graph.weights[:, source], rtol=1e-4, atol=1e-4)


def uncapped(model: vs.Model) -> None:
    """Without a bound on logits, which attribution stops before."""
    if hasattr(model.module.config, "final_logit_softcapping"):
        model.module.config.final_logit_softcapping = None


def ablations(made: Replacement, graph: AttributionGraph) -> list[tuple[int, dict[vs.Site, Tensor]]]:
    """A latent of the first and of the last layer, an error, and a token: (number, what ablating it changes)."""
    found, at = [], 0
    width, like = made.n_positions, made.errors
    for group in made.latents:
        one = len(group.value) // 2
        change = {}
        for site, rows in group.writes.items():
            change[site] = like.new_zeros(1, width, like.shape[-1])
            change[site][0, group.position[one]] = -group.value[one] * rows[one]
        found.append((at + one, change))
        at += len(group.value)
    errors = graph.numbers("error").tolist()
    last = made.wired.graph.n_layers - 1
    for layer, position in ((0, 2), (last, width - 1)):
        change = {vs.Site("mlp_out", layer): like.new_zeros(1, width, like.shape[-1])}
        change[vs.Site("mlp_out", layer)][0, position] = -made.errors[layer, position]
        found.append((errors[layer * width + position], change))
    return found


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_skips_are_passed_through(name: str) -> None:
    """Against a run in which the first MLP is its transcoder and its error."""
    model = families.model(name)
    given = coders(model, "some layers")[:1]
    graph, made = attribution_graph(model, given, IDS), replaced(wiring(model), Tokens(IDS), given)
    token = graph.numbers("token").tolist()[3]
    group, frozen = made.latents[0], Frozen(made)
    width = made.errors.shape[-1]
    site, change = vs.Site("embed"), made.errors.new_zeros(1, 6, width)
    change[0, 3] = -frozen.base["embed"][0, 3]
    if made.wired.graph.positions:
        pytest.skip("a token's node holds its position too")
    first = frozen.changed({site: change})
    passed = (first["layers.0.mlp_in"] - frozen.base["layers.0.mlp_in"]) @ made.skips[0][1]
    found = measured(frozen, {site: change, vs.Site("mlp_out", 0): passed}, graph)
    assert group.skip is not None
    torch.testing.assert_close(found, -graph.weights[:, token], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["some layers", "cross-layer"])
def test_sources_and_a_constant_add_up_to_every_value(kind: str) -> None:
    model = tiny.model("gpt2")
    graph = attribution_graph(model, coders(model, kind), IDS)
    values = torch.tensor([node.value for node in graph.nodes])
    made = [n for n, node in enumerate(graph.nodes) if node.kind in ("latent", "logit")]
    torch.testing.assert_close((graph.weights.sum(1) + graph.constants)[made], values[made], rtol=1e-4, atol=1e-4)
    raw = model.run(IDS).logits[0, -1]
    for number in graph.numbers("logit").tolist():  # the replacement model's logits are the model's
        node = graph.nodes[number]
        assert node.value == pytest.approx(float(raw[node.index] - raw.mean()), abs=1e-4)
        assert node.probability == pytest.approx(float(raw.softmax(0)[node.index]), abs=1e-6)


def test_latents_that_are_too_many_become_errors() -> None:
    model = tiny.model("llama")
    whole, few = (attribution_graph(model, cross_layer(model), IDS, most=most) for most in (4000, 30))
    assert len(few.numbers("latent")) == 30 < len(whole.numbers("latent"))
    for graph in (whole, few):
        logits = graph.numbers("logit")
        torch.testing.assert_close(
            (graph.weights.sum(1) + graph.constants)[logits],
            torch.tensor([graph.nodes[int(n)].value for n in logits]), rtol=1e-4, atol=1e-4,
        )  # fmt: skip
    assert few.replacement_score < whole.replacement_score


def test_nodes_are_parts_of_the_model() -> None:
    model = tiny.model("llama")
    coder = cross_layer(model)
    graph = attribution_graph(model, coder, IDS)
    run = model.run(IDS, capture=["layers.*.mlp_in"])
    for number in graph.numbers("latent").tolist()[::9]:
        node = graph.nodes[number]
        assert node.part is not None
        assert float(node.part.value(run)[0, node.position]) == pytest.approx(node.value, abs=1e-4)
        assert vs.resolve(node.part.ref, coder) == node.part


# --- influence and scores


def small(weights: dict[tuple[int, int], float], nodes: list[Node]) -> AttributionGraph:
    """weights: (target, source) -> weight."""
    matrix = torch.zeros(len(nodes), len(nodes))
    for (target, source), weight in weights.items():
        matrix[target, source] = weight
    zero = torch.zeros(len(nodes))
    return AttributionGraph(tuple(nodes), matrix, zero, matrix.abs().sum(1), "x", ("x",), 1)


def published() -> AttributionGraph:
    """Token -> latent (1), latent -> logit (3), error -> logit (1)."""
    nodes = [
        Node("latent", 0, 0, 7),
        Node("error", 0, 0),
        Node("token", 0, None, 1),
        Node("logit", 0, None, 2, probability=1.0),
    ]
    return small({(0, 2): 1.0, (3, 0): 3.0, (3, 1): 1.0}, nodes)


def test_scores_are_the_published_ones() -> None:
    graph = published()
    torch.testing.assert_close(graph.influence, torch.tensor([0.75, 0.25, 0.75, 0.0]))
    assert graph.replacement_score == pytest.approx(0.75)
    assert graph.completeness_score == pytest.approx(0.9091, abs=1e-4)
    assert graph.completeness_of_read == pytest.approx(0.8571, abs=1e-4)


def test_influence_ends_in_tokens_and_errors() -> None:
    model = tiny.model("llama")
    graph = attribution_graph(model, cross_layer(model), IDS)
    ends = sum(float(graph.influence[graph.numbers(kind)].sum()) for kind in ("token", "error"))
    assert ends == pytest.approx(float(graph.outputs.sum()), rel=1e-5)
    identity = torch.eye(len(graph.nodes), dtype=torch.float64)
    closed = graph.outputs.double() @ (torch.linalg.inv(identity - graph.shares.double()) - identity)
    torch.testing.assert_close(graph.influence.double(), closed, rtol=1e-4, atol=1e-6)


def test_without_errors_both_scores_are_one() -> None:
    graph = published()
    weights = graph.weights.clone()
    weights[3, 1] = 0.0
    perfect = small({(0, 2): 1.0, (3, 0): 3.0}, list(graph.nodes))
    assert torch.equal(perfect.weights, weights)
    assert (perfect.replacement_score, perfect.completeness_score, perfect.completeness_of_read) == (1.0, 1.0, 1.0)


def test_what_is_pruned_counts_as_error() -> None:
    model = tiny.model("llama")
    graph = attribution_graph(model, cross_layer(model), IDS)
    few = graph.pruned()
    assert len(few.nodes) < len(graph.nodes)
    assert 0 < few.replacement_score < graph.replacement_score
    assert few.completeness_of_read < graph.completeness_of_read
    for kind in ("token", "logit"):
        assert len(few.numbers(kind)) == len(graph.numbers(kind))
    edges = few.weights != 0
    for number in few.numbers("latent").tolist():
        assert edges[number].any() and edges[:, number].any()
    assert graph.pruned(1.0, 1.0).replacement_score == pytest.approx(graph.replacement_score, rel=1e-5)
    with pytest.raises(InputError, match="between 0 and 1"):
        graph.pruned(nodes=1.5)


# --- supernodes


def test_supernodes_are_read_as_one() -> None:
    graph = published().grouped({"both": [published().nodes[0], 2]})
    names, shares = graph.between_groups()
    assert names[0] == "both"
    torch.testing.assert_close(shares[names.index("logit 2 0"), 0], torch.tensor(0.75))
    with pytest.raises(InputError, match="one supernode"):
        graph.grouped({"a": [0], "b": [0]})
    with pytest.raises(InputError, match="no node"):
        graph.grouped({"a": [17]})


def test_latents_that_are_alike_are_grouped() -> None:
    """Two that read and write the same, and one that does not."""
    nodes = [*(Node("latent", 0, 0, n) for n in range(3)), Node("token", 0, None, 1), Node("token", 1, None, 2),
             Node("logit", 0, None, 2, probability=1.0)]  # fmt: skip
    weights = {(0, 3): 1.0, (1, 3): 2.0, (2, 4): 1.0, (5, 0): 1.0, (5, 1): 2.0, (5, 2): -1.0}
    graph = small(weights, nodes).grouped_alike()
    assert [set(of) for of in graph.groups.values()] == [{0, 1}]
    assert next(iter(graph.groups)) == "2 latents at 0 'x', layer 0"
    assert graph.pruned(1.0, 1.0).groups == graph.groups


# --- files

SCHEMA: dict[str, Any] = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str, "transcoder_list": list},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "node": {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str,
             "clerp": str},
    "optional": {"influence": float, "activation": float, "token_prob": float},
    "link": {"source": str, "target": str, "weight": float},
}  # fmt: skip
"""What the public viewers require (Neuronpedia's graph-schema.json, circuit-tracer's frontend/graph_models.py)."""


def test_files_hold_what_the_public_viewers_require(tmp_path: Path) -> None:
    model = tiny.model("llama")
    graph = attribution_graph(model, cross_layer(model), IDS).grouped_alike(0.3)
    save_graph(graph, tmp_path / "graph.json", slug="a-graph", scan="tiny-llama")
    data = json.loads((tmp_path / "graph.json").read_text())
    assert set(data) == {"metadata", "qParams", "nodes", "links"}
    fits(data["metadata"], SCHEMA["metadata"])
    fits(data["qParams"], SCHEMA["qParams"])
    for row in data["nodes"]:
        fits(row, SCHEMA["node"])
        assert all(isinstance(row[key], kind | None) for key, kind in SCHEMA["optional"].items())
        assert 0 <= row["ctx_idx"] < len(data["metadata"]["prompt_tokens"])
    names = {row["node_id"] for row in data["nodes"]}
    assert len(names) == len(data["nodes"])
    for link in data["links"]:
        fits(link, SCHEMA["link"])
        assert {link["source"], link["target"]} <= names
    kinds = {row["feature_type"] for row in data["nodes"]}
    assert kinds <= {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    logit = next(row for row in data["nodes"] if row["feature_type"] == "logit")
    assert "(p=" in logit["clerp"] and logit["is_target_logit"] and logit["layer"] == "4"
    latent = next(row for row in data["nodes"] if row["feature_type"] == "cross layer transcoder")
    layer, index, position = map(int, latent["node_id"].split("_"))
    assert (str(layer), position) == (latent["layer"], latent["ctx_idx"])
    assert latent["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    assert all(set(of[1:]) <= names for of in data["qParams"]["supernodes"])


def fits(row: dict[str, Any], needs: dict[str, type]) -> None:
    for key, kind in needs.items():
        assert isinstance(row[key], kind), f"{key} is {row.get(key)!r}"


def test_a_graph_is_read_back(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    graph = attribution_graph(model, coders(model, "some layers"), IDS).grouped_alike(0.2).pruned()
    save_graph(graph, tmp_path / "graph.json", nodes=1.0, edges=1.0)
    back = load_graph(tmp_path / "graph.json")
    assert back.nodes == graph.nodes and back.groups == graph.groups
    assert (back.texts, back.prompt, back.n_layers, back.transcoders) == (
        graph.texts,
        graph.prompt,
        3,
        graph.transcoders,
    )
    for name in ("weights", "inputs", "constants", "influence"):
        torch.testing.assert_close(getattr(back, name), getattr(graph, name))
    assert back.replacement_score == pytest.approx(graph.replacement_score)
    assert graph_json(back, nodes=1.0, edges=1.0) == graph_json(graph, nodes=1.0, edges=1.0)


def test_files_of_others_are_read_and_bad_ones_refused(tmp_path: Path) -> None:
    """As circuit-tracer writes them: without what only our files hold, and in another order."""
    data = graph_json(published(), nodes=1.0, edges=1.0)
    for row in data["nodes"]:
        del row["input_sum"], row["constant"]
    data["nodes"].reverse()
    del data["metadata"]["n_layers"], data["metadata"]["transcoder_list"]
    assert graph_from_json(data).replacement_score == pytest.approx(0.75)
    for change in (
        {"links": [{"source": "E_1_0", "target": "9_9_9", "weight": 1.0}]},
        {"nodes": data["nodes"] * 2},
        {"qParams": 3},
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(FileFormatError):
            load_graph(tmp_path / "bad.json")


# --- refusals


def test_what_is_no_transcoder_is_refused() -> None:
    model = tiny.model("llama")
    sae = Dictionary(
        "relu", (vs.Site("resid_post", 1),), (vs.Site("resid_post", 1),), (normal(48, M, seed=0),),
        (normal(M, 48, seed=1),), torch.zeros(M), (torch.zeros(48),),
    )  # fmt: skip
    for wrong, said in (
        (sae, "no transcoder"),
        ([transcoder(model, 1)] * 2, "one transcoder for each"),
        ([3], "dictionaries"),
    ):
        with pytest.raises(InputError, match=said):
            attribution_graph(model, wrong, IDS)
    with pytest.raises(InputError, match="one prompt"):
        attribution_graph(model, transcoder(model, 1), IDS.repeat(2, 1))
    with pytest.raises(InputError, match="most="):
        attribution_graph(model, transcoder(model, 1), IDS, most=0)
    with pytest.raises(UnknownNameError, match="kind of node"):
        published().numbers("head")


def test_targets_can_be_named() -> None:
    model = tiny.model("llama")
    graph = attribution_graph(model, transcoder(model, 1), IDS, targets=[5, 9])
    assert [graph.nodes[int(n)].index for n in graph.numbers("logit")] == [5, 9]
    reading = attribution_graph(model, transcoder(model, 1, read="resid_mid"), IDS)
    assert "latents" in repr(reading)
