/* The page of a benchmark: what stands where. All figures come from DATA.answers, which Python computed. */
const REC = DATA.record, ANS = DATA.answers;
const arms = REC.arms, armOf = id => arms.find(a => a.id === id), totalOf = id => ANS.totals.find(t => t.arm === id);
const head = ANS.comparisons.find(c => c.headline);
const finestMpp = Math.min(...arms.map(a => a.mpp)), coarsestMpp = Math.max(...arms.map(a => a.mpp));
const armColours = {};
arms.forEach((a, i) => { armColours[a.id] = head && a.id === head.dear ? "hr" : head && a.id === head.cheap ? "lr" : ["s3", "s4", "s2", "s6", "s7", "s8"][i % 6]; });
const STAGE_COLOURS = { open: "s8", segment: "s2", plan: "s9", fetch: "s4", decode: "s5", resample: "s6", handle: "s7", read: "s4", encode: "s1", write: "s3" };
const ratioOf = (c, what) => c.ratios.find(r => r.what === what);
/* With one encoder the resolution says it all. */
const oneEncoder = new Set(arms.map(a => a.encoder)).size === 1;
const nameOf = id => oneEncoder && (armOf(id).method || "native") === "native" ? armOf(id).label : id;
const limits = (r, prefix, to) => r.low === null || r.low === undefined ? "no interval: a single pass" : `${prefix}${number(r.low)}${to}${prefix}${number(r.high)}`;

function simpleTable(place, heading, rows, sums = () => false) {
  fill(place, el("table", {}, el("thead", {}, el("tr", {}, heading.map((h, i) => el("th", { class: i ? "num" : null }, h)))),
    el("tbody", {}, rows.map(row => el("tr", { class: sums(row) ? "sum" : null }, row.map((cell, i) => el("td", { class: i ? "num" : null }, cell)))))));
}

/* The answer. */
const n = REC.slides.length;
byId("title").textContent = head && ratioOf(head, "end to end").value
  ? `${armOf(head.cheap).label} costs 1/${number(ratioOf(head, "end to end").value)} of ${armOf(head.dear).label}, end to end`
  : "What reading and encoding cost";
const count = (n, thing) => `${n} ${thing}${n === 1 ? "" : "s"}`;
byId("subtitle").textContent = `${count(n, "slide")}, ${count(REC.repeats, "repeat")}, ${count(REC.machine.cores, "core")}${REC.machine.gpu ? ", " + REC.machine.gpu : ""}, ${REC.created_utc.replace("T", " ").replace("Z", " UTC")}.` + (head && armOf(head.dear).encoder !== armOf(head.cheap).encoder ? ` ${armOf(head.dear).encoder} at ${armOf(head.dear).label}, ${armOf(head.cheap).encoder} at ${armOf(head.cheap).label}.` : ` Encoder: ${arms[0].encoder}.`);
if (ANS.warnings.length) fill("doubts", el("div", { class: "notice" }, el("b", {}, "Before you rely on these figures"), el("ul", { style: "margin:6px 0 0;padding-left:20px" }, ANS.warnings.map(w => el("li", {}, w)))));
if (head) {
  const card = (what, title, detail) => {
    const r = ratioOf(head, what);
    if (!r || r.value === null) return null;
    return el("div", { class: "panel card answer", "data-what": what }, el("div", { class: "k" }, title), el("div", { class: "v" }, "1/" + number(r.value)),
      el("div", { class: "d" }, (r.low ? "95 % interval " : "") + limits(r, "1/", " to ")), el("div", { class: "d" }, detail(r)));
  };
  const pair = r => [el("b", { class: "hr" }, seconds(r.numerator)), " against ", el("b", { class: "lr" }, seconds(r.denominator))];
  fill("cards", [card("end to end", "End to end", r => el("span", {}, pair(r))), card("reading", "Reading", r => el("span", {}, pair(r))), card("encoding", "Encoding", r => el("span", {}, pair(r))),
    card("tiles", "Tiles", r => `${grouped(r.numerator)} against ${grouped(r.denominator)}`)].filter(Boolean));
  forest(byId("forest"), head);
} else byId("forest").parentElement.hidden = true;

