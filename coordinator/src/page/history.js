// What has happened, as the curves and the log need it. Pure data: no network, no document.

// Points in memory. A chart is some 1,000 pixels wide; beyond 20 points a pixel nothing more
// can be seen, and a run of any length must not fill the browser.
const MOST_POINTS = 20_000;
// The newest points are never thinned: they are what one looks at.
const KEPT_WHOLE = 2_000;
// The smooth curve forgets over this part of the steps shown.
const SMOOTHING = 1 / 30;
// … and at first over so many, or it would be as rough as what it smooths.
const SHORTEST_MEMORY = 8;

const COLUMNS = {
  step: (m) => m.step,
  loss: (m) => m.loss,
  norm: (m) => m.norm,
  rate: (m) => m.learning_rate,
  throughput: (m) => m.tokens_per_second,
  mfu: (m) => m.mfu ?? null,
  workers: (m) => m.workers,
};

export class Steps {
  constructor() {
    this.clear();
  }

  clear() {
    for (const name in COLUMNS) this[name] = [];
  }

  get length() {
    return this.step.length;
  }

  get last() {
    return this.step.at(-1) ?? 0;
  }

  // A step that was rolled back comes a second time, and replaces what stood at and after it.
  push(metrics) {
    this.truncate(metrics.step - 1);
    for (const name in COLUMNS) this[name].push(COLUMNS[name](metrics));
    if (this.length > MOST_POINTS) this.#thin();
  }

  // Forgets what came after `step`.
  truncate(step) {
    let keep = this.length;
    while (keep > 0 && this.step[keep - 1] > step) keep -= 1;
    if (keep < this.length) for (const name in COLUMNS) this[name].length = keep;
  }

  #thin() {
    const whole = this.length - KEPT_WHOLE;
    for (const name in COLUMNS) this[name] = this[name].filter((_, i) => i >= whole || i % 2 === 0);
  }

  // The column without its noise. A plain exponential mean trails behind a falling curve; taking
  // off the distance by which the mean trails its own mean puts it back (the "double" exponential
  // mean, P. G. Mulloy, 1994).
  smooth(column) {
    const once = this.#mean(this[column]);
    const twice = this.#mean(once);
    return once.map((value, i) => (value === null ? null : 2 * value - twice[i]));
  }

  // An exponential mean over steps (not points: older ones are thinner). A value that is no
  // number leaves a hole in the raw curve and does not poison this one.
  #mean(values) {
    const span = Math.max(SHORTEST_MEMORY, (this.last - (this.step[0] ?? 0)) * SMOOTHING);
    let sum = 0;
    let weight = 0;
    return values.map((value, i) => {
      const decay = i === 0 ? 0 : Math.exp((this.step[i - 1] - this.step[i]) / span);
      sum *= decay;
      weight *= decay;
      if (Number.isFinite(value)) {
        sum += (1 - decay) * value;
        weight += 1 - decay;
      }
      return weight > 0 ? sum / weight : null;
    });
  }
}

// Where a generation starts, and what made it necessary.
export class Generations {
  constructor() {
    this.clear();
  }

  clear() {
    this.marks = [];
    this.cause = "plan";
  }

  note(event) {
    if (event.kind === "lost" && event.reason !== "left") this.cause = "loss";
    else if (event.kind === "joined" && this.cause !== "loss") this.cause = "join";
    else if (event.kind === "rolled_back") this.marks = this.marks.filter((mark) => mark.step <= event.to);
    else if (event.kind === "planned") {
      this.marks.push({ step: event.base, generation: event.generation, cause: this.cause });
      this.cause = "plan";
    }
  }
}
