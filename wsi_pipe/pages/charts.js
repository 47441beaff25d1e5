/* Charts: bars made of boxes, histogram and scatter as SVG drawn at the width they have. */
function cssColour(name) { return `var(--${name})`; }

/* rows: [{label, note, parts: [{name, value, colour, tip}]}]; one scale for all; format gives the totals. */
function stackedBars(place, { rows, format, label, legend = true, max = null }) {
  const total = row => row.parts.reduce((sum, part) => sum + part.value, 0);
  const top = max || Math.max(...rows.map(total), 1e-12);
  const box = el("div", { class: "bars", role: "img", "aria-label": label + ": " + rows.map(r => `${r.label} ${format(total(r))}`).join(", ") });
  for (const row of rows) {
    const track = el("div", { class: "track" });
    for (const part of row.parts) {
      if (!(part.value > 0)) continue;
      const text = `${row.label} · ${part.name}: ${part.tip || format(part.value)}`;
      track.append(el("i", { style: `width:${100 * part.value / top}%;background:${cssColour(part.colour)}`,
        onmousemove: event => showTip(event, text), onmouseleave: hideTip }));
    }
    box.append(el("div", { class: "row" }, el("span", {}, row.label), track, el("span", { class: "total" }, row.note || format(total(row)))));
  }
  place.replaceChildren(box);
  if (legend) {
    const seen = new Map();
    for (const row of rows) for (const part of row.parts) if (part.value > 0) seen.set(part.name, part.colour);
    place.append(el("div", { class: "legend" }, [...seen].map(([name, colour]) => el("span", { style: `--c:${cssColour(colour)}` }, name))));
  }
}

