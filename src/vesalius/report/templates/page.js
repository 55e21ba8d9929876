// A link may lead into something folded: browsers open it for a fragment, but not all of them, and not for focus.
const reveal = (target) => {
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
};
const arrive = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  reveal(target);
  target.scrollIntoView({ block: target.tagName === "TR" || target.tagName === "FIGURE" ? "center" : "start" });
};

// The entry of the contents list whose section is in view.
const entries = new Map($$(".contents a").map((link) => [link.hash.slice(1), link]));
const watcher = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) if (isIntersecting) {
    entries.forEach((link) => link.removeAttribute("aria-current"));
    entries.get(target.id).setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -75% 0px" });
entries.forEach((_, id) => watcher.observe(document.getElementById(id)));

// On paper folded things, further conditions and further prompts are left out unless they are asked for.
$("#everything").addEventListener("change", ({ target }) => {
  document.documentElement.classList.toggle("everything", target.checked);
  for (const details of $$("details")) {
    if (target.checked && !details.open) details.dataset.opened = "";
    if (target.checked) details.open = true;
    else if ("opened" in details.dataset) { details.open = false; delete details.dataset.opened; }
  }
});
