"use strict";
// Elements, numbers and axes. Text is only ever set as text, so names cannot become markup.
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of children) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function show(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(digits)));
  return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

// A frame with named axes; `draw(group, x, y)` gets the scales.
function frame(options, draw) {
  // Drawn for the width at hand, so that text keeps its size on a phone.
  const width = Math.max(300, Math.min(560, window.innerWidth - 60)), height = options.height || 290, left = 66, right = 14, top = 12, bottom = 46;
  const [x0, x1] = options.x, [y0, y1] = options.y;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - right);
  const y = (v) => height - bottom - ((v - y0) / (y1 - y0)) * (height - top - bottom);
  const axis = svg("g", { class: "axis" });
  for (const t of ticks(x0, x1, width < 450 ? 4 : 6)) {
    if (options.whole && !Number.isInteger(t)) continue;
    axis.append(svg("line", { x1: x(t), x2: x(t), y1: height - bottom, y2: height - bottom + 4 }),
      svg("text", { x: x(t), y: height - bottom + 17, "text-anchor": "middle" }, options.xText ? options.xText(t) : show(t)));
  }
  for (const t of ticks(y0, y1, 5)) {
    if ((options.yPower || options.wholeY) && !Number.isInteger(t)) continue;
    axis.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }),
      svg("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, options.yPower ? power(t) : show(t)));
  }
  axis.append(svg("path", { fill: "none", d: `M${left},${top}V${height - bottom}H${width - right}` }),
    svg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, options.xLabel),
    svg("text", { transform: `translate(14,${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, options.yLabel));
  const inside = svg("g");
  draw(inside, x, y, height - bottom);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, axis, inside);
}

function power(t) {
  const up = svg("tspan", { dy: -5, "font-size": 9 }, String(t).replace("-", "−"));
  const group = document.createDocumentFragment();
  group.append("10", up);
  return group;
}

// Counts on bins, of all parts or of the chosen one.
function histogram(data, name, labels) {
  const box = el("div");
  const choice = el("select", { "aria-label": "which part" }, el("option", { value: "-1" }, labels.all));
  data.parts.forEach((part, i) => choice.append(el("option", { value: i }, part.name)));
  function draw() {
    const chosen = Number(choice.value);
    const parts = chosen < 0 ? data.parts : [data.parts[chosen]];
    const counts = data.edges.slice(1).map((_, i) => parts.reduce((sum, part) => sum + part.counts[i], 0));
    const total = counts.reduce((a, b) => a + b, 0);
    const apart = parts.reduce((sum, part) => sum + part.not_finite, 0);
    const edges = data.edges;
    const chart = frame({ x: [edges[0], edges[edges.length - 1]], y: [0, Math.max(1, ...counts) * 1.05],
      xLabel: labels.x, yLabel: labels.y, wholeY: true }, (g, x, y) => {
      counts.forEach((n, i) => g.append(svg("rect", { class: "bar", x: x(edges[i]) + 0.5, y: y(n),
        width: Math.max(0.5, x(edges[i + 1]) - x(edges[i]) - 1), height: y(0) - y(n) },
        svg("title", {}, `${show(edges[i])} to ${show(edges[i + 1])}: ${show(n)}`))));
    });
    const words = `${show(total)} ${labels.things} drawn` + (apart ? `; ${show(apart)} more ${labels.apart}` : "");
    box.replaceChildren(chart, el("div", { class: "note", "data-count": name }, words));
  }
  choice.addEventListener("change", draw);
  draw();
  return el("div", {}, el("div", { class: "bars" }, "of", choice), box);
}
