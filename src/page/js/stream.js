// Streaming: what is resident of each weight, and what processor and link do in a step.
const streaming = { step: 0, from: 0, to: 1 };
const LANES = [["processor", 0], ["link", 2]];
function streamWeight(item) {
  const at = WEIGHT.get(D.streaming.weights[item][0]);
  return at === undefined ? "?" : S_NAME(D.weights[at]);
}
function S_NAME(weight) { return shortWeight(weight[1]); }
function spanText([kind, number, start, end]) {
  const P = D.streaming, time = `${showTime((end - start) / 1e9)} from ${showTime(start / 1e9)}`;
  if (kind === 0) return `${nodeName(number)} ${opName(number)} · ${layersOf(number)[0] || ""} · ${time}`;
  const [item, first, count, bytes, slot] = P.copies[number];
  return `${kind === 1 ? "waits for" : "copy"} ${number}: ${streamWeight(item)} [${first}..${first + count}], ${showBytes(bytes)}, slot ${slot} · ${time}`;
}
function drawResidency() {
  const P = D.streaming, most = P.weights.reduce((n, w) => Math.max(n, w[1]), 1);
  $("residency").innerHTML = P.weights.map(([, bytes, slices, resident, tile, cut], item) => {
    const width = bytes / most * 100, part = slices ? resident / slices : 1;
    const what = part === 1 ? (cut === "stays" ? "stays" : "resident") : cut === "rows" ? "rows read where they lie" : `${(part * 100).toFixed(0)} % resident, tiles of ${tile} of ${slices} slices`;
    const tiles = part < 1 && tile ? Math.ceil((slices - resident) / tile) : 0;
    const cells = Array.from({ length: Math.min(tiles, 64) }, () => `<i></i>`).join("");
    return `<div class="residency-row"><span class="name" title="${esc(streamWeight(item))}">${esc(streamWeight(item))}</span><span class="bar-track"><span class="residency-bar" style="width:${Math.max(width, 0.3)}%"><b style="flex:${part}"></b><span class="tiles ${cut}" style="flex:${1 - part}">${cells}</span></span></span><span class="size">${showBytes(bytes)}</span><span class="what">${what}</span></div>`;
  }).join("");
}
// Steps repeat: what a copy does after the end of a step, it also did at the beginning of this one.
function stepSpans() {
  const step = D.streaming.steps[streaming.step];
  const before = step.spans.filter(s => s[3] > step.time).map(([kind, number, start, end]) => [kind, number, start - step.time, end - step.time]);
  return before.concat(step.spans);
}
function timelineScale() {
  const canvas = $("timeline"), end = Math.max(1, D.streaming.steps[streaming.step].time) * 1.01;
  const width = canvas.clientWidth, left = 76, inner = Math.max(1, width - left - 14);
  return {
    width, left, end,
    x: t => left + (t / end - streaming.from) / (streaming.to - streaming.from) * inner,
    time: x => ((x - left) / inner * (streaming.to - streaming.from) + streaming.from) * end,
  };
}
function drawTimeline() {
  if (!D.streaming) return;
  const canvas = $("timeline"), s = timelineScale(), ratio = devicePixelRatio || 1;
  if (!s.width) return;
  const height = 170, style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name);
  canvas.width = s.width * ratio;
  canvas.height = height * ratio;
  const paint = canvas.getContext("2d");
  paint.scale(ratio, ratio);
  paint.font = "11px system-ui, sans-serif";
  const step = D.streaming.steps[streaming.step];
  paint.fillStyle = colour("--dim");
  LANES.forEach(([name], lane) => paint.fillText(name, 8, 40 + lane * 60));
  const visible = stepSpans().filter(p => s.x(p[3]) >= s.left && s.x(p[2]) <= s.width);
  for (const [kind, number, start, end] of visible) {
    const x = Math.max(s.left, s.x(start)), w = Math.max(0.6, s.x(end) - x), y = kind === 2 ? 78 : 18;
    paint.fillStyle = kind === 0 ? colourOf(number) : kind === 1 ? colour("--del-text") : D.streaming.copies[number][4] % 2 ? "#5b8fd6" : "#2f5fa3";
    paint.globalAlpha = kind === 1 ? 0.35 : 1;
    paint.fillRect(x, y, w > 2 ? w - 0.5 : w, 36);
  }
  paint.globalAlpha = 1;
  paint.fillStyle = colour("--text");
  paint.strokeStyle = colour("--line");
  for (let i = 0; i <= 8; i++) {
    const t = s.time(s.left + (s.width - s.left - 14) * i / 8), x = s.x(t);
    paint.beginPath(); paint.moveTo(x, 12); paint.lineTo(x, 124); paint.stroke();
    paint.fillText(showTime(t / 1e9), Math.min(x - 10, s.width - 50), 140);
  }
  const x = s.x(step.time);
  paint.fillStyle = colour("--accent");
  if (x <= s.width) { paint.fillRect(x, 8, 1.5, 118); paint.fillText("step ends", Math.max(s.left, x - 56), 158); }
}
function timelineSummary() {
  const step = D.streaming.steps[streaming.step];
  $("stream-summary").innerHTML = `resident <b>${showBytes(D.streaming.resident)}</b> · ring <b>${D.streaming.slots} × ${showBytes(D.streaming.slot)}</b> · moved <b>${showBytes(D.streaming.moved)}</b> a step in ${D.streaming.copies.length} copies · `
    + `${step.name} of ${step.batch} × ${step.tokens} tokens after ${step.past}: predicted <b>${showTime(step.time / 1e9)}</b>, computing ${showTime(step.compute / 1e9)}, link busy ${showTime(step.copies / 1e9)}, stalled ${showTime(step.stall / 1e9)}`;
}
if (D.streaming) {
  $("stream-step").innerHTML = D.streaming.steps.map((s, at) => `<option value="${at}">${s.name}</option>`).join("");
  $("stream-step").onchange = e => { streaming.step = +e.target.value; streaming.from = 0; streaming.to = 1; timelineSummary(); drawTimeline(); };
  $("stream-reset").onclick = () => { streaming.from = 0; streaming.to = 1; drawTimeline(); };
  const canvas = $("timeline"), hint = $("stream-tip");
  canvas.addEventListener("wheel", e => {
    e.preventDefault();
    const s = timelineScale(), at = s.time(e.offsetX) / s.end, factor = e.deltaY > 0 ? 1.25 : 0.8;
    const from = at - (at - streaming.from) * factor, to = at + (streaming.to - at) * factor;
    if (to - from > 1e-5) { streaming.from = Math.max(0, from); streaming.to = Math.min(1, Math.max(to, streaming.from + 1e-5)); drawTimeline(); }
  }, { passive: false });
  canvas.addEventListener("mousemove", e => {
    const s = timelineScale(), t = s.time(e.offsetX), lane = e.offsetY < 66 ? 0 : 2;
    const hit = stepSpans().find(p => (p[0] === 2) === (lane === 2) && p[2] <= t && t < p[3]);
    hint.textContent = hit ? spanText(hit) : "";
  });
  drawResidency();
  timelineSummary();
}
