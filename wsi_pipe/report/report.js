/* The page of a job: what stands where. */
const SUM = DATA.summary, N = SUM.slides;

byId("title").textContent = DATA.title;
byId("subtitle").textContent = (N.failed || N.empty
  ? `${grouped(N.done)} of ${grouped(N.total)} slides are done` + (N.empty ? `, ${grouped(N.empty)} without tissue` : "") + (N.failed ? `, ${grouped(N.failed)} failed: what to do is below.` : ".")
  : N.total === 1 ? "The slide is done." : `All ${grouped(N.total)} slides are done.`) + ` ${DATA.created_utc}.`;

function figureCard(key, value, detail, wide) { return el("div", { class: "panel card" + (wide ? " wide" : "") }, el("div", { class: "k" }, key), el("div", { class: "v" }, value), detail ? el("div", { class: "d" }, detail) : null); }
const statusBar = el("div", { class: "statusbar", role: "img", "aria-label": `${N.done} done, ${N.empty} empty, ${N.failed} failed` },
  [["done", "good"], ["empty", "warn"], ["failed", "bad"]].map(([k, c]) => N[k] ? el("i", { style: `flex:${N[k]};background:var(--${c})` }) : null));
const totalTiles = Object.values(SUM.tiles).reduce((a, b) => a + b, 0);
const finestLabel = DATA.labels[FINEST], coarsestLabel = DATA.labels[0];
fill("cards",
  figureCard("Slides done", `${grouped(N.done)} / ${grouped(N.total)}`, [el("span", {}, `${grouped(N.empty)} empty · ${grouped(N.failed)} failed`), statusBar]),
  figureCard("Tiles kept", grouped(totalTiles), DATA.labels.map(l => `${grouped(SUM.tiles[l])} at ${l}`).join(" · ")),
  figureCard("Tissue", number(SUM.tissue_mm2) + THIN + "mm²", N.done ? `${number(SUM.tissue_mm2 / N.done)} mm² a slide` : null),
  figureCard("Time", seconds(SUM.seconds_total), SUM.seconds_total ? `${seconds(SUM.seconds_total / Math.max(N.total, 1))} a slide, added up over slides` : "nothing was left to do"));

const STAGE_COLOURS = { open: "s8", segment: "s2", tile: "s3", read: "s4", encode: "s1", extract: "s6", assemble: "s5" };
const STAGE_NAMES = { segment: "find tissue", tile: "lay grids", read: "read tiles", extract: DATA.stages.some(s => s.stage === "encode") ? "store features" : "extract", assemble: "write bag" };
const stageName = stage => STAGE_NAMES[stage] || stage;

/* High against low resolution. */
(function levels() {
  const panel = byId("levels");
  if (!DATA.labels.length) { panel.hidden = true; return; }
  const colours = label => label === finestLabel && FINEST > 0 ? "hr" : label === coarsestLabel ? "lr" : "s3";
  const bars = el("div", {}), time = el("div", {});
  const size = label => DATA.levels.find(l => l.label === label);
  const of = label => { const s = size(label); return s ? `${label} (${number(s.mpp)} µm/px)` : label; };
  panel.append(el("h3", {}, FINEST > 0 ? "High against low resolution" : "Tiles"));
  const ratio = SUM.hr_per_lr;
  if (ratio) {
    const side = 4, squares = svgEl("svg", { class: "squares", width: 76, height: 76, viewBox: "0 0 76 76", role: "img", "aria-label": `One ${coarsestLabel} tile covers the same tissue as about ${number(ratio)} ${finestLabel} tiles` });
    for (let a = 0; a < side; a += 1) for (let b = 0; b < side; b += 1) squares.append(svgEl("rect", { x: 4 + a * 17, y: 4 + b * 17, width: 15, height: 15, rx: 2, fill: "var(--hr)", opacity: (a * side + b) < Math.round(Math.min(ratio, 16)) ? 0.85 : 0.15 }));
    squares.append(svgEl("rect", { x: 1.5, y: 1.5, width: 72, height: 72, rx: 6, fill: "none", stroke: "var(--lr)", "stroke-width": 3 }));
    panel.append(el("div", { class: "compare", style: "margin-bottom:14px" }, squares, el("p", { style: "margin:0" }, "One ", el("b", { class: "lr" }, coarsestLabel), " tile covers the tissue of ", el("b", {}, number(ratio)), " ", el("b", { class: "hr" }, finestLabel), ` tiles here: the same tissue takes ${number(ratio)} times as many tiles at high resolution.`)));
  }
  const grid = el("div", { class: "levels" }, el("div", {}, el("h3", {}, "Tiles"), bars));
  stackedBars(bars, { label: "Tiles by resolution", legend: false, format: grouped, rows: DATA.labels.map(l => ({ label: l, parts: [{ name: of(l), value: SUM.tiles[l], colour: colours(l) }] })) });
  const timed = DATA.labels.filter(l => SUM.seconds_by_level[l]);
  if (timed.length) {
    grid.append(el("div", {}, el("h3", {}, "Seconds to read and encode"), time));
    const parts = [...new Set(timed.flatMap(l => Object.keys(SUM.seconds_by_level[l])))];
    stackedBars(time, { label: "Seconds by resolution", format: seconds, rows: timed.map(l => ({ label: l, parts: parts.map((p, k) => ({ name: p, value: SUM.seconds_by_level[l][p] || 0, colour: STAGE_COLOURS[p] || "s" + (k % 9 + 1) })) })) });
  }
  panel.append(grid);
})();

