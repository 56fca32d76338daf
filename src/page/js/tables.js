// The tables of kernels, weights and remarks, the passes with their diffs, and the facts of the engine.
const tables = {};

function kernelRows() {
  const rows = D.kernels.map(([id, name, dtypes]) => ({ id, name, dtypes: runs(dtypes), nodes: [], layers: new Map(), flops: 0, bytes: 0, time: 0 }));
  for (let at = 0; at < COUNT; at++) {
    const row = rows[N.kernel[at]];
    if (!row) continue;
    row.nodes.push(at);
    const [flops, read, written] = costOf(at);
    row.flops += flops;
    row.bytes += read + written;
    row.time += timeOf(at);
    layersOf(at).forEach(l => {
      const general = generalLayer(l);
      row.layers.set(general, (row.layers.get(general) || 0) + 1);
    });
  }
  return rows;
}

function makeKernels() {
  const rows = kernelRows(), total = rows.reduce((t, r) => t + r.time, 0);
  const layers = r => [...r.layers].map(([l, n]) => n > 1 ? `${l} × ${n}` : l).join(", ");
  tables.kernels = makeTable($("kernels"), [
    { title: "kernel", width: "minmax(190px, 1.2fr)", key: r => r.name, html: r => `<span class="mono"><span class="dim">${esc(r.id)}</span> ${esc(r.name)}</span>` },
    { title: "element types", width: "minmax(110px, .8fr)", key: r => r.dtypes, html: r => `<span class="mono dim" title="${esc(r.dtypes)}">${esc(r.dtypes)}</span>` },
    { title: "nodes", width: "64px", right: true, key: r => r.nodes.length, html: r => r.nodes.length },
    { title: "source layers", width: "minmax(160px, 2.4fr)", key: layers, html: r => `<span class="mono dim" title="${esc(layers(r))}">${esc(layers(r))}</span>` },
    { title: "FLOP", width: "80px", right: true, key: r => r.flops, html: r => showCount(r.flops) },
    { title: "bytes", width: "90px", right: true, key: r => r.bytes, html: r => showBytes(r.bytes) },
    { title: "time", width: "90px", right: true, key: r => r.time, html: r => showTime(r.time) },
    { title: "share", width: "74px", right: true, key: r => r.time, html: r => total > 0 ? (r.time / total * 100).toFixed(1) + " %" : "" },
  ], rows, {
    placeholder: "Search kernels and layers", sort: 6, note: "click a row: its nodes in the graph",
    search: r => r.name + " " + r.dtypes + " " + layers(r),
    open: r => { showTab("graph"); $("search").value = r.name; search(r.name); step(1); },
  });
}

function makeWeights() {
  const shape = r => S(r[2]);
  tables.weights = makeTable($("weights"), [
    { title: "name", width: "minmax(260px, 3fr)", key: r => r[1], html: r => `<span class="mono" title="${esc(r[1])}">${esc(shortWeight(r[1]))}</span>` },
    { title: "dtype", width: "60px", key: r => shape(r).split("[")[0], html: r => `<span class="mono">${esc(shape(r).split("[")[0])}</span>` },
    { title: "shape", width: "140px", key: shape, html: r => `<span class="mono">[${esc(shape(r).split("[")[1] || "")}</span>` },
    { title: "bytes", width: "86px", right: true, key: r => r[3], html: r => showBytes(r[3]) },
    { title: "made of", width: "minmax(120px, 1.6fr)", key: r => r[5].length, html: r => `<span class="mono dim" title="${esc(r[5].map(S).join("\n"))}">${esc(r[5].length > 1 ? `${r[5].length} tensors: ` : "")}${esc(r[5].map(S).join(", "))}</span>` },
    { title: "stored", width: "60px", key: r => r[6], html: r => ["no", "yes", "made"][r[6]] },
    { title: "first use", width: "74px", right: true, key: r => (WEIGHT_USES.get(r[0]) || [0])[0], html: r => { const at = (WEIGHT_USES.get(r[0]) || [])[0]; return at === undefined ? "" : `<span class="mono">${nodeName(at)}</span>`; } },
    { title: "streamable", width: "150px", key: r => r[4] ? r[4][2] : -1, html: r => r[4] ? `tiles ${showBytes(r[4][2])}, axis ${r[4][1]}` : `<span class="dim">no</span>` },
  ], D.weights, {
    placeholder: "Search weights", note: "click a row: its first reader",
    search: r => r[1] + " " + shape(r) + " " + r[5].map(S).join(" ") + (r[4] ? " streamable" : ""),
    open: r => { const at = (WEIGHT_USES.get(r[0]) || [])[0]; if (at !== undefined) { showTab("graph"); pick(at); } },
  });
}

