// The curves: uPlot, with a line wherever a generation starts. The three charts share one step
// axis: pointing at one points at all, dragging over one zooms all, a double click zooms out.

import * as format from "./format.js";

const PANELS = [
  {
    id: "loss",
    title: "Loss",
    unit: "nats a token",
    series: [
      { label: "each step", column: "loss", colour: "--curve-1-faint", show: format.loss, width: 1 },
      { label: "smooth", smooth: "loss", colour: "--curve-1", show: format.loss, width: 2.5 },
    ],
    axis: (value) => String(+value.toPrecision(4)),
  },
  {
    id: "throughput",
    title: "Throughput",
    unit: "tokens a second",
    fromZero: true,
    series: [
      { label: "tokens/s", column: "throughput", colour: "--curve-2", show: format.count, width: 1.5, fill: "--curve-2-fill" },
      { label: "workers", column: "workers", colour: "--curve-5", show: format.count, width: 1.5, right: true, stepped: true },
      // A number to be read only: its curve would be that of tokens/s, but for another scale.
      { label: "MFU", column: "mfu", show: format.share, right: true, hidden: true },
    ],
    axis: format.compact,
    rightAxis: (value) => (Number.isInteger(value) ? String(value) : ""),
    rightFromZero: true,
  },
  {
    id: "norm",
    title: "Gradient",
    unit: "norm before clipping, learning rate",
    series: [
      { label: "norm", column: "norm", colour: "--curve-3", show: format.small, width: 1.5 },
      { label: "rate", column: "rate", colour: "--curve-4", show: format.rate, width: 2, right: true },
    ],
    axis: (value) => String(+value.toPrecision(3)),
    rightAxis: (value) => (value === 0 ? "0" : Number(value.toPrecision(2)).toExponential()),
    rightFromZero: true,
  },
];

// Labels of generations nearer than this are left out (the lines stay).
const LABEL_PX = 26;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

class Chart {
  constructor(panel, charts) {
    this.panel = panel;
    this.charts = charts;
    this.figure = element("figure", "panel chart");
    this.figure.id = `chart-${panel.id}`;
    const caption = element("figcaption", "panel-head");
    const title = element("h2", "", panel.title);
    title.append(" ", element("small", "", panel.unit));
    const readout = element("p", "readout");
    this.values = panel.series.map((series) => {
      const item = element("span", "");
      if (!series.hidden) item.append(element("span", "swatch"));
      item.style.setProperty("--swatch", `var(${series.colour})`);
      const value = element("output", "", "–");
      item.append(`${series.label} `, value);
      readout.append(item);
      return value;
    });
    caption.append(title, readout);
    this.canvas = element("div", "canvas");
    this.empty = element("p", "empty", "the first step is still to come");
    this.canvas.append(this.empty);
    this.figure.append(caption, this.canvas);
  }

