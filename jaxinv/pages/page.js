"use strict";
// The page: one section after the other, all from the JSON beside this script.
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
page.replaceChildren(el("h1", {}, data.title));

function section(title, note, ...children) {
  return el("section", {}, el("h2", {}, title), note ? el("div", { class: "note" }, note) : null, ...children);
}
function card(field, value, label) {
  return el("div", { class: "card" }, el("b", { "data-field": field }, show(value)), el("span", {}, label));
}
function table(columns, rows, id) {  // columns: [title, is a number]
  const head = el("tr"), body = el("tbody");
  columns.forEach(([title, number]) => head.append(el("th", number ? { class: "n" } : {}, title)));
  rows.forEach((row) => {
    const line = el("tr");
    row.forEach((value, i) => line.append(el("td", columns[i][1] ? { class: "n" } : {}, typeof value === "string" ? value : show(value))));
    body.append(line);
  });
  return el("div", { class: "scroll" }, el("table", { id }, el("thead", {}, head), body));
}
const warning = (title, text) => el("div", { class: "warn" }, el("strong", {}, title), el("pre", {}, text));

function spectrum(freedom) {
  const values = freedom.spectrum, found = values.map((v, i) => [i + 1, v]).filter(([, v]) => v > 0);
  const logs = found.map(([, v]) => Math.log10(v));
  const lowest = Math.floor(Math.min(...logs)), highest = Math.ceil(Math.max(...logs) + 0.01);
  return frame({ x: [0, values.length], y: [lowest, highest], yPower: true, whole: true, xLabel: "number of the singular value", yLabel: "singular value of ∂f/∂w" }, (g, x, y, floor) => {
    const cut = freedom.rank + 0.5;
    g.append(svg("line", { x1: x(cut), x2: x(cut), y1: 12, y2: floor, stroke: "#b3402e", "stroke-dasharray": "5 4" }),
      svg("text", { x: x(cut) - 6, y: floor - 8, "text-anchor": "end", style: "fill:#b3402e" }, `rank ${show(freedom.rank)}`));
    if (freedom.error > 0 && Math.log10(freedom.error) > lowest) {
      const at = y(Math.log10(freedom.error));
      g.append(svg("line", { x1: x(0), x2: x(values.length), y1: at, y2: at, stroke: "#8a97a6", "stroke-dasharray": "2 3" }),
        svg("text", { x: x(0) + 6, y: at - 5, style: "fill:#5c6b7d" }, `rounding of the spectrum, ${show(freedom.error, 2)}`));
    }
    found.forEach(([i, v]) => g.append(svg("circle", { cx: x(i), cy: y(Math.log10(v)), r: values.length > 300 ? 1.3 : 2.2, fill: "#2463a6" },
      svg("title", {}, `σ${i} = ${show(v)}`))));
  });
}

function outputs(name, values) {
  const logs = values.map((v) => (v > 0 ? Math.log10(v) : null)), known = logs.filter((v) => v !== null);
  const highest = Math.max(...known), lowest = Math.min(...known), spread = highest - lowest > 1.5;
  const y = spread ? [Math.floor(lowest) - 0.2, Math.ceil(highest)] : [0, Math.max(...values, 1e-300) * 1.06];
  return frame({ x: [-0.5, values.length - 0.5], y, yPower: spread, whole: true, xLabel: `output unit of ${name}`, yLabel: "path norm γ₂ of the unit" }, (g, x, at, floor) => {
    values.forEach((v, i) => {
      const height = spread ? logs[i] : v;
      if (height === null) return;
      g.append(svg("rect", { class: "bar", "data-output": i, x: x(i - 0.42), width: Math.max(0.6, x(i + 0.42) - x(i - 0.42)), y: at(height), height: Math.max(0, floor - at(height)) },
        svg("title", {}, `${name}[${i}]: ${show(v)}`)));
    });
  });
}

