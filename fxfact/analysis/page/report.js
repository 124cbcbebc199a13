"use strict";
// Explanations beside the pointer, or below what has the keyboard's focus.
const tip = document.getElementById("tip");
const place = (x, y) => {
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 18}px`;
};
const show = (target, x, y) => {
  const owner = target.closest?.("[data-tip]");
  tip.hidden = !owner;
  if (!owner) return;
  tip.textContent = owner.dataset.tip;
  place(x, y);
};
document.addEventListener("pointermove", (event) => show(event.target, event.clientX, event.clientY));
document.addEventListener("pointerdown", (event) => show(event.target, event.clientX, event.clientY));
document.addEventListener("focusin", (event) => {
  const box = event.target.getBoundingClientRect();
  show(event.target, box.left, box.bottom - 14);
});
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// A click on a chain shows its stages. The picture is as wide as it has to be.
const chains = [...document.querySelectorAll(".chain")];
const resize = (picture) => {
  const width = picture.querySelector(".chain.open") ? picture.dataset.wide : picture.dataset.narrow;
  picture.setAttribute("width", width);
  picture.setAttribute("viewBox", `0 0 ${width} ${picture.getAttribute("height")}`);
};
const open = (chain, state) => {
  chain.classList.toggle("open", state);
  resize(chain.closest("svg"));
};
for (const chain of chains) chain.addEventListener("click", () => open(chain, !chain.classList.contains("open")));
document.getElementById("all")?.addEventListener("click", () => {
  const state = !chains.every((chain) => chain.classList.contains("open"));
  for (const chain of chains) open(chain, state);
});

// A click on a column's name sorts by it: numbers from the largest, names from A; a second click turns the order.
const body = document.querySelector("tbody");
const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
const compare = (a, b) => (a === "" || b === "" ? (a === "") - (b === "") : 0);
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, isText = head.dataset.kind === "text";
    const first = isText ? "ascending" : "descending";
    const other = isText ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const each of head.parentElement.cells) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((one, two) => {
      const [a, b] = [key(one, column), key(two, column)];
      return compare(a, b) || sign * (isText ? a.localeCompare(b, undefined, { numeric: true }) : a - b);
    });
    body.append(...rows);
  });
}

// A click on the map goes to the layer's row.
for (const cell of document.querySelectorAll(".map i")) {
  cell.addEventListener("click", () => {
    for (const row of body.rows) row.classList.toggle("found", row.dataset.layer === cell.dataset.layer);
    document.querySelector("tr.found")?.scrollIntoView({ block: "center", behavior: "smooth" });
  });
}
