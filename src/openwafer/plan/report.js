// Sort a table by the column whose head is clicked; a second click turns the order round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent;
    const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
    const number = (row) => Number(row.cells[head.cellIndex].dataset.v);
    if (rows.length && rows.every((row) => row.cells[head.cellIndex].dataset.v)) rows.sort((a, b) => number(a) - number(b));
    body.append(...(up ? rows : rows.reverse()));
  });
}
