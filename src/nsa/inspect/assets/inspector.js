"use strict";

/* Ties the parts together: state, keyboard, what is said about the query in view. */

const percent = (v) => `${Math.round(100 * v)}%`;
const KIND_NAMES = { init: "first", local: "local", chosen: "chosen" };

function shownText(piece) {
  return piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

class Inspector {
  constructor(root) {
    this.root = root;
    this.meta = JSON.parse(root.querySelector("[data-meta]").textContent);
    this.tokens = this.meta.tokens;
    this.view = "blocks";
    this.hover = null;
    this.query = this.meta.start.query;
    this.cells = new Map();
    this.colors = palette();
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    this.buildText();
    this.listen();
    this.colorPicker();
    const start = root.querySelector(`input[value="${this.meta.start.cell}"]`);
    start.checked = true;
    this.selectCell(this.meta.start.cell);
  }

  get shown() {
    return this.hover === null ? this.query : this.hover;
  }

  listen() {
    const map = this.find("map");
    map.addEventListener("keydown", (event) => this.onKey(event));
    map.addEventListener("pointermove", (event) => this.preview(this.rowAt(event), this.columnAt(event)));
    map.addEventListener("pointerleave", () => this.preview(null, null));
    map.addEventListener("click", (event) => this.keep(this.rowAt(event)));
    this.root.querySelectorAll("[name=cell]").forEach((input) =>
      input.addEventListener("change", () => this.selectCell(input.value)));
    this.root.querySelectorAll("[name=view]").forEach((input) =>
      input.addEventListener("change", () => {
        this.view = input.value;
        this.root.dataset.view = this.view;
        this.redraw();
      }));
    this.find("metric").addEventListener("change", () => this.colorPicker());
    this.find("text").addEventListener("click", (event) => {
      const token = event.target.closest("[data-t]");
      if (token) this.keep(Number(token.dataset.t));
    });
    this.find("passages").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) this.scrollText(Number(button.dataset.first));
    });
    const size = this.find("map");
    new ResizeObserver(() => size.clientWidth !== this.width && this.redraw()).observe(size);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.colors = palette();
      this.redraw();
    });
  }

  onKey(event) {
    const block = this.meta.geometry.block_size;
    const last = this.tokens.length - 1;
    const moves = { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1, PageUp: -block,
      PageDown: block, Home: -last, End: last };
    if (!(event.key in moves) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.hover = null;
    this.keep(this.query + moves[event.key] * (event.shiftKey ? 10 : 1));
  }

  rowAt(event) {
    const box = this.find("map").getBoundingClientRect();
    return this.clamp(Math.floor(((event.clientY - box.top) / box.height) * this.tokens.length));
  }

  columnAt(event) {
    const box = this.find("map").getBoundingClientRect();
    return this.clamp(Math.floor(((event.clientX - box.left) / box.width) * this.tokens.length));
  }

  clamp(t) {
    return Math.min(this.tokens.length - 1, Math.max(0, t));
  }

  keep(t) {
    this.query = this.clamp(t);
    this.update();
    this.scrollText(this.query);
  }

  preview(t, position = null) {
    this.hover = t;
    this.pointed = position;
    this.update();
  }

  async selectCell(key) {
    this.key = key;
    if (!this.cells.has(key)) {
      const text = this.root.querySelector(`[data-cell="${key}"]`).textContent;
      this.cells.set(key, await unpackCell(text, this.meta));
    }
    if (this.key !== key) return;
    this.cell = this.cells.get(key);
    this.summarise();
    this.buildCharts();
    this.redraw();
    this.scrollText(this.query);
    this.root.dataset.ready = key;
  }

  /* The grid of layers and heads, shaded by one measure. */
  colorPicker() {
    const name = this.find("metric").value;
    const values = Object.values(this.meta.cells).map((c) => c[name]);
    const low = Math.min(...values);
    const spread = Math.max(...values) - low || 1;
    const color = { gate_cmp: "--cmp", gate_win: "--win", overlap: "--twin" }[name] || "--slc";
    this.root.querySelectorAll("[name=cell]").forEach((input) => {
      const value = this.meta.cells[input.value][name];
      const label = input.parentElement;
      label.style.setProperty("--c", `var(${color})`);
      label.style.setProperty("--a", `${Math.round(8 + (34 * (value - low)) / spread)}%`);
      label.querySelector("span").textContent = percent(value);
    });
  }

  summarise() {
    const own = this.meta.cells[this.key];
    const set = (name, text) => (this.find(name).textContent = text);
    set("recall", percent(own.recall));
    set("recall-note", `window alone ${percent(own.window_recall)}, best possible ${percent(own.best_recall)}`
      + (own.twin_recall === undefined ? "" : `; of the dense twin's ${percent(own.twin_recall)}`));
    set("overlap", percent(own.overlap));
    this.fillBars(this.find("gates-mean"), [own.gate_cmp, own.gate_slc, own.gate_win]);
  }

  fillBars(host, values) {
    const rows = [["compressed", "--cmp"], ["selected", "--slc"], ["window", "--win"]];
    host.innerHTML = rows.map(([name, color], i) =>
      `<span>${name}</span><i style="--c:var(${color});--w:${(100 * values[i]).toFixed(1)}%"></i>`
      + `<span class="num">${values[i].toFixed(2)}</span>`).join("");
  }

  buildCharts() {
    const { cell, meta } = this;
    const x = Array.from(this.tokens, (_, t) => t);
    const curve = (name) => Array.from(cell.curves[name], (v) => v / 255);
    const gate = (i) => x.map((t) => cell.gates[3 * t + i] / 255);
    const overlap = curve("overlap");
    overlap[0] = null;
    const common = { x, y: [0, 1], xLabel: "token", radius: Math.round(x.length / 80),
      onHover: (t) => this.preview(t), onPick: (t) => this.keep(t) };
    const recall = [
      { name: "best possible", color: "var(--muted)", values: curve("best_recall"), dash: true },
      { name: "selected + window", color: "var(--slc)", values: curve("recall") },
      { name: "window alone", color: "var(--win)", values: curve("window_recall") },
    ];
    if (meta.curves.includes("twin_recall")) {
      recall.push({ name: "of the dense twin", color: "var(--twin)", values: curve("twin_recall") });
    }
    const charts = {
      "gates-chart": { label: "Gates of the three branches along the text", series: [
        { name: "compressed", color: "var(--cmp)", values: gate(0) },
        { name: "selected", color: "var(--slc)", values: gate(1) },
        { name: "window", color: "var(--win)", values: gate(2) }] },
      "recall-chart": { label: "Share of dense attention that the query's tokens hold", yFormat: percent,
        series: recall },
      "overlap-chart": { label: "Share of blocks that the query before read too", yFormat: percent,
        series: [{ name: "shared with the token before", color: "var(--slc)", values: overlap }] },
    };
    this.charts = Object.entries(charts).map(([name, spec]) => {
      const host = this.find(name);
      host.replaceChildren();
      return lineChart(host, { ...common, ...spec });
    });
  }

  /* Blocks are spans around the spans of their tokens: a query changes classes, not text. */
  buildText() {
    const host = this.find("text");
    const size = this.meta.geometry.block_size;
    this.blockSpans = [];
    this.tokenSpans = this.tokens.map((piece, t) => {
      if (t % size === 0) {
        this.blockSpans.push(document.createElement("span"));
        host.append(this.blockSpans.at(-1));
      }
      const span = document.createElement("span");
      span.dataset.t = t;
      span.textContent = piece;
      this.blockSpans.at(-1).append(span);
      return span;
    });
  }

  redraw() {
    if (!this.cell) return;
    const map = this.find("map");
    this.width = map.clientWidth;
    this.height = Math.min(this.width, 560);
    drawMap(this.find("map-canvas"), this.cell, this.view, this.colors, this.width, this.height);
    this.update();
  }

  update() {
    if (!this.cell || this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      const t = this.shown;
      drawCursor(this.find("cursor-canvas"), this.meta, t, this.query, this.colors, this.width, this.height);
      drawStrip(this.find("strip-canvas"), this.cell, t, this.colors, this.width, 62);
      this.charts.forEach((chart) => chart.setCursor(t));
      this.describe(t);
      this.markText(t);
    });
  }

  describe(t) {
    const { cell, meta } = this;
    const blocks = blocksOf(cell, t);
    const token = shownText(this.tokens[t]).replace(/^ $/, "␣");
    const before = this.tokens.slice(Math.max(0, t - 14), t).map(shownText).join("");
    this.find("query-title").textContent = `What token ${t} reads`;
    this.find("before").textContent = `… ${before}`;
    this.find("token").textContent = token;
    this.fillBars(this.find("gates-now"), [0, 1, 2].map((i) => cell.gates[3 * t + i] / 255));
    const size = meta.geometry.block_size;
    const shares = blocks.map((b) => blockShare(cell, t, b));
    const most = Math.max(...shares, 0.01);
    const items = blocks.map((b, i) => {
      const kind = blockKind(meta, t, b);
      const share = shares[i];
      const stop = Math.min((b + 1) * size, t + 1);
      const item = document.createElement("li");
      item.innerHTML = `<button type="button" data-first="${b * size}" title="Show tokens ${b * size} to ${stop - 1} in the text">`
        + `<span class="tag ${kind}">${KIND_NAMES[kind]} ${b}</span>`
        + `<span class="share"><i style="--w:${((100 * share) / most).toFixed(1)}%"></i>${percent(share)}</span>`
        + `<span class="snip"></span></button>`;
      item.querySelector(".snip").textContent = this.tokens.slice(b * size, stop).join("").replace(/\s+/g, " ");
      return item;
    });
    this.find("passages").replaceChildren(...items);
    const read = this.readCount(t, blocks);
    this.find("reads").textContent = `${read} of ${t + 1} tokens in full (${blocks.length} blocks and the window), the rest compressed`;
    const map = this.find("map");
    map.setAttribute("aria-valuenow", t);
    map.setAttribute("aria-valuetext", `Token ${t}, “${token.trim()}”, reads blocks ${blocks.join(", ")}`);
    this.find("readout").textContent = this.pointedText(t) ?? `Token ${t} “${token.trim()}” reads blocks ${blocks.join(", ")}.`;
  }

  pointedText(t) {
    const s = this.pointed;
    if (this.hover === null || s === null || s === undefined) return null;
    if (s > t) return `Token ${t} cannot see ${s}: it comes later.`;
    const size = this.meta.geometry.block_size;
    const block = Math.floor(s / size);
    const kind = readsBlock(this.cell, t, block) ? KIND_NAMES[blockKind(this.meta, t, block)] : "not selected";
    const windowed = s > t - this.meta.geometry.window_size ? ", in the window" : "";
    const snippet = this.tokens.slice(block * size, (block + 1) * size).join("").replace(/\s+/g, " ").trim();
    return `Token ${t} → block ${block} (${kind}${windowed}, ${percent(blockShare(this.cell, t, block))} of compressed attention): “${snippet.slice(0, 90)}…”`;
  }

  readCount(t, blocks) {
    const size = this.meta.geometry.block_size;
    const from = Math.max(0, t - this.meta.geometry.window_size + 1);
    return blocks.reduce((sum, b) => sum + Math.max(0, Math.min((b + 1) * size, from) - b * size), t + 1 - from);
  }

  markText(t) {
    const { geometry } = this.meta;
    this.blockSpans.forEach((span, b) => {
      const read = b * geometry.block_size <= t && readsBlock(this.cell, t, b);
      const kind = read ? blockKind(this.meta, t, b) : null;
      span.className = kind === "chosen" ? "slc" : kind ? "forced" : "";
    });
    this.tokenSpans.forEach((span, s) => {
      const name = s === t ? "now" : s > t ? "ahead" : s > t - geometry.window_size ? "win" : "";
      if (span.className !== name) span.className = name;
    });
  }

  scrollText(t) {
    const box = this.find("text");
    const span = this.tokenSpans[t];
    const top = span.offsetTop;
    if (top < box.scrollTop + 40 || top > box.scrollTop + box.clientHeight - 60) {
      box.scrollTop = Math.max(0, top - box.clientHeight * 0.55);
    }
  }
}

document.querySelectorAll("[data-inspector]").forEach((root) => new Inspector(root));
drawDataCharts();
