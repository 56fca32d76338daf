// Header, tabs and the page's address: #tab=weights&q=rope&expand=all&node=n12.
const TABS = [
  ["graph", "Graph", COUNT], ["kernels", "Kernels", D.kernels.length], ["memory", "Memory map", D.buffers.length], ...(D.streaming ? [["stream", "Streaming", D.streaming.copies.length]] : []), ["weights", "Weights", D.weights.length],
  ["passes", "Passes", D.history ? D.history.passes.length - 1 : ""], ["remarks", "Remarks", D.history ? D.history.remarks.length : ""], ["about", "Engine", ""],
];
function showTab(name) {
  if (!TABS.some(t => t[0] === name)) return;
  TABS.forEach(([id]) => { $(id).hidden = id !== name; });
  document.querySelectorAll("#tabs button").forEach(b => {
    b.classList.toggle("on", b.dataset.tab === name);
    b.setAttribute("aria-selected", b.dataset.tab === name);
  });
  if (name === "graph") draw();
  if (name === "memory") drawArena();
  if (name === "stream") drawTimeline();
  if (tables[name]) tables[name].draw();
}
function drawTiles() {
  let flops = 0, bytes = 0, time = 0;
  for (let at = 0; at < COUNT; at++) { flops += costOf(at)[0]; bytes += bytesOf(at); time += timeOf(at); }
  const memory = D.memory, tile = (value, name) => `<div class="tile"><b>${value}</b><span>${name}</span></div>`;
  $("tiles").innerHTML = tile(COUNT.toLocaleString("en"), `nodes, ${D.kernels.length} kernels`) + tile(showBytes(memory.peak), "activations, peak") + tile(showBytes(memory.lower_bound), "lower bound")
    + tile(showBytes(memory.weights), "weights") + tile(showBytes(memory.streamable), "streamable") + tile(showBytes(memory.states), "states, at most")
    + tile(showCount(flops), "FLOP a step") + tile(showBytes(bytes), "bytes moved a step") + tile(showTime(time), "predicted a step");
}
function costsChanged() {
  drawTiles();
  makeKernels();
  listeners.costs.forEach(f => f());
}
function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.get("shapes") === "largest") { state.bindings = 1; $("bindings").value = "1"; costsChanged(); }
  if (wanted.get("tab")) showTab(wanted.get("tab"));
  if (wanted.get("expand") === "all") expandAll(true);
  if (wanted.get("zoom")) zoom(+wanted.get("zoom"));
  if (wanted.has("q")) {
    $("search").value = wanted.get("q");
    search(wanted.get("q"));
    step(1);
  }
  const at = wanted.has("node") ? POSITION.get(+wanted.get("node").replace(/^n/, "")) : undefined;
  if (at !== undefined) pick(at);
}

{
  const m = D.manifest;
  $("title").textContent = m.family === m.kind ? m.family : `${m.family} · ${m.kind}`;
  $("subtitle").textContent = `for ${m.target}, ${m.dtype}, ${m.weight_streaming ? "weights streamable" : "weights resident"}`;
  const bound = D.symbols.map(([s, , max, , hint]) => `${s} = ${hint ?? max}`).join(", ");
  $("bindings").title = bound ? `typical: ${bound}` : "no symbols";
  $("rate-flops").value = state.flops / 1e9;
  $("rate-bytes").value = state.bytes / 1e9;
  $("rates-of").textContent = `(${D.rates.of})`;
  $("bindings").onchange = e => { state.bindings = +e.target.value; costsChanged(); };
  const rate = (id, key) => $(id).addEventListener("change", e => {
    const value = parseFloat(e.target.value) * 1e9;
    if (value > 0) { state[key] = value; $("rates-of").textContent = "(yours)"; costsChanged(); }
  });
  rate("rate-flops", "flops");
  rate("rate-bytes", "bytes");
  $("tabs").innerHTML = TABS.map(([id, name, count]) => `<button role="tab" data-tab="${id}">${name}<small>${count.toLocaleString("en")}</small></button>`).join("");
  $("tabs").addEventListener("click", e => { const b = e.target.closest("button"); if (b) showTab(b.dataset.tab); });
  document.addEventListener("keydown", e => {
    if (e.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) { e.preventDefault(); showTab("graph"); $("search").focus(); }
  });
  buildRows();
  costsChanged();
  makeWeights();
  makePasses();
  makeRemarks();
  makeAbout();
  showTab("graph");
  fromAddress();
  addEventListener("hashchange", fromAddress);
  addEventListener("resize", () => { draw(); drawArena(); drawTimeline(); Object.values(tables).forEach(t => t.draw()); });
}