  build() {
    this.plot?.destroy();
    const { width, height } = this.canvas.getBoundingClientRect();
    this.plot = new uPlot(this.#options(width, height), this.#data(), this.canvas);
    this.plot.root.hidden = this.charts.steps.length === 0;
  }

  resize() {
    const { width, height } = this.canvas.getBoundingClientRect();
    if (width > 0 && (width !== this.plot.width || height !== this.plot.height)) this.plot.setSize({ width, height });
  }

  update() {
    this.empty.hidden = this.charts.steps.length > 0;
    this.plot.root.hidden = !this.empty.hidden;
    this.plot.setData(this.#data(), false);
    this.plot.setScale("x", this.charts.range());
    if (this.plot.cursor.idx == null) this.read(null);
  }

  // Shows the values at a point, or the newest ones.
  read(index) {
    const { steps } = this.charts;
    const at = index ?? steps.length - 1;
    this.panel.series.forEach((series, i) => {
      const value = at < 0 ? "–" : series.show(this.plot.data[i + 1][at]);
      if (this.values[i].textContent !== value) this.values[i].textContent = value;
    });
  }

  #data() {
    const { steps } = this.charts;
    return [steps.step, ...this.panel.series.map((s) => (s.smooth ? steps.smooth(s.smooth) : steps[s.column]))];
  }

  #options(width, height) {
    const { panel, charts } = this;
    const axis = (more) => ({
      stroke: () => colour("--ink-soft"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: () => colour("--grid"), width: 1 },
      ticks: { show: false },
      ...more,
    });
    const zoomTo = (range) => charts.zoom(range);
    return {
      width,
      height,
      padding: [16, panel.rightAxis ? 4 : 18, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: "steps", setSeries: false },
        y: false,
        drag: { setScale: false, x: true, y: false },
        points: { size: 7 },
        bind: { dblclick: () => () => zoomTo(null) },
      },
      scales: {
        x: { time: false },
        y: { range: (_, low, high) => span(low, high, panel.fromZero) },
        right: { range: (_, low, high) => span(low, high, panel.rightFromZero) },
      },
      axes: [
        axis({ size: 26, values: (_, ticks) => ticks.map((t) => (Number.isInteger(t) ? format.compact(t) : "")) }),
        axis({ size: 46, values: (_, ticks) => ticks.map(panel.axis) }),
        ...(panel.rightAxis
          ? [axis({ scale: "right", side: 1, size: 46, grid: { show: false }, values: (_, t) => t.map(panel.rightAxis) })]
          : []),
      ],
      series: [
        {},
        ...panel.series.map((s) => ({
          label: s.label,
          show: !s.hidden,
          scale: s.right ? "right" : "y",
          stroke: () => colour(s.colour),
          fill: s.fill && (() => colour(s.fill)),
          width: s.width,
          paths: s.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
          // A line needs two points; one alone is drawn as a dot.
          points: { show: () => charts.steps.length < 2 },
        })),
      ],
      hooks: {
        drawAxes: [(u) => this.#mark(u)],
        setCursor: [(u) => this.read(u.cursor.idx)],
        setSelect: [
          (u) => {
            if (u.select.width < 4) return;
            zoomTo({ min: u.posToVal(u.select.left, "x"), max: u.posToVal(u.select.left + u.select.width, "x") });
            u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          },
        ],
      },
    };
  }

  // Generations, before the curves are drawn over them.
  #mark(u) {
    const { ctx, bbox } = u;
    const dpr = devicePixelRatio;
    let labelled = -Infinity;
    ctx.save();
    ctx.font = `${11 * dpr}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    ctx.lineWidth = dpr;
    for (const mark of this.charts.generations.marks) {
      const { min, max } = u.scales.x;
      if (mark.step < min || mark.step > max) continue;
      const x = Math.round(u.valToPos(mark.step, "x", true)) + 0.5;
      ctx.strokeStyle = ctx.fillStyle = colour(`--mark-${mark.cause}`);
      ctx.globalAlpha = 0.6;
      ctx.setLineDash(mark.cause === "loss" ? [] : [4 * dpr, 3 * dpr]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.globalAlpha = 1;
      if (x - labelled >= LABEL_PX * dpr) {
        ctx.fillText(`g${mark.generation}`, Math.max(x, bbox.left + 8 * dpr), bbox.top - 4 * dpr);
        labelled = x;
      }
    }
    ctx.restore();
  }
}

// A little air around the values; never an empty range, which has no scale.
function span(low, high, fromZero) {
  if (low == null || high == null) return [0, 1];
  const bottom = fromZero ? Math.min(0, low) : low;
  const air = (high - bottom || Math.abs(high) || 1) * 0.06;
  return [fromZero ? bottom : bottom - air, high + air];
}

export class Charts {
  #zoom = null;

  constructor(container, steps, generations) {
    this.steps = steps;
    this.generations = generations;
    this.charts = PANELS.map((panel) => new Chart(panel, this));
    container.append(...this.charts.map((chart) => chart.figure));
    for (const chart of this.charts) {
      chart.build();
      new ResizeObserver(() => chart.resize()).observe(chart.canvas);
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const chart of this.charts) chart.plot.redraw(false);
    });
  }

  // The steps shown.
  range() {
    if (this.#zoom) return this.#zoom;
    const first = Math.min(this.steps.step[0] ?? 0, this.generations.marks[0]?.step ?? Infinity);
    return { min: first, max: Math.max(this.steps.last, first + 1) };
  }

  zoom(range) {
    this.#zoom = range;
    this.update();
  }

  update() {
    for (const chart of this.charts) chart.update();
  }
}
