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
// Pictures: numbers of what is pointed at, colors, zoom and pan by mouse, buttons and keys.
for (const figure of document.querySelectorAll("figure.floor")) {
  const svg = figure.querySelector("svg"), line = figure.querySelector(".pointed");
  const read = () => svg.getAttribute("viewBox").split(" ").map(Number);
  const show = (box) => svg.setAttribute("viewBox", box.join(" "));
  const zoom = (factor, cx = 0.5, cy = 0.5) => {
    const [x, y, w, h] = read();
    show([x + w * cx * (1 - factor), y + h * cy * (1 - factor), w * factor, h * factor]);
  };
  const move = (dx, dy) => { const [x, y, w, h] = read(); show([x + dx * w, y + dy * h, w, h]); };
  const all = () => svg.setAttribute("viewBox", svg.dataset.all);
  svg.addEventListener("pointerover", (event) => {
    const title = event.target.closest("rect, g")?.querySelector("title") ?? event.target.parentElement?.querySelector?.(":scope > title");
    if (title) line.textContent = title.textContent;
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== figure) return;
    event.preventDefault();
    const place = svg.getBoundingClientRect();
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, (event.clientX - place.x) / place.width, (event.clientY - place.y) / place.height);
  }, { passive: false });
  let from = null;
  svg.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; figure.focus({ preventScroll: true }); });
  addEventListener("pointerup", () => { from = null; });
  svg.addEventListener("pointermove", (event) => {
    if (!from) return;
    const place = svg.getBoundingClientRect();
    move((from[0] - event.clientX) / place.width, (from[1] - event.clientY) / place.height);
    from = [event.clientX, event.clientY];
  });
  const keys = { "+": () => zoom(1 / 1.3), "=": () => zoom(1 / 1.3), "-": () => zoom(1.3), "0": all,
    ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1) };
  figure.addEventListener("keydown", (event) => {
    if (event.target !== figure || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const button of figure.querySelectorAll("[data-color]")) {
    button.addEventListener("click", () => {
      for (const rect of svg.querySelectorAll("rect[data-u]")) rect.style.fill = rect.dataset[button.dataset.color];
    });
  }
  for (const button of figure.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", { in: () => zoom(1 / 1.5), out: () => zoom(1.5), all }[button.dataset.zoom]);
  }
}
document.documentElement.dataset.ready = "yes";
