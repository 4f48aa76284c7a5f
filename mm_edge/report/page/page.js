// Draws the plots, filters plots and tables alike, and sorts tables. All text is put in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const config = {
  background: "transparent",
  font: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
  view: { stroke: "var(--line)" },
  axis: {
    labelColor: "var(--ink)", titleColor: "var(--ink)", gridColor: "var(--line)", domainColor: "var(--muted)",
    tickColor: "var(--muted)", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12, gridOpacity: 0.6,
  },
  legend: {
    labelColor: "var(--ink)", titleColor: "var(--ink)", orient: "bottom", titleFontWeight: "normal", labelFontSize: 12,
    symbolLimit: 0, symbolOpacity: 1, labelLimit: 240, columns: innerWidth < 480 ? 3 : 0,
  },
};
const options = { ast: true, renderer: "svg", actions: false, logLevel: 1, defaultStyle: false, tooltip: { disableDefaultStyle: true }, config };
const views = [];

function selected() {
  const wanted = {};
  for (const select of document.querySelectorAll("[data-filter]")) {
    if (select.value) wanted[select.dataset.filter] = select.value;
  }
  return wanted;
}

function matches(values, wanted) {
  return Object.entries(wanted).every(([name, value]) => String(values[name]) === value);
}

function visibleRows(wanted) {
  return (data.rows || []).filter((row) => row.role === "dense" || matches(row, wanted));
}

function tableRowMatches(row, wanted) {
  const marks = row.dataset;
  const filtered = (data.filters || []).some((name) => name in marks);
  return !filtered || matches(marks, wanted);
}

async function applyFilters() {
  const wanted = selected();
  const rows = visibleRows(wanted);
  for (const row of document.querySelectorAll("tbody tr")) row.hidden = !tableRowMatches(row, wanted);
  const shown = document.getElementById("shown");
  if (shown) {
    const all = data.rows.filter((row) => row.role !== "dense").length;
    shown.value = `${rows.filter((row) => row.role !== "dense").length} of ${all} networks shown`;
  }
  for (const view of views) await view.data("rows", rows).runAsync();
}

async function draw() {
  for (const box of document.querySelectorAll("[data-plot]")) {
    const spec = data.plots[box.dataset.plot];
    const filtered = spec.data && spec.data.name === "rows";
    const full = filtered ? { ...spec, datasets: { rows: visibleRows({}) } } : spec;
    const { view } = await vegaEmbed(box.firstElementChild, full, options);
    if (filtered) views.push(view);
    box.classList.add("drawn");
  }
}

function compare(a, b) {
  const x = Number(a), y = Number(b);
  if (a === "" || b === "") return (a === "") - (b === "");
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
}

function sortBy(table, index, head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const x = a.cells[index].dataset.sort, y = b.cells[index].dataset.sort;
    return down && x !== "" && y !== "" ? compare(y, x) : compare(x, y);
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    head.querySelector("button")?.addEventListener("click", () => sortBy(table, index, head));
  });
}
document.getElementById("filters")?.addEventListener("submit", (event) => event.preventDefault());
for (const select of document.querySelectorAll("[data-filter]")) select.addEventListener("change", applyFilters);
addEventListener("beforeprint", () => { for (const item of document.querySelectorAll("details")) item.open = true; });
await draw();
await applyFilters();
document.documentElement.dataset.ready = "true";