// How a page with a history is made, and the pipeline, where there is none.
function noHistory() {
  return `<div class="note"><b>An engine carries its pipeline, not its history.</b>
    <p>To see what each pass changed and why fusions were blocked, let the compiler write the page:</p>
    <p><code>millrace compile MODEL -o ENGINE --html PAGE.html</code></p>
    <p class="dim">The pipeline that made this engine:</p><div class="chips">${pipelineChips()}</div></div>`;
}
const pipelineChips = () => D.manifest.pipeline.split(/,(?![^{]*\})/).map(p => `<code>${esc(p)}</code>`).join("");

// Lines of a unified diff; where as many lines go as come, the part that differs is marked.
function diffHtml(lines) {
  const html = lines.map(l => esc(l) || " ");
  for (let at = 0; at < lines.length; at++) {
    let gone = at;
    while (gone < lines.length && lines[gone][0] === "-") gone++;
    let come = gone;
    while (come < lines.length && lines[come][0] === "+") come++;
    if (gone > at && come - gone === gone - at) for (let n = 0; n < gone - at; n++) {
      const a = lines[at + n], b = lines[gone + n], word = /[\w.@%$]/;
      let first = 1, last = 0;
      while (first < a.length && first < b.length && a[first] === b[first]) first++;
      while (last < a.length - first && last < b.length - first && a[a.length - 1 - last] === b[b.length - 1 - last]) last++;
      while (first > 1 && word.test(a[first - 1])) first--;
      while (last > 0 && word.test(a[a.length - last])) last--;
      [[at + n, a], [gone + n, b]].forEach(([row, l]) => {
        html[row] = `${esc(l.slice(0, first))}<mark>${esc(l.slice(first, l.length - last))}</mark>${esc(l.slice(l.length - last))}`;
      });
    }
    at = Math.max(at, come - 1);
  }
  const kind = l => l[0] === "+" ? "add" : l[0] === "-" ? "del" : l.startsWith("@@") ? "at" : "";
  return html.map((h, at) => `<div class="${kind(lines[at])}">${h}</div>`).join("");
}

function makePasses() {
  const box = $("passes");
  if (!D.history) { box.innerHTML = noHistory(); return; }
  const passes = D.history.passes;
  box.innerHTML = `<div class="split"><div class="steps">${passes.map((p, n) => {
    const by = p.after - p.before;
    const nodes = n === 0 ? `${p.after} nodes` : by ? `${p.before} → ${p.after}` : p.changed ? "same count" : "";
    return `<div class="step ${p.diff ? "go" : ""} ${p.changed ? "" : "same"}" data-n="${n}"><span>${n ? n + ". " : ""}${esc(p.name)}</span><span class="dim">${p.changed ? nodes : "unchanged"}</span><span class="right" style="width:44px;color:var(${by < 0 ? "--add-text" : "--dim"})">${by && n ? (by > 0 ? "+" : "−") + Math.abs(by) : ""}</span></div>`;
  }).join("")}</div><div class="diff" id="diff"></div></div>`;
  const show = n => {
    box.querySelectorAll(".step").forEach(s => s.classList.toggle("on", +s.dataset.n === n));
    const diff = passes[n] && passes[n].diff;
    $("diff").innerHTML = diff ? diffHtml(diff.replace(/\n$/, "").split("\n"))
      : `<div class="dim">No pass changed the module.</div>`;
    $("diff").scrollTop = 0;
  };
  box.querySelector(".steps").addEventListener("click", e => {
    const s = e.target.closest(".step.go");
    if (s) show(+s.dataset.n);
  });
  show(passes.findIndex(p => p.diff && p.after !== p.before) >= 0 ? passes.findIndex(p => p.diff && p.after !== p.before) : passes.findIndex(p => p.diff));
}

