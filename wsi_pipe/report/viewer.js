/* One slide's picture, large: wheel, buttons, plus and minus zoom; drag moves; arrows go to the next slide. */
const look = { i: 0, kind: "tissue", zoom: 1, x: 0, y: 0, fit: 1 };
const viewer = byId("viewer"), stage = byId("viewer-stage"), image = byId("viewer-image");

function place() { image.style.transform = `translate(${look.x}px, ${look.y}px) scale(${look.zoom})`; }
function fitImage() {
  if (!image.naturalWidth) return;
  look.fit = Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight);
  look.zoom = look.fit;
  look.x = (stage.clientWidth - image.naturalWidth * look.zoom) / 2;
  look.y = (stage.clientHeight - image.naturalHeight * look.zoom) / 2;
  place();
}
function zoomAt(px, py, factor) {
  const next = Math.min(Math.max(look.zoom * factor, look.fit * 0.5), Math.max(look.fit * 16, 8));
  look.x = px - (px - look.x) * next / look.zoom;
  look.y = py - (py - look.y) * next / look.zoom;
  look.zoom = next;
  place();
}
function zoomMiddle(factor) { zoomAt(stage.clientWidth / 2, stage.clientHeight / 2, factor); }
function showPicture() {
  const i = look.i;
  image.src = picture(i, look.kind) || picture(i, "tissue") || "data:,";
  image.alt = `${S.id[i]}, ${look.kind === "grid" ? "grids" : "tissue contours"}`;
  byId("viewer-title").textContent = S.id[i];
  byId("viewer-facts").textContent = [S.status[i], S.status[i] === "done" ? tilesText(i) : S.reason[i], S.tissue_mm2[i] ? `${number(S.tissue_mm2[i])} mm² tissue` : null, ...S.flags[i], S.mpp[i] ? S.mpp[i].replace(" (", " um/px (") : null, ...S.notes[i], S.path[i]].filter(Boolean).join(" · ");
  fill("viewer-kinds", [["tissue", "tissue"], ["grid", "grids"]].filter(([kind]) => picture(i, kind)).map(([kind, text]) =>
    el("button", { type: "button", "aria-pressed": String(look.kind === kind), onclick: () => { look.kind = kind; showPicture(); } }, text)));
}
function openViewer(i) {
  look.i = i; look.kind = picture(i, list.kind) ? list.kind : "tissue";
  viewer.showModal();
  showPicture();
  stage.focus();
}
function step(by) {
  const within = list.shown.filter(i => picture(i, "tissue")), at = within.indexOf(look.i);
  if (!within.length) return;
  look.i = within[(at + by + within.length) % within.length];
  showPicture();
}
image.addEventListener("load", fitImage);
new ResizeObserver(fitImage).observe(stage);
stage.addEventListener("wheel", event => { event.preventDefault(); const box = stage.getBoundingClientRect(); zoomAt(event.clientX - box.left, event.clientY - box.top, Math.exp(-event.deltaY * 0.0015)); }, { passive: false });
const fingers = new Map();
stage.addEventListener("pointerdown", event => { stage.setPointerCapture(event.pointerId); fingers.set(event.pointerId, [event.clientX, event.clientY]); });
stage.addEventListener("pointermove", event => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const now = [event.clientX, event.clientY];
  if (fingers.size === 2) {
    const other = [...fingers.entries()].find(([id]) => id !== event.pointerId)[1], box = stage.getBoundingClientRect();
    const apart = p => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
    zoomAt((now[0] + other[0]) / 2 - box.left, (now[1] + other[1]) / 2 - box.top, apart(now) / apart(before));
  } else { look.x += now[0] - before[0]; look.y += now[1] - before[1]; place(); }
  fingers.set(event.pointerId, now);
});
for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, event => fingers.delete(event.pointerId));
stage.addEventListener("dblclick", event => { const box = stage.getBoundingClientRect(); zoomAt(event.clientX - box.left, event.clientY - box.top, 2); });
byId("zoom-in").addEventListener("click", () => zoomMiddle(1.5));
byId("zoom-out").addEventListener("click", () => zoomMiddle(1 / 1.5));
byId("zoom-fit").addEventListener("click", fitImage);
byId("viewer-previous").addEventListener("click", () => step(-1));
byId("viewer-next").addEventListener("click", () => step(1));
byId("viewer-close").addEventListener("click", () => viewer.close());
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", event => {
  const keys = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), "+": () => zoomMiddle(1.5), "=": () => zoomMiddle(1.5), "-": () => zoomMiddle(1 / 1.5), "0": fitImage };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
