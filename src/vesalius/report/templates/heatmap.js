// Heatmaps: one stop for Tab, arrow keys between the cells, and the cell's words in a line under the table.
for (const table of $$("table.heat")) {
  const readout = $(".readout", table.closest(".condition"));
  const cells = $$("td[title]", table);
  const at = (row, column) => table.tBodies[0].rows[row]?.cells[column];
  const say = (cell) => { readout.textContent = cell.title; };
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  cells.forEach((cell, index) => { cell.tabIndex = index ? -1 : 0; });
  table.addEventListener("pointerover", ({ target }) => { if (target.title) say(target); });
  table.addEventListener("focusin", ({ target }) => {
    if (!target.title) return;
    cells.forEach((cell) => { cell.tabIndex = -1; });
    target.tabIndex = 0;
    say(target);
  });
  table.addEventListener("keydown", (event) => {
    const [down, right] = step[event.key] ?? [0, 0];
    if (!down && !right) return;
    event.preventDefault();
    let [row, column] = [event.target.parentElement.sectionRowIndex + down, event.target.cellIndex + right];
    // Rows may have gaps (the embedding stands in the MLPs' row only).
    while (at(row, column) && !at(row, column).title) { row += down; column += right; }
    at(row, column)?.title && at(row, column).focus();
  });
}
