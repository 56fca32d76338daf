// The graph as a list in execution order, repeated layers folded, edges drawn as arcs beside it. Only rows in view exist.
const graph = { rows: [], rowOf: new Int32Array(COUNT), adjacent: [], height: 26, openGroups: new Set(), openBlocks: new Set(), openRest: new Set(), mostTime: 1 };
const scroller = $("scroller"), rowsBox = $("rows"), canvas = $("edges");

GROUPS.forEach((g, number) => {
  graph.openGroups.add(number);
  graph.openBlocks.add(number + ":" + g.blocks.findIndex(b => b.variant === g.common));
});

// The rows that stand open: {at} a node, {group} its head, {block} a layer's head, {rest} a run of equal layers.
function buildRows() {
  const rows = [];
  const nodes = (start, end, indent) => { for (let at = start; at < end; at++) rows.push({ at, indent }); };
  let at = 0;
  GROUPS.forEach((g, number) => {
    nodes(at, g.start, 0);
    at = g.end;
    rows.push({ group: number, start: g.start, end: g.end });
    if (!graph.openGroups.has(number)) return;
    const seen = new Set();
    for (let k = 0; k < g.blocks.length; k++) {
      const b = g.blocks[k], key = number + ":" + k;
      // Layers equal to one that stands above are one row, until it is opened.
      let end = k;
      while (end < g.blocks.length && seen.has(g.blocks[end].variant) && !graph.openBlocks.has(number + ":" + end) && !graph.openRest.has(number + ":" + end)) end++;
      if (end - k > 1) {
        rows.push({ rest: k, to: end - 1, group: number, start: b.start, end: g.blocks[end - 1].end });
        k = end - 1;
        continue;
      }
      seen.add(b.variant);
      rows.push({ block: k, group: number, start: b.start, end: b.end });
      if (graph.openBlocks.has(key)) nodes(b.start, b.end, 2);
    }
  });
  nodes(at, COUNT, 0);
  graph.rows = rows;
  rows.forEach((row, r) => {
    if (row.at !== undefined) graph.rowOf[row.at] = r;
    else if (row.group !== undefined && row.block === undefined && row.rest === undefined) {
      if (!graph.openGroups.has(row.group)) graph.rowOf.fill(r, row.start, row.end);
    } else graph.rowOf.fill(r, row.start, row.end);
  });
  buildEdges();
  rowsBox.style.height = rows.length * graph.height + "px";
  draw();
}

// Edges between rows, each pair once, listed at both ends.
function buildEdges() {
  const adjacent = Array.from({ length: graph.rows.length }, () => []), seen = new Set();
  for (let at = 0; at < COUNT; at++) for (const code of N.in[at]) {
    if (code % 3 !== 0) continue;
    const def = DEF[code / 3];
    if (def < 0) continue;
    const from = graph.rowOf[def], to = graph.rowOf[at];
    const key = from * graph.rows.length + to;
    if (from === to || seen.has(key)) continue;
    seen.add(key);
    adjacent[from].push(to);
    adjacent[to].push(from);
  }
  graph.adjacent = adjacent;
}

function shortLayer(at) {
  const names = layersOf(at);
  const g = GROUP_OF[at];
  const prefix = g < 0 ? "" : `${GROUPS[g].stem}.${GROUPS[g].blocks[BLOCK_OF[at]].index}.`;
  const short = names.map(n => n.startsWith(prefix) ? n.slice(prefix.length) : n);
  // The layer itself says nothing beside its parts.
  const parts = short.filter(n => n + "." !== prefix);
  const list = parts.length ? parts : short;
  let common = 0;
  if (list.length > 1) for (let n = 0; list.every(p => p[n] !== undefined && p[n] === list[0][n]); n++) if (list[0][n] === ".") common = n + 1;
  return common ? `${list[0].slice(0, common)}{${list.map(p => p.slice(common)).join(", ")}}` : list.join(", ");
}

function timeCell(seconds, most) {
  const width = most > 0 ? Math.max(seconds > 0 ? 1 : 0, seconds / most * 46) : 0;
  return `<span class="time"><span class="track"><i style="width:${width.toFixed(1)}px"></i></span>${showTime(seconds)}</span>`;
}

function rangeCost(start, end) {
  let flops = 0, bytes = 0, time = 0;
  for (let at = start; at < end; at++) { flops += costOf(at)[0]; bytes += bytesOf(at); time += timeOf(at); }
  return { flops, bytes, time };
}

