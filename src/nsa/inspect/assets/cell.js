"use strict";

/* One layer and kv head: its arrays, unpacked from base64 of a zlib stream, and what they say. */

async function unpackCell(base64, meta) {
  const bytes = Uint8Array.from(atob(base64.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  const tokens = meta.tokens.length;
  let at = 0;
  const take = (size) => data.subarray(at, (at += size));
  const cell = { meta, rowBytes: Math.ceil(meta.numBlocks / 8) };
  cell.blocks = take(tokens * cell.rowBytes);
  cell.gates = take(tokens * 3);
  cell.curves = {};
  for (const name of meta.curves) cell.curves[name] = take(tokens);
  cell.compressed = take(tokens * meta.numCompressed);
  if (at !== data.length) throw new Error(`expected ${at} bytes of data, got ${data.length}`);
  return cell;
}

function readsBlock(cell, t, block) {
  return (cell.blocks[t * cell.rowBytes + (block >> 3)] >> (block & 7)) & 1;
}

/* "first" and "local" blocks are read by rule, the others because they scored highest. */
function blockKind(meta, t, block) {
  const g = meta.geometry;
  if (block < g.num_init_blocks) return "init";
  return block > Math.floor(t / g.block_size) - g.num_local_blocks ? "local" : "chosen";
}

function blocksOf(cell, t) {
  const found = [];
  for (let b = 0; b < cell.meta.numBlocks; b++) if (readsBlock(cell, t, b)) found.push(b);
  return found;
}

/* Bytes hold 255 sqrt(p), which keeps small probabilities apart. */
function probability(cell, t, i) {
  const v = cell.compressed[t * cell.meta.numCompressed + i] / 255;
  return v * v;
}

/* Share of the compressed attention that overlaps a selection block (eq. 9, then normalised). */
function blockShare(cell, t, block) {
  const g = cell.meta.geometry;
  const perWindow = g.compress_block_size / g.compress_stride;
  const first = (block * g.block_size) / g.compress_stride - (perWindow - 1);
  let sum = 0;
  cell.meta.weights.forEach((weight, m) => {
    const i = first + m;
    if (i >= 0 && i < cell.meta.numCompressed) sum += weight * probability(cell, t, i);
  });
  return sum / perWindow;
}

/* Compressed attention at each stride-long piece of the text: the mean of the blocks over it. */
function density(cell, t) {
  const g = cell.meta.geometry;
  const perWindow = g.compress_block_size / g.compress_stride;
  const pieces = Math.ceil(cell.meta.tokens.length / g.compress_stride);
  const out = new Float32Array(pieces);
  for (let i = 0; i < cell.meta.numCompressed; i++) {
    const p = probability(cell, t, i) / perWindow;
    for (let r = 0; r < perWindow; r++) out[i + r] += p;
  }
  return out;
}
