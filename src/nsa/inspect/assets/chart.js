"use strict";

/* Line charts as SVG, in the page's own colours. Series share the x values. */

function smoothed(values, radius) {
  if (radius < 1) return values;
  return Array.from(values, (_, i) => {
    let sum = 0;
    let count = 0;
    for (let j = Math.max(0, i - radius); j <= Math.min(values.length - 1, i + radius); j++) {
      if (values[j] === null) continue;
      sum += values[j];
      count++;
    }
    return count ? sum / count : null;
  });
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-6; v += step) ticks.push(v);
  return ticks;
}

/* `spec`: {label, x, series: [{name, color, values, dash, mark}], y: [low, high] or null, radius,
   xLabel, yFormat, xFormat, onHover, onPick}. Returns {setCursor(index)}. */
function lineChart(host, spec) {
  const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));
  const format = spec.yFormat || ((v) => v.toFixed(2));
  const xFormat = spec.xFormat || ((v) => String(Math.round(v)));
  const legend = document.createElement("ul");
  legend.className = "legend";
  const outputs = spec.series.map((series) => {
    const item = document.createElement("li");
    const mark = document.createElement("span");
    mark.className = `swatch stroke${series.dash ? " dash" : ""}`;
    mark.style.setProperty("--c", series.color);
    const value = document.createElement("b");
    item.append(mark, series.name, value);
    legend.append(item);
    return value;
  });
  const frame = document.createElement("div");
  frame.className = "chart";
  host.append(legend, frame);

  const lines = spec.series.map((s) => ({ ...s, smooth: smoothed(s.values, spec.radius || 0) }));
  const all = lines.flatMap((s) => finite(Array.from(s.smooth)));
  let [low, high] = spec.y || [Math.min(...all), Math.max(...all)];
  if (!spec.y) {
    const pad = (high - low) * 0.06 || 0.5;
    low -= pad;
    high += pad;
  }
  const x0 = spec.x[0];
  const x1 = spec.x[spec.x.length - 1];
  const margin = { left: 38, right: 8, top: 8, bottom: 34 };
  let width = 0;
  let cursor = null;
  const height = 210;
  const px = (x) => margin.left + ((x - x0) / (x1 - x0 || 1)) * (width - margin.left - margin.right);
  const py = (y) => height - margin.bottom - ((y - low) / (high - low)) * (height - margin.top - margin.bottom);

  function path(values) {
    let d = "";
    let open = false;
    const step = Math.max(1, Math.floor(values.length / (width * 2)));
    for (let i = 0; i < values.length; i += step) {
      if (values[i] === null || !Number.isFinite(values[i])) {
        open = false;
        continue;
      }
      const y = Math.min(high, Math.max(low, values[i]));
      d += `${open ? "L" : "M"}${px(spec.x[i]).toFixed(1)} ${py(y).toFixed(1)}`;
      open = true;
    }
    return d;
  }

  function draw() {
    width = frame.clientWidth;
    if (!width) return;
    const yTicks = niceTicks(low, high, 4);
    const xTicks = niceTicks(x0, x1, Math.max(2, Math.floor(width / 110)));
    const parts = [`<svg role="img" height="${height}" viewBox="0 0 ${width} ${height}">`];
    for (const tick of yTicks) {
      parts.push(`<line class="grid" x1="${margin.left}" x2="${width - margin.right}" y1="${py(tick)}" y2="${py(tick)}"/>`);
      parts.push(`<text x="${margin.left - 6}" y="${py(tick) + 4}" text-anchor="end">${format(tick)}</text>`);
    }
    for (const tick of xTicks) {
      parts.push(`<text x="${px(tick)}" y="${height - margin.bottom + 16}" text-anchor="middle">${xFormat(tick)}</text>`);
    }
    parts.push(`<text x="${(margin.left + width) / 2}" y="${height - 3}" text-anchor="middle">${spec.xLabel}</text>`);
    for (const line of lines) {
      const dash = line.dash ? " dash" : "";
      if (spec.radius && !line.dash) parts.push(`<path class="raw" stroke="${line.color}" d="${path(line.values)}"/>`);
      parts.push(`<path class="smooth${dash}" stroke="${line.color}" d="${path(line.smooth)}"/>`);
      if (line.mark) line.smooth.forEach((v, i) => {
        if (v !== null) parts.push(`<circle r="3.5" fill="${line.color}" cx="${px(spec.x[i])}" cy="${py(v)}"/>`);
      });
    }
    parts.push(`<line class="cursor" y1="${margin.top}" y2="${height - margin.bottom}" visibility="hidden"/></svg>`);
    frame.innerHTML = parts.join("");
    frame.firstChild.setAttribute("aria-label", spec.label);
    setCursor(cursor);
  }

  function setCursor(index) {
    cursor = index;
    const line = frame.querySelector(".cursor");
    if (!line) return;
    line.setAttribute("visibility", index === null ? "hidden" : "visible");
    const shown = index === null ? spec.x.length - 1 : index;
    const x = px(spec.x[shown]);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    lines.forEach((series, i) => {
      let at = shown;
      while (at > 0 && series.values[at] === null) at--;
      const value = series.values[at];
      outputs[i].textContent = value === null ? "" : format(value);
    });
  }

  function indexAt(event) {
    const box = frame.getBoundingClientRect();
    const share = (event.clientX - box.left - margin.left) / (box.width - margin.left - margin.right);
    const x = x0 + Math.min(1, Math.max(0, share)) * (x1 - x0);
    let best = 0;
    for (let i = 1; i < spec.x.length; i++) if (Math.abs(spec.x[i] - x) < Math.abs(spec.x[best] - x)) best = i;
    return best;
  }

  const hover = spec.onHover || setCursor;
  frame.addEventListener("pointermove", (event) => hover(indexAt(event)));
  frame.addEventListener("pointerleave", () => hover(null));
  if (spec.onPick) frame.addEventListener("click", (event) => spec.onPick(indexAt(event)));
  new ResizeObserver(() => frame.clientWidth !== width && draw()).observe(frame);
  draw();
  return { setCursor };
}

/* Charts that a page brings as JSON: <figure data-chart>{...}</figure>. */
function drawDataCharts() {
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    lineChart(figure, spec);
  }
}