function forest(place, comparison) {
  const rows = comparison.ratios.filter(r => r.value !== null && r.value > 0);
  const tiles = ratioOf(comparison, "tiles").value, narrow = () => place.clientWidth < 560, height = 34 * rows.length + 44;
  drawn(place, height, (svg, width) => {
    svg.setAttribute("aria-label", rows.map(r => `${r.what}: ${number(r.value)} (${limits(r, "", " to ")})`).join("; "));
    const left = narrow() ? 8 : 250, right = width - (narrow() ? 8 : 150);
    const x = axisScale(rows.flatMap(r => [r.low || r.value, r.high || r.value, r.value]).concat(1).filter(v => v > 0), { log: true, from: left, to: right });
    for (const t of x.ticks) svg.append(svgEl("line", { class: "grid", x1: x.at(t), x2: x.at(t), y1: 4, y2: height - 28 }), svgEl("text", { x: x.at(t), y: height - 10, "text-anchor": "middle" }, number(t)));
    if (tiles) svg.append(svgEl("line", { x1: x.at(tiles), x2: x.at(tiles), y1: 4, y2: height - 28, stroke: "var(--text)", "stroke-dasharray": "3 3" }));
    rows.forEach((r, i) => {
      const y = 22 + 34 * i, main = ["end to end", "reading", "encoding"].includes(r.what);
      svg.append(svgEl("text", { class: main ? "label" : null, x: narrow() ? left : left - 14, y: narrow() ? y - 8 : y + 4, "text-anchor": narrow() ? "start" : "end", "font-weight": main ? 600 : 400 }, narrow() ? `${r.what}: ${number(r.value)}` : r.what));
      const at = narrow() ? y + 4 : y;
      if (r.low) svg.append(svgEl("line", { x1: x.at(r.low), x2: x.at(r.high), y1: at, y2: at, stroke: "var(--hr)", "stroke-width": 3, "stroke-linecap": "round", opacity: 0.55 }));
      svg.append(svgEl("circle", { cx: x.at(r.value), cy: at, r: main ? 6 : 4.5, fill: "var(--hr)" }));
      if (!narrow()) svg.append(svgEl("text", { class: "label", x: right + 12, y: y + 4 }, r.low ? `${number(r.value)} (${limits(r, "", " – ")})` : number(r.value)));
    });
  });
}

/* Stages. */
let clock = "wall_s";
const allStages = DATA.groups.flatMap(g => g.stages);
function drawStages() {
  fill("clock", [["wall_s", "wall seconds"], ["cpu_s", "processor seconds"]].map(([key, text]) => el("button", { type: "button", "aria-pressed": String(clock === key), onclick: () => { clock = key; drawStages(); } }, text)));
  const parts = t => allStages.filter(s => t.stages[s]).map(s => ({ name: s, value: t.stages[s][clock], colour: STAGE_COLOURS[s] }));
  const sum = t => parts(t).reduce((a, p) => a + p.value, 0);
  const ordered = ANS.totals.slice().sort((a, b) => armOf(a.arm).mpp - armOf(b.arm).mpp);
  stackedBars(byId("bars"), { label: "Seconds by stage", format: seconds, rows: ordered.map(t => ({ label: nameOf(t.arm), parts: parts(t) })) });
  stackedBars(byId("shares"), { label: "Shares by stage", format: percent, max: 1, legend: false, rows: ordered.map(t => ({ label: nameOf(t.arm), note: seconds(sum(t)), parts: parts(t).map(p => ({ ...p, tip: `${percent(p.value / sum(t))}, ${seconds(p.value)}`, value: p.value / sum(t) })) })) });
}
drawStages();
byId("stages-note").textContent = `Seconds for ${n === 1 ? "the slide" : `all ${n} slides`}, mean of ${count(REC.repeats, "repeat")}. Stages are timed one after the other with nothing else going on. End to end is less than their sum where stages overlap, and holds what only a whole run does: pictures, masks, checks.`;
(function stageTable() {
  const rows = [], wall = (t, stages) => stages.reduce((a, s) => a + (t.stages[s] ? t.stages[s].wall_s : 0), 0);
  const show = v => v === null || v === undefined ? "–" : number(v);
  const ratio = (a, b) => head && b ? number(a / b) : "–";
  const withRatio = (label, values) => { const r = head ? [ratio(values[arms.findIndex(a => a.id === head.dear)], values[arms.findIndex(a => a.id === head.cheap)])] : []; return [label, ...values.map(show), ...r]; };
  for (const group of DATA.groups) {
    const present = group.stages.filter(s => ANS.totals.some(t => t.stages[s]));
    const own = s => ANS.totals.map(t => t.stages[s] ? t.stages[s].wall_s : null);
    for (const s of present) {
      rows.push(withRatio(s, own(s)));
      const part = DATA.parts[s];
      if (part && ANS.totals.some(t => t.stages[part])) rows.push(withRatio("of which " + part, own(part)));
    }
    if (present.length > 1) rows.push(withRatio("= " + group.name, ANS.totals.map(t => wall(t, present))));
  }
  rows.push(withRatio("= one after the other", ANS.totals.map(t => wall(t, allStages))));
  rows.push(withRatio("end to end, overlapped", ANS.totals.map(t => t.end_to_end_s)));
  simpleTable("stage-table", ["Wall seconds", ...ANS.totals.map(t => nameOf(t.arm)), ...(head ? ["ratio"] : [])], rows, row => row[0].startsWith("=") || row[0].startsWith("end"));
})();

