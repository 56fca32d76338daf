// Everything about the picked node, with its neighbours drawn around it.
function nodeLink(at) {
  return `<a class="link mono" data-node="${at}">${nodeName(at)}</a> ${esc(opName(at))}`;
}

function operandHtml(code) {
  const id = Math.floor(code / 3);
  if (code % 3 === 0) {
    const from = DEF[id] >= 0 ? `from ${nodeLink(DEF[id])}` : `input <b>${esc(inputName(id))}</b>`;
    return `<div class="operand v"><span class="mono">%${id} : ${esc(typeOf(id))}</span><br>${from}${placeHtml(id)}</div>`;
  }
  if (code % 3 === 1) {
    const w = WEIGHT.has(id) ? D.weights[WEIGHT.get(id)] : null;
    return w ? `<div class="operand w"><span class="mono">@${dotted(w[1])} : ${esc(S(w[2]))}</span><br>weight, ${showBytes(w[3])}${w[4] ? `, streamable in tiles of ${showBytes(w[4][2])}` : ""}</div>` : "";
  }
  const s = STATE.get(id);
  return s ? `<div class="operand s"><span class="mono">@${esc(s[1])} : ${esc(S(s[2]))}</span><br>state, up to ${showBytes(s[3])}</div>` : "";
}

const BUFFER_OF = new Map();
D.buffers.forEach((b, n) => b[4].forEach(v => BUFFER_OF.set(v, n)));
function placeHtml(v) {
  const place = placeOf(v);
  if (!place) return "";
  const buffer = BUFFER_OF.has(v) ? D.buffers[BUFFER_OF.get(v)] : null;
  const life = buffer ? `, bytes ${buffer[1].toLocaleString("en")} to ${(buffer[1] + buffer[0]).toLocaleString("en")} at the upper bounds, alive ${buffer[2]}…${buffer[3] - 1}` : "";
  return `<br><span class="dim">at <span class="mono">${esc(place)}</span>${life}</span>`;
}

function nearWeight(id) {
  const parts = (WEIGHT.has(id) ? D.weights[WEIGHT.get(id)][1] : "?").replace(/\.pack\d.*$/, "").split("+");
  return parts[0].split(".").filter(p => p !== "weight").slice(-1)[0] + (parts.length > 1 ? ` +${parts.length - 1}` : "");
}

// Sources left, the node in the middle, users right.
function nearSvg(at) {
  const sources = [];
  N.in[at].forEach(code => {
    const id = Math.floor(code / 3);
    const one = code % 3 === 0 ? (DEF[id] >= 0 ? { node: DEF[id], name: opName(DEF[id]), sub: nodeName(DEF[id]) } : { name: inputName(id), sub: "input" })
      : code % 3 === 1 ? { name: nearWeight(id), sub: "weight" }
        : { name: STATE.has(id) ? STATE.get(id)[1] : "?", sub: "state" };
    if (!sources.some(s => s.node !== undefined && s.node === one.node)) sources.push(one);
  });
  const users = [...new Set(N.out[at].flatMap(v => USES.get(v) || []))].map(u => ({ node: u, name: opName(u), sub: nodeName(u) }));
  D.outputs.forEach(([name], n) => { if (N.out[at].some(v => placeOf(v).startsWith(`output ${n},`))) users.push({ name, sub: "output" }); });
  const most = 7, cut = list => list.length > most ? [...list.slice(0, most - 1), { name: `${list.length - most + 1} more`, sub: "" }] : list;
  const left = cut(sources), right = cut(users), rows = Math.max(left.length, right.length, 1);
  const height = rows * 40 + 6, width = 370, box = 108;
  const y = (n, count) => (height - count * 40) / 2 + n * 40 + 4;
  const clip = text => text.length > 15 ? text.slice(0, 14) + "…" : text;
  const draw = (item, x, top, kind) => `<g class="${kind}" ${item.node === undefined ? "" : `data-node="${item.node}"`}><rect x="${x}" y="${top}" width="${box}" height="32" rx="5"></rect><text x="${x + 7}" y="${top + 14}">${esc(clip(item.name))}</text><text class="sub" x="${x + 7}" y="${top + 26}">${esc(item.sub)}</text></g>`;
  const middle = (width - box) / 2, own = y(0, 1);
  const edge = (x1, y1, x2, y2, colour) => `<path style="stroke:var(${colour})" d="M${x1} ${y1} C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}"></path>`;
  return `<svg class="near" viewBox="0 0 ${width} ${height}">`
    + left.map((_, n) => edge(box, y(n, left.length) + 16, middle, own + 16, "--in")).join("")
    + right.map((_, n) => edge(middle + box, own + 16, width - box, y(n, right.length) + 16, "--out")).join("")
    + left.map((s, n) => draw(s, 0, y(n, left.length), "")).join("")
    + draw({ name: opName(at), sub: nodeName(at) }, middle, own, "self")
    + right.map((s, n) => draw(s, width - box, y(n, right.length), "")).join("") + `</svg>`;
}

