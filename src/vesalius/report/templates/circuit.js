// The circuit: how many edges are shown, and the paths through the part that is selected.
const drawing = $("svg.circuit");
if (drawing) {
  const [slider, count, card] = [$("#edges-shown"), $(".threshold output"), $(".panel .card")];
  const hint = card.innerHTML;
  const edges = $$(".edges .e", drawing).map((element) => {
    const [source, target] = element.dataset.e.split(" ");
    return { element, source, target, rank: +element.dataset.k, weight: +element.dataset.w };
  }).sort((a, b) => a.rank - b.rank);
  const letters = $$(".letter", drawing);
  const nodes = new Map($$(".node", drawing).map((node) => [node.id.slice("node-".length), node]));
  let selected = null;

  // Everything reached from a part along the edges shown, in one direction.
  const reach = (start, from, to) => {
    const [found, open] = [new Set([start]), [start]];
    while (open.length) {
      const at = open.pop();
      for (const edge of edges) if (edge.rank <= +slider.value && edge[from] === at && !found.has(edge[to])) {
        found.add(edge[to]);
        open.push(edge[to]);
      }
    }
    return found;
  };
  const paint = () => {
    const shown = +slider.value;
    const [above, below] = selected ? [reach(selected, "target", "source"), reach(selected, "source", "target")] : [];
    for (const { element, source, target, rank } of edges) {
      const near = selected && (source === selected || target === selected);
      const path = selected && ((above.has(source) && above.has(target)) || (below.has(source) && below.has(target)));
      element.classList.toggle("weak", rank > shown);
      element.classList.toggle("near", !!near);
      element.classList.toggle("path", !!path);
    }
    for (const letter of letters) letter.classList.toggle("weak", +letter.dataset.k > shown);
    for (const [number, node] of nodes) {
      node.classList.toggle("path", !!selected && (above.has(number) || below.has(number)));
      if (number === selected) node.setAttribute("aria-current", "true"); else node.removeAttribute("aria-current");
    }
    drawing.classList.toggle("selecting", !!selected);
  };
  const tell = () => {
    const shown = edges.slice(0, +slider.value);
    const carried = shown.reduce((sum, edge) => sum + Math.abs(edge.weight), 0) / (+drawing.dataset.total || 1);
    const least = shown.length ? `, each at least ${Math.abs(shown.at(-1).weight).toFixed(2)}` : "";
    count.textContent = `${shown.length} of ${edges.length} edges${least}: ${Math.round(100 * carried)} % of the total absolute weight`;
    slider.setAttribute("aria-valuetext", count.textContent);
  };
  const make = (tag, parent, text = "") => {
    const element = document.createElement(tag);
    element.textContent = text;
    parent.append(element);
    return element;
  };
  // The strongest edges into or out of the selected part, as buttons that go on to the other end.
  const neighbours = (title, from, to) => {
    const found = edges.filter((edge) => edge[from] === selected).slice(0, 6);
    if (!found.length) return;
    const line = make("p", card, title + " ");
    line.className = "small";
    for (const edge of found) {
      const other = { in: "input", out: "output" }[edge[to]] ?? $("th", $(`#part-${edge[to]}`)).firstChild.textContent;
      const end = nodes.has(edge[to]) ? make("button", line, other) : make("span", line, other);
      if (nodes.has(edge[to])) end.addEventListener("click", () => select(edge[to], true));
      line.append(` ${edge.weight.toFixed(2)} `);
    }
  };
  const describe = () => {
    card.replaceChildren();
    if (!selected) { card.innerHTML = hint; return; }
    const row = $(`#part-${selected}`);
    make("h3", card, $("th", row).firstChild.textContent);
    const role = make("p", card);
    role.append(...[...$(".role", row).childNodes].map((node) => node.cloneNode(true)));
    make("p", card, `effect ${$(".effect .num", row).textContent}`).className = "num";
    make("p", card, $(".description", row).textContent);
    for (const dot of $$(".about a", row)) {
      const line = make("p", card);
      line.className = "verdict-line";
      const link = line.appendChild(dot.cloneNode(true));
      const said = $$(`${link.hash} .statement > p:not(.small, .why)`).map((sentence) => sentence.textContent);
      line.append(` ${said.join(". ")}`);
    }
    neighbours("acted on by", "target", "source");
    neighbours("acts on", "source", "target");
    const line = make("p", card);
    line.className = "small";
    Object.assign(make("a", line, "in the table"), { href: `#part-${selected}` });
    line.append(" · ");
    make("button", line, "clear").addEventListener("click", () => select(null));
  };
  const select = (number, focus = false) => {
    selected = number;
    paint();
    describe();
    if (focus) nodes.get(number)?.focus({ preventScroll: true });
  };
  drawing.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    const node = event.target.closest(".node");
    if (node) event.preventDefault();
    const number = node ? node.id.slice("node-".length) : null;
    select(number === selected ? null : number);
  });
  $(".stage").addEventListener("keydown", (event) => { if (event.key === "Escape") select(null); });
  slider.addEventListener("input", () => { tell(); paint(); });
  // A link "in the drawing" selects what it leads to.
  const selectTarget = () => {
    const number = location.hash.match(/^#node-(\d+)$/)?.[1];
    if (nodes.has(number)) select(number, true);
  };
  window.addEventListener("hashchange", selectTarget);
  selectTarget();
  tell();
}