function makeRemarks() {
  if (!D.history) { $("remarks").innerHTML = noHistory(); return; }
  // Remarks that differ in numbers only are one row.
  const rows = new Map();
  D.history.remarks.forEach(([pass, node, loc, message, general]) => {
    const key = [pass, general, message.replace(/\d+/g, "*")].join("\n");
    if (!rows.has(key)) rows.set(key, { pass, node, loc, message, general, count: 0 });
    rows.get(key).count++;
  });
  const list = [...rows.values()], where = r => r.count > 1 ? r.general : r.loc;
  tables.remarks = makeTable($("remarks"), [
    { title: "pass", width: "140px", key: r => r.pass, html: r => esc(r.pass) },
    { title: "layers", width: "minmax(200px, 1fr)", key: where, html: r => `<span class="mono" title="${esc(r.loc)}">${esc(where(r))}</span>` },
    { title: "times", width: "60px", right: true, key: r => r.count, html: r => r.count },
    { title: "remark", width: "minmax(300px, 2.4fr)", key: r => r.message, html: r => `<span title="${esc(r.message)}">${esc(r.message)}</span>` },
    { title: "first node", width: "90px", key: r => r.node, html: r => `<span class="mono dim">${esc(r.node)}</span>` },
  ], list, { placeholder: "Search remarks", empty: "No pass left a remark.", note: "nodes as they were called in that pass", search: r => `${r.pass} ${r.loc} ${r.message}` });
}

function weightsKept() {
  const bytes = [0, 0, 0];
  D.weights.forEach(w => { bytes[w[6]] += w[3]; });
  const words = ["left out, bound at load", "stored in the engine", "generated at load"];
  return bytes.map((b, n) => b ? `${showBytes(b)} ${words[n]}` : "").filter(Boolean).join("<br>") || "none";
}

function makeAbout() {
  const m = D.manifest, f = D.file;
  const pairs = list => list.filter(([, v]) => v !== null && v !== undefined && v !== "").map(([k, v]) => `<tr><th>${esc(k)}</th><td>${v}</td></tr>`).join("");
  const types = list => list.map(([n, t]) => `<tr><td>${esc(n)}</td><td class="mono">${esc(t)}</td></tr>`).join("");
  $("about").innerHTML = `
    <div class="card"><h2>Model</h2><table>${pairs([["family", esc(m.family)], ["kind", esc(m.kind)], ["target", esc(m.target)], ["dtype", esc(m.dtype)], ["phase", esc(D.phase)],
    ["weights", weightsKept()], ["streaming", m.weight_streaming ? "weights may be streamed" : "off"],
    ...(m.model ? Object.entries(m.model).map(([k, v]) => [k, esc(Array.isArray(v) ? v.join(", ") : v)]) : [])])}</table></div>
    <div class="card"><h2>Symbols</h2><table><tr><th>symbol</th><th>range</th><th>multiple of</th><th>typical</th></tr>${D.symbols.map(([s, min, max, multiple, hint]) => `<tr><td class="mono">${esc(s)}</td><td>${min} … ${max}</td><td>${multiple}</td><td>${hint ?? `<span class="dim">largest</span>`}</td></tr>`).join("")}</table>
    <h2>Inputs</h2><table>${types(D.inputs)}</table><h2>Outputs</h2><table>${types(D.outputs)}</table></div>
    <div class="card"><h2>Memory at the upper bounds</h2><table>${pairs([["activations", showBytes(D.memory.peak)], ["lower bound", showBytes(D.memory.lower_bound)], ["buffers", D.memory.buffers], ["weights", showBytes(D.memory.weights)], ["streamable", showBytes(D.memory.streamable)], ["states", showBytes(D.memory.states)]])}</table>
    <h2>Pipeline</h2><div class="chips">${pipelineChips()}</div></div>
    ${f ? `<div class="card"><h2>Engine file</h2><table>${pairs([["bytes", `${f.bytes.toLocaleString("en")} (${showBytes(f.bytes)})`], ["producer", esc(f.producer)], ["identity", `<span class="mono">${esc(f.identity)}</span>`]])}</table>
    <h2>Sections</h2><table>${f.sections.map(([n, b]) => `<tr><td>${esc(n)}</td><td class="right">${showBytes(b)}</td></tr>`).join("")}</table></div>` : ""}
    <div class="card"><h2>How costs are counted</h2><p>Predicted time of a node is max(FLOP ÷ rate, bytes ÷ bandwidth) with the rates at the top of the page; change them to those of your machine. A matmul counts 2·m·n·k, attention 4·q·k·d·heads, one element of one elementwise step 1. Bytes are operands read and results written once; lookups count the rows they touch, views nothing. “Typical” shapes are the symbols' hints, and the largest value where there is none.</p></div>
    ${D.history && D.history.stats.length ? `<div class="card"><h2>Counters of the passes</h2><table>${pairs(D.history.stats.map(([k, v]) => [k, v.toLocaleString("en")]))}</table></div>` : ""}`;
}