function showDetails() {
  const at = picked;
  if (at < 0) {
    $("details").innerHTML = overviewHtml();
    return;
  }
  const [flops, read, written] = costOf(at), arithmetic = flops / state.flops, traffic = (read + written) / state.bytes;
  const why = timeOf(at) === 0 ? "moves nothing" : arithmetic > traffic ? `arithmetic; memory alone ${showTime(traffic)}` : `memory; arithmetic alone ${showTime(arithmetic)}`;
  const attrs = S(N.attrs[at]), total = sum(COUNT, timeOf);
  $("details").innerHTML = `<div><span class="swatch" style="background:${colourOf(at)}"></span><span class="big">${esc(opName(at))}</span> <span class="mono dim">${nodeName(at)}</span>
    <span class="dim">· step ${at + 1} of ${COUNT}</span> <a class="link" id="unpick">close</a></div>${nearSvg(at)}
    <dl>${attrs ? `<dt>attributes</dt><dd class="mono">${esc(attrs)}</dd>` : ""}
    <dt>layers</dt><dd class="mono">${layersOf(at).map(dotted).join("<br>") || "–"}</dd>
    ${kernelOf(at) ? `<dt>kernel</dt><dd class="mono">${esc(D.kernels[N.kernel[at]][0])} ${esc(kernelOf(at))}</dd>` : ""}
    <dt>time</dt><dd>${showTime(timeOf(at))} <span class="dim">${total > 0 ? (timeOf(at) / total * 100).toFixed(1) + " % of the step, " : ""}${why}</span></dd>
    <dt>FLOP</dt><dd>${showCount(flops)} <span class="dim">${read + written ? (flops / (read + written)).toFixed(2) + " a byte" : ""}</span></dd>
    <dt>reads, writes</dt><dd>${showBytes(read)}, ${showBytes(written)}</dd></dl>
    <h2>Operands</h2>${N.in[at].map(operandHtml).join("") || "none"}
    <h2>Results</h2>${N.out[at].map(v => `<div class="operand r"><span class="mono">%${v} : ${esc(typeOf(v))}</span>${placeHtml(v)}<br>${(USES.get(v) || []).slice(0, 12).map(u => "to " + nodeLink(u)).join("<br>") || "<span class=dim>no reader in the graph</span>"}${(USES.get(v) || []).length > 12 ? `<br><span class=dim>and ${USES.get(v).length - 12} more</span>` : ""}</div>`).join("")}`;
  $("unpick").onclick = () => { pick(-1); draw(); };
}

// Where the time goes, while no node is picked.
function overviewHtml() {
  const total = sum(COUNT, timeOf);
  const by = new Map();
  for (let at = 0; at < COUNT; at++) {
    const key = kindOf(opName(at));
    const entry = by.get(key) || { count: 0, time: 0 };
    entry.count++;
    entry.time += timeOf(at);
    by.set(key, entry);
  }
  const kinds = [...by].sort((a, b) => b[1].time - a[1].time);
  // The same op in the same part of every layer is one entry.
  const parts = new Map();
  for (let at = 0; at < COUNT; at++) {
    const where = generalLayer(layersOf(at)[0] || ""), key = opName(at) + " " + where;
    if (!parts.has(key)) parts.set(key, { at, where, count: 0, time: 0 });
    const part = parts.get(key);
    part.count++;
    part.time += timeOf(at);
  }
  const slow = [...parts.values()].sort((a, b) => b.time - a.time || a.at - b.at).slice(0, 12);
  const share = t => total > 0 ? (t / total * 100).toFixed(1) + " %" : "";
  return `<h2>Where the predicted time goes</h2><dl style="grid-template-columns:1fr auto auto auto">${kinds.map(([k, e]) => `<dd><span class="swatch" style="background:${k[1]}"></span>${k[0]}</dd><dt class="right">${e.count}</dt><dd class="right">${showTime(e.time)}</dd><dt class="right">${share(e.time)}</dt>`).join("")}</dl>
    <h2>Longest parts, over all layers</h2><dl style="grid-template-columns:1fr auto auto">${slow.map(p => `<dd>${nodeLink(p.at)} <span class="dim">${p.count > 1 ? "× " + p.count : ""}</span><br><span class="mono dim">${dotted(p.where)}</span></dd><dd class="right">${showTime(p.time)}</dd><dt class="right">${share(p.time)}</dt>`).join("")}</dl>
    <h2>How to read this</h2><p class="dim">Rows are nodes in execution order; arcs in the margin are the values between them. Equal layers are shown once: click a heading to open or close it. Click a node for its operands, place and cost. <code>/</code> searches, arrow keys move, ctrl and wheel zoom.</p>`;
}

$("details").addEventListener("click", e => {
  const link = e.target.closest("[data-node]");
  if (link) pick(+link.dataset.node);
});
listeners.pick.push(showDetails);
listeners.costs.push(showDetails);
