"use strict";
// A click on a column's head sorts its table by it, a second one the other way round. Cells hold
// what they sort by in data-v; numbers sort as numbers, and cells without a value stand last.
for (const head of document.querySelectorAll("th button")) {
  head.addEventListener("click", () => {
    const cell = head.parentElement;
    const table = cell.closest("table");
    const column = [...cell.parentElement.children].indexOf(cell);
    const down = cell.getAttribute("aria-sort") === "ascending";
    const sign = down ? -1 : 1;
    const key = (row) => row.children[column].dataset.v;
    const order = (a, b) => {
      const [u, v] = [key(a), key(b)];
      if (u === "" || v === "") return (u === "") - (v === "");
      return sign * (isNaN(u) || isNaN(v) ? u.localeCompare(v) : u - v);
    };
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  });
}
