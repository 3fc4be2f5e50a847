"""How a report looks and moves. No address of another machine may stand here: a report is one file."""

CSS = """
:root { color-scheme: light dark;
  --bg:#fbfaf7; --card:#fff; --ink:#1d1f23; --soft:#676c76; --line:#e4e1d9; --accent:#8a5a00;
  --c0:#0b6fb8; --c1:#d1590b; --c2:#0a8f6b; --c3:#a8478f; --c4:#7a6a00; --c5:#5b55c9; --c6:#b3392f; --c7:#3d7d8c; }
@media (prefers-color-scheme: dark) { :root {
  --bg:#14161a; --card:#1c1f25; --ink:#e8e6e1; --soft:#9aa0aa; --line:#31353d; --accent:#e8b04a;
  --c0:#5fb4f0; --c1:#f59a4f; --c2:#4bcba3; --c3:#dd8ac6; --c4:#cdbb45; --c5:#a09bf5; --c6:#ef8379; --c7:#7dc0cf; } }
* { box-sizing:border-box }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  -webkit-text-size-adjust:100% }
main { max-width:1180px; margin:0 auto; padding:28px 20px 60px }
header { border-bottom:1px solid var(--line); padding-bottom:18px; margin-bottom:22px }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 6px; letter-spacing:-.01em; overflow-wrap:anywhere }
h2 { font-size:1.05rem; margin:36px 0 12px; color:var(--accent); font-weight:650 }
h3 { font-size:.95rem; margin:0; font-weight:650; overflow-wrap:anywhere }
.facts { color:var(--soft); font-size:.9rem; display:flex; flex-wrap:wrap; gap:2px 18px }
.facts b { color:var(--ink); font-weight:600 }
.state { display:inline-block; padding:1px 9px; border-radius:99px; border:1px solid currentColor; font-size:.8rem;
  vertical-align:middle; margin-left:10px; font-weight:600; letter-spacing:0 }
.state.finished { color:var(--c2) } .state.unfinished { color:var(--c1) }
.numbers { display:grid; grid-template-columns:repeat(auto-fill,minmax(150px,1fr)); gap:12px }
.numbers div, .panel, .card { background:var(--card); border:1px solid var(--line); border-radius:10px }
.numbers div { padding:10px 14px }
.numbers span { display:block; color:var(--soft); font-size:.8rem; overflow-wrap:anywhere }
.numbers b { font-size:1.35rem; font-weight:600; font-variant-numeric:tabular-nums }
.grid2 { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr)); gap:14px }
.panel { margin:0; padding:12px 12px 6px; display:flex; flex-direction:column; justify-content:space-between }
.columns { columns:320px; column-gap:14px } .columns .card { break-inside:avoid; display:inline-block; width:100% }
.grid2 + details { margin-top:14px }
.panel figcaption { display:flex; flex-wrap:wrap; align-items:baseline; gap:2px 10px; font-size:.8rem; color:var(--soft) }
.panel h3 { color:var(--ink) }
.legend { margin-left:auto; display:flex; flex-wrap:wrap; gap:0 12px; font-variant-numeric:tabular-nums }
.legend b { color:var(--ink); font-weight:600 }
.legend i { display:inline-block; width:10px; height:3px; border-radius:2px; margin-right:5px; vertical-align:middle }
.at { color:var(--ink) } .at:empty { display:none }
.scale { border:1px solid var(--line); border-radius:4px; padding:0 5px; font-size:.72rem }
svg { width:100%; height:auto; display:block; touch-action:pan-y }
svg text { fill:var(--soft); font-size:12.5px; font-variant-numeric:tabular-nums }
svg .grid { stroke:var(--line); stroke-width:1 } svg polyline { stroke-width:1.8; stroke-linejoin:round; stroke-linecap:round }
svg .cursor { stroke:var(--soft); stroke-width:1; stroke-dasharray:3 3; visibility:hidden }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch }
.card { padding:12px 16px; margin-bottom:14px }
.card h3 { margin-bottom:8px } .card.wide { grid-column:1/-1 } .grid2 .card { margin:0 }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; width:100% }
th { text-align:left; color:var(--soft); font-weight:600; font-size:.8rem; padding:4px 18px 6px 0;
  border-bottom:1px solid var(--line) }
td { padding:5px 18px 5px 0; border-bottom:1px solid var(--line); vertical-align:top }
tr:last-child td { border-bottom:0 } th.n, td.n { text-align:right }
td.key { color:var(--soft); white-space:nowrap } td.value { overflow-wrap:anywhere }
pre { margin:0; white-space:pre-wrap; overflow-wrap:anywhere;
  font:13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
details > summary { cursor:pointer; color:var(--soft); font-size:.9rem; margin:8px 0 }
.images { display:grid; grid-template-columns:repeat(auto-fill,minmax(110px,1fr)); gap:12px }
.images figure { margin:0 } .images img { width:100%; border-radius:6px; border:1px solid var(--line); display:block }
.images .small img { image-rendering:pixelated }
.images figcaption { font-size:.75rem; color:var(--soft); overflow-wrap:anywhere }
@media (max-width:520px) { main { padding:18px 12px 40px } .legend { margin-left:0 } td.key { white-space:normal } }
@media print { body { background:#fff } .panel, .card { break-inside:avoid } }
"""

# What is under the pointer: the nearest step of each curve, shown in the legend; the last values otherwise.
SCRIPT = """
for (const panel of document.querySelectorAll('.panel')) {
  const data = JSON.parse(panel.dataset.curves), svg = panel.querySelector('svg'), cursor = panel.querySelector('.cursor');
  const shown = [...panel.querySelectorAll('.legend b')], at = panel.querySelector('.at'), last = shown.map(b => b.textContent);
  const short = v => {
    for (const [size, unit] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']])
      if (Math.abs(v) >= size) return +(v / size).toPrecision(3) + unit;
    return String(+v.toPrecision(4));
  };
  const leave = () => {
    cursor.style.visibility = 'hidden'; at.textContent = ''; shown.forEach((b, i) => b.textContent = last[i]);
  };
  const move = event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const part = Math.min(1, Math.max(0, (x - data.left) / (data.right - data.left)));
    const step = data.x[0] + part * (data.x[1] - data.x[0]);
    let nearest = null;
    data.curves.forEach((curve, i) => {
      let best = -1;
      curve.x.forEach((s, k) => {
        if (curve.y[k] !== null && (best < 0 || Math.abs(s - step) < Math.abs(curve.x[best] - step))) best = k;
      });
      if (best < 0) return;
      shown[i].textContent = short(curve.y[best]);
      if (nearest === null || Math.abs(curve.x[best] - step) < Math.abs(nearest - step)) nearest = curve.x[best];
    });
    const to = data.left + (nearest - data.x[0]) / (data.x[1] - data.x[0]) * (data.right - data.left);
    cursor.setAttribute('x1', to); cursor.setAttribute('x2', to); cursor.style.visibility = 'visible';
    at.textContent = 'step ' + nearest;
  };
  svg.addEventListener('pointermove', move);
  svg.addEventListener('pointerdown', move);
  svg.addEventListener('pointerleave', leave);
}
"""
