/* Tables and the list of slides: filter, sort, one page at a time, so that ten thousand slides stay quick. */
const S = DATA.slides, COUNT = S.id.length, FINEST = DATA.labels.length - 1;

function chip(kind, text) { return el("span", { class: "chip " + kind }, text || kind); }

/* columns: [{name, value(row), show(row), num, cls}]; sorts by any column; shows pageSize rows at a time. */
function pagedTable(place, { rows, columns, pageSize = 50, label, sort = null }) {
  const state = { page: 0, sort, down: false };
  let order = rows.slice();
  const table = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label });
  const pager = el("div", { class: "tools" });
  const resort = () => {
    order = rows.slice();
    if (state.sort !== null) {
      const value = columns[state.sort].value, sign = state.down ? -1 : 1;
      order.sort((a, b) => { const x = value(a), y = value(b); return sign * (typeof x === "string" || typeof y === "string" ? String(x ?? "").localeCompare(String(y ?? ""), "en", { numeric: true }) : (x ?? -Infinity) - (y ?? -Infinity)); });
    }
  };
  const draw = () => {
    const pages = Math.max(Math.ceil(order.length / pageSize), 1);
    state.page = Math.min(state.page, pages - 1);
    const head = columns.map((c, i) => el("th", { class: c.num ? "num" : null, "aria-sort": state.sort === i ? (state.down ? "descending" : "ascending") : null },
      c.value ? el("button", { type: "button", onclick: () => { state.down = state.sort === i ? !state.down : !!c.num; state.sort = i; state.page = 0; resort(); draw(); } }, c.name) : c.name));
    const body = order.slice(state.page * pageSize, (state.page + 1) * pageSize).map(row =>
      el("tr", { class: row.cls || null }, columns.map(c => el("td", { class: [c.num ? "num" : "", c.cls || ""].join(" ").trim() || null }, c.show ? c.show(row) : String(c.value(row) ?? "–")))));
    table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
    pager.replaceChildren(...(pages > 1 ? pagerParts(state.page, pages, order.length, p => { state.page = p; draw(); }) : []));
  };
  resort(); draw();
  place.replaceChildren(table, pager);
  return { update(next) { rows = next; state.page = 0; resort(); draw(); } };
}

function pagerParts(page, pages, total, go) {
  const field = el("input", { type: "number", min: 1, max: pages, value: page + 1, "aria-label": "Page", style: "width:5.5em",
    onchange: event => go(Math.min(Math.max(Math.round(+event.target.value || 1), 1), pages) - 1) });
  return [
    el("button", { type: "button", disabled: page === 0, onclick: () => go(page - 1) }, "‹ Previous"),
    el("span", { class: "muted" }, "page "), field, el("span", { class: "muted" }, `of ${grouped(pages)} · ${grouped(total)} in all`),
    el("button", { type: "button", disabled: page >= pages - 1, onclick: () => go(page + 1) }, "Next ›"),
  ];
}

/* The address of a slide's picture, embedded or in the folder beside the page; null where there is none. */
function picture(i, kind) {
  const own = DATA.embedded[S.id[i]];
  if (own && own[kind]) return own[kind];
  const bit = kind === "tissue" ? 1 : 2;
  return S.pictures[i] & bit ? "thumbnails/" + encodeURIComponent(S.id[i]) + (bit === 1 ? ".jpg" : ".grid.jpg") : null;
}

function tilesText(i) { return DATA.labels.map((label, k) => `${grouped(S.tiles[i][k])} at ${label}`).join(" · "); }

const SORTS = {
  order: ["as given", (a, b) => a - b],
  name: ["name", (a, b) => S.id[a].localeCompare(S.id[b], "en", { numeric: true })],
  most: ["most tiles", (a, b) => (S.tiles[b][FINEST] || 0) - (S.tiles[a][FINEST] || 0)],
  fewest: ["fewest tiles", (a, b) => (S.tiles[a][FINEST] || 0) - (S.tiles[b][FINEST] || 0)],
  tissue: ["most tissue", (a, b) => (S.tissue_mm2[b] || 0) - (S.tissue_mm2[a] || 0)],
  slow: ["slowest", (a, b) => (S.seconds[b] || 0) - (S.seconds[a] || 0)],
};
const FILTERS = {
  all: () => true, done: i => S.status[i] === "done", empty: i => S.status[i] === "empty",
  failed: i => S.status[i] === "failed", outliers: i => S.flags[i].length > 0, noted: i => S.notes[i].length > 0,
};
const list = { shown: [], page: 0, size: 24, view: COUNT > 200 ? "table" : "pictures", kind: "tissue", filter: "all", sort: "order", text: "" };
const haystack = S.id.map((id, i) => (id + "\n" + S.path[i] + "\n" + (S.reason[i] || "") + "\n" + S.notes[i].join("\n")).toLowerCase());

