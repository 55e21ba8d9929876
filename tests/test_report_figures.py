"""The pictures of the report: places, colours and widths follow the numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from pages import Page, luminance
from summaries import VARIANTS, ioi, tiny
from summary_parts import Summary, names_of
from vesalius import report
from vesalius.report import (
    circuit_drawing,
    circuit_edges,
    circuit_layout,
    distributions,
    forest,
    heatmap,
    scales,
    view,
    words,
)
from vesalius.report.attention_picture import opening, picture
from vesalius.site import Site

SMALL = names_of(2, 2)[1:]


def test_heatmap_colours_follow_the_sign_and_marks_follow_the_summary() -> None:
    effects = ioi()["effects"]
    members = [member["component"] for member in ioi()["circuit"]["members"]]
    found = heatmap.heatmaps(effects, members)
    for drawn, condition in zip(found, effects["conditions"], strict=True):
        by_place = {
            (line.name, column): cell
            for line in drawn.lines
            for column, cell in zip(drawn.columns, line.cells, strict=True)
            if cell is not None
        }
        assert len(by_place) == 301
        for name, mean in zip(effects["components"], condition["mean"], strict=True):
            site = Site.parse(name)
            row = "MLP" if site.index is None else f"head {site.index}"
            cell = by_place[row, heatmap.INPUT if site.layer is None else str(site.layer)]
            assert cell.title.startswith(words.component(name) + ": ")
            assert cell.colour[0] == ("z" if cell.colour == "z" else "p" if mean > 0 else "n")
            assert cell.member == (name in members) and cell.conflict == (name in effects["sign_conflicts"])
            assert cell.text == f"{100 * mean:.0f}".replace("-0", "0").replace("-", "−")
            assert cell.silent == (cell.text == "0")
        sizes = [abs(row.effect["estimate"]) for row in drawn.ranking]
        assert sizes == sorted(np.abs(condition["mean"]), reverse=True)[: len(sizes)]
    assert len({drawn.limit for drawn in found}) == 1
    assert found[0].limit == max(np.abs([condition["mean"] for condition in effects["conditions"]]).ravel())


def test_encoder_and_decoder_each_have_their_rows() -> None:
    effects = tiny()["effects"]
    stacks = [name.replace("layers", f"{stack}.layers") for stack in ("encoder", "decoder") for name in SMALL]
    effects["components"] = ["embed", *stacks, "no site at all"]
    for condition in effects["conditions"]:
        arrays = {key: value for key, value in condition.items() if isinstance(value, list)}
        condition.update({key: [*value, *value[1:], 0.3] for key, value in arrays.items()})
    drawn = heatmap.heatmaps(effects, [])[0]
    assert [line.name for line in drawn.lines] == [
        "MLP", "decoder head 0", "decoder head 1", "decoder MLP", "encoder head 0", "encoder head 1", "encoder MLP",
    ]  # fmt: skip
    assert sum(cell is not None for line in drawn.lines for cell in line.cells) == 1 + 2 * 6
    assert "no site at all" in [row.component for row in drawn.ranking]


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


def test_the_legend_shows_every_colour_at_the_values_that_have_it() -> None:
    drawn = heatmap.heatmaps(ioi()["effects"], [])[0]
    assert drawn.legend == [f"n{step}" for step in range(9, 0, -1)] + ["z"] + [f"p{step}" for step in range(1, 10)]
    for pixel, value in drawn.legend_ticks:
        assert scales.diverging(value, drawn.limit) == drawn.legend[int(pixel // heatmap.STEP_WIDTH)]


@pytest.mark.parametrize("root", [False, True])
def test_a_scale_holds_everything_in_order_and_its_ticks_are_where_they_say(root: bool) -> None:
    values = [-0.263, -0.09, -0.001, 0.0, 0.003, 0.02, 0.45, 1.13]
    scale = scales.around(values, 10, 180, root=root)
    pixels = [scale(value) for value in values]
    assert pixels == sorted(pixels) and pixels[0] > 10 and pixels[-1] < 180
    ticks = scale.ticks(4)
    assert (scale(0), 0.0) in ticks and len(ticks) >= 3
    for pixel, value in ticks:
        assert 10 <= pixel <= 180 and pixel == scale(value) and float(f"{value:.1g}") == pytest.approx(value)
    gaps = np.diff([pixel for pixel, _ in ticks])
    assert (gaps > 0).all() and (not root or (gaps >= 170 / (1.25 * 4)).all())
    if root:
        # Pixels from zero go with the square root.
        assert (scale(1.0) - scale(0)) / (scale(0.25) - scale(0)) == pytest.approx(2, abs=0.03)


def test_ramps_grow_steadily_darker_so_that_they_survive_grey_printing() -> None:
    rules = dict(re.findall(r"^\.(\w\d)\{fill:(#\w{6})", scales.colour_rules().split("@media")[0], flags=re.M))
    for kind in "pna":
        steps = [luminance(rules[f"{kind}{step}"]) for step in range(1, 10)]
        assert steps == sorted(steps, reverse=True) and steps[0] > 4 * steps[-1]


def numbers(circuit: Summary) -> dict[str, int]:
    return view.part_numbers(circuit)


def test_circuit_members_stand_by_layer_apart_and_inside() -> None:
    circuit = ioi()["circuit"]
    drawing = circuit_drawing.draw(circuit, numbers(circuit), "share")
    by_number = {node.number: node for node in drawing.nodes}
    members = [(member, by_number[numbers(circuit)[member["component"]]]) for member in circuit["members"]]
    assert len(drawing.nodes) == len(members) == 20
    for first, node in members:
        assert 0 <= node.x <= drawing.width - drawing.node_width and 0 <= node.y <= drawing.height
        assert node.suppresses == first["suppresses"] and node.uncertain == first["uncertain"]
        assert node.title.startswith(words.component(first["component"])) and first["role"] in node.title
        lanes = [h.lane for h in drawing.headings if h.lane.x <= node.x <= h.lane.x + h.lane.width]
        assert [lane.role for lane in lanes] == [first["role"]]
        for second, other in members:
            if first["layer"] < second["layer"]:
                assert node.y > other.y
            if first["component"] != second["component"]:
                assert abs(node.x - other.x) >= drawing.node_width or abs(node.y - other.y) >= drawing.node_height


def test_edge_widths_are_proportional_to_weights_and_signs_are_kept() -> None:
    circuit = ioi()["circuit"]
    edges = circuit_drawing.draw(circuit, numbers(circuit)).edges
    weights = sorted(circuit["edges"], key=lambda edge: -abs(edge["weight"]))
    assert [edge.weight for edge in reversed(edges)] == [edge["weight"] for edge in weights]
    assert [edge.rank for edge in reversed(edges)] == list(range(1, len(weights) + 1))
    np.testing.assert_allclose(
        np.corrcoef([e.width for e in edges], [abs(e.weight) for e in edges])[0, 1], 1, atol=1e-4
    )
    for edge in edges:
        # An arrowhead is a closed triangle, a bar across is a single stroke.
        assert edge.tip.endswith("z") == (edge.weight > 0)


def test_the_fewest_strongest_edges_that_carry_80_percent_are_shown_at_first() -> None:
    circuit = ioi()["circuit"]
    drawing = circuit_drawing.draw(circuit, numbers(circuit))
    total = sum(abs(edge["weight"]) for edge in circuit["edges"])
    shown = [abs(edge.weight) for edge in drawing.shown]
    assert drawing.total == pytest.approx(total) and min(shown) >= max(abs(e.weight) for e in drawing.edges if e.weak)
    assert sum(shown) >= 0.8 * total > sum(shown) - min(shown)


def test_weights_that_add_up_to_80_percent_exactly_need_no_further_edge() -> None:
    circuit = ioi()["circuit"]
    for edge in circuit["edges"]:
        edge["weight"] = 0.1
    circuit["edges"] = circuit["edges"][:50]
    assert len(circuit_drawing.draw(circuit, numbers(circuit)).shown) == 40


def test_edges_begin_and_end_at_their_parts_and_do_not_turn_back() -> None:
    circuit = ioi()["circuit"]
    drawing = circuit_drawing.draw(circuit, numbers(circuit))
    nodes = {str(node.number): node for node in drawing.nodes}
    for edge in drawing.edges:
        x0, y0, *_, x1, y1 = map(float, re.findall(r"-?[\d.]+", edge.path))
        source, target = (nodes.get(end) for end in edge.ends)
        if source is not None:
            assert source.x <= x0 <= source.x + drawing.node_width and y0 == source.y
        if target is not None:
            assert target.x <= x1 <= target.x + drawing.node_width
            beside = source is not None and source.y == target.y
            assert y1 == pytest.approx(target.y - 1 if beside else target.y + drawing.node_height + 1)
        assert y1 < y0


def test_curves_go_around_what_stands_between() -> None:
    members = [ioi()["circuit"]["members"][1] | {"component": f"layers.{i}.z[0]", "layer": i} for i in range(3)]
    layout = circuit_layout.arrange(members)
    (x0, y0), (x1, y1) = layout.corner("layers.0.z[0]"), layout.corner("layers.2.z[0]")
    assert x0 == x1
    start, end = (x0 + 28, y0), (x1 + 28, y1 + circuit_layout.NODE_HEIGHT)
    around = layout.curve("layers.0.z[0]", "layers.2.z[0]", start, end)
    far = max(float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", around)) - (x0 + 28)
    assert far > circuit_layout.NODE_WIDTH / 2
    straight = layout.curve("layers.0.z[0]", "layers.1.z[0]", start, (x0 + 28, layout.corner("layers.1.z[0]")[1] + 31))
    assert {float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", straight)} == {x0 + 28}


def test_a_part_that_acts_on_most_others_has_letters_in_place_of_lines() -> None:
    circuit = ioi()["circuit"]
    hub = circuit["members"][0]["component"]
    others = [member["component"] for member in circuit["members"][1:]]
    circuit["edges"] = [edge for edge in circuit["edges"] if edge["source"] != hub]
    circuit["edges"] += [{"source": hub, "target": name, "weight": 1.0} for name in others]
    drawing = circuit_drawing.draw(circuit, numbers(circuit))
    (found,) = drawing.hubs
    assert found.name == words.component(hub) and found.letter == "a"
    assert len([edge for edge in drawing.edges if edge.hub]) == len(found.places) == len(others)
    corners = {(node.x + 1, node.y + drawing.node_height) for node in drawing.nodes}
    assert {(place.x, place.y) for place in found.places} <= corners
    page = Page(report.render(ioi() | {"circuit": circuit}))
    assert page.count("g", "hub") == page.count("g", "letter") - 1 == len(others)
    assert f"acted on by {words.component(hub)}" in page.text


def large(count: int) -> Summary:
    summary = ioi()
    template = summary["circuit"]["members"][1]
    names = [name for name in names_of(30, 9) if ".z[" in name][:count]
    members = [
        template | {"component": n, "layer": int(n.split(".")[1]), "head": int(n[-2]), "claims": []} for n in names
    ]
    rng = np.random.default_rng(0)
    edges = [
        {"source": a, "target": b, "weight": float(rng.gamma(1, 0.1))}
        for a in names
        for b in names
        if int(a.split(".")[1]) < int(b.split(".")[1]) and rng.uniform() < 0.3
    ]
    summary["circuit"].update(members=members, edges=edges)
    return summary


def test_a_hundred_members_are_all_drawn_side_by_side() -> None:
    circuit = large(100)["circuit"]
    drawing = circuit_drawing.draw(circuit, numbers(circuit))
    assert len(drawing.nodes) == 100 and drawing.members_left_out == 0
    assert len({(node.x, node.y) for node in drawing.nodes}) == 100


def test_a_circuit_too_large_to_draw_says_what_was_left_out() -> None:
    summary = large(200)
    drawing = circuit_drawing.draw(summary["circuit"], numbers(summary["circuit"]))
    assert len(drawing.nodes) == circuit_drawing.MOST_NODES and drawing.members_left_out == 200 - len(drawing.nodes)
    assert len(drawing.edges) == circuit_edges.MOST_EDGES
    text = Page(report.render(summary)).text
    assert f"{drawing.members_left_out} parts with smaller effects are not drawn" in text
    assert f"{drawing.edges_left_out} weaker edges are not drawn" in text and drawing.edges_left_out > 0


def test_names_over_the_lanes_are_whole_words_where_they_fit() -> None:
    assert circuit_drawing._in_lines("MLP writes toward the answer", 11) == ("MLP writes", "toward the", "answer")
    assert circuit_drawing._in_lines("S-inhibition", 9) == ("S-", "inhibition")
    assert circuit_drawing._in_lines("a b c d e", 1, most=2) == ("a", "b…")


def test_attention_squares_stand_for_their_shares() -> None:
    head = ioi()["attention"][0]
    for prompt in head["prompts"]:
        drawn = picture(head, prompt)
        pattern = np.array(prompt["pattern"])
        squares = {}
        for colour, path in drawn.squares:
            for x, y in re.findall(r"M([\d.]+) ([\d.]+)h", path):
                at = round((float(y) - drawn.top) / drawn.cell), round((float(x) - drawn.left) / drawn.cell)
                squares[at] = colour
        assert set(squares) == {
            tuple(at) for at in np.argwhere([[scales.sequential(v) != "z" for v in row] for row in pattern])
        }
        assert all(q >= k for q, k in squares)
        assert drawn.looks_at[0][1] == pattern[-1].max()
        levels = [int(squares[at][1:]) for at in sorted(squares, key=lambda at: pattern[at])]
        assert levels == sorted(levels)


def test_attention_weights_under_the_pointer_are_those_of_the_pattern() -> None:
    head = {"component": "layers.0.z[0]", "role": "none"}
    prompt = {"tokens": ["a", "b", "c"], "pattern": [[1.0, 0.0, 0.0], [0.5, 0.1, None], [0.0, 0.7, 0.3]]}
    assert picture(head, prompt).shares == "100;50,10,;0,70,30"


def test_a_prompt_is_chosen_by_its_first_words() -> None:
    assert opening(["<|im_start|>", "After", " Anna", " and", " Paul", " left"]) == "After Anna and Paul left"
    assert opening(["word "] * 20) == "word word word word word word …"


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
        # No prompt is off the scale, however far out.
        assert [x for x, _ in panel.dots] == [panel.scale(value) for value in entry["per_example"]]
        assert all(panel.scale.start <= x <= panel.scale.end for x, _ in panel.dots)


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
    assert len(drawn) == distributions.MAIN_CLAIMS and verdicts.count("SUPPORTED") == 6 and len(set(verdicts)) > 1
    assert {c["verdict"] for c in distributions.main_claims(VARIANTS["control"]()["claims"])} == {
        "REFUTED",
        "INCONCLUSIVE",
    }


def test_forests_of_one_unit_share_a_scale_that_holds_all_of_them() -> None:
    claims = [claim for claim in ioi()["claims"] if claim["unit"] == "attention" and claim["estimate"] is not None]
    claims[0] = claims[0] | {"estimate": 40.0, "low": 30.0, "high": 50.0}
    drawn = forest.forests(claims)
    assert len({found.zero for found in drawn}) == 1 and len({found.ticks for found in drawn}) == 1
    assert [found.point for found in drawn] == [forest_pixel(claims, claim) for claim in claims]
    for found, claim in zip(drawn, claims, strict=True):
        assert found.line is not None and found.point is not None and found.line[0] <= found.point <= found.line[1]
        assert found.line[0] > 0 and found.line[1] < found.width
        assert found.band is not None and math.isclose(
            found.band[1] - found.zero, found.zero - found.band[0], abs_tol=0.2
        )
        if abs(claim["estimate"] - claim["delta"]) > 0.02:
            assert (found.point > found.band[1]) == (claim["estimate"] > claim["delta"])


def forest_pixel(claims: list[Summary], claim: Summary) -> float:
    """Written out again: low and high ends of everything shown, by their signed square roots, 2 % room."""
    shown = [c[k] for c in claims for k in ("low", "high", "estimate", "delta", "control_estimate")] + [
        -c["delta"] for c in claims
    ]
    low, high = (np.sign(end) * abs(end) ** 0.5 for end in (min([0.0, *shown]), max([0.0, *shown])))
    room = 0.02 * (high - low)
    at = float(np.sign(claim["estimate"]) * abs(claim["estimate"]) ** 0.5)
    return round(10 + (at - low + room) / (high - low + 2 * room) * 170, 1)
