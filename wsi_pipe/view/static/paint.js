"use strict";
/* Drawing over the slide: outlines, grids, values of tiles as colours, scale bar. Nothing here asks the server. */

/* Cividis (Nunez, Anderton and Renslow 2018), which colour-blind people see as others do, at nine places. */
const SCALE = [[0, 34, 78], [26, 56, 111], [67, 78, 108], [98, 100, 112], [125, 124, 120], [155, 148, 119], [187, 175, 112], [221, 204, 95], [254, 232, 56]];
const GRID_COLOURS = ["rgb(16 72 200)", "rgb(0 140 105)", "rgb(196 120 0)", "rgb(90 90 90)"];
const OUTLINE_COLOUR = "rgb(0 128 64)", TRIAL_COLOUR = "rgb(200 30 120)";

function scaleColour(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1), i = Math.min(Math.floor(at), SCALE.length - 2), rest = at - i;
  return SCALE[i].map((value, k) => Math.round(value + rest * (SCALE[i + 1][k] - value)));
}
const SCALE_CSS = "linear-gradient(90deg, " + SCALE.map(c => `rgb(${c.join(" ")})`).join(", ") + ")";
const SCALE_256 = Array.from({ length: 256 }, (_, i) => `rgb(${scaleColour(i / 255).join(" ")})`);

/* The colour of each tile of a layer's answer; null where a tile has no value. */
function tileColours(answer) {
  if (answer.colours) {
    const c = answer.colours;
    return Array.from({ length: c.length / 3 }, (_, i) => `rgb(${c[3 * i]} ${c[3 * i + 1]} ${c[3 * i + 2]})`);
  }
  const top = answer.top > 0 ? answer.top : 1;
  return answer.values.map(value => value === null ? null : SCALE_256[Math.round(Math.min(Math.max(value / top, 0), 1) * 255)]);
}

/* view: {x, y, k} with screen = (level-0 - (x, y)) * k. */
function paintTiles(context, view, size, grid, cells, colours, opacity) {
  const [ox, oy] = grid.origin, [sx, sy] = grid.stride, [w, h] = grid.size;
  context.globalAlpha = opacity;
  for (let i = 0; i < cells.length / 2; i += 1) {
    const colour = colours[i];
    if (colour === null) continue;
    const left = (ox + cells[2 * i] * sx - view.x) * view.k, top = (oy + cells[2 * i + 1] * sy - view.y) * view.k;
    const right = left + w * view.k, bottom = top + h * view.k;
    if (right < 0 || bottom < 0 || left > size[0] || top > size[1]) continue;
    context.fillStyle = colour;
    // Edges on whole pixels: neighbours neither overlap nor leave a gap.
    const x0 = Math.round(left), y0 = Math.round(top);
    context.fillRect(x0, y0, Math.max(Math.round(right) - x0, 1), Math.max(Math.round(bottom) - y0, 1));
  }
  context.globalAlpha = 1;
}

function paintGrid(context, view, size, grid, cells, colour, opacity) {
  const [ox, oy] = grid.origin, [sx, sy] = grid.stride, [w, h] = grid.size;
  // Lines closer than this would hide the tissue: then tiles are only tinted.
  if (w * view.k < 5) { paintTiles(context, view, size, grid, cells, { length: cells.length / 2, ...Array(cells.length / 2).fill(colour) }, opacity * 0.35); return; }
  context.globalAlpha = opacity;
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.beginPath();
  for (let i = 0; i < cells.length / 2; i += 1) {
    const left = (ox + cells[2 * i] * sx - view.x) * view.k, top = (oy + cells[2 * i + 1] * sy - view.y) * view.k;
    if (left + w * view.k < 0 || top + h * view.k < 0 || left > size[0] || top > size[1]) continue;
    context.rect(Math.round(left) + 0.5, Math.round(top) + 0.5, Math.round(w * view.k), Math.round(h * view.k));
  }
  context.stroke();
  context.globalAlpha = 1;
}

function paintOutline(context, view, outline, colour, opacity) {
  context.globalAlpha = opacity;
  context.lineJoin = "round";
  for (const [width, stroke] of [[4, "rgb(255 255 255 / .8)"], [2, colour]]) {
    context.lineWidth = width;
    context.strokeStyle = stroke;
    context.beginPath();
    for (const polygon of outline) for (const ring of polygon) {
      for (let i = 0; i < ring.length; i += 2) {
        const x = (ring[i] - view.x) * view.k, y = (ring[i + 1] - view.y) * view.k;
        if (i === 0) context.moveTo(x, y); else context.lineTo(x, y);
      }
      context.closePath();
    }
    context.stroke();
  }
  context.globalAlpha = 1;
}

function paintFrame(context, view, box) {
  const [x, y, w, h] = box, at = [(x - view.x) * view.k, (y - view.y) * view.k, w * view.k, h * view.k];
  context.lineWidth = 4; context.strokeStyle = "#fff"; context.strokeRect(...at);
  context.lineWidth = 2; context.strokeStyle = "#c2386e"; context.strokeRect(...at);
}

/* The longest of 1, 2, 5 times a power of ten that is no longer than 140 pixels: {px, text}. */
function scaleBar(umPerPx) {
  const most = 140 * umPerPx, ten = 10 ** Math.floor(Math.log10(most));
  const um = [5, 2, 1].map(n => n * ten).find(n => n <= most) || ten;
  const text = um >= 1000 ? `${um / 1000} mm` : um >= 1 ? `${um} µm` : `${Math.round(um * 1000)} nm`;
  return { px: um / umPerPx, text };
}

/* Flat pairs to a row number: the tile at a cell. */
function cellRows(cells) {
  const rows = new Map();
  for (let i = 0; i < cells.length / 2; i += 1) rows.set(cells[2 * i] + "," + cells[2 * i + 1], i);
  return rows;
}