/* Failures. */
const failed = S.id.map((_, i) => i).filter(i => S.status[i] === "failed").map(i => ({ i }));
if (failed.length) {
  byId("failures").hidden = false;
  const unlisted = N.failed - failed.length;
  byId("failures-note").textContent = `${grouped(N.failed)} ${N.failed === 1 ? "slide" : "slides"}. ` + (unlisted > 0 ? `Of each cause the first are listed here; all stand in report.csv and failures.csv. ` : "") + `The others are not affected. After mending the cause, run the same command again: it does only what is missing.`;
  if (N.failed > 10) {
    byId("failures-causes").hidden = false;
    pagedTable(byId("failures-causes"), { rows: DATA.causes, pageSize: 10, label: "Causes", columns: [
      { name: "Slides", value: r => r.slides, show: r => grouped(r.slides), num: true }, { name: "Stage", value: r => r.stage, cls: "keep" },
      { name: "Kind", value: r => r.error, show: r => el("code", {}, r.error || "–") }, { name: "For example", value: r => r.example, show: r => `${r.example}: ${r.reason}`, cls: "reason" },
      { name: "What to do", value: r => r.remedy || "–", cls: "remedy" }] });
  }
  pagedTable(byId("failures-table"), { rows: failed, pageSize: 20, label: "Failures", columns: [
    { name: "Slide", value: r => S.id[r.i], cls: "id" },
    { name: "Stage", value: r => S.stage[r.i] },
    { name: "What happened", value: r => S.reason[r.i], cls: "reason" },
    { name: "What to do", value: r => S.remedy[r.i] || "–", cls: "remedy" },
    { name: "File", value: r => S.path[r.i], show: r => el("code", {}, S.path[r.i]) }] });
}

/* Slides. */
if (DATA.left_out) byId("slides-tools").before(el("p", { class: "muted" }, `${grouped(DATA.left_out)} of ${grouped(N.total)} slides are not listed here: all stand in report.csv.`));
showSlides();

/* Distributions. */
const withTiles = S.id.map((_, i) => i).filter(i => S.status[i] === "done" && (S.tiles[i][FINEST] || 0) > 0);
if (withTiles.length > 3 && DATA.tiles_histogram) {
  byId("spread").hidden = false;
  const flagged = withTiles.filter(i => S.flags[i].length);
  byId("outlier-rule").textContent = (flagged.length ? `${grouped(flagged.length)} slides stand out. ` : "No slide stands out. ") + DATA.outlier_rule;
  byId("tiles-title").textContent = `Tiles per slide at ${finestLabel}`;
  const between = (values, bar, last) => withTiles.filter(i => values(i) >= bar.from * (1 - 1e-9) && (values(i) < bar.to || last));
  const pick = ids => { if (ids.length) { const keep = new Set(ids); FILTERS.all = i => keep.has(i); showSlides({ filter: "all", text: "" }); resetNote(ids.length); byId("slides").scrollIntoView(); } };
  const draw = (id, data, values, words) => data && histogram(byId(id), { bars: data.bars, log: data.log, xLabel: words.x, yLabel: "slides", label: words.label, format: number, colour: words.colour,
    onPick: bar => pick(between(values, bar, bar === data.bars[data.bars.length - 1])) });
  draw("tiles-histogram", DATA.tiles_histogram, i => S.tiles[i][FINEST], { x: `tiles at ${finestLabel}` + (DATA.tiles_histogram.log ? " (log)" : ""), label: "Histogram of tiles per slide", colour: "hr" });
  draw("tissue-histogram", DATA.tissue_histogram, i => S.tissue_mm2[i], { x: "tissue, mm²" + (DATA.tissue_histogram && DATA.tissue_histogram.log ? " (log)" : ""), label: "Histogram of tissue area per slide", colour: "s4" });
  const dots = withTiles.filter(i => S.tissue_mm2[i] > 0);
  if (dots.length) {
    const span = values => Math.max(...values) / Math.min(...values) > 20;
    const logs = span(dots.map(i => S.tissue_mm2[i])) || span(dots.map(i => S.tiles[i][FINEST]));
    scatter(byId("tissue-tiles"), { label: "Tiles against tissue area, one dot a slide", logX: logs, logY: logs, xLabel: "tissue, mm²" + (logs ? " (log)" : ""), yLabel: `tiles at ${finestLabel}` + (logs ? " (log)" : ""), formatY: number,
      groups: { usual: { colour: "hr", size: COUNT > 2000 ? 4 : 7, opacity: COUNT > 500 ? 0.5 : 0.75 }, outlier: { colour: "accent", size: 9, opacity: 1 } },
      points: dots.map(i => ({ x: S.tissue_mm2[i], y: S.tiles[i][FINEST], group: S.flags[i].length ? "outlier" : "usual", key: i, text: `${S.id[i]}\n${tilesText(i)}\n${number(S.tissue_mm2[i])} mm²` + (S.flags[i].length ? "\n" + S.flags[i].join(", ") : "") })),
      onPick: point => picture(point.key, "tissue") ? openViewer(point.key) : showSlides({ filter: "all", text: S.id[point.key] }) });
    fill("tissue-tiles-legend", el("span", { style: "--c:var(--hr)" }, "usual"), el("span", { style: "--c:var(--accent)" }, "outlier"));
  }
  if (flagged.length) pagedTable(byId("outliers-table"), { rows: flagged.map(i => ({ i })), pageSize: 10, label: "Outliers", columns: [
    { name: "Slide", value: r => S.id[r.i], cls: "id" }, { name: "What stands out", value: r => S.flags[r.i].join(", ") },
    { name: `Tiles ${finestLabel}`, value: r => S.tiles[r.i][FINEST], show: r => grouped(S.tiles[r.i][FINEST]), num: true },
    { name: "Tissue mm²", value: r => S.tissue_mm2[r.i], show: r => number(S.tissue_mm2[r.i]), num: true },
    { name: "Seconds", value: r => S.seconds[r.i], show: r => number(S.seconds[r.i]), num: true }] });
}
function resetNote(n) {
  const note = el("p", { class: "notice" }, `Only the ${grouped(n)} slides of one bar are shown. `, el("button", { type: "button", onclick: () => { FILTERS.all = () => true; note.remove(); showSlides({ filter: "all" }); } }, "Show all"));
  const old = document.querySelector("#slides > .notice");
  if (old) old.remove();
  byId("slides-tools").before(note);
}
for (const link of document.querySelectorAll("[data-if]")) link.hidden = byId(link.dataset.if).hidden;

