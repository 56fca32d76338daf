// The activation arena: x is the position in the schedule, y the offset, each buffer a rectangle.
const arena = { from: 0, to: Math.max(1, COUNT), hover: -1 };
const map = $("map"), tip = $("tip");
const PEAK = D.memory.peak || 0, LOWER = D.memory.lower_bound || 0;
const MARGIN = { left: 78, right: 14, top: 14, bottom: 30 };

// Bytes alive at each position.
const LIVE = new Float64Array(COUNT + 1);
D.buffers.forEach(([bytes, , start, end]) => { LIVE[start] += bytes; LIVE[Math.min(end, COUNT)] -= bytes; });
for (let at = 1; at <= COUNT; at++) LIVE[at] += LIVE[at - 1];

const bufferLayer = b => { const at = DEF[b[4][0]]; return at < 0 ? "" : layersOf(at)[0] || ""; };

function arenaScale() {
  const width = map.clientWidth, height = map.clientHeight, top = Math.max(PEAK, 1) * 1.06;
  const inner = [width - MARGIN.left - MARGIN.right, height - MARGIN.top - MARGIN.bottom];
  return {
    width, height,
    x: at => MARGIN.left + (at - arena.from) / (arena.to - arena.from) * inner[0],
    y: bytes => height - MARGIN.bottom - bytes / top * inner[1],
    position: x => arena.from + (x - MARGIN.left) / inner[0] * (arena.to - arena.from),
    bytes: y => (height - MARGIN.bottom - y) / inner[1] * top,
  };
}

function drawArena() {
  const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name);
  const ratio = devicePixelRatio || 1, s = arenaScale();
  if (!s.width) return;
  map.width = s.width * ratio;
  map.height = s.height * ratio;
  const paint = map.getContext("2d");
  paint.scale(ratio, ratio);
  paint.font = "11px system-ui, sans-serif";
  if (!D.buffers.length) {
    paint.fillStyle = colour("--dim");
    paint.fillText("The module has no activation plan.", 20, 30);
    return;
  }
  // Grid and labels.
  paint.strokeStyle = colour("--line");
  paint.fillStyle = colour("--dim");
  paint.textAlign = "right";
  for (let n = 0; n <= 4; n++) {
    const bytes = PEAK * n / 4, y = Math.round(s.y(bytes)) + .5;
    paint.globalAlpha = .5;
    line(paint, MARGIN.left, y, s.width - MARGIN.right, y);
    paint.globalAlpha = 1;
    paint.fillText(showBytes(Math.round(bytes)), MARGIN.left - 8, y + 4);
  }
  paint.textAlign = "center";
  const span = arena.to - arena.from, step = niceStep(span / 10);
  for (let at = Math.ceil(arena.from / step) * step; at < arena.to; at += step) {
    if (at >= arena.from) paint.fillText(at, s.x(at), s.height - 11);
  }
  paint.textAlign = "left";
  paint.save();
  paint.beginPath();
  paint.rect(MARGIN.left, MARGIN.top - 6, s.width - MARGIN.left - MARGIN.right, s.height - MARGIN.top - MARGIN.bottom + 8);
  paint.clip();
  D.buffers.forEach((b, n) => {
    const [bytes, offset, start, end] = b;
    if (end < arena.from || start > arena.to) return;
    const x = s.x(start), w = Math.max(1, s.x(end) - x), y = s.y(offset + bytes), h = Math.max(1, s.y(offset) - y);
    const at = DEF[b[4][0]];
    paint.globalAlpha = n === arena.hover ? 1 : .8;
    paint.fillStyle = at < 0 ? "#888" : colourOf(at);
    paint.fillRect(x, y, w, h);
    if (w > 3 && h > 3) {
      paint.globalAlpha = 1;
      paint.strokeStyle = n === arena.hover ? colour("--text") : colour("--panel");
      paint.lineWidth = n === arena.hover ? 2 : 1;
      paint.strokeRect(x + .5, y + .5, w - 1, h - 1);
    }
    if (w > 90 && h > 16) {
      paint.globalAlpha = 1;
      paint.fillStyle = "#fff";
      const label = `%${b[4][0]} ${showBytes(bytes)}`;
      paint.fillText(label, Math.max(x, MARGIN.left) + 6, y + h / 2 + 4);
    }
  });
  paint.globalAlpha = 1;
  // Bytes alive, lower bound, peak.
  paint.strokeStyle = colour("--text");
  paint.lineWidth = 1.5;
  paint.beginPath();
  // A step narrower than a few pixels would only add noise.
  if (s.x(1) - s.x(0) >= 4) for (let at = Math.max(0, Math.floor(arena.from)); at <= Math.min(COUNT - 1, Math.ceil(arena.to)); at++) {
    paint.lineTo(s.x(at), s.y(LIVE[at]));
    paint.lineTo(s.x(at + 1), s.y(LIVE[at]));
  }
  paint.stroke();
  paint.lineWidth = 2;
  paint.strokeStyle = colour("--del-text");
  line(paint, MARGIN.left, s.y(PEAK), s.width - MARGIN.right, s.y(PEAK));
  paint.setLineDash([7, 5]);
  paint.strokeStyle = colour("--accent");
  line(paint, MARGIN.left, s.y(LOWER), s.width - MARGIN.right, s.y(LOWER));
  paint.restore();
  paint.font = "600 11px system-ui, sans-serif";
  paint.fillStyle = colour("--del-text");
  paint.fillText(`arena ${showBytes(PEAK)}`, MARGIN.left + 6, s.y(PEAK) - 6);
  paint.fillStyle = colour("--accent");
  paint.fillText(`lower bound ${showBytes(LOWER)}`, MARGIN.left + 116, s.y(LOWER) - 6);
}
function line(paint, x1, y1, x2, y2) {
  paint.beginPath();
  paint.moveTo(x1, y1);
  paint.lineTo(x2, y2);
  paint.stroke();
}
function niceStep(rough) {
  const power = Math.pow(10, Math.floor(Math.log10(Math.max(rough, 1))));
  return Math.max(1, [1, 2, 5, 10].find(n => n * power >= rough) * power);
}