// Rows too low for text: a block in the colour of the op and a bar of its time.
function tinyHtml(row, r, top) {
  const style = `top:${top}px;height:${Math.max(1, graph.height - (graph.height > 5 ? 1 : 0))}px`;
  if (row.at === undefined) return `<div class="row tiny fold" data-r="${r}" style="${style}"></div>`;
  const width = graph.mostTime > 0 ? timeOf(row.at) / graph.mostTime * 100 : 0;
  const mark = row.at === picked ? "pick" : found.set.has(row.at) ? "hit" : "";
  return `<div class="row tiny ${mark}" data-r="${r}" style="${style}" title="${nodeName(row.at)} ${esc(opName(row.at))} ${esc(shortLayer(row.at))} ${showTime(timeOf(row.at))}"><b style="background:${colourOf(row.at)}"></b><u><i style="background:${colourOf(row.at)};width:${width.toFixed(2)}%"></i></u></div>`;
}

function rowHtml(row, r) {
  const top = r * graph.height;
  if (graph.height < 16) return tinyHtml(row, r, top);
  const style = `style="top:${top}px;height:${graph.height}px"`;
  if (row.at !== undefined) {
    const at = row.at, cost = costOf(at);
    const mark = at === picked ? "pick" : neighbours.sources.has(at) ? "source" : neighbours.users.has(at) ? "user" : "";
    return `<div class="row node indent${row.indent} ${mark} ${found.set.has(at) ? "hit" : ""}" data-r="${r}" ${style}><span></span>
      <span class="op"><span class="swatch" style="background:${colourOf(at)}"></span>${esc(opName(at))}<span class="id">${nodeName(at)}</span></span>
      <span class="layer" title="${esc(layersOf(at).join(", "))}">${esc(shortLayer(at))}</span><span class="type" title="${esc(resultType(at))}">${esc(resultType(at))}</span>
      <span class="kernel">${esc(kernelOf(at))}</span><span class="right">${cost[0] ? showCount(cost[0]) : ""}</span>
      <span class="right">${bytesOf(at) ? showBytes(bytesOf(at)) : ""}</span>${timeCell(timeOf(at), graph.mostTime)}</div>`;
  }
  const g = GROUPS[row.group], cost = rangeCost(row.start, row.end);
  let name, open, what, indent = 1, extra = "";
  if (row.block !== undefined) {
    const b = g.blocks[row.block];
    open = graph.openBlocks.has(row.group + ":" + row.block);
    name = `${g.stem}.${b.index}`;
    const equal = g.blocks.filter(o => o.variant === b.variant).length;
    what = `${b.end - b.start} nodes` + (equal === 1 && g.blocks.length > 1 ? ", differs from the others" : "");
  } else if (row.rest !== undefined) {
    open = false;
    name = `${g.stem}.${g.blocks[row.rest].index}…${g.blocks[row.to].index}`;
    what = `${row.to - row.rest + 1} more equal layers`;
  } else {
    open = graph.openGroups.has(row.group);
    name = `${g.stem}.${g.blocks[0].index}…${g.blocks[g.blocks.length - 1].index} × ${g.blocks.length}`;
    const variants = new Set(g.blocks.map(b => b.variant)).size;
    what = `${row.end - row.start} nodes` + (variants > 1 ? `, ${variants} variants` : ", all equal");
    indent = 0;
    extra = "group";
  }
  return `<div class="row fold ${extra}" data-r="${r}" ${style}><span></span>
    <span class="name indent${indent}" style="grid-column:2/6;padding-left:${indent * 16}px">${open ? "▾" : "▸"} ${esc(name)} <span class="dim">· ${what}</span></span>
    <span class="right dim">${showCount(cost.flops)}</span><span class="right dim">${showBytes(cost.bytes)}</span><span class="time dim">${showTime(cost.time)}</span></div>`;
}

function draw() {
  const first = Math.max(0, Math.floor(scroller.scrollTop / graph.height) - 6);
  const last = Math.min(graph.rows.length, first + Math.ceil(scroller.clientHeight / graph.height) + 14);
  let html = "";
  for (let r = first; r < last; r++) html += rowHtml(graph.rows[r], r);
  rowsBox.innerHTML = html;
  $("columns").style.paddingRight = 6 + scroller.offsetWidth - scroller.clientWidth + "px";
  drawEdges(first, last);
}

