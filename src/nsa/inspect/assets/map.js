"use strict";

/* The block map: one row per query, one column per position read; and the strip of one row. */

function palette() {
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (name) => {
    probe.fillStyle = style.getPropertyValue(`--${name}`).trim();
    probe.fillRect(0, 0, 1, 1);
    return probe.getImageData(0, 0, 1, 1).data.slice(0, 3);
  };
  const names = ["cmp", "slc", "win", "future", "past", "forced", "ink", "surface", "line", "muted"];
  return Object.fromEntries(names.map((name) => [name, rgb(name)]));
}

const css = (color, alpha = 1) => `rgb(${color[0]} ${color[1]} ${color[2]} / ${alpha})`;

function fitCanvas(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/* Colour of each position for one query: written into `row`, three bytes per token. */
function paintRow(cell, t, view, colors, row) {
  const { geometry, tokens } = cell.meta;
  let heat = null;
  if (view === "compressed") {
    heat = density(cell, t);
    const peak = heat.reduce((a, b) => Math.max(a, b), 0) || 1;
    heat = heat.map((p) => Math.sqrt(p / peak));
  }
  for (let s = 0; s < tokens.length; s++) {
    let color = colors.past;
    let blend = 1;
    if (s > t) color = colors.future;
    else if (heat) {
      color = colors.cmp;
      blend = heat[Math.floor(s / geometry.compress_stride)];
    } else {
      const block = Math.floor(s / geometry.block_size);
      const kind = readsBlock(cell, t, block) ? blockKind(cell.meta, t, block) : null;
      if (kind === "chosen") color = colors.slc;
      else if (s > t - geometry.window_size) color = colors.win;
      else if (kind) color = colors.forced;
    }
    for (let c = 0; c < 3; c++) {
      row[3 * s + c] = colors.past[c] + (color[c] - colors.past[c]) * blend;
    }
  }
}

function drawMap(canvas, cell, view, colors, width, height) {
  const context = fitCanvas(canvas, width, height);
  const tokens = cell.meta.tokens.length;
  const image = context.createImageData(canvas.width, canvas.height);
  const row = new Uint8ClampedArray(3 * tokens);
  const source = Int32Array.from({ length: canvas.width }, (_, x) => Math.floor((x * tokens) / canvas.width));
  let painted = -1;
  for (let y = 0; y < canvas.height; y++) {
    const t = Math.floor((y * tokens) / canvas.height);
    const start = 4 * y * canvas.width;
    if (t === painted) {
      image.data.copyWithin(start, start - 4 * canvas.width, start);
      continue;
    }
    painted = t;
    paintRow(cell, t, view, colors, row);
    for (let x = 0; x < canvas.width; x++) {
      const from = 3 * source[x];
      image.data[start + 4 * x] = row[from];
      image.data[start + 4 * x + 1] = row[from + 1];
      image.data[start + 4 * x + 2] = row[from + 2];
      image.data[start + 4 * x + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

/* The line of the query in view, and a fainter one for the query that is kept. */
function drawCursor(canvas, meta, shown, kept, colors, width, height) {
  const context = fitCanvas(canvas, width, height);
  const tokens = meta.tokens.length;
  const line = (t, alpha) => {
    const y = ((t + 0.5) / tokens) * height;
    context.fillStyle = css(colors.surface, 0.9 * alpha);
    context.fillRect(0, y - 2, width, 4);
    context.fillStyle = css(colors.ink, alpha);
    context.fillRect(0, y - 1, width, 2);
    context.beginPath();
    context.moveTo(0, y - 6);
    context.lineTo(9, y);
    context.lineTo(0, y + 6);
    context.fill();
  };
  if (kept !== shown) line(kept, 0.35);
  line(shown, 1);
}

/* One row enlarged: bars of compressed attention above, what is read in full below. */
function drawStrip(canvas, cell, t, colors, width, height) {
  const context = fitCanvas(canvas, width, height);
  const { geometry, tokens, numBlocks } = cell.meta;
  const base = height - 16;
  const at = (s) => (Math.min(s, tokens.length) / tokens.length) * width;
  context.fillStyle = css(colors.future);
  context.fillRect(at(t + 1), 0, width - at(t + 1), height);
  const heat = density(cell, t);
  const peak = heat.reduce((a, b) => Math.max(a, b), 0);
  context.fillStyle = css(colors.cmp);
  heat.forEach((p, i) => {
    const left = at(i * geometry.compress_stride);
    const tall = peak ? (p / peak) * (base - 4) : 0;
    const wide = at((i + 1) * geometry.compress_stride) - left;
    context.fillRect(left, base - tall, Math.max(1, wide - (wide > 3 ? 1 : 0)), tall);
  });
  context.fillStyle = css(colors.line);
  context.fillRect(0, base, width, 1);
  for (let b = 0; b < numBlocks; b++) {
    if (!readsBlock(cell, t, b)) continue;
    const forced = blockKind(cell.meta, t, b) !== "chosen";
    const stop = Math.min((b + 1) * geometry.block_size, t + 1);
    context.fillStyle = css(forced ? colors.forced : colors.slc);
    context.fillRect(at(b * geometry.block_size), base + 3, Math.max(2, at(stop) - at(b * geometry.block_size) - 0.5), 6);
  }
  const from = at(Math.max(0, t - geometry.window_size + 1));
  context.fillStyle = css(colors.win);
  context.fillRect(from, base + 11, Math.max(2, at(t + 1) - from), 4);
}
