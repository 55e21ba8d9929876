"""The pictures of the report: places, colours and widths follow the numbers."""

from __future__ import annotations

import math
import re

import numpy as np

from pages import Page, luminance
from summaries import VARIANTS, ioi
from summary_parts import Summary, names_of
from vesalius import report
from vesalius.report import circuit_drawing, distributions, forest, heatmap, scales, words
from vesalius.report.attention_picture import picture


def test_heatmap_colours_follow_the_sign_and_marks_follow_the_summary() -> None:
    effects = ioi()["effects"]
    members = [member["component"] for member in ioi()["circuit"]["members"]]
    found = heatmap.heatmaps(effects, members)
    for drawn, condition in zip(found, effects["conditions"], strict=True):
        for name, cell, mean in zip(effects["components"], drawn.cells, condition["mean"], strict=True):
            assert cell.colour[0] == ("z" if cell.colour == "z" else "p" if mean > 0 else "n")
            assert cell.member == (name in members) and cell.conflict == (name in effects["sign_conflicts"])
            if cell.suppresses:
                assert mean < 0
        places = {(cell.x, cell.y) for cell in drawn.cells}
        assert len(places) == 301
        assert all(0 <= x <= drawn.width - drawn.cell_width + 1 and y <= drawn.height for x, y in places)
        sizes = [abs(row.effect["estimate"]) for row in drawn.ranking]
        assert sizes == sorted(np.abs(condition["mean"]), reverse=True)[: len(sizes)]
    assert len({drawn.limit for drawn in found}) == 1


def test_helping_and_suppressing_of_one_size_get_one_depth_of_colour() -> None:
    for value in np.linspace(0.01, 2.0, 40):
        up, down = scales.diverging(value, 0.5), scales.diverging(-value, 0.5)
        assert up.replace("p", "n") == down
    assert (
        scales.diverging(0.5, 0.5) == "p9"
        and scales.diverging(0.0, 0.5) == "z"
        and scales.diverging(None, 1) == "missing"
    )
    assert {f".{kind}{step}" for kind in "pna" for step in range(1, 10)} <= set(
        re.findall(r"\.\w+", scales.colour_rules())
    )


def test_ramps_grow_steadily_darker_so_that_they_survive_grey_printing() -> None:
    rules = dict(re.findall(r"^\.(\w\d)\{fill:(#\w{6})\}", scales.colour_rules().split("@media")[0], flags=re.M))
    for kind in "pna":
        steps = [luminance(rules[f"{kind}{step}"]) for step in range(1, 10)]
        assert steps == sorted(steps, reverse=True) and steps[0] > 4 * steps[-1]


def test_circuit_members_stand_by_layer_apart_and_inside() -> None:
    circuit = ioi()["circuit"]
    drawing = circuit_drawing.draw(circuit, "share")
    by_name = {node.title.split(":")[0]: node for node in drawing.nodes}
    members = [(member, by_name[words.component(member["component"])]) for member in circuit["members"]]
    assert len(drawing.nodes) == len(members) == 20
    for first, node in members:
        assert 0 <= node.x <= drawing.width - drawing.node_width and 0 <= node.y <= drawing.height
        assert node.suppresses == first["suppresses"]
        for second, other in members:
            if first["layer"] < second["layer"]:
                assert node.y > other.y
            if first["component"] != second["component"]:
                assert abs(node.x - other.x) >= drawing.node_width or abs(node.y - other.y) >= drawing.node_height


def test_edge_widths_are_proportional_to_weights_and_signs_are_kept() -> None:
    circuit = ioi()["circuit"]
    edges = circuit_drawing.draw(circuit).edges
    weights = sorted(circuit["edges"], key=lambda edge: -abs(edge["weight"]))
    widths = [edge.width for edge in reversed(edges)]
    np.testing.assert_allclose(
        np.corrcoef(widths, [abs(e["weight"]) for e in weights[: len(widths)]])[0, 1], 1, atol=1e-4
    )
    assert sum(edge.negative for edge in edges) == sum(e["weight"] < 0 for e in weights[: len(widths)])


def test_a_circuit_too_large_to_draw_says_what_was_left_out() -> None:
    summary = ioi()
    template = summary["circuit"]["members"][1]
    names = [name for name in names_of(30, 9) if ".z[" in name][:100]
    members = [
        template | {"component": n, "layer": int(n.split(".")[1]), "head": int(n[-2]), "claims": []} for n in names
    ]
    edges = [{"source": names[0], "target": name, "weight": 0.1} for name in names[9:]]
    summary["circuit"].update(members=members, edges=edges)
    drawing = circuit_drawing.draw(summary["circuit"])
    assert len(drawing.nodes) == circuit_drawing.MOST_NODES and drawing.members_left_out == 100 - len(drawing.nodes)
    assert len({(node.x, node.y) for node in drawing.nodes}) == len(drawing.nodes)
    text = Page(report.render(summary)).text
    assert f"{drawing.members_left_out} parts with smaller effects are not drawn" in text
    assert f"{drawing.edges_left_out} weaker edges are not drawn" in text and drawing.edges_left_out > 0