function choose() {
  const words = list.text.toLowerCase().split(/\s+/).filter(Boolean), passes = FILTERS[list.filter];
  list.shown = [];
  for (let i = 0; i < COUNT; i += 1) if (passes(i) && words.every(word => haystack[i].includes(word))) list.shown.push(i);
  if (list.sort !== "order") list.shown.sort((a, b) => SORTS[list.sort][1](a, b) || a - b);
}
function showSlides(change, keepPage = false) {
  Object.assign(list, change || {});
  choose();
  if (!keepPage) list.page = 0;
  drawSlides();
}
function card(i) {
  const source = picture(i, list.kind) || picture(i, "tissue");
  const top = source
    ? el("button", { class: "shot", type: "button", "aria-label": "Look closer at " + S.id[i], onclick: () => openViewer(i) }, el("img", { src: source, alt: `${S.id[i]}, ${list.kind === "grid" ? "grids" : "tissue contours"}`, loading: source.startsWith("data:") ? null : "lazy", decoding: "async" }))
    : el("div", { class: "none" }, S.reason[i] || "no picture");
  return el("article", { class: "tile-card" }, top, el("div", { class: "text" }, el("div", { class: "name" }, S.id[i]),
    el("div", { class: "chips" }, chip(S.status[i]), S.flags[i].map(flag => chip("outlier", flag))),
    S.status[i] === "done" ? el("div", { class: "muted" }, tilesText(i)) : null,
    S.tissue_mm2[i] ? el("div", { class: "muted" }, `${number(S.tissue_mm2[i])} mm² tissue · ${seconds(S.seconds[i])}`) : null,
    S.status[i] !== "done" && S.reason[i] && source ? el("div", { class: "muted" }, S.reason[i]) : null,
    S.notes[i].length ? el("div", { class: "muted" }, S.notes[i].join("; ")) : null));
}
function drawSlides() {
  const size = list.view === "pictures" ? list.size : 50, pages = Math.max(Math.ceil(list.shown.length / size), 1);
  list.page = Math.min(list.page, pages - 1);
  const view = byId("slides-view"), now = list.shown.slice(list.page * size, (list.page + 1) * size);
  if (!list.shown.length) view.replaceChildren(el("p", { class: "muted" }, "No slide fits."));
  else if (list.view === "pictures") view.replaceChildren(el("div", { class: "gallery" }, now.map(card)));
  else view.replaceChildren(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Slides" }, el("table", {},
    el("thead", {}, el("tr", {}, ["Slide", "Status"].map(t => el("th", {}, t)), DATA.labels.map(l => el("th", { class: "num" }, "Tiles " + l)), ["Tissue mm²", "Seconds"].map(t => el("th", { class: "num" }, t)), el("th", {}, "Notes"))),
    el("tbody", {}, now.map(i => el("tr", {},
      el("td", { class: "id" }, picture(i, "tissue") ? el("a", { href: "#slides", onclick: event => { event.preventDefault(); openViewer(i); } }, S.id[i]) : S.id[i]),
      el("td", {}, chip(S.status[i])), S.tiles[i].map(n => el("td", { class: "num" }, grouped(n))),
      el("td", { class: "num" }, number(S.tissue_mm2[i])), el("td", { class: "num" }, number(S.seconds[i])),
      el("td", {}, [S.mpp[i] ? S.mpp[i].replace(" (", " um/px (") : null, ...S.flags[i], ...S.notes[i], S.reason[i]].filter(Boolean).join("; "))))))));
  fill("slides-pager", pages > 1 ? pagerParts(list.page, pages, list.shown.length, p => { list.page = p; drawSlides(); byId("slides").scrollIntoView(); }) : []);
  drawTools();
}
function drawTools() {
  const press = (on, text, action) => el("button", { type: "button", "aria-pressed": String(on), onclick: action }, text);
  const counts = Object.fromEntries(Object.keys(FILTERS).map(name => [name, 0]));
  for (let i = 0; i < COUNT; i += 1) for (const name of Object.keys(FILTERS)) if (FILTERS[name](i)) counts[name] += 1;
  const tools = byId("slides-tools");
  let search = byId("slides-search");
  if (!search) {
    search = el("input", { type: "search", id: "slides-search", class: "grow", placeholder: "Search names, paths, reasons", "aria-label": "Search slides", oninput: event => showSlides({ text: event.target.value }) });
    tools.append(search, el("span", { id: "slides-choices", style: "display:contents" }));
  }
  if (search.value !== list.text) search.value = list.text;
  fill("slides-choices",
    el("span", { class: "segmented", role: "group", "aria-label": "Which slides" }, Object.keys(FILTERS).filter(n => n === "all" || counts[n]).map(n => press(list.filter === n, `${n} ${grouped(counts[n])}`, () => showSlides({ filter: n })))),
    el("select", { "aria-label": "Sort slides", onchange: event => showSlides({ sort: event.target.value }) }, Object.entries(SORTS).map(([key, [text]]) => el("option", { value: key, selected: list.sort === key }, text))),
    el("span", { class: "segmented", role: "group", "aria-label": "View" }, press(list.view === "pictures" && list.kind === "tissue", "tissue", () => showSlides({ view: "pictures", kind: "tissue" }, true)),
      press(list.view === "pictures" && list.kind === "grid", "grids", () => showSlides({ view: "pictures", kind: "grid" }, true)), press(list.view === "table", "table", () => showSlides({ view: "table" }, true))));
}
