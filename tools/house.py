"""Draws docs/house.svg, the picture of the architecture page, from the rows that tests/test_layers.py holds."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_layers import ROWS

LEFT, WIDTH, ROOF, ROW = 176, 544, 150, 34
# Storeys from the roof down: label, colour of the letters, colour of the wall, and the rows in it with their words.
STOREYS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    ("ask", "#7a5ea8", "#efe8f7", (
        ("cli", "the command line; the only room that prints"),
        ("report", "figures and self-contained pages"),
        ("studies", "whole stories, step by step"),
    )),
    ("take apart, say, test", "#a8552a", "#fbeadd", (
        ("attribution images", "why this number, for this input; networks that see"),
        ("interpretable validate", "models that can be read; a claim, fresh data: Evidence"),
        ("describe circuits", "what a part does; which parts it takes"),
        ("dictionaries", "parts that are found, not given"),
        ("quantities", "what is measured about a part, one file each"),
        ("concepts", "whether latents stand for a concept"),
        ("agents data toys", "who acts; pairs, text, tables; known networks"),
    )),
    ("engine", "#1f7a6c", "#dff1ec", (
        ("patching", "many edited runs as few forwards, exactly"),
        ("model", "Model.run: the network as it is, named; hooks"),
    )),
    ("words", "#2f6299", "#e2ecf7", (
        ("metric intervention adapters coder", "what is measured, changed, and where it lies"),
        ("refs", "from a reference back to its part"),
        ("directions", "parts that are coordinates along vectors"),
        ("activations parts", "values read; what can be edited"),
        ("inputs", "Tokens and Pairs"),
        ("site", "the name of one tensor"),
    )),
    ("cellar", "#6b5f4b", "#ebe4d6", (
        ("protocol", "claims, evidence, verdicts and their ledger"),
        ("jobs", "files, blocks, progress, threads"),
        ("stats seeds", "every p-value and interval; every draw"),
        ("errors", "what was given, and what to do"),
    )),
)  # fmt: skip
STYLE = """
    .name { font: 600 15px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #23201a }
    .name { text-anchor: middle }
    .says { font-size: 14px; fill: #4b463c }
    .storey { font-size: 14px; font-weight: 600; text-anchor: end }
    .rule { font-size: 14px; fill: #4b463c; text-anchor: middle }
    .wall { stroke: #23201a; stroke-width: 1.5; fill: none }
    .thin { stroke: #23201a; stroke-width: 1; fill: none }
"""


def floor(rooms: str, words: str, top: int, first: bool) -> list[str]:
    """One row: its line, its rooms side by side, and what they are for."""
    names = rooms.split()
    step = WIDTH / len(names)
    drawn = [f'<path d="M{LEFT} {top}H{LEFT + WIDTH}" class="{"wall" if first else "thin"}"/>']
    for number, name in enumerate(names):
        if number:
            drawn.append(f'<path d="M{LEFT + number * step:g} {top}v{ROW}" class="thin"/>')
        drawn.append(f'<text x="{LEFT + (number + 0.5) * step:g}" y="{top + 22}" class="name">{name}</text>')
    return [*drawn, f'<text x="768" y="{top + 22}" class="says">{words}</text>']


def storey(label: str, ink: str, wall: str, rows: tuple[tuple[str, str], ...], top: int) -> list[str]:
    """Some rows under one name."""
    height, lines = ROW * len(rows), label.split(", ")
    middle = top + height / 2 + 5 - 9 * (len(lines) - 1)
    drawn = [
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{height}" fill="{wall}"/>',
        f'<path d="M164 {top + 5}h-5V{top + height - 5}h5" stroke="{ink}" stroke-width="2" fill="none"/>',
    ]
    for number, line in enumerate(lines):
        comma = "," if number + 1 < len(lines) else ""
        drawn.append(f'<text x="150" y="{middle + 18 * number:g}" class="storey" fill="{ink}">{line}{comma}</text>')
    for number, (rooms, words) in enumerate(rows):
        drawn += floor(rooms, words, top + number * ROW, number == 0)
    return drawn


def picture() -> str:
    """The whole SVG."""
    listed = [rooms for _, _, _, rows in STOREYS for rooms, _ in rows]
    if listed != ROWS[::-1]:
        raise SystemExit(f"the picture has the rows {listed[::-1]}, the test {ROWS}")
    bottom = ROOF + ROW * len(listed)
    cellar = bottom - ROW * len(STOREYS[-1][3])
    body = []
    top = ROOF
    for label, ink, wall, rows in STOREYS:
        body += storey(label, ink, wall, rows, top)
        top += ROW * len(rows)
    middle = LEFT + WIDTH / 2
    told = "; ".join(row.replace(" ", ", ") for row in ROWS)
    return "\n  ".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 {bottom + 62}" width="1120" height="{bottom + 62}" '
        'role="img" aria-labelledby="title desc" font-family="ui-sans-serif, system-ui, -apple-system, \'Segoe UI\', '
        'Helvetica, Arial, sans-serif">',
        '<title id="title">The house: the rooms of vesalius as floors</title>',
        '<desc id="desc">A house cut open. Every floor is a row of rooms; a room imports only from floors beneath its '
        f"own, and rooms on one floor never import each other. From the cellar up: {told}.</desc>",
        f"<style>{STYLE}  </style>",
        f'<rect width="1120" height="{bottom + 62}" rx="14" fill="#fdfaf3"/>',
        f'<rect x="24" y="{cellar}" width="1072" height="{bottom - cellar + 16}" rx="6" fill="#f1e8d6"/>',
        f'<path d="M24 {cellar}H1096" stroke="#8a7a55" stroke-width="2"/>',
        '<path d="M598 130V54h34V130" class="wall" style="fill:#e9dcc6"/>',
        f'<path d="M{LEFT - 22} {ROOF}L{middle:g} 22L{LEFT + WIDTH + 22} {ROOF}Z" style="fill:#f6dfd0" class="wall"/>',
        f'<circle cx="{middle:g}" cy="88" r="17" style="fill:#fdfaf3" class="wall"/>',
        f'<path d="M{middle:g} 71v34M{middle - 17:g} 88h34" class="thin"/>',
        f'<text x="{middle:g}" y="134" class="rule">vesalius</text>',
        *body,
        f'<path d="M{LEFT} {ROOF}V{bottom}H{LEFT + WIDTH}V{ROOF}" class="wall"/>',
        f'<path d="M740 {ROOF + 8}V{bottom - 12}m-5 -8l5 9l5 -9" class="thin"/>',
        f'<text x="{middle:g}" y="{bottom + 42}" class="rule">imports go down only; rooms on one floor never import '
        "each other</text>",
    ]) + "\n</svg>\n"  # fmt: skip


if __name__ == "__main__":
    (ROOT / "docs" / "house.svg").write_text(picture(), "utf-8")