(function runStages() {
  const own = ANS.totals.filter(t => t.end_to_end_s !== null), stages = [...new Set(own.flatMap(t => Object.keys(t.run_stages)))];
  byId("run-stages-note").textContent = DATA.run_stages_note;
  simpleTable("run-stage-table", ["Wall seconds", ...own.map(t => nameOf(t.arm))], [...stages.map(s => [s, ...own.map(t => number(t.run_stages[s]))]), ["= end to end", ...own.map(t => number(t.end_to_end_s))]], row => row[0].startsWith("="));
})();

/* Slides. */
const passes = REC.measurements.filter(m => m.kind === "end_to_end");
const native = arms.filter(a => a.method === "native" || !a.method);
const groupsOf = Object.fromEntries(native.map(a => [a.id, { colour: armColours[a.id], size: 8 }]));
const spread = values => Math.max(...values) / Math.min(...values) > 20;
scatter(byId("cost"), { label: "Seconds end to end against tiles, one dot a pass", logX: spread(passes.map(m => m.tiles)), logY: spread(passes.map(m => m.wall_s)), xLabel: "tiles" + (spread(passes.map(m => m.tiles)) ? " (log)" : ""), yLabel: "seconds end to end" + (spread(passes.map(m => m.wall_s)) ? " (log)" : ""), groups: groupsOf,
  points: passes.map(m => ({ x: m.tiles, y: m.wall_s, group: m.arm, text: `${m.slide}\n${nameOf(m.arm)}: ${grouped(m.tiles)} tiles, ${seconds(m.wall_s)}` })) });
fill("cost-legend", native.map(a => el("span", { style: `--c:var(--${armColours[a.id]})` }, nameOf(a.id))));
const mean = (arm, slide, value) => { const own = passes.filter(m => m.arm === arm && m.slide === slide); return own.reduce((a, m) => a + value(m), 0) / own.length; };
if (head) {
  const rows = REC.slides.map(s => {
    const tiles = [head.dear, head.cheap].map(a => mean(a, s.slide_id, m => m.tiles)), wall = [head.dear, head.cheap].map(a => mean(a, s.slide_id, m => m.wall_s));
    return { id: s.slide_id, tiles, wall, tissue: s.tissue_mm2 };
  });
  scatter(byId("savings"), { label: "Ratio of seconds and of tiles by slide", xLabel: `tiles at ${armOf(head.dear).label}`, yLabel: "times as much", groups: { seconds: { colour: "hr", size: 9, opacity: 1 }, tiles: { colour: "s8", size: 7, opacity: 0.7 } },
    points: rows.flatMap(r => [{ x: r.tiles[0], y: r.tiles[0] / r.tiles[1], group: "tiles", text: `${r.id}\n${number(r.tiles[0] / r.tiles[1])} times the tiles` }, { x: r.tiles[0], y: r.wall[0] / r.wall[1], group: "seconds", text: `${r.id}\n${number(r.wall[0] / r.wall[1])} times the seconds` }]) });
  fill("savings-legend", el("span", { style: "--c:var(--hr)" }, "seconds, end to end"), el("span", { style: "--c:var(--s8)" }, "tiles"));
  const [dear, cheap] = [armOf(head.dear), armOf(head.cheap)];
  simpleTable("slide-table", ["Slide", "Tissue mm²", `Tiles ${dear.label}`, `Tiles ${cheap.label}`, `Seconds ${dear.label}`, `Seconds ${cheap.label}`, "Ratio"], rows.map(r => [r.id, number(r.tissue), grouped(r.tiles[0]), grouped(r.tiles[1]), number(r.wall[0]), number(r.wall[1]), number(r.wall[0] / r.wall[1])]));
} else { byId("savings").parentElement.hidden = true; byId("slide-table").hidden = true; }

