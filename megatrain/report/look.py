"""How the page looks, and the few lines that show the values under the pointer."""

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --ink: #1d2125; --soft: #68707a; --line: #e4e6e9;
  --main: #2563c9; --second: #d9622b; --third: #6b7f3a; --good: #2f8f5b; --bad: #c93a3a; --warn: #b7791f; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1c2024; --ink: #e7e9ec; --soft: #98a1ab;
  --line: #2e343a; --main: #6ea3f7; --second: #f0915f; --third: #a9bf72; --good: #5cc48a; --bad: #f07070;
  --warn: #e0ad55; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 20px 16px 48px; max-width: 1180px; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; margin-bottom: 14px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 600; margin: 0; }
.badge { font-size: 12px; font-weight: 600; border-radius: 99px; padding: 1px 10px; border: 1px solid; }
.finished { color: var(--good); } .failed { color: var(--bad); } .preempted { color: var(--warn); }
.running { color: var(--main); }
.note { color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(152px, 1fr)); gap: 10px; margin-bottom: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 12px; min-width: 0; }
.figure b { display: block; font-size: 19px; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: 12px; }
.charts, .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 12px; }
.wide { grid-column: 1 / -1; }
.top { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 10px; min-height: 24px; }
.legend, .readout { color: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.legend span { white-space: nowrap; display: inline-block; }
.legend i { display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin: 0 4px 3px 10px;
  background: currentColor; vertical-align: middle; }
.legend i.tall { width: 2px; height: 11px; margin-bottom: 0; }
svg { display: block; width: 100%; height: auto; overflow: hidden; touch-action: pan-y; }
.narrow { display: none; }
@media (max-width: 640px) { .narrow { display: block; } .broad { display: none; } body { padding: 14px 10px 40px; } }
.tick { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke: var(--c); }
.pale { opacity: .3; stroke-width: 1; }
.dot { fill: var(--c); }
.main { --c: var(--main); color: var(--main); } .second { --c: var(--second); color: var(--second); }
.third { --c: var(--third); color: var(--third); }
.mark { stroke: currentColor; stroke-width: 1.4; color: var(--soft); }
.resumed { color: var(--good); stroke-dasharray: 4 3; } .saved { color: var(--soft); }
.skipped { color: var(--warn); } .spike, .failed { color: var(--bad); }
.preempted { color: var(--warn); stroke-dasharray: 1 3; }
.cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 400; color: var(--soft); white-space: nowrap; vertical-align: top; }
td, th { padding: 4px 14px 4px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
tr:first-child > * { border-top: 0; }
.two { margin-top: 12px; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 8px 0 0; }
"""

SCRIPT = """
for (const svg of document.querySelectorAll('svg[data-curves]')) {
  const curves = JSON.parse(svg.dataset.curves), [low, high] = svg.dataset.range.split(',').map(Number);
  const left = +svg.dataset.left, right = +svg.dataset.right, width = svg.viewBox.baseVal.width;
  const cursor = svg.querySelector('.cursor'), readout = svg.closest('.card').querySelector('.readout');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    const step = low + (Math.min(Math.max(x, left), width - right) - left) / (width - left - right) * (high - low);
    const near = curve => curve.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
    const main = near(curves[0]), at = left + (main[0] - low) / (high - low) * (width - left - right);
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at); cursor.style.visibility = 'visible';
    readout.textContent = 'step ' + main[0].toLocaleString() + curves.map(curve => {
      const point = near(curve);
      return ' · ' + curve.label + ' ' + Number(point[1].toPrecision(5));
    }).join('');
  });
  svg.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; readout.textContent = ''; });
}
"""