// Arcs in the margin: the farther an edge reaches, the farther left it bulges.
function drawEdges(first, last) {
  const style = getComputedStyle(document.documentElement), ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth || 110, height = scroller.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = height + "px";
  canvas.style.marginBottom = -height + "px";
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  paint.clearRect(0, 0, width, height);
  const y = r => (r + .5) * graph.height - scroller.scrollTop, edge = width - 6;
  const arc = (a, b, colour, thick, alpha) => {
    const reach = Math.min(edge - 4, 9 + 11 * Math.log2(Math.abs(b - a) + 1));
    paint.strokeStyle = colour;
    paint.lineWidth = thick;
    paint.globalAlpha = alpha;
    paint.beginPath();
    paint.moveTo(edge, y(a));
    // Far ends are cut so that the curve keeps its shape near the visible end.
    paint.bezierCurveTo(edge - reach * 1.33, y(a), edge - reach * 1.33, y(b), edge, y(b));
    paint.stroke();
    paint.globalAlpha = 1;
  };
  const grey = style.getPropertyValue("--dim");
  const chosen = picked < 0 ? -1 : graph.rowOf[picked];
  const faint = graph.height < 12 ? .18 : chosen >= 0 ? .3 : .5;
  for (let r = first; r < last; r++) {
    const list = graph.adjacent[r];
    for (let n = 0; n < list.length && n < 200; n++) {
      const other = list[n];
      if (other < r && other >= first) continue;
      if (r !== chosen && other !== chosen) arc(r, other, grey, 1, faint);
    }
  }
  if (chosen >= 0) for (const other of graph.adjacent[chosen].slice(0, 400)) {
    const colour = style.getPropertyValue(other < chosen ? "--in" : "--out");
    arc(chosen, other, colour, 2, 1);
    paint.fillStyle = colour;
    paint.beginPath();
    paint.arc(edge, y(other), 3, 0, 7);
    paint.fill();
  }
}

const neighbours = { sources: new Set(), users: new Set() };
function updateNeighbours() {
  neighbours.sources.clear();
  neighbours.users.clear();
  if (picked < 0) return;
  N.in[picked].forEach(code => { if (code % 3 === 0 && DEF[code / 3] >= 0) neighbours.sources.add(DEF[code / 3]); });
  N.out[picked].forEach(v => (USES.get(v) || []).forEach(at => neighbours.users.add(at)));
}

function toggle(row) {
  const flip = (set, key) => { if (!set.delete(key)) set.add(key); };
  if (row.block !== undefined) flip(graph.openBlocks, row.group + ":" + row.block);
  else if (row.rest !== undefined) for (let k = row.rest; k <= row.to; k++) graph.openRest.add(row.group + ":" + k);
  else {
    flip(graph.openGroups, row.group);
    [...graph.openRest].filter(k => k.startsWith(row.group + ":")).forEach(k => graph.openRest.delete(k));
  }
  buildRows();
}

function expandAll(open) {
  GROUPS.forEach((g, number) => {
    if (!open) graph.openRest.clear();
    graph.openGroups.add(number);
    const shown = g.blocks.findIndex(b => b.variant === g.common);
    g.blocks.forEach((b, k) => {
      const key = number + ":" + k;
      if (open || k === shown) graph.openBlocks.add(key); else graph.openBlocks.delete(key);
    });
  });
  buildRows();
}

// Opens what hides a node and scrolls to it.
function reveal(at) {
  if (graph.rows[graph.rowOf[at]].at !== at) {
    graph.openGroups.add(GROUP_OF[at]);
    graph.openBlocks.add(GROUP_OF[at] + ":" + BLOCK_OF[at]);
    buildRows();
  }
  const top = graph.rowOf[at] * graph.height, view = scroller.clientHeight;
  if (top < scroller.scrollTop + 40 || top > scroller.scrollTop + view - 60) scroller.scrollTop = top - view / 3;
  draw();
}

function zoom(height) {
  const middle = (scroller.scrollTop + scroller.clientHeight / 2) / graph.height;
  graph.height = Math.max(2, Math.min(40, height));
  rowsBox.style.height = graph.rows.length * graph.height + "px";
  scroller.scrollTop = middle * graph.height - scroller.clientHeight / 2;
  draw();
}