function model() {
  const f = data.freedom, group = data.group;
  page.append(el("div", { class: "sub" }, `What jaxinv ${data.version} sees in this network. All numbers are in this file; it loads nothing.`));
  const cards = el("div", { class: "cards" }, card("parameters", data.parameters, "parameters"), card("dimension", group.dimension, "dimension of the rescaling group"));
  const split = f.dead !== undefined, all = f.everywhere;
  if (!f.refused) cards.append(card("rank", f.rank, all ? `degrees of freedom on ${f.inputs}` : "degrees of freedom (rank)"));
  if (all && !all.refused) cards.append(card("everywhere", all.lower === all.upper ? all.lower : `${show(all.lower)} to ${show(all.upper)}`, "degrees of freedom on all inputs"));
  if (split) cards.append(card("dead", f.dead, "dead"), card("unexplained", f.unexplained, "unexplained"));
  if (f.unseen > 0) cards.append(card("unseen", f.unseen, "unseen by these inputs"));
  const norm = data.log10_path_norm;
  const text = norm === null ? "–" : Math.abs(norm) < 5 ? show(Math.pow(10, norm)) : `10^${show(norm)}`;
  cards.append(el("div", { class: "card" }, el("b", { "data-field": "path-norm" }, data.refused ? "refused" : text), el("span", {}, "path norm γ₂")));
  page.append(cards);

  const limits = section("What the counts say", null);
  if (f.refused) limits.append(warning(`No degrees of freedom on ${f.inputs}`, f.refused));
  else if (split) limits.append(el("p", { id: "sum" }, `${show(data.parameters)} parameters = ${show(f.rank)} degrees of freedom + ${show(f.rescaling)} rescalings${f.matrix > 0 ? ` + ${show(f.matrix)} of matrices` : ""} + ${show(f.dead)} dead + ${show(f.unexplained)} unexplained${f.unexplained > 0 && !f.compared ? " or unseen by these inputs" : ""}${f.unseen > 0 ? ` + ${show(f.unseen)} unseen by these inputs` : ""} (${f.certain ? "certain" : "NOT CERTAIN"}), on ${f.inputs}.`));
  else limits.append(el("p", { id: "sum" }, `On ${f.inputs}: ${f.evidence}.`));
  (f.notes || []).forEach((text) => limits.append(el("p", { class: "note" }, `${text}.`)));
  if (all && all.refused) limits.append(warning("No count on all inputs", all.refused));
  else if (all) limits.append(el("p", { id: "everywhere" }, `On all inputs: ${all.lower === all.upper ? show(all.lower) : `between ${show(all.lower)} and ${show(all.upper)}`} degrees of freedom (${all.certain ? "certain" : "NOT CERTAIN"}), by ${all.by}.`), ...all.missing.map((text) => el("p", { class: "note" }, text)));
  if (data.refused) limits.append(warning("No path norm and no κ", data.refused));
  if (group.pinned_by.length) limits.append(el("p", {}, "What limits the group: these operations fix the scale of their operands."), table([["operation"], ["where"]], group.pinned_by.map((p) => [p.operation, p.where]), "pinned"));
  if (group.tied_by.length) limits.append(el("p", {}, "These operations give several units one scale, so there are fewer generators than units."), table([["operation"], ["where"]], group.tied_by.map((p) => [p.operation, p.where]), "tied"));
  if (!group.pinned_by.length && !group.tied_by.length) limits.append(el("p", {}, "No operation fixes the scale of its operands."));
  const classes = data.matrices.classes;
  if (classes.length) limits.append(el("p", {}, `Matrix symmetries: ${show(data.matrices.dimension_beyond_rescalings)} dimensions beyond rescalings. Weights before ~ are multiplied by a matrix, those after it by its inverse.`), table([["class"]], classes.map((name) => [name]), "matrices"));
  if (group.unused.length) limits.append(el("p", {}, `Unused, the function cannot depend on them: ${group.unused.join(", ")}.`));
  page.append(limits);

  const p = data.picture;
  const counts = p.columns.map((c, i) => p.units.column.filter((k) => k === i).length);
  const few = p.columns.filter((c, i) => counts[i] < c.total).length;
  const lost = p.connections.filter((c) => c.shown < c.total);
  const shown = p.connections.reduce((s, c) => s + c.shown, 0), total = p.connections.reduce((s, c) => s + c.total, 0);
  const note = el("div", { class: "note", id: "shown" },
    `A circle is a unit or a channel: one generator of the group, or an element of an input or output. Lines are the weights between units (of a convolution all taps together). Channels that skip connections tie together are one unit; lines that lead back to it run below. Squares: scale fixed by an operation that is not homogeneous. `,
    few ? `${show(p.units.column.length)} of ${show(p.columns.reduce((n, c) => n + c.total, 0))} units are shown: in ${few === 1 ? "one column" : `${few} columns`} only the ${p.most} with the largest ${p.measure} (zoomed in, the headings say how many there are). ` : "All units are shown. ",
    lost.length ? `Lines shown: ${show(shown)} of ${show(total)}, those with the largest ${p.measure}.` : `All ${show(total)} lines are shown.`,
    p.undrawn.length ? ` Not drawn, since no unit, input or output is at either end: ${p.undrawn.join(", ")}.` : "");
  const drawn = picture(p, data.leaves);
  page.append(section("Units and weights", null, note, drawn.box));
  drawn.fit();

  page.append(section("Parameters", "norm: ‖w‖₂ of the array. in/out: norm of the weights that lead into a unit over that of those that lead out, smallest, median and largest of its units. share: Σ w²κ/γ₂², the part of the squared path norm on paths through the array.",
    table([["array"], ["shape"], ["type"], ["size", 1], ["units", 1], ["norm", 1], ["largest\n|w|", 1], ["median\nlog₁₀ κ", 1], ["share", 1], ["in/out\nmin", 1], ["in/out\nmedian", 1], ["in/out\nmax", 1]],
      data.leaves.map((l) => [l.name, l.shape.join("×") || "scalar", l.dtype, l.size, l.units, l.norm, l.largest, l.log10_kappa, l.share, ...(l.ratio || ["", "", ""])]), "leaves")));

  const charts = el("div", { class: "charts" });
  if (data.kappa) charts.append(section("Path sensitivities", "κ: how much of γ₂² hangs on one weight. Path-SGD divides by it.", histogram(data.kappa, "kappa", { all: "all parameters", x: "log₁₀ κ", y: "parameters", things: "parameters", apart: "have κ = 0 or a κ that rounding has lost" })));
  if (group.dimension) charts.append(section("Balance of units", "0 where incoming and outgoing weights have equal norms, as after jaxinv.balance.", histogram(data.balance, "balance", { all: "all units", x: "log₁₀ (incoming norm / outgoing norm)", y: "units", things: "units", apart: "have no weight but 0 on one side" })));
  if (split) charts.append(section("Spectrum of the Jacobian", `${f.evidence}.`, spectrum(f)));
  for (const [name, values] of Object.entries(data.outputs || {})) charts.append(section(`Path norms of the outputs`, `${show(values.length)} units; γ₂² is the sum of their squares.`, outputs(name, values)));
  page.append(charts);
  return drawn;
}