/* Timings. */
if (DATA.stages.length) {
  byId("timings-note").textContent = "Wall seconds added up over slides. Stages and slides go on at the same time, so the run itself took less." + (SUM.cached_slides ? ` Stages that were done already (${grouped(SUM.cached_slides)} slides) are left out of the table.` : "");
  stackedBars(byId("timings-bars"), { label: "Seconds by stage", format: seconds, legend: false, rows: DATA.stages.map(s => ({ label: stageName(s.stage), parts: [{ name: stageName(s.stage), value: s.total_s, colour: STAGE_COLOURS[s.stage] || "s7" }] })) });
  pagedTable(byId("timings-table"), { rows: DATA.stages, label: "Timings", columns: [
    { name: "Stage", value: r => stageName(r.stage), cls: "keep" }, { name: "Slides", value: r => r.slides, show: r => grouped(r.slides), num: true },
    { name: "All", value: r => r.total_s, show: r => seconds(r.total_s), num: true }, { name: "Median", value: r => r.median_s, show: r => seconds(r.median_s), num: true },
    { name: "Slowest", value: r => r.max_s, show: r => seconds(r.max_s), num: true }, { name: "Slowest slide", value: r => r.slowest, cls: "id" }] });
} else { byId("timings-note").textContent = "Everything was there already."; byId("timings-bars").hidden = true; }

/* Settings. */
(function settings() {
  const changed = DATA.settings.filter(s => s.changed).length, button = byId("settings-all");
  byId("settings-note").textContent = (changed ? `${changed} ${changed === 1 ? "differs" : "differ"} from the default.` : "All are the defaults.") + " The same stands in config.toml beside this page.";
  let all = false;
  const rows = () => DATA.settings.filter(s => all || s.changed || ["resolutions", "encoders", "tile_px"].includes(s.name)).map(s => ({ ...s, cls: s.changed ? null : "usual" }));
  const table = pagedTable(byId("settings-table"), { rows: rows(), pageSize: 100, label: "Settings", columns: [
    { name: "Stage", value: r => r.group }, { name: "Setting", value: r => r.name, show: r => [el("code", {}, r.name), r.help ? el("div", { class: "muted small" }, r.help) : null] },
    { name: "Value", value: r => r.value, show: r => r.changed ? el("b", {}, r.value) : r.value }, { name: "Default", value: r => r.default }] });
  button.addEventListener("click", () => { all = !all; button.setAttribute("aria-pressed", String(all)); button.textContent = all ? "Show what matters" : "Show all settings"; table.update(rows()); });
})();
fill("footer", `Made by wsi-pipe ${DATA.wsi_pipe_version}, ${DATA.created_utc}. This page stands by itself and asks the network nothing` + (Object.keys(DATA.embedded).length ? "." : "; its pictures are in the folder thumbnails beside it."));
