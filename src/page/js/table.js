// A sortable, searchable table that renders only the rows in view.
// columns: {title, width, right, key(row) -> number or string, html(row)}; options: {search(row) -> text, open(row), placeholder, note}.
function makeTable(parent, columns, rows, options) {
  const height = 28;
  parent.innerHTML = `<div class="bar"><div class="search"><input type="search" placeholder="${esc(options.placeholder)}" spellcheck="false"><span class="dim"></span></div><span class="grow"></span><span class="hint">${options.note || ""}</span></div>
    <div class="table"><div class="thead"></div><div class="tbody" tabindex="0"><div></div></div></div>${rows.length ? "" : `<p class="dim">${esc(options.empty || "Nothing to show.")}</p>`}`;
  const input = parent.querySelector("input"), shownCount = parent.querySelector(".search span");
  const head = parent.querySelector(".thead"), body = parent.querySelector(".tbody"), space = body.firstChild;
  const grid = columns.map(c => c.width).join(" ");
  let view = rows.slice(), sort = options.sort ?? -1, down = true;
  function refresh() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    view = rows.filter(r => { const text = options.search(r).toLowerCase(); return words.every(w => text.includes(w)); });
    if (sort >= 0) {
      const keyed = view.map((r, at) => [columns[sort].key(r), at, r]);
      const sign = down ? -1 : 1;
      keyed.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]));
      view = keyed.map(k => k[2]);
    }
    head.style.gridTemplateColumns = grid;
    head.innerHTML = columns.map((c, n) => `<span data-n="${n}" class="${c.right ? "right" : ""} ${n === sort ? "on" : ""}">${esc(c.title)}${n === sort ? (down ? " ▾" : " ▴") : ""}</span>`).join("");
    shownCount.textContent = view.length === rows.length ? `${rows.length} rows` : `${view.length} of ${rows.length}`;
    space.style.height = body.style.height = view.length * height + "px";
    if (!view.length) space.innerHTML = "";
    draw();
  }
  function draw() {
    const first = Math.max(0, Math.floor(body.scrollTop / height) - 4);
    const last = Math.min(view.length, first + Math.ceil(body.clientHeight / height) + 10);
    let html = "";
    for (let n = first; n < last; n++) {
      const cells = columns.map(c => `<span class="${c.right ? "right" : ""}">${c.html(view[n])}</span>`).join("");
      html += `<div class="trow ${options.open ? "go" : ""}" data-n="${n}" style="top:${n * height}px;grid-template-columns:${grid}">${cells}</div>`;
    }
    space.innerHTML = html;
    head.style.paddingRight = 12 + body.offsetWidth - body.clientWidth + "px";
  }
  head.addEventListener("click", e => {
    const n = e.target.dataset.n;
    if (n === undefined) return;
    down = sort === +n ? !down : !!columns[n].right;
    sort = +n;
    refresh();
  });
  body.addEventListener("scroll", draw);
  input.addEventListener("input", () => { body.scrollTop = 0; refresh(); });
  space.addEventListener("click", e => {
    const row = e.target.closest(".trow");
    if (row && options.open) options.open(view[+row.dataset.n]);
  });
  refresh();
  return { refresh, draw, search(text) { input.value = text; refresh(); } };
}
