"use strict";
// A click on a column's title sorts by it, a second click turns the order round. Numbers begin with
// the greatest. A cell without a value stays last; rows of equal value keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    title.querySelector("button").addEventListener("click", () => {
      const isNumber = title.classList.contains("number");
      const before = title.getAttribute("aria-sort");
      const order = before === null ? (isNumber ? "descending" : "ascending")
        : before === "ascending" ? "descending" : "ascending";
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return sign * (isNumber ? Number(a) - Number(b) : a.localeCompare(b));
      });
      body.append(...rows);
      for (const other of titles) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", order);
    });
  });
}

// A click on a heat map shows it large, another one small again.
for (const button of document.querySelectorAll("button.zoom")) {
  button.addEventListener("click", () => {
    const large = button.closest("figure").classList.toggle("large");
    button.setAttribute("aria-pressed", large);
  });
}