// Search over ids, ops, layers, weights, states and kernels; every word has to occur.
const found = { set: new Set(), list: [], at: -1 };
function haystack(at) {
  const named = N.in[at].map(code => code % 3 === 1 && WEIGHT.has((code - 1) / 3) ? D.weights[WEIGHT.get((code - 1) / 3)][1]
    : code % 3 === 2 && STATE.has((code - 2) / 3) ? STATE.get((code - 2) / 3)[1] : "");
  return [nodeName(at), opName(at), ...layersOf(at), kernelOf(at), ...named].join(" ").toLowerCase();
}
function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  found.list = [];
  found.at = -1;
  if (words.length) for (let at = 0; at < COUNT; at++) {
    const hay = haystack(at);
    if (words.every(w => w === "n" + N.id[at] || (!/^n\d+$/.test(w) && hay.includes(w)))) found.list.push(at);
  }
  found.set = new Set(found.list);
  $("hits").textContent = words.length ? `${found.list.length} match${found.list.length === 1 ? "" : "es"}` : "";
  const box = $("found");
  box.hidden = !found.list.length;
  box.innerHTML = found.list.slice(0, 60).map((at, n) => `<div data-n="${n}">${nodeName(at)} ${esc(opName(at))} · <span class="dim">${esc(layersOf(at)[0] || "")}</span></div>`).join("")
    + (found.list.length > 60 ? `<div class="dim">and ${found.list.length - 60} more: step through with ↓</div>` : "");
  draw();
}
function step(by) {
  if (!found.list.length) return;
  found.at = (found.at + by + found.list.length) % found.list.length;
  $("hits").textContent = `${found.at + 1} of ${found.list.length}`;
  $("found").hidden = true;
  pick(found.list[found.at]);
}

rowsBox.addEventListener("click", e => {
  const element = e.target.closest(".row");
  if (!element) return;
  const row = graph.rows[+element.dataset.r];
  if (row.at !== undefined) pick(row.at); else toggle(row);
});
scroller.addEventListener("scroll", draw);
scroller.addEventListener("wheel", e => {
  if (!e.ctrlKey) return;
  e.preventDefault();
  zoom(graph.height * (e.deltaY < 0 ? 1.15 : 1 / 1.15));
}, { passive: false });
scroller.addEventListener("keydown", e => {
  if (e.key !== "ArrowDown" && e.key !== "ArrowUp") return;
  e.preventDefault();
  const by = e.key === "ArrowDown" ? 1 : -1;
  let r = picked < 0 ? -1 : graph.rowOf[picked];
  do r += by; while (graph.rows[r] && graph.rows[r].at === undefined);
  if (graph.rows[r]) pick(graph.rows[r].at);
});
// Drag the margin to move.
canvas.addEventListener("pointerdown", e => {
  canvas.setPointerCapture(e.pointerId);
  const from = e.clientY, top = scroller.scrollTop;
  canvas.onpointermove = move => { scroller.scrollTop = top - (move.clientY - from); };
  canvas.onpointerup = () => { canvas.onpointermove = null; };
});
$("search").addEventListener("input", e => search(e.target.value));
$("search").addEventListener("keydown", e => {
  if (e.key === "Enter") step(e.shiftKey ? -1 : 1);
  if (e.key === "Escape") { e.target.value = ""; search(""); }
});
$("search").addEventListener("focus", () => { $("found").hidden = !found.list.length; });
$("search").addEventListener("blur", () => setTimeout(() => { $("found").hidden = true; }, 180));
$("found").addEventListener("mousedown", e => {
  const n = e.target.closest("[data-n]");
  if (n) { found.at = +n.dataset.n - 1; step(1); }
});
$("next").onclick = () => step(1);
$("previous").onclick = () => step(-1);
$("expand").onclick = () => expandAll(true);
$("collapse").onclick = () => expandAll(false);
$("zoom-in").onclick = () => zoom(graph.height * 1.25);
$("zoom-out").onclick = () => zoom(graph.height / 1.25);
$("zoom-fit").onclick = () => zoom(graph.height < 14 ? 26 : scroller.clientHeight / Math.max(1, graph.rows.length));
listeners.pick.push(at => { updateNeighbours(); if (at >= 0) reveal(at); });
listeners.costs.push(() => {
  graph.mostTime = 0;
  for (let at = 0; at < COUNT; at++) graph.mostTime = Math.max(graph.mostTime, timeOf(at));
  $("columns").innerHTML = ["edges", "op", "layer", "result", "kernel", "FLOP", "bytes", "time"].map((t, n) => `<span class="${n > 4 ? "right" : ""} ${t}">${t}</span>`).join("");
  draw();
});
