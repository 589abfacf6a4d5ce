// A canvas to draw a digit on, what the networks see of it, and what each of them says.

const SIDE = 280, PEN = 14;
const STYLE = `
.digit-canvas { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; padding: 4px;
  color: var(--jp-content-font-color1, var(--vscode-foreground, inherit)); font-size: 13px; }
.digit-canvas canvas { border: 1px solid #7d7d7d; background: white; display: block; }
.digit-canvas .paper { width: ${SIDE}px; height: ${SIDE}px; touch-action: none; cursor: crosshair; }
.digit-canvas .seen { width: 112px; height: 112px; image-rendering: pixelated; background: black; }
.digit-canvas button { margin: 8px 8px 0 0; font: inherit; }
.digit-canvas table { border-collapse: collapse; font: inherit; }
.digit-canvas th, .digit-canvas td { padding: 2px 5px; text-align: center; border: 0;
  background: none; color: inherit; }
.digit-canvas th.name { text-align: left; font-weight: normal; white-space: nowrap; }
.digit-canvas .bar { width: 12px; height: 22px; display: flex; align-items: flex-end;
  background: #7d7d7d33; }
.digit-canvas .bar div { width: 100%; background: #1f77b4; }
.digit-canvas .best { font-weight: bold; white-space: nowrap; min-width: 62px; text-align: left; }`;

function make(tag, parent, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  parent.append(element);
  return element;
}

function draw(context, strokes, width) {
  context.clearRect(0, 0, SIDE, SIDE);
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round" });
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(stroke[0][0] - 0.1, stroke[0][1]); // so that a single point gives a dot
    for (const point of stroke) context.lineTo(...point);
    context.stroke();
  }
}

// MNIST's strokes are about a tenth of a digit thick: so is the ink, however large one draws.
function ink(strokes) {
  const extents = [0, 1].map((axis) => {
    const values = strokes.flat().map((point) => point[axis]);
    return Math.max(...values) - Math.min(...values);
  });
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  draw(canvas.getContext("2d"), strokes, Math.max(4, Math.max(...extents) / 9));
  return canvas.toDataURL("image/png").split(",")[1];
}

function render({ model, el }) {
  const root = make("div", el, { className: "digit-canvas" });
  make("style", root, { textContent: STYLE });
  const left = make("div", root);
  const paper = make("canvas", left, { className: "paper", width: SIDE, height: SIDE });
  paper.setAttribute("aria-label", "Draw a digit here");
  const undo = make("button", left, { textContent: "Undo" });
  const clear = make("button", left, { textContent: "Clear" });
  const middle = make("div", root);
  const seen = make("canvas", middle, { className: "seen", width: 28, height: 28 });
  make("div", middle, { textContent: "what the networks see" });
  const table = make("table", root);
  const head = make("tr", table);
  make("th", head);
  for (let digit = 0; digit < 10; digit++) make("th", head, { textContent: digit });
  const rows = model.get("names").map((name) => {
    const row = make("tr", table);
    make("th", row, { className: "name", textContent: name });
    const bars = Array.from({ length: 10 }, () =>
      make("div", make("div", make("td", row), { className: "bar" })));
    return { bars, best: make("td", row, { className: "best" }) };
  });

  let strokes = [], pen = null, waiting = false, changed = false, number = 0, asked = 0;

  // One question at a time: the next is what has been drawn when the answer comes.
  function ask() {
    if (!strokes.length || !changed || (waiting && performance.now() - asked < 3000)) return;
    changed = false;
    waiting = true;
    asked = performance.now();
    model.set("drawing", { number: ++number, png: ink(strokes) });
    model.save_changes();
  }

  function show(pixels, probabilities) {
    const image = new ImageData(28, 28);
    pixels.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
    seen.getContext("2d").putImageData(image, 0, 0);
    rows.forEach(({ bars, best }, i) => {
      const row = probabilities[i];
      bars.forEach((bar, digit) => { bar.style.height = `${100 * (row?.[digit] ?? 0)}%`; });
      const most = row && Math.max(...row);
      best.textContent = row ? `${row.indexOf(most)} (${Math.round(100 * most)} %)` : "";
    });
  }

  function redraw() {
    draw(paper.getContext("2d"), strokes, PEN);
    changed = true;
    if (strokes.length) ask();
    else show(new Array(784).fill(0), []);
  }

  function point(event) {
    const box = paper.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top].map(
      (value, i) => (value * SIDE) / (i ? box.height : box.width));
  }

  paper.addEventListener("pointerdown", (event) => {
    if (event.button || pen !== null) return; // a second finger, or a palm
    event.preventDefault();
    paper.setPointerCapture(event.pointerId);
    pen = event.pointerId;
    strokes.push([point(event)]);
    redraw();
  });
  paper.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pen) return;
    strokes.at(-1).push(point(event));
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    paper.addEventListener(name, (event) => { if (event.pointerId === pen) pen = null; });
  }
  undo.addEventListener("click", () => { pen = null; strokes.pop(); redraw(); });
  clear.addEventListener("click", () => { pen = null; strokes = []; redraw(); });

  const answered = () => {
    const answer = model.get("answer");
    if (answer.number !== number) return; // of a drawing elsewhere, or long ago
    waiting = false;
    if (strokes.length) show(answer.pixels, answer.probabilities);
    ask();
  };
  model.on("change:answer", answered);
  show(new Array(784).fill(0), []);
  return () => model.off("change:answer", answered);
}

export default { render };
