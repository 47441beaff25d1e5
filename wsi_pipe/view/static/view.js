"use strict";
/* The viewer: the list of slides, one or two views, layers, the tile that was clicked, and settings that are tried. */

const embedded = document.getElementById("embedded");
const INSIDE = embedded ? JSON.parse(embedded.textContent) : null;

function byId(id) { return document.getElementById(id); }
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
let toastTimer = 0;
function toast(text) {
  byId("toast").textContent = text;
  byId("toast").classList.add("on");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => byId("toast").classList.remove("on"), 4000);
}
function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en-US") : String(+value.toPrecision(3));
}

/* Where answers come from: the server, or the page itself. */
async function ask(path, signal) {
  if (INSIDE) {
    if (!(path in INSIDE)) throw new Error("not in this page");
    return INSIDE[path];
  }
  const response = await fetch(path, { signal });
  const answer = await response.json().catch(() => ({ error: `the viewer answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.error || String(response.status));
  return answer;
}
function pictureUrl(number, level, column, row) {
  return INSIDE ? "data:image/jpeg;base64," + INSIDE.pictures[`${level}/${column}_${row}`] : `slides/${number}/pictures/${level}/${column}_${row}.jpg`;
}
function labelPath(label) { return encodeURIComponent(label); }
function keyPath(key) { return key.split("/").map(encodeURIComponent).join("/"); }
function inside(path) { return INSIDE ? decodeURIComponent(path) : path; }

const state = { slides: [], shown: [], panes: [], active: 0, together: true, trial: null, sliders: [], restoring: true };
const ROW_PX = 68;

/* ---- the list ---- */
const SORTS = {
  order: (a, b) => a - b,
  name: (a, b) => state.slides[a].id.localeCompare(state.slides[b].id, "en", { numeric: true }),
  tissue: (a, b) => (state.slides[b].tissue_mm2 || 0) - (state.slides[a].tissue_mm2 || 0),
  tiles: (a, b) => mostTiles(b) - mostTiles(a),
  status: (a, b) => state.slides[b].status.localeCompare(state.slides[a].status),
};
function mostTiles(i) { return Math.max(0, ...Object.values(state.slides[i].tiles)); }
function chooseRows() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = s => (s.id + " " + s.case + " " + s.path + " " + s.status).toLowerCase();
  state.shown = state.slides.map((_, i) => i).filter(i => words.every(word => text(state.slides[i]).includes(word)));
  state.shown.sort((a, b) => SORTS[byId("sort").value](a, b) || a - b);
  byId("count").textContent = state.shown.length === state.slides.length ? `${state.slides.length} slides` : `${state.shown.length} of ${state.slides.length} slides`;
  byId("rows-all").style.height = state.shown.length * ROW_PX + "px";
  drawRows();
}
function drawRows() {
  if (INSIDE) return;
  // Only the rows in sight are in the page: ten thousand slides scroll like ten.
  const box = byId("rows"), first = Math.max(Math.floor(box.scrollTop / ROW_PX) - 3, 0), last = Math.min(first + Math.ceil(box.clientHeight / ROW_PX) + 8, state.shown.length);
  const current = pane() ? pane().number : -1;
  const rows = [];
  for (let k = first; k < last; k += 1) {
    const i = state.shown[k], slide = state.slides[i];
    const tiles = Object.entries(slide.tiles).map(([label, count]) => `${count.toLocaleString("en-US")} at ${label}`).join(" · ");
    const row = el("div", { class: "row", role: "option", "aria-selected": String(i === current), title: slide.reason || slide.path, onclick: () => { openSlide(pane(), i); showTab("slide"); } },
      el("img", { src: `slides/${i}/thumbnail.jpg`, alt: "", loading: "lazy", onerror: event => { event.target.style.visibility = "hidden"; } }),
      el("div", {}, el("b", {}, slide.id), el("span", { class: slide.status }, [slide.status, slide.tissue_mm2 ? `${short(slide.tissue_mm2)} mm²` : ""].filter(Boolean).join(" · ") || slide.case), el("span", {}, tiles)));
    row.style.top = k * ROW_PX + "px";
    rows.push(row);
  }
  byId("rows-all").replaceChildren(...rows);
}

/* ---- views ---- */
function pane() { return state.panes[state.active]; }

function addPane() {
  const name = el("span", { class: "name" }), where = el("span", { class: "where" }), bar = el("span", { class: "bar" }), holder = el("div", { class: "osd" });
  const canvas = el("canvas", { class: "over" });
  const box = el("div", { class: "pane" }, holder, canvas, name, where, bar);
  byId("panes").append(box);
  // A picture that comes after its slide was left is no news.
  OpenSeadragon.console = { ...console, log() {}, debug() {}, info() {}, warn() {}, error: (...said) => console.error(...said) };
  const viewer = OpenSeadragon({
    element: holder, showNavigationControl: false, drawer: "canvas", prefixUrl: "", animationTime: 0.4, springStiffness: 12,
    maxZoomPixelRatio: 8, visibilityRatio: 0.3, imageLoaderLimit: 6, timeout: 60000, placeholderFillStyle: "#fff", immediateRender: true,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, gestureSettingsTouch: { clickToZoom: false },
  });
  const made = { viewer, canvas, box, name, where, bar, number: -1, about: null, layers: new Map(), tile: null, grids: new Map(), scale: 1, opening: null };
  viewer.addHandler("update-viewport", () => draw(made));
  viewer.addHandler("viewport-change", () => { if (made === pane()) follow(made); keepLink(); });
  viewer.addHandler("canvas-press", () => activate(state.panes.indexOf(made)));
  viewer.addHandler("canvas-scroll", () => activate(state.panes.indexOf(made)));
  viewer.addHandler("canvas-click", event => { if (event.quick) pick(made, toSlide(made, event.position)); });
  viewer.addHandler("tile-load-failed", event => { if (event.message && !/abort/i.test(event.message)) console.warn("picture", event.message); });
  holder.addEventListener("mousemove", event => { const r = holder.getBoundingClientRect(); made.mouse = [event.clientX - r.left, event.clientY - r.top]; tellWhere(made); });
  state.panes.push(made);
  return made;
}

function activate(i) {
  if (i < 0 || i === state.active) return;
  state.active = i;
  state.panes.forEach((p, k) => p.box.classList.toggle("active", k === i));
  drawSide();
  drawRows();
}

async function openSlide(target, number, place) {
  if (target.opening) target.opening.abort();
  const opening = target.opening = new AbortController();
  target.box.querySelector(".error")?.remove();
  target.name.textContent = state.slides[number].id;
  const kept = target.number >= 0 ? new Map([...target.layers].map(([id, layer]) => [id, { on: layer.on, opacity: layer.opacity }])) : null;
  target.number = number;
  target.tile = null;
  drawRows();
  let about;
  try { about = await ask(`slides/${number}`, opening.signal); } catch (error) {
    if (opening.signal.aborted) return;
    target.viewer.close();
    target.about = null;
    target.layers.clear();
    target.box.append(el("p", { class: "error" }, error.message));
    drawSide();
    return;
  }
  target.about = about;
  target.grids.clear();
  const finest = about.finest_level ?? about.max_level;
  target.scale = 2 ** (about.max_level - finest);
  target.layers = layersOf(about, kept);
  target.viewer.close();
  target.viewer.open({
    width: Math.ceil(about.size[0] / target.scale), height: Math.ceil(about.size[1] / target.scale), tileSize: about.picture_px, tileOverlap: 0, minLevel: 0, maxLevel: finest,
    getTileUrl: (level, column, row) => pictureUrl(number, level, column, row),
  });
  target.viewer.addOnceHandler("open", () => {
    target.viewer.viewport.goHome(true);
    if (place) goTo(target, place);
    draw(target);
  });
  for (const layer of target.layers.values()) if (layer.on) load(target, layer);
  drawSide();
  keepLink();
  if (state.trial && target === pane()) tryNow();
}

function layersOf(about, kept) {
  const layers = new Map(), defaults = new Map([["outline", true]]);
  const attention = about.layers.filter(layer => layer.key.startsWith("attention/"));
  if (attention.length) defaults.set(`value:${attention[0].label}:${attention[0].key}`, true);
  const add = (id, layer) => {
    const before = kept && kept.get(id);
    layers.set(id, { id, on: before ? before.on : defaults.get(id) || false, opacity: before ? before.opacity : layer.kind === "value" ? 0.55 : 0.9, ...layer });
  };
  for (const layer of about.layers) add(`value:${layer.label}:${layer.key}`, { ...layer, kind: "value", name: layer.title, title: `${layer.label}: ${layer.title}` });
  about.grids.forEach((grid, k) => add(`grid:${grid.label}`, { kind: "grid", label: grid.label, title: `grid ${grid.label}, ${grid.count.toLocaleString("en-US")} tiles`, colour: GRID_COLOURS[k % GRID_COLOURS.length] }));
  if (about.outline) add("outline", { kind: "outline", title: "tissue outline", colour: OUTLINE_COLOUR });
  return layers;
}

async function gridOf(target, label) {
  if (!target.grids.has(label)) {
    target.grids.set(label, ask(inside(`slides/${target.number}/grids/${labelPath(label)}`)).then(answer => ({ ...answer, rows: cellRows(answer.cells), facts: target.about.grids.find(grid => grid.label === label) })));
  }
  return target.grids.get(label);
}

async function load(target, layer) {
  const number = target.number;
  try {
    if (layer.kind !== "outline") layer.grid = await gridOf(target, layer.label);
    if (layer.kind === "value" && !layer.answer) {
      layer.answer = await ask(inside(`slides/${number}/layers/${labelPath(layer.label)}/${keyPath(layer.key)}`));
      layer.colours = tileColours(layer.answer);
    }
  } catch (error) { toast(error.message); return; }
  if (number === target.number) { draw(target); drawLegends(); }
}

/* ---- places ---- */
function viewOf(target) {
  const item = target.viewer.world.getItemAt(0);
  if (!item) return null;
  const a = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0)), b = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(1000, 0));
  const k = (b.x - a.x) / 1000 / target.scale;
  return { x: -a.x / k, y: -a.y / k, k };
}
function toSlide(target, position) {
  const view = viewOf(target);
  return view ? [view.x + position.x / view.k, view.y + position.y / view.k] : null;
}
/* um per screen pixel where the resolution is known, else level-0 pixels. */
function unitsOf(target) { return target.about && target.about.mpp ? target.about.mpp[0] : 1; }
function placeOf(target) {
  const view = viewOf(target);
  if (!view) return null;
  const size = target.viewer.container;
  return { x: view.x + size.clientWidth / 2 / view.k, y: view.y + size.clientHeight / 2 / view.k, um: unitsOf(target) / view.k };
}
function goTo(target, place, immediately = true) {
  const item = target.viewer.world.getItemAt(0);
  if (!item) return;
  const centre = item.imageToViewportCoordinates(place.x / target.scale, place.y / target.scale);
  target.viewer.viewport.panTo(centre, immediately);
  if (place.um) target.viewer.viewport.zoomTo(item.imageToViewportZoom(place.um === 0 ? 1 : unitsOf(target) / place.um * target.scale), centre, immediately);
}
let following = false;
function follow(from) {
  if (following || !state.together || state.panes.length < 2) return;
  const place = placeOf(from), units = unitsOf(from);
  following = true;
  for (const other of state.panes) {
    if (other === from || !other.about) continue;
    const ratio = units / unitsOf(other);
    goTo(other, { x: place.x * ratio, y: place.y * ratio, um: place.um });
  }
  following = false;
}

/* ---- drawing ---- */
function draw(target) {
  const { canvas, viewer } = target, size = [viewer.container.clientWidth, viewer.container.clientHeight], ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(size[0] * ratio) || canvas.height !== Math.round(size[1] * ratio)) { canvas.width = Math.round(size[0] * ratio); canvas.height = Math.round(size[1] * ratio); }
  const context = canvas.getContext("2d"), view = viewOf(target);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, size[0], size[1]);
  if (!view || !target.about) return;
  for (const layer of target.layers.values()) {
    if (!layer.on) continue;
    if (layer.kind === "value" && layer.colours && layer.grid) paintTiles(context, view, size, layer.grid.facts, layer.grid.cells, layer.colours, layer.opacity);
    else if (layer.kind === "grid" && layer.grid) paintGrid(context, view, size, layer.grid.facts, layer.grid.cells, layer.colour, layer.opacity);
    else if (layer.kind === "outline") paintOutline(context, view, target.about.outline, layer.colour, layer.opacity);
  }
  if (state.trial && state.trial.number === target.number && state.trial.answer) paintOutline(context, view, state.trial.answer.outline, TRIAL_COLOUR, 1);
  if (target.tile) for (const box of target.tile.boxes) paintFrame(context, view, box);
  const um = target.about.mpp ? target.about.mpp[0] / view.k : null;
  if (um) {
    const { px, text } = scaleBar(um), line = el("i");
    line.style.width = px + "px";
    target.bar.replaceChildren(line, text);
  }
  target.bar.hidden = !um;
  tellWhere(target);
}
function tellWhere(target) {
  const view = viewOf(target);
  if (!view || !target.about) { target.where.textContent = ""; return; }
  const um = target.about.mpp ? target.about.mpp[0] / view.k : null, parts = [];
  if (um) parts.push(`${short(10 / um)}x`, `${short(um)} µm/px`);
  if (target.mouse) {
    const x = view.x + target.mouse[0] / view.k, y = view.y + target.mouse[1] / view.k;
    parts.push(um ? `${short(x * target.about.mpp[0] / 1000)}, ${short(y * target.about.mpp[1] / 1000)} mm` : "", `${Math.round(x)}, ${Math.round(y)}`);
  }
  target.where.textContent = parts.filter(Boolean).join(" · ");
}

/* ---- the side ---- */
function drawSide() {
  const target = pane(), about = target && target.about;
  byId("facts").replaceChildren();
  byId("trial").hidden = !about || Boolean(INSIDE) || !state.sliders.length || !about.mpp;
  if (!about) { byId("layers").replaceChildren(el("p", { class: "muted small" }, "No slide.")); drawTile(target); return; }
  const rows = [["slide", about.id], ["size", `${about.size[0].toLocaleString("en-US")} × ${about.size[1].toLocaleString("en-US")} px`],
    ["mpp", about.mpp ? `${short(about.mpp[0])} µm/px (${about.mpp_source})` : "not known"], ["reader", `${about.reader}, ${about.vendor}`], ["case", about.case],
    ["status", about.status + (about.reason ? `: ${about.reason}` : "")], ["file", about.path], ...about.notes.map(note => ["note", note])];
  byId("facts").append(el("dl", {}, rows.filter(row => row[1]).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
  const all = [...target.layers.values()], shown = [];
  const group = (title, some) => { if (some.length) shown.push(el("h3", {}, title), ...some.map(layer => layerRow(target, layer))); };
  group("On the slide", all.filter(layer => layer.kind !== "value"));
  for (const grid of about.grids) group(`Values at ${grid.label}`, all.filter(layer => layer.kind === "value" && layer.label === grid.label));
  byId("layers").replaceChildren(...(shown.length ? shown : [el("p", { class: "muted small" }, "A slide alone has no layers: give the folder of a job.")]));
  drawLegends();
  drawTile(target);
}
function layerRow(target, layer) {
  const range = el("input", { type: "range", min: 0, max: 1, step: 0.05, value: layer.opacity, "aria-label": `Opacity of ${layer.title}`, hidden: !layer.on, oninput: event => { layer.opacity = +event.target.value; draw(target); } });
  const box = el("input", { type: "checkbox", checked: layer.on, onchange: event => toggle(target, layer, event.target.checked) });
  box.checked = layer.on;
  const swatch = layer.colour ? el("span", { class: "swatch" }) : null;
  if (swatch) swatch.style.background = layer.colour;
  return el("div", { class: "layer", "data-layer": layer.id }, el("label", {}, box, swatch, layer.kind === "value" ? layer.name : layer.title), el("div", { class: "legend-place" }), range);
}
function toggle(target, layer, on) {
  layer.on = on;
  // One field of values hides another.
  if (on && layer.kind === "value") for (const other of target.layers.values()) if (other.kind === "value" && other !== layer) other.on = false;
  if (on) load(target, layer);
  draw(target);
  drawSide();
  keepLink();
}
function drawLegends() {
  const target = pane();
  if (!target) return;
  for (const row of document.querySelectorAll(".layer")) {
    const layer = target.layers.get(row.dataset.layer), place = row.querySelector(".legend-place");
    if (!layer || !layer.on || layer.kind !== "value" || !layer.answer) { place.replaceChildren(); continue; }
    if (layer.answer.colours) { place.replaceChildren(el("p", { class: "muted small" }, "Red, green, blue: first, second, third component of this slide.")); continue; }
    const bar = el("i"), share = layer.key.startsWith("attention/");
    bar.style.background = SCALE_CSS;
    place.replaceChildren(el("div", { class: "legend-bar" }, el("span", {}, "0"), bar, el("span", {}, share ? `${short(layer.answer.top)} (uniform: ${short(1 / layer.answer.values.length)})` : short(layer.answer.top))));
  }
}

/* ---- the tile that was clicked ---- */
async function pick(target, at) {
  if (!at || !target.about || !target.about.grids.length) return;
  const found = [];
  for (const facts of target.about.grids) {
    const grid = await gridOf(target, facts.label);
    const cell = [0, 1].map(axis => Math.floor((at[axis] - facts.origin[axis]) / facts.stride[axis])), row = grid.rows.get(cell.join(","));
    if (row === undefined) continue;
    const corner = [0, 1].map(axis => facts.origin[axis] + cell[axis] * facts.stride[axis]);
    found.push({ facts, grid, row, box: [...corner, ...facts.size] });
  }
  target.tile = found.length ? { at, found, boxes: found.map(item => item.box) } : null;
  draw(target);
  drawTile(target);
  if (found.length && matchMedia("(max-width: 860px)").matches) toast("The tile is under Layers.");
}
async function drawTile(target) {
  const place = byId("tile"), tile = target && target.tile;
  if (!tile) { place.replaceChildren(el("p", { class: "muted small" }, target && target.about && target.about.grids.length ? "Click a tile." : "No grid here.")); return; }
  const parts = [], finest = tile.found[tile.found.length - 1];
  if (!INSIDE) {
    parts.push(el("div", { class: "tiles-two" }, tile.found.slice().reverse().map(item => {
      const figure = el("figure", {}, el("img", { src: `slides/${target.number}/tiles/${labelPath(item.facts.label)}/${item.row}.png`, alt: `tile ${item.row} at ${item.facts.label}` }));
      if (item !== finest) {
        const mark = el("span", { class: "mark" });
        [["left", 0, 2], ["top", 1, 3]].forEach(([side, axis, extent]) => { mark.style[side] = 100 * (finest.box[axis] - item.box[axis]) / item.box[extent] + "%"; });
        mark.style.width = 100 * finest.box[2] / item.box[2] + "%";
        mark.style.height = 100 * finest.box[3] / item.box[3] / (1 + 0) + "%";
        const frame = el("div", {}); frame.style.position = "relative"; frame.append(figure.firstChild, mark); figure.append(frame);
      }
      figure.append(el("figcaption", {}, `${item.facts.label}, tile ${item.row}` + familyText(tile, item)));
      return figure;
    })));
  }
  const table = el("tbody");
  parts.push(el("table", { class: "values" }, table));
  const near = el("div");
  parts.push(near);
  place.replaceChildren(...parts);
  for (const item of tile.found.slice().reverse()) {
    for (const layer of target.layers.values()) {
      if (layer.kind !== "value" || layer.label !== item.facts.label || layer.key.startsWith("components/")) continue;
      if (!layer.answer) await load(target, layer);
      if (target.tile !== tile) return;
      if (layer.answer) table.append(el("tr", {}, el("td", {}, `${layer.label} ${layer.name}`), el("td", {}, short(layer.answer.values[item.row]))));
    }
  }
  const encoders = INSIDE ? [] : [...target.layers.values()].filter(layer => layer.kind === "value" && layer.key.startsWith("components/") && tile.found.some(item => item.facts.label === layer.label));
  if (encoders.length) near.append(nearestTool(target, tile, encoders));
}
function familyText(tile, item) {
  const k = tile.found.indexOf(item), finer = tile.found[k + 1];
  const children = finer && finer.grid.parent ? finer.grid.parent.filter(row => row === item.row).length : 0;
  return (item.grid.parent && k > 0 ? `, in tile ${item.grid.parent[item.row]} of ${tile.found[k - 1].facts.label}` : "") + (children ? `, ${children} children at ${finer.facts.label}` : "");
}
function nearestTool(target, tile, encoders) {
  const select = el("select", { "aria-label": "Features" }, encoders.map(layer => el("option", { value: layer.id }, `${layer.label} ${layer.key.slice("components/".length)}`)));
  const results = el("div", { class: "near" });
  const find = async scope => {
    const layer = target.layers.get(select.value), item = tile.found.find(one => one.facts.label === layer.label), encoder = layer.key.slice("components/".length);
    results.replaceChildren(el("span", {}, "looking ..."));
    let found;
    try { found = await ask(`slides/${target.number}/tiles/${labelPath(layer.label)}/${item.row}/nearest?encoder=${encodeURIComponent(encoder)}&in=${scope}`); } catch (error) { results.replaceChildren(error.message); return; }
    results.replaceChildren(...found.map(one => el("button", { type: "button", title: `${state.slides[one.slide].id}, tile ${one.row}, similarity ${one.similarity}`, "data-row": one.row, onclick: () => jump(target, one.slide, layer.label, one.row) },
      el("img", { src: `slides/${one.slide}/tiles/${labelPath(layer.label)}/${one.row}.png`, alt: `tile ${one.row}`, loading: "lazy" }), el("span", {}, short(one.similarity)))));
    if (!found.length) results.append("none");
  };
  return el("div", {}, el("p", { class: "small muted" }, "Most alike by features"), select, " ",
    el("button", { type: "button", onclick: () => find("slide") }, "In this slide"), " ", state.slides.length > 1 ? el("button", { type: "button", onclick: () => find("job") }, "In the job") : "", results);
}
async function jump(target, number, label, row) {
  if (number !== target.number) await openSlide(target, number);
  if (!target.about) return;
  const grid = await gridOf(target, label), facts = grid.facts;
  const centre = [0, 1].map(axis => facts.origin[axis] + grid.cells[2 * row + axis] * facts.stride[axis] + facts.size[axis] / 2);
  const go = () => { goTo(target, { x: centre[0], y: centre[1], um: unitsOf(target) * facts.size[0] / 300 }); pick(target, centre); };
  if (target.viewer.world.getItemCount()) go(); else target.viewer.addOnceHandler("open", go);
}

/* ---- settings that are tried ---- */
function drawTrial() {
  const body = byId("trial-body");
  body.hidden = !state.trial;
  byId("trial-toggle").setAttribute("aria-pressed", String(Boolean(state.trial)));
  if (!state.trial) { state.panes.forEach(draw); return; }
  const result = el("p", { id: "trial-result", class: "small" }), wrote = el("pre", { id: "trial-how" });
  body.replaceChildren(...state.sliders.map(slider => {
    const shown = el("b", {}, short(slider.value));
    return el("label", { title: slider.help }, slider.name, shown, el("input", { type: "range", min: slider.low, max: slider.high, step: slider.step, value: slider.value, "data-setting": slider.name,
      oninput: event => { state.trial.values[slider.name] = +event.target.value; shown.textContent = short(+event.target.value); tryNow(); } }));
  }), result, wrote);
}
let trying = null;
async function tryNow() {
  const trial = state.trial, target = pane();
  if (!trial || !target.about) return;
  if (trying) trying.abort();
  const mine = trying = new AbortController();
  trial.number = target.number;
  try { trial.answer = await ask(`slides/${target.number}/trial?` + new URLSearchParams(trial.values), mine.signal); } catch (error) { if (!mine.signal.aborted) byId("trial-result").textContent = error.message; return; }
  if (mine.signal.aborted || state.trial !== trial) return;
  const counts = Object.entries(trial.answer.tiles).map(([label, count]) => `${count.toLocaleString("en-US")} tiles at ${label}`).join(", ");
  byId("trial-result").textContent = trial.answer.reason || `${short(trial.answer.tissue_mm2)} mm² of tissue, ${counts}`;
  const names = Object.keys(trial.values);
  byId("trial-how").textContent = names.length ? "for all slides:\n" + names.map(n => `--${n.replaceAll("_", "-")} ${trial.values[n]}`).join(" ") +
    `\n\nfor this slide, in the slide list:\nslide,${names.join(",")}\n${target.about.path || target.about.id},${names.map(n => trial.values[n]).join(",")}` : "Move a slider: the outline and the tiles that the command would give show at once.";
  draw(target);
}

/* ---- links ---- */
let linkTimer = 0;
function keepLink() {
  if (state.restoring) return;
  clearTimeout(linkTimer);
  linkTimer = setTimeout(() => history.replaceState(null, "", "#" + linkText()), 250);
}
function linkText() {
  const parts = new URLSearchParams();
  state.panes.forEach((target, k) => {
    if (!target.about) return;
    const place = placeOf(target), end = k ? "2" : "";
    parts.set("s" + end, target.about.id);
    if (place && (k === 0 || !state.together)) parts.set("at" + end, [place.x.toFixed(1), place.y.toFixed(1), place.um.toPrecision(5)].join(","));
    parts.set("on" + end, [...target.layers.values()].filter(layer => layer.on).map(layer => layer.id).join("|"));
  });
  if (!state.together) parts.set("apart", "1");
  return parts.toString();
}
async function restore() {
  const parts = new URLSearchParams(location.hash.slice(1));
  state.together = !parts.get("apart");
  const slide = end => { const i = state.slides.findIndex(s => s.id === parts.get("s" + end)); return i >= 0 ? i : 0; };
  const place = end => { const text = parts.get("at" + end); if (!text) return null; const [x, y, um] = text.split(",").map(Number); return [x, y, um].every(isFinite) ? { x, y, um } : null; };
  const use = async (target, end) => {
    await openSlide(target, slide(end), place(end));
    if (parts.get("on" + end) !== null) {
      const on = new Set(parts.get("on" + end).split("|"));
      for (const layer of target.layers.values()) { layer.on = on.has(layer.id); if (layer.on) load(target, layer); }
    }
  };
  await use(addPane(), "");
  if (parts.get("s2") !== null) { split(); await use(state.panes[1], "2"); activate(0); }
  state.panes[0].box.classList.add("active");
  state.restoring = false;
  drawSide();
}

/* ---- buttons and keys ---- */
function split() {
  const two = state.panes.length < 2;
  if (two) {
    const target = addPane();
    document.body.classList.add("split");
    if (!state.restoring) openSlide(target, state.panes[0].number, placeOf(state.panes[0])).then(() => activate(1));
  } else {
    const gone = state.panes.pop();
    gone.viewer.destroy();
    gone.box.remove();
    document.body.classList.remove("split");
    state.active = 0;
    state.panes[0].box.classList.add("active");
    drawSide();
    drawRows();
  }
  byId("split").setAttribute("aria-pressed", String(two));
  byId("sync").hidden = !two;
  byId("sync").setAttribute("aria-pressed", String(state.together));
  keepLink();
}
function step(by) {
  const at = state.shown.indexOf(pane().number), next = state.shown[Math.min(Math.max(at + by, 0), state.shown.length - 1)];
  if (next === undefined || next === pane().number) return;
  byId("rows").scrollTop = Math.max(state.shown.indexOf(next) * ROW_PX - 120, 0);
  openSlide(pane(), next);
}
function toggleKind(test) {
  const target = pane(), some = [...target.layers.values()].filter(test);
  if (some.length) toggle(target, some[0], !some[0].on);
}
function showTab(name) { document.body.dataset.tab = name; for (const button of document.querySelectorAll("#tabs button")) button.setAttribute("aria-pressed", String(button.dataset.tab === name)); if (name === "list") drawRows(); }
const KEYS = [
  ["n", "next slide", () => step(1)], ["p", "previous slide", () => step(-1)], ["o", "tissue outline", () => toggleKind(l => l.kind === "outline")],
  ["g", "coarsest grid", () => toggleKind(l => l.kind === "grid")], ["h", "finest grid", () => { const grids = [...pane().layers.values()].filter(l => l.kind === "grid"); if (grids.length) toggle(pane(), grids[grids.length - 1], !grids[grids.length - 1].on); }],
  ["a", "attention", () => toggleKind(l => l.kind === "value" && l.key.startsWith("attention/"))], ["s", "split", () => split()], ["f", "whole slide", () => pane().viewer.viewport.goHome()],
  ["1", "pixel for pixel", () => { const place = placeOf(pane()); if (place) goTo(pane(), { ...place, um: unitsOf(pane()) }, false); }], ["?", "these keys", () => byId("keys").showModal()],
];
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const key = KEYS.find(one => one[0] === event.key);
  if (key && pane()) { event.preventDefault(); key[2](); }
});
byId("keys-rows").append(...KEYS.map(([key, text]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, text))), el("tr", {}, el("td", {}, el("kbd", {}, "+"), " ", el("kbd", {}, "−"), " ", el("kbd", {}, "arrows")), el("td", {}, "zoom and move, once the view was clicked")));
byId("help").onclick = () => byId("keys").showModal();
byId("split").onclick = () => split();
byId("sync").onclick = () => { state.together = !state.together; byId("sync").setAttribute("aria-pressed", String(state.together)); if (state.together) follow(pane()); keepLink(); };
byId("link").onclick = async () => {
  history.replaceState(null, "", "#" + linkText());
  try { await navigator.clipboard.writeText(location.href); toast("The address of this view is copied. It works while this viewer runs."); } catch { toast("Copy the address of the page: it leads back to this view."); }
};
byId("theme").onclick = () => {
  const root = document.documentElement, dark = (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "light" : "dark";
};
byId("search").oninput = chooseRows;
byId("sort").onchange = chooseRows;
byId("rows").addEventListener("scroll", drawRows);
byId("trial-toggle").onclick = () => { state.trial = state.trial ? null : { values: {} }; drawTrial(); tryNow(); };
for (const button of document.querySelectorAll("#tabs button")) button.onclick = () => showTab(button.dataset.tab);
addEventListener("resize", () => { drawRows(); });

(async () => {
  const answer = await ask("slides");
  Object.assign(state, { slides: answer.slides, sliders: answer.sliders });
  byId("title").textContent = answer.job || answer.title;
  document.title = `${answer.title} · wsi-pipe view`;
  document.body.classList.toggle("alone", Boolean(INSIDE));
  chooseRows();
  showTab("slide");
  await restore();
})().catch(error => toast(error.message));