function experiment() {
  page.append(el("div", { class: "sub" }, data.summary));
  const { columns, rows } = data.table, [title, ...notes] = data.table.title.split("\n");
  const results = table(columns.map((c, i) => [c, data.table.numeric[i]]), rows, "results");
  results.classList.add("whole");
  page.append(section(title, null, ...notes.map((n) => el("div", { class: "note", "data-note": "" }, n)), results));
  page.append(section("Figure", data.caption, el("figure", {}, el("img", { src: data.figure, alt: data.caption }))));
  const text = (v) => v === null ? "–" : Array.isArray(v) ? v.join(", ") : typeof v === "object" ? Object.entries(v).map((pair) => pair.join(" ")).join(", ") : String(v);
  const list = (values) => Object.entries(values).map(([k, v]) => [k.replaceAll("_", " "), text(v)]);
  page.append(section("How it was run", `From ${data.source}, SHA-256 of the file ${data.sha256}.`, table([["setting"], ["value"]], list(data.config), "config"), el("p"), table([["environment"], ["value"]], list(data.environment), "environment")));
}

const drawn = data.kind === "model" ? model() : (experiment(), null);

// `#zoom=2` opens a page zoomed in; `#check` moves the view and points at things, and writes down
// what came of it.
function act() {
  const zoomed = /[#&]zoom=([\d.]+)/.exec(location.hash);
  if (drawn && zoomed) drawn.zoom(Number(zoomed[1]));
  if (!drawn || !/[#&]check/.test(location.hash)) return;
  const box = drawn.view.getBoundingClientRect(), before = Number(drawn.view.dataset.scale);
  const world = document.getElementById("world"), start = world.getAttribute("transform");
  const [x, y] = [Math.round(box.left) + 100, Math.round(box.top) + 50];
  drawn.view.dispatchEvent(new WheelEvent("wheel", { deltaY: -500, clientX: x, clientY: y, cancelable: true, bubbles: true }));
  const after = Number(drawn.view.dataset.scale), zoomedTo = world.getAttribute("transform");
  drawn.view.dispatchEvent(new PointerEvent("pointerdown", { clientX: 200, clientY: 200, bubbles: true }));
  window.dispatchEvent(new PointerEvent("pointermove", { clientX: 230, clientY: 190 }));
  window.dispatchEvent(new PointerEvent("pointerup", {}));
  const dragged = world.getAttribute("transform");
  const found = { at: [x - box.left, y - box.top], before, after, start, zoomed: zoomedTo, dragged, unit: drawn.nodes.map((n) => drawn.about(n)), edge: drawn.paths.slice(0, 200).map((n) => drawn.about(n)) };
  page.append(el("output", { id: "checked" }, JSON.stringify(found)));
}
act();