/* Redraws when the width changes, so that text keeps its size on a phone. */
function drawn(place, height, draw) {
  let width = 0;
  const again = () => {
    const now = Math.max(Math.floor(place.clientWidth), 120);
    if (now === width) return;
    width = now;
    const svg = svgEl("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, height, role: "img" });
    draw(svg, width, height);
    place.replaceChildren(svg);
  };
  again();
  new ResizeObserver(again).observe(place);
}

function niceTicks(low, high, count) {
  const span = high - low || 1, raw = span / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const ticks = [];
  for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-9; t += step) ticks.push(+t.toPrecision(12));
  return ticks;
}
function axisScale(values, { log = false, zero = false, from, to }) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) {
    low = Math.log10(low); high = Math.log10(high);
    const pad = Math.max((high - low) * 0.06, 0.08);
    low -= pad; high += pad;
    const ticks = [];
    for (let p = Math.floor(low); p <= high; p += 1)
      for (const m of high - low > 2.5 ? [1] : high - low > 1.2 ? [1, 3] : [1, 2, 5]) {
        const t = m * 10 ** p;
        if (Math.log10(t) >= low && Math.log10(t) <= high) ticks.push(t);
      }
    return { at: v => from + (to - from) * (Math.log10(v) - low) / (high - low), ticks };
  }
  if (zero) low = Math.min(low, 0);
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  high += pad;
  if (!(zero && low === 0)) low -= pad;
  return { at: v => from + (to - from) * (v - low) / (high - low), ticks: niceTicks(low, high, Math.abs(to - from) / 80) };
}
function axes(svg, x, y, box, { xLabel, yLabel, formatX = number, formatY = number }) {
  for (const t of y.ticks) {
    svg.append(svgEl("line", { class: "grid", x1: box.left, x2: box.right, y1: y.at(t), y2: y.at(t) }));
    svg.append(svgEl("text", { x: box.left - 6, y: y.at(t) + 4, "text-anchor": "end" }, formatY(t)));
  }
  for (const t of x.ticks) {
    svg.append(svgEl("line", { class: "axis", x1: x.at(t), x2: x.at(t), y1: box.bottom, y2: box.bottom + 4 }));
    svg.append(svgEl("text", { x: x.at(t), y: box.bottom + 18, "text-anchor": "middle" }, formatX(t)));
  }
  svg.append(svgEl("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  svg.append(svgEl("text", { class: "label", x: (box.left + box.right) / 2, y: box.bottom + 36, "text-anchor": "middle" }, xLabel));
  svg.append(svgEl("text", { class: "label", x: box.left, y: box.top - 10 }, yLabel));
}

/* bars: [{from, to, count, marked}] of equal width on the drawn axis; marked counts are drawn in another colour. */
function histogram(place, { bars, log, xLabel, yLabel, label, colour = "hr", format = number, onPick = null }) {
  drawn(place, 240, (svg, width, height) => {
    svg.setAttribute("aria-label", label);
    const box = { left: 40, right: width - 8, top: 26, bottom: height - 44 };
    const x = axisScale([bars[0].from, bars[bars.length - 1].to], { log, from: box.left, to: box.right });
    const y = axisScale([0, ...bars.map(b => b.count)], { zero: true, from: box.bottom, to: box.top });
    y.ticks = y.ticks.filter(t => Number.isInteger(t));
    axes(svg, x, y, box, { xLabel, yLabel, formatX: format, formatY: grouped });
    for (const bar of bars) {
      const left = x.at(bar.from), wide = Math.max(x.at(bar.to) - left - 1, 1);
      const text = `${format(bar.from)} to ${format(bar.to)}: ${grouped(bar.count)} slides` + (bar.marked ? `, ${grouped(bar.marked)} outliers` : "");
      const draw = (low, high, c) => high > low && svg.append(svgEl("rect", { x: left, width: wide, y: y.at(high), height: y.at(low) - y.at(high), rx: 2, fill: cssColour(c) }));
      draw(0, bar.count - bar.marked, colour);
      draw(bar.count - bar.marked, bar.count, "accent");
      svg.append(svgEl("rect", { x: left, width: wide, y: box.top, height: box.bottom - box.top, fill: "transparent",
        style: onPick && bar.count ? "cursor:pointer" : null, onclick: onPick && bar.count ? () => onPick(bar) : null,
        onmousemove: event => showTip(event, text), onmouseleave: hideTip }));
    }
  });
}

/* points: [{x, y, group, text, key}]; groups: {name: {colour, radius, ring}}. All dots of a group are one path. */
function scatter(place, { points, groups, xLabel, yLabel, label, logX = false, logY = false, lines = [], height = 300, onPick = null, formatX = number, formatY = number }) {
  drawn(place, height, (svg, width, tall) => {
    svg.setAttribute("aria-label", label);
    const box = { left: 52, right: width - 10, top: 26, bottom: tall - 44 };
    const x = axisScale(points.map(p => p.x).concat(...lines.map(l => l.points.map(p => p[0]))), { log: logX, zero: !logX, from: box.left, to: box.right });
    const y = axisScale(points.map(p => p.y).concat(...lines.map(l => l.points.map(p => p[1]))), { log: logY, zero: !logY, from: box.bottom, to: box.top });
    axes(svg, x, y, box, { xLabel, yLabel, formatX, formatY });
    for (const line of lines) {
      const d = line.points.map((p, i) => `${i ? "L" : "M"}${x.at(p[0]).toFixed(1)} ${y.at(p[1]).toFixed(1)}`).join("");
      svg.append(svgEl("path", { d, fill: "none", stroke: cssColour(line.colour), "stroke-width": 1.5, "stroke-dasharray": line.dash || null }));
    }
    const places = points.map(p => [x.at(p.x), y.at(p.y)]);
    for (const [name, style] of Object.entries(groups)) {
      let d = "";
      points.forEach((p, i) => { if (p.group === name) d += `M${places[i][0].toFixed(1)} ${places[i][1].toFixed(1)}h0`; });
      if (d) svg.append(svgEl("path", { d, fill: "none", stroke: cssColour(style.colour), "stroke-width": style.size || 6, "stroke-linecap": "round", opacity: style.opacity || 0.75 }));
    }
    const ring = svg.appendChild(svgEl("circle", { r: 7, fill: "none", stroke: "var(--text)", "stroke-width": 1.5, visibility: "hidden" }));
    const nearest = event => {
      const at = svg.getBoundingClientRect(), px = event.clientX - at.left, py = event.clientY - at.top;
      let best = -1, distance = 18 * 18;
      places.forEach((p, i) => { const d = (p[0] - px) ** 2 + (p[1] - py) ** 2; if (d < distance) { distance = d; best = i; } });
      return best;
    };
    svg.addEventListener("mousemove", event => {
      const i = nearest(event);
      ring.setAttribute("visibility", i < 0 ? "hidden" : "visible");
      svg.style.cursor = i >= 0 && onPick ? "pointer" : "default";
      if (i < 0) { hideTip(); return; }
      ring.setAttribute("cx", places[i][0]); ring.setAttribute("cy", places[i][1]);
      showTip(event, points[i].text);
    });
    svg.addEventListener("mouseleave", () => { ring.setAttribute("visibility", "hidden"); hideTip(); });
    if (onPick) svg.addEventListener("click", event => { const i = nearest(event); if (i >= 0) onPick(points[i]); });
  });
}
