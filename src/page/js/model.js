"use strict";
// The facts of the page, decoded: columns of numbers with tables of strings beside them.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const S = n => D.strings[n];
const N = D.nodes, COUNT = N.id.length;
// Breaks long dotted names at their dots.
const dotted = text => esc(text).replace(/([.+])/g, "$1<wbr>");
// Element types with repetitions counted.
function runs(list) {
  const out = [];
  list.forEach(t => { const last = out[out.length - 1]; if (last && last[0] === t) last[1]++; else out.push([t, 1]); });
  return out.map(([t, n]) => n > 1 ? `${t} × ${n}` : t).join(", ");
}
// `a.b.c+a.b.d.pack8` as `a.b.{c + d}.pack8`.
function shortWeight(name) {
  const parts = name.split("+");
  if (parts.length < 2) return name;
  const tail = (parts[parts.length - 1].match(/\.pack\d.*$/) || [""])[0];
  parts[parts.length - 1] = parts[parts.length - 1].slice(0, parts[parts.length - 1].length - tail.length);
  let prefix = 0;
  for (let n = 0; parts.every(p => p[n] !== undefined && p[n] === parts[0][n]); n++) if (parts[0][n] === ".") prefix = n + 1;
  return `${parts[0].slice(0, prefix)}{${parts.map(p => p.slice(prefix)).join(" + ")}}${tail}`;
}
const state = { bindings: 0, flops: D.rates.flops, bytes: D.rates.bytes };

function esc(text) {
  return String(text).replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
}
function showBytes(n) {
  if (n === null || n === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  while (n >= 1024 && at < 5) { n /= 1024; at++; }
  return (at === 0 ? n : n >= 100 ? n.toFixed(0) : n.toFixed(n >= 10 ? 1 : 2)) + " " + units[at];
}
function showCount(n) {
  const units = ["", " k", " M", " G", " T", " P", " E"];
  let at = 0;
  while (n >= 1000 && at < 6) { n /= 1000; at++; }
  return (at === 0 ? n : n >= 100 ? n.toFixed(0) : n.toFixed(n >= 10 ? 1 : 2)) + units[at];
}
function showTime(s) {
  if (!isFinite(s)) return "–";
  if (s === 0) return "0";
  const units = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
  const [scale, unit] = units.find(([u]) => s >= u) || units[3];
  const n = s / scale;
  return (n >= 100 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(2)) + " " + unit;
}

// Values by id; nodes are named by their position in the execution order.
const bound = D.values.id.reduce((most, id) => Math.max(most, id + 1), 0);
const VALUE_AT = new Int32Array(bound).fill(-1), DEF = new Int32Array(bound).fill(-1);
D.values.id.forEach((id, at) => { VALUE_AT[id] = at; });
N.out.forEach((list, at) => list.forEach(v => { DEF[v] = at; }));
const USES = new Map();
N.in.forEach((list, at) => list.forEach(code => {
  if (code % 3 !== 0) return;
  const v = code / 3;
  if (!USES.has(v)) USES.set(v, []);
  const users = USES.get(v);
  if (users[users.length - 1] !== at) users.push(at);
}));
const WEIGHT = new Map(D.weights.map((w, at) => [w[0], at]));
const WEIGHT_USES = new Map();
N.in.forEach((list, at) => list.forEach(code => {
  if (code % 3 !== 1) return;
  const w = (code - 1) / 3;
  if (!WEIGHT_USES.has(w)) WEIGHT_USES.set(w, []);
  WEIGHT_USES.get(w).push(at);
}));
const STATE = new Map(D.states.map(s => [s[0], s]));
const POSITION = new Map(N.id.map((id, at) => [id, at]));

const nodeName = at => "n" + N.id[at];
const opName = at => S(N.op[at]);
const layersOf = at => N.layers[at].map(S);
const kernelOf = at => N.kernel[at] < 0 ? "" : D.kernels[N.kernel[at]][1];
const typeOf = v => VALUE_AT[v] < 0 ? "?" : S(D.values.type[VALUE_AT[v]]);
const placeOf = v => VALUE_AT[v] < 0 || !D.values.place[VALUE_AT[v]] ? "" : S(D.values.place[VALUE_AT[v]] - 1);
const inputName = v => VALUE_AT[v] < 0 || !D.values.name[VALUE_AT[v]] ? "" : S(D.values.name[VALUE_AT[v]] - 1);
const resultType = at => N.out[at].map(typeOf).join(", ");
const costOf = at => N.cost[state.bindings][at];
const bytesOf = at => { const c = costOf(at); return c[1] + c[2]; };
function timeOf(at) {
  const c = costOf(at);
  return Math.max(c[0] / state.flops, (c[1] + c[2]) / state.bytes);
}
function sum(count, of) {
  let total = 0;
  for (let at = 0; at < count; at++) total += of(at);
  return total;
}

// Groups of repeated layers; BLOCK_OF and GROUP_OF tell where a node stands.
const GROUPS = D.groups.map(([stem, common, blocks]) => {
  const first = blocks[0], last = blocks[blocks.length - 1];
  return {
    stem, common, start: first[1], end: last[1] + last[2],
    blocks: blocks.map(([index, start, length, variant]) => ({ index, start, end: start + length, variant })),
  };
});
const GROUP_OF = new Int32Array(COUNT).fill(-1), BLOCK_OF = new Int32Array(COUNT).fill(-1);
GROUPS.forEach((g, number) => g.blocks.forEach((b, k) => {
  for (let at = b.start; at < b.end; at++) { GROUP_OF[at] = number; BLOCK_OF[at] = k; }
}));

// One colour for each kind of work, readable on light and dark grounds.
const KINDS = [
  ["matmul", "#3b7dd8", /^(matmul|conv2d)/], ["attention", "#c2489b", /attention/], ["norm", "#3f9b57", /norm|softmax/],
  ["elementwise", "#d08a1d", /^(pointwise|add|sub|mul|div|exp|silu|gelu|tanh|relu|neg|sigmoid|cast|select)/],
  ["cache and rope", "#7b5fd0", /^(kv_append|rope)/], ["lookup", "#1b9a9a", /^(embedding|gather|scatter)/],
  ["view or move", "#98a2ae", /^(reshape|transpose|slice|concat|broadcast|iota)/], ["other", "#b0563e", /./],
];
const kindCache = new Map();
function kindOf(op) {
  if (!kindCache.has(op)) kindCache.set(op, KINDS.find(k => k[2].test(op)));
  return kindCache.get(op);
}
const colourOf = at => kindOf(opName(at))[1];

const generalLayer = name => name.replace(/(\.)\d+(?=\.|$)/, "$1*");

// What other parts of the page do when shapes, rates or the picked node change.
const listeners = { costs: [], pick: [] };
let picked = -1;
function pick(at) {
  picked = at;
  listeners.pick.forEach(f => f(at));
}
