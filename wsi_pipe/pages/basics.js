/* What every page needs: its data, elements, numbers, theme, tooltip. Text goes in as text, never as HTML. */
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG_NS = "http://www.w3.org/2000/svg";

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter(child => child !== null && child !== undefined && child !== false));
  return node;
}
function el(tag, attributes, ...children) { return build(document.createElement(tag), attributes, children); }
function svgEl(tag, attributes, ...children) { return build(document.createElementNS(SVG_NS, tag), attributes, children); }
function byId(id) { return document.getElementById(id); }
function fill(id, ...children) { const node = byId(id); node.replaceChildren(...children.flat()); return node; }

const THIN = "\u202f";
function grouped(value) { return Math.round(value).toLocaleString("en-US"); }
/* About three significant figures: 0.0123, 1.23, 12.3, 123, 1,234. */
function number(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 100) return grouped(value);
  return String(+value.toPrecision(size >= 0.001 ? 3 : 2));
}
function seconds(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  if (value === 0) return "0 s";
  if (value < 1e-3) return number(value * 1e6) + THIN + "µs";
  if (value < 1) return number(value * 1e3) + THIN + "ms";
  if (value < 120) return number(value) + THIN + "s";
  if (value < 7200) return number(value / 60) + THIN + "min";
  if (value < 172800) return number(value / 3600) + THIN + "h";
  return number(value / 86400) + THIN + "days";
}
function bytes(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return number(value) + THIN + units[unit];
}
function percent(value) { return value > 0 && value < 0.001 ? "<0.1%" : number(100 * value) + "%"; }

const tip = document.body.appendChild(el("div", { id: "tip", role: "status" }));
function showTip(event, text) {
  tip.textContent = text;
  tip.classList.add("on");
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
}
function hideTip() { tip.classList.remove("on"); }

function themeButton() {
  const root = document.documentElement;
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const button = el("button", { type: "button", "aria-label": "Change between light and dark", onclick: () => {
    root.dataset.theme = dark() ? "light" : "dark";
    button.textContent = dark() ? "☀" : "☾";
  } }, dark() ? "☀" : "☾");
  return button;
}
for (const place of document.querySelectorAll("[data-theme-button]")) place.append(themeButton());