def test_attention_squares_stand_for_their_shares() -> None:
    head = ioi()["attention"][0]
    drawn = picture(head)
    pattern = np.array(head["pattern"])
    squares = {
        (round((s.y - drawn.top) / drawn.cell), round((s.x - drawn.left) / drawn.cell)): s for s in drawn.squares
    }
    assert set(squares) == {
        tuple(at) for at in np.argwhere([[scales.sequential(v) != "z" for v in row] for row in pattern])
    }
    assert all(q >= k for q, k in squares)
    assert drawn.looks_at[0][1] == pattern[-1].max()
    order = sorted(squares, key=lambda at: pattern[at])
    levels = [int(squares[at].colour[1:]) for at in order]
    assert levels == sorted(levels)


def test_histogram_of_random_sets_loses_no_draw() -> None:
    circuit = ioi()["circuit"]
    for panel, entry in zip(distributions.against_random(circuit), circuit["faithfulness"], strict=True):
        heights = np.array([height for _, _, height in panel.bars])
        counts = heights / heights[heights > 0].min()
        values = entry["random"]["values"]
        edges = np.linspace(panel.scale.start, panel.scale.end, distributions.BINS + 1)
        expected, _ = np.histogram([panel.scale(v) for v in values], edges)
        assert len(heights) == (expected > 0).sum()
        np.testing.assert_allclose(counts / counts.max(), expected[expected > 0] / expected.max(), atol=0.02)
        assert len(panel.dots) == len(entry["per_example"])


def test_every_example_of_a_claim_is_one_dot_in_the_row_of_its_template() -> None:
    summary = ioi()
    numbers = {entry["template"]: i for i, entry in enumerate(summary["gate"]["templates"], start=1)}
    claim = next(c for c in summary["claims"] if c["verdict"] == "SUPPORTED")
    drawn = distributions.spread(claim, numbers)
    assert len(drawn.strips) == 12 and sum(len(s.effects) for s in drawn.strips) == 32 == sum(
        len(s.controls) for s in drawn.strips
    )
    for strip in drawn.strips:
        values = [v for v, t in zip(claim["values"], claim["templates"], strict=True) if t == strip.title]
        assert strip.effects == tuple(drawn.scale(v) for v in values) and strip.mean == drawn.scale(
            float(np.mean(values))
        )
    assert [s.label for s in distributions.spread(claim | {"templates": []}, numbers).strips] == ["all"]


def test_main_claims_show_refuted_ones_beside_the_supported() -> None:
    drawn = distributions.main_claims(ioi()["claims"])
    verdicts = [claim["verdict"] for claim in drawn]
    assert len(drawn) == distributions.MAIN_CLAIMS and verdicts.count("SUPPORTED") == 6 and "REFUTED" in verdicts
    assert {c["verdict"] for c in distributions.main_claims(VARIANTS["control"]()["claims"])} == {
        "REFUTED",
        "INCONCLUSIVE",
    }


def test_forests_of_one_unit_share_a_scale_and_keep_their_order() -> None:
    claims = [claim for claim in ioi()["claims"] if claim["unit"] == "attention" and claim["estimate"] is not None]
    drawn = forest.forests(claims)
    assert len({found.zero for found in drawn}) == 1
    assert (
        np.argsort([f.point for f in drawn]).tolist()
        == np.argsort([round(forest_pixel(claims, c), 1) for c in claims]).tolist()
    )
    for found, claim in zip(drawn, claims, strict=True):
        assert found.line is not None and found.point is not None and found.line[0] <= found.point <= found.line[1]
        assert found.band is not None and math.isclose(
            found.band[1] - found.zero, found.zero - found.band[0], abs_tol=0.2
        )
        assert (found.point > found.band[1]) == (claim["estimate"] > claim["delta"])


def forest_pixel(claims: list[Summary], claim: Summary) -> float:
    """Written out again: low and high ends of everything shown, 6 % room, linear."""
    shown = [c[k] for c in claims for k in ("low", "high", "estimate", "delta", "control_estimate")] + [
        -c["delta"] for c in claims
    ]
    low, high = min([0.0, *shown]), max([0.0, *shown])
    room = 0.06 * (high - low)
    return 6 + (claim["estimate"] - low + room) / (high - low + 2 * room) * 178
