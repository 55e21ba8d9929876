"""Discovery against networks whose circuits are known, exact effects against estimates, and what was missed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
import vesalius as vs
from vesalius.circuits import ablation, acdc, discover, edge_patching, load_circuit, save_circuit, with_cut, with_only
from vesalius.circuits.attribution import edge_attribution
from vesalius.circuits.hybrid import shortlisted
from vesalius.circuits.masked import masked_stream
from vesalius.circuits.verified import verified
from vesalius.errors import FileFormatError, InputError, UnknownNameError
from vesalius.jobs import silent
from vesalius.toys import EDGES, MECHANISMS, PROGRAMS, compiled, compiled_checks, compiled_pairs, mechanism

SMALL = [name for name in PROGRAMS if name not in ("reverse", "sort")]


def named(circuit: vs.circuits.Circuit) -> set[tuple[str, str]]:
    return {(str(edge.source), str(edge.target)) for edge in circuit.edges}


# --- the networks


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiled_program_computes_what_the_compilers_own_network_does(name: str) -> None:
    ids, expected = compiled_checks(name)
    found = compiled(name).run(ids, capture="final_norm")["final_norm"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["resample", "zero"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_truth_is_what_changes_any_output_at_any_position(name: str, kind: str) -> None:
    """All outputs are looked at here, not only the two that a pair compares."""
    model, pairs = compiled(name), compiled_pairs(name, 64)
    cut = ablation(model, pairs, vs.logit_diff, kind)
    edges, unembed = len(cut.wired.graph), model.W_U
    base = model.run(pairs.clean).logits
    changed = torch.zeros(edges, dtype=torch.bool)
    for some in torch.arange(edges).split(16):
        with torch.no_grad():
            logits = masked_stream(cut, torch.eye(edges)[some]) @ unembed.T
        changed[some] = (logits.unflatten(0, (len(some), -1)) - base).abs().amax((1, 2, 3)) > 1e-3
    assert int(changed.sum()) == EDGES[name][kind]


@pytest.mark.parametrize("name", MECHANISMS)
def test_the_edges_of_hand_built_networks_are_those_stated(name: str) -> None:
    known = mechanism(name)
    found = discover(known.model, known.pairs, "exact", sink=silent)
    assert named(found) == set(known.edges)


# --- discovery


@pytest.mark.parametrize("kind", ["resample", "zero"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["hybrid", "acdc"])
def test_hybrid_and_acdc_find_compiled_circuits_exactly(method: str, name: str, kind: str) -> None:
    model, pairs = compiled(name), compiled_pairs(name, 48)
    truth = discover(model, pairs, "exact", kind=kind, sink=silent)
    found = discover(model, pairs, method, kind=kind, sink=silent)
    assert len(truth.edges) == EDGES[name][kind]
    assert named(found) == named(truth)
    assert found.kept == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("name", "kind", "count"), [("reverse", "resample", 2), ("reverse", "zero", 11)])
def test_the_published_circuits_of_reverse(name: str, kind: str, count: int) -> None:
    found = discover(compiled(name), compiled_pairs(name, 64), "hybrid", kind=kind, sink=silent)
    assert len(found.edges) == count
    if kind == "resample":
        assert named(found) == {("embed", "layers.3.v[0]"), ("layers.3.z[0]", "logits")}


def test_length_has_an_empty_circuit() -> None:
    found = discover(compiled("length"), compiled_pairs("length"), "hybrid", sink=silent)
    assert not found.edges and not found.members and found.kept == 1


def test_sort_is_where_gradients_fail_and_the_warning_says_so() -> None:
    model, pairs = compiled("sort"), compiled_pairs("sort", 48)
    truth = discover(model, pairs, "exact", sink=silent)
    assert truth.scores is not None
    true = truth.scores.effects.abs().mean(1) > 0.01
    estimates = edge_attribution(model, pairs, sink=silent).effects.abs().mean(1)
    estimates = torch.where(estimates < 1e-6 * estimates.max(), 0.0, estimates)
    wins = (estimates[true][:, None] > estimates[~true]).double() + (estimates[true][:, None] == estimates[~true]) / 2
    assert float(wins.mean()) == pytest.approx(0.71, abs=0.1)
    messages: list[str] = []
    found = discover(model, pairs, "eap", drawn=59, sink=lambda event: messages.append(event.message))
    assert found.check is not None and len(found.check.saturated) >= 3
    assert any("Saturated" in message for message in messages)
    assert named(discover(model, pairs, "hybrid", sink=silent)) == named(truth)


def test_a_short_shortlist_says_how_much_it_may_have_missed() -> None:
    known = mechanism("induction")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    estimates = edge_attribution(known.model, known.pairs, sink=silent)
    shortlist = torch.zeros(len(estimates.items), dtype=torch.bool)
    shortlist[cut.wired.graph.number(vs.Edge(vs.Unit(vs.Site("z", 1, 0)), vs.Unit(vs.Site("logits"))))] = True
    some = verified(cut, estimates, shortlist, 30, 0.01).check
    assert some.drawn <= 30 and some.missed <= some.drawn and some.missed <= some.most_missed
    assert some.most_missed >= 4 - some.missed  # four edges are not on it
    everything = verified(cut, estimates, shortlist, len(shortlist), 0.01).check
    assert (everything.missed, everything.most_missed) == (4, 4)
    assert "at most 4 edges were missed" in everything.describe()


def test_saturated_readers_bring_their_edges_onto_the_shortlist() -> None:
    known = mechanism("saturated")
    cut = ablation(known.model, known.pairs, vs.logit_diff)
    estimates = edge_attribution(known.model, known.pairs, sink=silent)
    number = cut.wired.graph.number(vs.Edge(vs.Unit(vs.Site("embed")), vs.Unit(vs.Site("k", 0, 0))))
    exact = edge_patching(known.model, known.pairs, sink=silent).effects
    assert float(exact[number].abs().min()) >= 0.5 and float(estimates.effects[number].abs().max()) < 0.05
    assert shortlisted(cut, estimates, 8, 0.01)[number]


def test_gates_are_seen_from_one_side_only() -> None:
    """Cutting clean runs (noising) shows AND's inputs, restoring corrupted ones shows OR's."""
    for name, noising, denoising in (("and", 1.0, 0.0), ("or", 0.0, 1.0)):
        known = mechanism(name)
        edge = vs.Edge(vs.Unit(vs.Site("z", 0, 0)), vs.Unit(vs.Site("mlp_in", 0)))
        for prompts, expected in (("clean", noising), ("corrupted", denoising)):
            found = edge_patching(known.model, known.pairs, edges=[edge], prompts=prompts, sink=silent)
            assert float(found.effects.abs().max()) == pytest.approx(expected, abs=1e-3)


def test_xor_has_seven_perfect_circuits_of_which_three_are_connected() -> None:
    known = mechanism("xor")
    cut = ablation(known.model, known.pairs, vs.logit_diff, "zero")
    graph = cut.wired.graph
    parts = [vs.Edge(vs.Unit(vs.Site.parse(one)), vs.Unit(vs.Site.parse(two))) for one, two in known.edges]
    numbers = [graph.number(edge) for edge in parts]
    masks = torch.ones(2 ** len(numbers), len(graph), dtype=torch.bool)
    for row in range(len(masks)):
        masks[row, numbers] = torch.tensor([bool(row >> bit & 1) for bit in range(len(numbers))])
    perfect = (with_only(cut, masks) > 0).all(1)
    assert int(perfect.sum()) == 7
    only = masks & graph.mask(parts)
    assert sum(torch.equal(graph.connected(row), row) for row in only[perfect]) == 3


def test_a_negative_head_is_found_by_size_and_not_by_sign() -> None:
    known = mechanism("negative")
    effects = edge_patching(known.model, known.pairs, sink=silent)
    mean = dict(zip(map(str, effects.items), effects.mean.tolist(), strict=True))
    assert mean["layers.0.z[0] -> logits"] == pytest.approx(-1.5, abs=0.01)
    assert mean["layers.0.z[1] -> logits"] == pytest.approx(0.5, abs=0.01)
    assert ("layers.0.z[1]", "logits") in named(discover(known.model, known.pairs, "hybrid", sink=silent))


def test_edge_pruning_recovers_a_compiled_circuit() -> None:
    found = discover(compiled("frac_prevs"), compiled_pairs("frac_prevs", 24), "pruning", sink=silent)
    assert len(found.edges) == 3 and found.kept == pytest.approx(1, abs=0.01)


def test_acdc_is_the_sequential_algorithm_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cut = ablation(tiny.model("gpt2", layers=1), tiny.pairs(), vs.logit_diff)
    removed, now, base = torch.zeros(len(cut.wired.graph), dtype=torch.bool), 0.0, cut.plain()[0]
    for reader in reversed(range(len(cut.wired.graph.readers))):
        for writer in reversed(range(int(cut.wired.graph.counts[reader]))):
            tried = removed.clone()
            tried[int(cut.wired.graph.starts[reader]) + writer] = True
            distance = float((with_cut(cut, tried[None])[0] - base).abs().mean())
            if distance - now < 0.1:
                removed, now = tried, distance
    found = acdc(cut, 0.1, out=tmp_path)
    assert torch.equal(found, ~removed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vesalius.circuits.greedy.with_cut", lambda *_: pytest.fail("a finished run was made again"))
        assert torch.equal(acdc(cut, 0.1, out=tmp_path), found)
    with pytest.raises(InputError, match="another folder"):
        acdc(ablation(tiny.model("gpt2", layers=1), tiny.pairs(), vs.logit_diff, "zero"), 0.1, out=tmp_path)


# --- exact effects


@pytest.mark.parametrize("kind", ["resample", "mean", "zero"])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_replayed_edges_equal_whole_runs(family: str, kind: str) -> None:
    model, pairs = tiny.model(family, layers=2), tiny.pairs()
    cut = ablation(model, pairs, vs.logit_diff, kind)
    expected = with_cut(cut, torch.eye(len(cut.wired.graph), dtype=torch.bool))
    found = edge_patching(model, pairs, kind=kind, sink=silent)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    assert found.cost.spent < found.cost.naive * (0.5 if kind == "resample" else 0.8)


def test_finished_edges_are_kept(tmp_path: Path) -> None:
    model, pairs = tiny.model("llama", layers=1), tiny.pairs()
    first = edge_patching(model, pairs, out=tmp_path, sink=silent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vesalius.circuits.exact._Work.values", lambda *_: pytest.fail("made again"))
        again = edge_patching(model, pairs, out=tmp_path, check=False, sink=silent)
    assert torch.equal(first.values, again.values)


# --- the front


def test_a_circuit_can_be_kept_and_read_for_its_own_model_only(tmp_path: Path) -> None:
    known, path = mechanism("induction"), tmp_path / "circuit.json"
    found = discover(known.model, known.pairs, sink=silent)
    save_circuit(found, path)
    again = load_circuit(path, known.model)
    assert again.edges == found.edges and again.members == found.members
    with pytest.raises(InputError, match="weights"):
        load_circuit(path, mechanism("negative").model)
    path.write_text("{}")
    with pytest.raises(FileFormatError):
        load_circuit(path, known.model)


def test_what_cannot_be_searched_is_refused() -> None:
    known = mechanism("negative")
    with pytest.raises(UnknownNameError, match="hybrid"):
        discover(known.model, known.pairs, "magic", sink=silent)
    wrong = vs.Pairs(
        clean=known.pairs.clean, corrupted=known.pairs.corrupted, answer=known.pairs.distractor,
        distractor=known.pairs.answer,
    )  # fmt: skip
    with pytest.raises(InputError, match="does not do this task"):
        discover(known.model, wrong, sink=silent)
    split = vs.Pairs(
        clean=known.pairs.clean, corrupted=known.pairs.corrupted, answer=known.pairs.answer,
        distractor=known.pairs.distractor, splits=("discovery", "validation") * 12,
    )  # fmt: skip
    with pytest.raises(InputError, match="search on one"):
        discover(known.model, split, sink=silent)
    with pytest.raises(InputError, match="takes a threshold"):
        discover(known.model, known.pairs, "acdc", size=3, sink=silent)


def test_what_a_gradient_method_found_is_not_counted_as_missed() -> None:
    """All edges are drawn: those with an effect that the circuit lacks are missed, and no others."""
    known = mechanism("saturated", n=8)
    found = discover(known.model, known.pairs, "eap", drawn=10**6, sink=silent)
    truth = discover(known.model, known.pairs, "exact", sink=silent)
    assert found.check is not None
    assert found.check.missed == found.check.most_missed == len(named(truth) - named(found)) > 0


@pytest.mark.parametrize("method", ["acdc", "hybrid"])
def test_an_edges_weight_is_what_cutting_it_alone_does(method: str) -> None:
    known = mechanism("induction", n=8)
    found = discover(known.model, known.pairs, method, sink=silent)
    alone = edge_patching(known.model, known.pairs, edges=list(found.edges), sink=silent)
    assert len(found.edges) > 2
    assert list(found.edges.values()) == pytest.approx(alone.effects.mean(1).tolist(), abs=1e-5)
    assert all(found.edges.values())
