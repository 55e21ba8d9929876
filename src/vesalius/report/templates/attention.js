// Attention: the pair under the pointer, or under a cursor that the arrow keys move, in words.
const readPair = $("#attention .readout");
for (const picture of $$("svg.attention")) {
  const [left, top, cell] = picture.dataset.grid.split(" ").map(Number);
  const shares = picture.dataset.shares.split(";").map((row) => row.split(","));
  const tokens = $$(".queries text", picture).map((text) => text.textContent);
  const [cursor, last] = [$(".cursor", picture), tokens.length - 1];
  const name = $("figcaption b", picture.closest("figure")).textContent;
  let [query, key] = [last, 0];
  const show = () => {
    cursor.setAttribute("x", left + key * cell);
    cursor.setAttribute("y", top + query * cell);
    picture.classList.add("pointed");
    readPair.textContent = `${name}: ${tokens[query]} (${query + 1}) looks at ${tokens[key]} (${key + 1}) with ${shares[query]?.[key] || 0} %`;
  };
  picture.addEventListener("pointermove", (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    const [q, k] = [Math.floor((point.y - top) / cell), Math.floor((point.x - left) / cell)];
    if (q < 0 || k < 0 || q > last || k > last) return;
    [query, key] = [q, k];
    show();
  });
  picture.addEventListener("pointerleave", () => picture.classList.remove("pointed"));
  picture.addEventListener("focus", show);
  picture.addEventListener("blur", () => picture.classList.remove("pointed"));
  picture.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!moves[event.key]) return;
    event.preventDefault();
    query = Math.min(Math.max(query + moves[event.key][0], 0), last);
    key = Math.min(Math.max(key + moves[event.key][1], 0), last);
    show();
  });
}
window.addEventListener("hashchange", arrive);
if (location.hash) arrive();