function bufferAt(x, y) {
  const s = arenaScale(), at = s.position(x), bytes = s.bytes(y);
  return D.buffers.findIndex(([size, offset, start, end]) => at >= start && at < end && bytes >= offset && bytes < offset + size);
}
function arenaWindow(from, to) {
  const span = Math.min(Math.max(to - from, Math.min(8, COUNT)), Math.max(COUNT, 1));
  const start = Math.max(0, Math.min(from, Math.max(COUNT, 1) - span));
  arena.from = start;
  arena.to = start + span;
  drawArena();
}
map.addEventListener("mousemove", e => {
  if (e.buttons) return;
  const hover = bufferAt(e.offsetX, e.offsetY);
  if (hover !== arena.hover) { arena.hover = hover; drawArena(); }
  tip.hidden = hover < 0;
  if (hover < 0) return;
  const b = D.buffers[hover], at = DEF[b[4][0]];
  tip.innerHTML = `<b class="mono">${b[4].slice(0, 6).map(v => "%" + v).join(" ")}${b[4].length > 6 ? " …" : ""}</b> ${showBytes(b[0])} <span class="dim">at ${showBytes(b[1])}</span><br>
    alive in steps ${b[2]}…${b[3] - 1}<br>${at < 0 ? "" : `${nodeName(at)} ${esc(opName(at))}<br><span class="mono">${esc(layersOf(at).join(", "))}</span><br><span class="mono">${esc(typeOf(b[4][0]))}</span>`}`;
  const box = map.getBoundingClientRect();
  tip.style.left = Math.min(e.offsetX + 16, box.width - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(e.offsetY + 16, box.height - tip.offsetHeight - 8) + "px";
});
map.addEventListener("mouseleave", () => { tip.hidden = true; arena.hover = -1; drawArena(); });
map.addEventListener("wheel", e => {
  e.preventDefault();
  const at = arenaScale().position(e.offsetX), factor = e.deltaY < 0 ? 1 / 1.25 : 1.25;
  arenaWindow(at - (at - arena.from) * factor, at + (arena.to - at) * factor);
}, { passive: false });
map.addEventListener("pointerdown", e => {
  const x = e.clientX, from = arena.from, to = arena.to;
  let moved = false;
  map.setPointerCapture(e.pointerId);
  map.onpointermove = move => {
    if (Math.abs(move.clientX - x) < 4 && !moved) return;
    moved = true;
    const shift = (x - move.clientX) / (map.clientWidth - MARGIN.left - MARGIN.right) * (to - from);
    arenaWindow(from + shift, to + shift);
  };
  map.onpointerup = () => {
    map.onpointermove = map.onpointerup = null;
    if (moved) return;
    const hit = bufferAt(e.offsetX, e.offsetY);
    if (hit >= 0 && DEF[D.buffers[hit][4][0]] >= 0) { showTab("graph"); pick(DEF[D.buffers[hit][4][0]]); }
  };
});
$("arena-reset").onclick = () => arenaWindow(0, COUNT);
$("arena-title").innerHTML = D.buffers.length
  ? `arena <b>${showBytes(PEAK)}</b> at the upper bounds · lower bound <b>${showBytes(LOWER)}</b>${LOWER && PEAK > LOWER ? `, ${((PEAK / LOWER - 1) * 100).toFixed(2)} % below` : ""} · ${D.buffers.length} buffers · <code>${esc(D.memory.arenas.map(a => `${a[0]} = ${a[1]}`).join("; "))}</code>` : "no activation plan";
{
  const used = new Set(D.buffers.map(b => DEF[b[4][0]]).filter(at => at >= 0).map(at => kindOf(opName(at))));
  $("legend").innerHTML = KINDS.filter(k => used.has(k)).map(k => `<span><span class="swatch" style="background:${k[1]}"></span>${k[0]}</span>`).join("")
    + `<span><b style="color:var(--text)">—</b> bytes alive (zoomed in)</span><span><b style="color:var(--accent)">╌</b> lower bound: most bytes alive at once</span><span><b style="color:var(--del-text)">—</b> arena</span><span class="grow"></span><span>x: position in the schedule, y: offset</span>`;
}
