// Tables: a header is a button that sorts; above some tables a text and verdicts to filter by.
const collator = new Intl.Collator("en", { numeric: true });
const sortValue = (row, index, numeric) => {
  const cell = row.cells[index];
  const text = cell.dataset.v ?? cell.textContent.trim();
  return numeric ? (text === "" ? NaN : Number(text)) : text;
};
const compare = (a, b, sign) => {
  if (typeof a === "string") return sign * collator.compare(a, b);
  // What was not measured stands last in either direction.
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return sign * (a - b);
};
for (const table of $$("table.sortable")) {
  for (const header of $$("thead th[data-sort]", table)) {
    // Not a <button>: Chromium leaves those out where it repeats a header on the next printed page.
    const button = document.createElement("span");
    Object.assign(button, { role: "button", tabIndex: 0, className: "sort" });
    button.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); button.click(); }
    });
    // An axis in a header is drawn under the words that sort.
    button.append(...[...header.childNodes].filter((node) => node.nodeName !== "svg"));
    header.prepend(button);
    button.addEventListener("click", () => {
      const numeric = header.dataset.sort === "number";
      const now = header.getAttribute("aria-sort");
      // Large numbers first, words from A; a second click turns it around.
      const order = now ? (now === "ascending" ? "descending" : "ascending") : numeric && header.cellIndex ? "descending" : "ascending";
      for (const other of $$("th[aria-sort]", table)) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const rows = [...table.tBodies[0].rows].map((row) => [sortValue(row, header.cellIndex, numeric), row]);
      rows.sort(([a], [b]) => compare(a, b, order === "ascending" ? 1 : -1));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }
}
for (const tools of $$(".tools")) {
  const section = tools.closest("section");
  const rows = $$("tr[data-kinds]", section);
  const [search, output] = [$("input[type=search]", tools), $("output", tools)];
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const boxes = $$("input[type=checkbox]", tools);
    const kinds = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const wanted = row.dataset.kinds.trim().split(" ").some((kind) => kinds.has(kind));
      row.hidden = !(wanted && words.every((word) => text.includes(word)));
      shown += !row.hidden;
    }
    const all = !words.length && kinds.size === boxes.length;
    output.textContent = all ? "" : `${shown} of ${rows.length} shown`;
    if (words.length) for (const row of rows) if (!row.hidden) reveal(row);
  };
  tools.addEventListener("input", apply);
}