/* Others. */
const others = ANS.comparisons.filter(c => !c.headline);
if (others.length) {
  byId("others").hidden = false;
  for (const c of others) {
    const place = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": c.title, id: "other-" + others.indexOf(c) });
    byId("other-tables").append(el("div", {}, el("h3", {}, c.title[0].toUpperCase() + c.title.slice(1)), place));
    simpleTable(place.id, ["", nameOf(c.dear), nameOf(c.cheap), "Ratio", "95 % interval"], c.ratios.filter(r => r.value !== null).map(r => { const show = r.unit === "s" ? seconds : r.unit === "B" ? bytes : number; return [r.what, show(r.numerator), show(r.denominator), number(r.value), limits(r, "", " to ")]; }));
  }
}
for (const link of document.querySelectorAll("[data-if]")) link.hidden = byId(link.dataset.if).hidden;

/* An archive: the figures for other numbers of slides and prices follow from those that Python gave. */
(function archive() {
  const given = ANS.assumptions, inputs = {};
  const field = (key, text, value, step) => el("label", {}, text, inputs[key] = el("input", { type: "number", min: 0, step, value, oninput: draw }));
  fill("archive-tools", field("slides", "slides a year", given.slides, 1000), field("hour", `${given.currency} an hour`, given.price_per_hour, "any"), field("kwh", `${given.currency} a kWh`, given.price_per_kwh, "any"));
  fill("archive-words", given.words.map(w => el("li", {}, w)));
  function draw() {
    const factor = (+inputs.slides.value || 0) / given.slides, hour = +inputs.hour.value || 0, kwh = +inputs.kwh.value || 0, priced = hour > 0 || kwh > 0;
    const rows = ANS.projections.map(p => ({ ...p, hours: p.hours * factor, kwh: p.kwh * factor, read: p.gigabytes_read * factor, written: p.gigabytes_written * factor, cost: priced ? p.hours * factor * hour + p.kwh * factor * kwh : null }));
    stackedBars(byId("archive-bars"), { label: "Machine hours a year", legend: false, format: v => number(v) + THIN + "h", rows: rows.map(r => ({ label: nameOf(r.arm), parts: [{ name: "hours", value: r.hours, colour: armColours[r.arm] }] })) });
    simpleTable("archive-table", ["", "Hours", "GB read", "GB written", "kWh", ...(priced ? [given.currency] : [])], rows.map(r => [nameOf(r.arm), number(r.hours), number(r.read), number(r.written), number(r.kwh), ...(priced ? [number(r.cost)] : [])]));
  }
  draw();
})();

/* Method. */
fill("facts", ANS.facts.map(f => el("li", {}, f.replaceAll("`", ""))));
const books = ANS.balance;
simpleTable("balance", ["Part", "s"], [...Object.entries(books.parts).map(([k, v]) => [k, number(v)]), ["= sum", number(books.explained_s)], ["The process, as the system counts it", number(books.process_s)], ["Not explained", (100 * books.unexplained).toFixed(1) + "%"]], row => row[0].startsWith("="));
simpleTable("meaning", ["Stage", "What it is"], [...allStages, ...Object.values(DATA.parts)].filter(s => ANS.totals.some(t => t.stages[s])).map(s => [s, DATA.meaning[s]]));
for (const cell of byId("meaning").querySelectorAll(".num")) cell.classList.remove("num");
fill("footer", `Made by wsi-pipe ${REC.wsi_pipe_version}. Measured with: ${REC.command}. This page stands by itself; all its figures follow from benchmark.json beside it.`);
