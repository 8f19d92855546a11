"""Look: the style sheet and the script of the report's page, as text that the page holds inside itself."""

from __future__ import annotations

BRUSH = (
    '<svg viewBox="0 0 44 16" width="44" height="16" aria-hidden="true">'
    '<path d="M2 11c6-7 10-8 13-4s-4 7 2 6 8-9 13-9-1 8 3 8 5-4 9-6" fill="none" stroke="currentColor" '
    'stroke-width="3.2" stroke-linecap="round"/></svg>'
)


CSS = """
:root {
  --paper: #f7f4ee; --card: #fffdf9; --ink: #26231f; --soft: #776f64; --line: #e6dfd3; --grid: #eee8dd;
  --main: #c8482f; --second: #2f6f8f; --third: #6b7f2a; --fourth: #8a4f9e; --faint: #e0a795;
  --good: #3f7d4e; --warn: #b7791f; --bad: #b3261e; --shadow: 0 1px 2px #4a3c2a14,0 8px 24px #4a3c2a0f;
}
@media (prefers-color-scheme:dark) {
  :root {
    --paper: #16171a; --card: #1e2024; --ink: #ece8e1; --soft: #9c968c; --line: #30333a;
    --grid: #292c32; --main: #ff8a6b; --second: #6cb6d9; --third: #b3c768; --fourth: #c99ad9;
    --faint: #8a5546; --good: #74c28a; --warn: #e3b25a; --bad: #ff7b72; --shadow: 0 1px 2px #0006;
  }
}
* { box-sizing: border-box }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 ui-sans-serif,system-ui,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px }
h1, h2, h3, p { margin: 0 }
.brand {
  color: var(--main); font: italic 600 17px/1 Georgia,"Iowan Old Style",serif; display: flex; gap: 10px;
  align-items: center;
}
h1 { font: 600 34px/1.2 Georgia,"Iowan Old Style",serif; margin: 14px 0 4px; overflow-wrap: anywhere }
h2 { font: 600 21px/1.3 Georgia,"Iowan Old Style",serif }
.sub, .hint, .meta, small { color: var(--soft) }
.pill {
  font: 600 12px/1 ui-sans-serif,system-ui,sans-serif; vertical-align: middle; padding: 5px 10px;
  border-radius: 99px; border: 1px solid; margin-left: 6px;
}
.pill.complete { color: var(--good) }
.pill.running { color: var(--second) }
.reason { color: var(--warn); margin-top: 6px; overflow-wrap: anywhere }
.pill.stopped { color: var(--warn) }
.progress { height: 4px; border-radius: 9px; background: var(--line); margin-top: 18px; overflow: hidden }
.progress i { display: block; height: 100%; background: var(--main); border-radius: 9px }
section { margin-top: 36px }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(150px,1fr)); gap: 12px; margin-top: 22px;
}
.figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 14px 16px;
  box-shadow: var(--shadow); display: flex; flex-direction: column;
}
.figure span { font-size: 12.5px; color: var(--soft) }
.figure b { font: 600 25px/1.35 Georgia,serif; font-variant-numeric: tabular-nums }
.figure small { font-size: 12px }
.figure.bad b { color: var(--bad) }
.bar {
  display: flex; justify-content: space-between; align-items: center; gap: 24px; position: sticky;
  top: 0; background: var(--paper); padding: 8px 0; z-index: 2;
}
.scrub {
  display: flex; align-items: center; gap: 12px; color: var(--soft); font-variant-numeric: tabular-nums;
  flex: 0 1 420px; justify-content: flex-end;
}
.scrub output { color: var(--ink); font-weight: 600; min-width: 3.5em }
input[type=range] { accent-color: var(--main); flex: 1; min-width: 80px }
.prompts {
  display: grid; grid-template-columns: repeat(auto-fill,minmax(min(100%,480px),1fr)); gap: 20px;
  margin-top: 14px;
}
.prompt {
  background: var(--card); border: 1px solid var(--line); border-radius: 18px; padding: 18px;
  box-shadow: var(--shadow); min-width: 0;
}
.prompt h3 { font: italic 500 17px/1.4 Georgia,serif; margin-bottom: 12px; overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px }
.pair figure { margin: 0; position: relative }
.pair img { width: 100%; height: auto; display: block; border-radius: 10px }
.pair figcaption {
  position: absolute; left: 8px; bottom: 8px; font-size: 12px; padding: 2px 9px; border-radius: 99px;
  background: #000a; color: #fff;
}
.pair .adapter figcaption { background: var(--main); color: #fff }
@media (prefers-color-scheme:dark) {
  .pair .adapter figcaption { color: #16171a }
}
.meta { font-size: 13px; margin-top: 10px; font-variant-numeric: tabular-nums }
.difference.bad { color: var(--bad); font-weight: 600 }
.strip {
  display: flex; gap: 6px; overflow-x: auto; margin-top: 12px; padding: 3px 3px 6px;
  scrollbar-width: thin;
}
.strip button {
  flex: 0 0 auto; border: 0; background: none; padding: 0; cursor: pointer; color: var(--soft);
  font: 11.5px/1.6 ui-sans-serif,system-ui,sans-serif; font-variant-numeric: tabular-nums;
  text-align: center;
}
.strip img {
  width: 64px; height: 64px; object-fit: cover; display: block; border-radius: 7px;
  outline: 2px solid transparent; outline-offset: 1px;
}
.strip [aria-current] img { outline-color: var(--main) }
.strip [aria-current] { color: var(--ink); font-weight: 600 }
.missing {
  aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 10px; display: grid;
  place-items: center; text-align: center; font-size: 12px; color: var(--soft); overflow-wrap: anywhere;
}
.strip .missing { width: 64px; font-size: 9px }
.plots {
  display: grid; grid-template-columns: repeat(auto-fit,minmax(min(100%,500px),1fr)); gap: 20px;
  margin-top: 14px;
}
.plot {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 18px;
  padding: 16px 16px 8px; box-shadow: var(--shadow); position: relative;
}
.plot figcaption {
  display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; padding: 0 4px 6px;
}
.plot figcaption b { font: 600 16px/1.4 Georgia,serif }
.plot small { flex-basis: 100%; font-size: 12.5px }
.legend { display: flex; gap: 12px; margin-left: auto; font-size: 12.5px; color: var(--soft) }
.key i {
  display: inline-block; width: 16px; height: 0; border-top: 3px solid var(--main);
  vertical-align: middle; margin-right: 6px; border-radius: 2px;
}
.key.second i { border-color: var(--second) }
.key.third i { border-color: var(--third) }
.key.fourth i { border-color: var(--fourth) }
.key.faint i { border-color: var(--faint) }
.key.dashed i { border-top: 2px dashed var(--soft) }
.chart { width: 100%; height: auto; display: block; touch-action: pan-y }
.grid { stroke: var(--grid) }
.axis { stroke: var(--line) }
.tick, .none { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums }
.tick.y { text-anchor: end }
.tick.x, .none { text-anchor: middle }
.curve { fill: none; stroke: var(--main); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round }
.curve.second { stroke: var(--second) }
.curve.third { stroke: var(--third) }
.curve.fourth { stroke: var(--fourth) }
.curve.faint { stroke: var(--faint); stroke-width: 1; opacity: .75 }
.curve.dashed { stroke: var(--soft); stroke-width: 1.8; stroke-dasharray: 6 5 }
.dot { fill: var(--main) }
.dot.second { fill: var(--second) }
.dot.third { fill: var(--third) }
.dot.fourth { fill: var(--fourth) }
.dot.dashed { fill: var(--soft) }
.band { fill: var(--main); opacity: .13 }
.spread { fill: var(--faint); opacity: .38 }
circle.mark { fill: var(--card); stroke: var(--good); stroke-width: 2.4 }
text.mark {
  fill: var(--good); font-size: 12.5px; font-weight: 600; paint-order: stroke; stroke: var(--card);
  stroke-width: 4px;
}
.divider { stroke: var(--soft); stroke-dasharray: 2 4 }
text.divider { stroke: none; fill: var(--soft); font-size: 11.5px }
.cursor { stroke: var(--soft); visibility: hidden }
.plot>output {
  position: absolute; right: 20px; bottom: 44px; font-size: 12.5px; font-variant-numeric: tabular-nums;
  background: var(--card); border-radius: 8px; padding: 0 6px; pointer-events: none; white-space: pre;
}
details summary { cursor: pointer; list-style: none }
summary::-webkit-details-marker { display: none }
summary h2 { display: inline }
summary::after { content: " +"; color: var(--soft); font-size: 20px }
details[open] summary::after { content: " \\2013" }
.values {
  border-collapse: collapse; margin-top: 12px; width: 100%; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px; border-spacing: 0; overflow: hidden;
  border-collapse: separate;
}
.values th { font-weight: 500; color: var(--soft); text-align: left; width: 34%; vertical-align: top }
.values th, .values td { padding: 7px 16px; border-bottom: 1px solid var(--grid); overflow-wrap: anywhere }
.values tr:last-child>* { border-bottom: 0 }
.values td { font-variant-numeric: tabular-nums }
.notes {
  list-style: none; padding: 0; margin: 12px 0 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 14px;
}
.notes li {
  display: grid; grid-template-columns: 90px 70px 1fr; gap: 8px; padding: 8px 16px;
  border-bottom: 1px solid var(--grid);
}
.notes li:last-child { border: 0 }
.notes span { color: var(--soft); font-variant-numeric: tabular-nums }
.notes b { font-weight: 600; color: var(--second) }
.notes .note b { color: var(--warn) }
.notes .skipped b { color: var(--bad) }
.notes .saved b { color: var(--good) }
.notes div { overflow-wrap: anywhere }
footer { margin-top: 48px; color: var(--soft); font-size: 13px }
@media (max-width:560px) {
  main { padding: 20px 14px }
  .notes li { grid-template-columns: 1fr 1fr }
  .notes div { grid-column: 1/-1 }
  .bar { flex-wrap: wrap; gap: 6px }
}
"""

