"use strict";
// The units of the network and the weights between them; wheel and drag move the view.
function picture(data, leaves) {
  const { columns, units, edges, biases } = data;
  const most = Math.max(1, ...columns.map((_, i) => units.column.filter((c) => c === i).length));
  // Tall enough for the frame, however many columns there are.
  const between = Math.max(1, columns.length - 1), LEAST = 15;
  // Wide enough for it, too, however many units.
  const STEP = Math.max(170, Math.min(420, (2 * LEAST * most) / between));
  const GAP = Math.max(LEAST, (between * STEP * 0.3) / most), R = 0.3 * GAP;
  const view = svg("svg", { id: "picture", role: "img", tabindex: 0, "aria-label": "units and weights" });
  const world = svg("g", { id: "world" }), lines = svg("g"), dots = svg("g"), heads = svg("g");
  world.append(lines, dots, heads);
  view.append(world);

  // Places.
  const rows = columns.map(() => 0), row = units.column.map((c) => rows[c]++);
  const tallest = Math.max(...rows, 1);
  const places = units.column.map((c, i) => {
    const gap = Math.min(GAP * 2.5, (GAP * tallest) / Math.max(rows[c], 1));
    return [c * STEP, (row[i] - (rows[c] - 1) / 2) * gap];
  });
  const top = -(GAP * tallest) / 2 - 10;
  const over = Math.max(0, ...edges.source.map((s, i) => units.column[edges.target[i]] - units.column[s]).filter((n) => n > 1)) * 12;

  // Colours: of edges one hue, of units from blue (incoming light) to red (incoming heavy).
  const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));
  const largest = Math.max(0.3, ...finite(units.ratio.map((r) => (r > 0 ? Math.abs(Math.log10(r)) : null))));
  const mix = (a, b, t) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * t)).join(",")})`;
  const WHITE = [248, 248, 248], RED = [190, 40, 45], BLUE = [35, 100, 175];
  function tint(ratio) {
    if (ratio === null || !(ratio > 0)) return "#b9c0c9";
    const t = Math.max(-1, Math.min(1, Math.log10(ratio) / largest));
    return mix(WHITE, t > 0 ? RED : BLUE, Math.abs(t));
  }
  const measures = {
    share: { name: "share of γ₂² (no rescaling changes it)", log: edges.share.map((v) => (v > 0 ? Math.log10(v) : null)) },
    log10_kappa: { name: "κ of the weight", log: edges.log10_kappa },
    norm: { name: "|w|", log: edges.norm.map((v) => (v > 0 ? Math.log10(v) : null)) },
  };
  const usable = Object.keys(measures).filter((m) => finite(measures[m].log).length);
  const ramp = (t) => (t < 0.5 ? mix([205, 219, 233], [70, 130, 190], 2 * t) : mix([70, 130, 190], [16, 38, 82], 2 * t - 1));

  const paths = edges.source.map((s, i) => {
    const t = edges.target[i], [x1, y1] = places[s], [x2, y2] = places[t];
    const span = (x2 - x1) / STEP;
    let d;
    if (span === 1) d = `M${x1},${y1}C${x1 + STEP / 2},${y1} ${x2 - STEP / 2},${y2} ${x2},${y2}`;
    else if (span > 1) {  // over the columns between
      const up = top - 16 * span;
      d = `M${x1},${y1}C${x1 + STEP / 2},${up} ${x2 - STEP / 2},${up} ${x2},${y2}`;
    } else {  // back to an earlier column, or to its own, below
      const down = -top + 14 * (1 - span);
      d = `M${x1},${y1}C${x1 + STEP / 2},${down} ${x2 - STEP / 2},${down} ${x2},${y2}`;
    }
    const path = svg("path", { class: "edge", d, "data-edge": i });
    lines.append(path);
    return path;
  });
  let low = 0, high = 1;
  function weigh(measure) {
    const values = measures[measure] ? measures[measure].log : [];
    const sorted = finite(values).sort((a, b) => a - b);
    high = sorted[sorted.length - 1];
    low = Math.max(sorted[Math.floor(sorted.length * 0.02)], high - 6);
    if (!(high - low > 1e-6)) low = high - 1;
    const order = [];
    paths.forEach((path, i) => {
      const v = values[i], t = v === null || v === undefined ? -1 : Math.max(0, (v - low) / (high - low));
      path.setAttribute("stroke", t < 0 ? "#c3cbd4" : ramp(t));
      path.setAttribute("stroke-width", t < 0 ? 0.6 : 0.4 + 2.4 * t);
      path.setAttribute("opacity", t < 0 ? 0.6 : 0.3 + 0.65 * t);
      path.classList.toggle("none", t < 0);
      order.push([t, path]);
    });
    order.sort((a, b) => a[0] - b[0]).forEach(([, path]) => lines.append(path));  // the heaviest on top
    legend(measure);
  }

  const nodes = places.map(([x, y], i) => {
    const kind = columns[units.column[i]].kind;
    const shape = kind === "fixed" ? svg("rect", { x: -R, y: -R, width: 2 * R, height: 2 * R })
      : svg("circle", { r: R });
    shape.setAttribute("fill", kind === "hidden" ? tint(units.ratio[i]) : kind === "fixed" ? "#33404f" : "#d9d2c3");
    const node = svg("g", { class: "unit", "data-unit": i, "data-kind": kind, transform: `translate(${x},${y})` },
      shape, svg("text", { y: 1.8 }, kind === "fixed" ? "" : String(units.index[i])));
    dots.append(node);
    return node;
  });
  const titles = columns.map((c) => ({ input: `inputs ${c.name}`, output: `outputs ${c.name}` }[c.kind] || c.name));
  const room = Math.max(150, 6.4 * Math.max(...titles.map((title) => title.length)));
  const headings = columns.map((c, i) => {
    const count = rows[i] < c.total ? `${rows[i]} of ${show(c.total)}` : show(c.total);
    const title = titles[i];
    const text = svg("text", { class: "heading" }, svg("tspan", { x: 0 }, title),
      c.kind === "fixed" ? null : svg("tspan", { x: 0, dy: 14 }, `${count} unit${c.total === 1 ? "" : "s"}`));
    heads.append(text);
    return text;
  });

  // The view.
  let scale = 1, dx = 0, dy = 0;
  const size = () => { const box = view.getBoundingClientRect(); return [box.width || 1180, box.height || 520]; };
  function apply() {
    world.setAttribute("transform", `translate(${dx},${dy}) scale(${scale})`);
    view.dataset.scale = scale;
    world.classList.toggle("near", scale > 1.9);
    const crowded = STEP * scale < room, every = Math.ceil(24 / (STEP * scale));
    headings.forEach((text, i) => {
      text.style.display = i % every && i < columns.length - 1 ? "none" : "";
      text.setAttribute("transform",
      `translate(${i * STEP - (crowded ? 0 : 30 / scale)},${top - over - (crowded ? 4 : 22) / scale}) scale(${1 / scale}) rotate(${crowded ? -38 : 0})`);
      if (text.lastChild !== text.firstChild) text.lastChild.style.display = crowded ? "none" : "";
    });
  }
  function zoom(factor, x, y) {
    const next = Math.max(0.05, Math.min(40, scale * factor)), ratio = next / scale;
    dx = x - (x - dx) * ratio;
    dy = y - (y - dy) * ratio;
    scale = next;
    apply();
  }
  function fit() {
    const [w, h] = size(), wide = (columns.length - 1) * STEP, high = GAP * tallest;
    const back = edges.source.some((s, i) => places[edges.target[i]][0] <= places[s][0]) ? 1.35 : 1;
    const narrow = w < 600, scaled = (head, side) => Math.min((w - side) / Math.max(wide, 1), (h - head - 30) / (high * back + over), 3);
    let head = 50, side = narrow ? 120 : 240;
    scale = scaled(head, side);
    const slanted = STEP * scale < room;  // headings need room above and to the right
    if (slanted) [head, side] = narrow ? [130, 130] : [175, 200];
    scale = scaled(head, side);
    dx = slanted ? Math.min((w - wide * scale) / 2, w - wide * scale - (narrow ? 105 : 140)) : (w - wide * scale) / 2;
    dy = head + (over - top) * scale + Math.max(0, (h - head - 30 - (high * back + over) * scale) / 2);
    apply();
  }
  view.addEventListener("wheel", (e) => {
    e.preventDefault();
    const box = view.getBoundingClientRect();
    zoom(Math.exp(-e.deltaY * 0.0016), e.clientX - box.left, e.clientY - box.top);
  }, { passive: false });
  let held = null;
  view.addEventListener("pointerdown", (e) => { held = [e.clientX - dx, e.clientY - dy]; });
  window.addEventListener("pointermove", (e) => {
    if (!held) return;
    dx = e.clientX - held[0];
    dy = e.clientY - held[1];
    apply();
  });
  window.addEventListener("pointerup", () => { held = null; });
  const middle = () => size().map((v) => v / 2);
  view.addEventListener("keydown", (e) => {
    if (e.key === "+" || e.key === "=") zoom(1.3, ...middle());
    else if (e.key === "-") zoom(1 / 1.3, ...middle());
    else if (e.key === "0") fit();
  });

  // What the pointer is on.
  const tip = document.getElementById("tip");
  function about(target) {
    const edge = target.closest("[data-edge]"), unit = target.closest("[data-unit]");
    if (unit) {
      const i = Number(unit.dataset.unit), text = [units.name[i]];
      if (units.ratio[i] !== null) text.push(`incoming/outgoing norm ${show(units.ratio[i])}`);
      if (units.u[i] !== null) text.push(`u = ${show(units.u[i])} balances it`);
      if (units.through[i] !== null) text.push(`share of γ₂² through it ${show(units.through[i])}`);
      biases.unit.forEach((b, k) => {
        if (b === i) text.push(`${leaves[biases.leaf[k]].name}: |w| ${show(biases.norm[k])}`);
      });
      return text.join("\n");
    }
    if (edge) {
      const i = Number(edge.dataset.edge), n = edges.weights[i];
      const text = [`${leaves[edges.leaf[i]].name}: ${n === 1 ? "one weight" : `${show(n)} weights`}`,
        `from ${units.name[edges.source[i]]}`, `to ${units.name[edges.target[i]]}`,
        `${n === 1 ? "|w|" : "norm"} ${show(edges.norm[i])}`];
      if (edges.log10_kappa[i] !== null) text.push(`κ${n === 1 ? "" : " (the largest)"} 10^${show(edges.log10_kappa[i])}`);
      if (edges.share[i] !== null) text.push(`share of γ₂² ${show(edges.share[i])}`);
      return text.join("\n");
    }
    return "";
  }
  function focus(target) {
    const unit = target.closest("[data-unit]");
    view.classList.toggle("focused", Boolean(unit));
    if (!unit) return;
    const i = Number(unit.dataset.unit), on = new Set([i]);
    paths.forEach((path, k) => {
      const touches = edges.source[k] === i || edges.target[k] === i;
      path.classList.toggle("on", touches);
      if (touches) on.add(edges.source[k]).add(edges.target[k]);
    });
    nodes.forEach((node, k) => node.classList.toggle("on", on.has(k)));
  }
  view.addEventListener("pointerover", (e) => {
    const text = about(e.target);
    tip.hidden = !text;
    tip.textContent = text;
    focus(e.target);
  });
  view.addEventListener("pointermove", (e) => {
    tip.style.left = `${Math.min(e.clientX + 14, window.innerWidth - 450)}px`;
    tip.style.top = `${e.clientY + 14}px`;
  });
  view.addEventListener("pointerleave", () => { tip.hidden = true; view.classList.remove("focused"); });

  // Legend.
  const scales = el("div", { class: "scales" });
  function bar(title, colours, ends) {
    const n = 60, g = svg("svg", { viewBox: "0 0 310 46" }, svg("text", { y: 12 }, title));
    for (let k = 0; k < n; k++) g.append(svg("rect", { x: k * 5, y: 18, width: 5.2, height: 10, fill: colours((k + 0.5) / n) }));
    ends.forEach(([t, text]) => g.append(svg("text", { x: t * 300, y: 43, "text-anchor": t < 0.1 ? "start" : t > 0.9 ? "end" : "middle" }, text)));
    return g;
  }
  function legend(measure) {
    const at = (v) => show(Math.pow(10, v), 2);
    scales.replaceChildren();
    if (measures[measure] && usable.length) scales.append(bar(`lines: ${measures[measure].name}, logarithmic`, ramp,
      [[0, `≤ ${at(low)}`], [0.5, at((low + high) / 2)], [1, at(high)]]));
    scales.append(bar("units: incoming/outgoing norm, logarithmic", (t) => tint(Math.pow(10, (2 * t - 1) * largest)),
      [[0, at(-largest)], [0.5, "1"], [1, at(largest)]]));
  }
  const choice = el("select", { id: "measure", "aria-label": "what lines show" });
  usable.forEach((m) => choice.append(el("option", { value: m }, measures[m].name)));
  choice.addEventListener("change", () => weigh(choice.value));
  const button = (text, action) => { const b = el("button", { type: "button" }, text); b.addEventListener("click", action); return b; };
  weigh(usable[0] || "norm");
  const box = el("div", {}, el("div", { class: "bars" }, "lines show", choice, button("+", () => zoom(1.4, ...middle())),
    button("−", () => zoom(1 / 1.4, ...middle())), button("fit", fit), "wheel zooms, dragging moves, pointing tells"), view, scales);
  return { box, fit, zoom: (k) => zoom(k, ...middle()), about, nodes, paths, view };
}