# The page reads well without it.
SCRIPT = """
// One slider chooses the step of every prompt's adapter picture; a film strip's picture does the same.
const range = document.querySelector('.scrub input');

function show(step) {
  for (const card of document.querySelectorAll('.prompt')) {
    const now = card.querySelector(`.strip [data-step="${step}"]`);
    if (!now) continue;
    for (const button of card.querySelectorAll('.strip button'))
      button.toggleAttribute('aria-current', button === now);
    const from = now.querySelector('img'), to = card.querySelector('.adapter img');
    if (from && to) to.src = from.src;
    const word = card.querySelector('.difference');
    word.textContent = now.dataset.words;
    word.classList.toggle('bad', now.dataset.bad === '1');
    const left = now.offsetLeft - now.parentNode.offsetLeft - 100;
    now.parentNode.scrollTo({ left, behavior: 'smooth' });
  }
  document.querySelector('.scrub output').textContent = (+step).toLocaleString('en');
}

if (range) {
  const steps = range.dataset.steps.split(',');
  range.oninput = () => show(steps[range.value]);
  for (const button of document.querySelectorAll('.strip button'))
    button.onclick = () => {
      range.value = steps.indexOf(button.dataset.step);
      show(button.dataset.step);
    };
}
for (const strip of document.querySelectorAll('.strip')) strip.scrollLeft = strip.scrollWidth;

// The pointer over a chart reads the curves' numbers back from their points.
for (const svg of document.querySelectorAll('svg.chart[data-end]')) {
  const [left, right, top, bottom] = svg.dataset.frame.split(' ').map(Number);
  const { width, height } = svg.viewBox.baseVal;
  const low = +svg.dataset.low, high = +svg.dataset.high, log = svg.dataset.log === '1';
  const out = svg.parentNode.querySelector('output'), cursor = svg.querySelector('.cursor');
  const curves = [...svg.querySelectorAll('polyline')]
    .map(line => ({ label: line.dataset.label, points: [...line.points] }))
    .filter(curve => curve.points.length);
  const value = y => {
    const share = 1 - (y - top) / (height - top - bottom);
    return log ? low * (high / low) ** share : low + share * (high - low);
  };
  svg.onpointermove = event => {
    const area = svg.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width * width;
    const nearest = curves.map(curve => ({
      label: curve.label,
      point: curve.points.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a),
    }));
    if (!nearest.length) return;
    const at = nearest[0].point.x;
    cursor.setAttribute('x1', at);
    cursor.setAttribute('x2', at);
    cursor.style.visibility = 'visible';
    const step = Math.round((at - left) / (width - left - right) * svg.dataset.end);
    const numbers = nearest.map(({ label, point }) => `${label} ${value(point.y).toPrecision(4)}`);
    out.textContent = `step ${step}   ${numbers.join('   ')}`;
  };
  svg.onpointerleave = () => {
    cursor.style.visibility = 'hidden';
    out.textContent = '';
  };
}

// While the run goes on the page reloads, unless somebody is looking at an earlier step.
if (document.body.dataset.state === 'running')
  setInterval(() => {
    if (!document.hidden && (!range || range.value === range.max)) location.reload();
  }, 20000);
"""
