// The document outside of the curves. Every text is set as text, never as markup; elements are
// changed only where they differ, so that a screen reader and a selection are left in peace.

import * as format from "./format.js";

// Entries of the log that the page keeps; the metrics file has them all.
const MOST_EVENTS = 500;
// A worker that has gone stays in the table, faded, long enough to be seen.
const FAREWELL_MS = 8_000;
// Heartbeats come several times a second; silence beyond these is worth a colour.
const QUIET_MS = 1_000;
const SILENT_MS = 3_000;
// Up to so many lanes, each is drawn as a cell of its own.
const MOST_CELLS = 128;

// Kinds of events as a word of the log, and how they look.
const KINDS = {
  joined: ["join", "good"],
  reattached: ["back", "good"],
  recovered: ["back", "good"],
  refused: ["refused", "warn"],
  lost: ["death", "bad"],
  left: ["leave", "plain"],
  hung: ["hangs", "bad"],
  slow: ["slow", "warn"],
  recovers: ["slow no more", "good"],
  stopping: ["stop", "plain"],
  planned: ["plan", "plan"],
  rolled_back: ["undone", "bad"],
  checkpoint_written: ["saved", "save"],
  checkpoint_failed: ["unsaved", "bad"],
  checkpoint_refused: ["damaged", "warn"],
  load_failed: ["not loaded", "bad"],
  diverged: ["diverged", "bad"],
  corrupt: ["corrupt", "bad"],
  skipped: ["skipped", "warn"],
  non_finite: ["not finite", "bad"],
  draining: ["drain", "plain"],
  drained: ["drained", "save"],
  finished: ["finished", "good"],
  failed: ["failed", "bad"],
  no_plan: ["no plan", "bad"],
};

const id = (name) => document.getElementById(name);

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function put(element, name, value) {
  if (element.dataset[name] !== value) element.dataset[name] = value;
}

// Golden-angle steps round the colour circle: neighbours differ, and a worker keeps its colour
// whoever comes and goes.
const hue = (worker) => String((worker * 137.508 + 30) % 360);

export function header(snapshot) {
  const { last } = snapshot;
  say(id("run"), snapshot.run || "Caravan");
  say(id("phase"), snapshot.phase);
  put(id("phase"), "phase", snapshot.phase);
  say(id("step"), format.count(snapshot.step));
  say(id("steps"), format.count(snapshot.steps));
  const part = snapshot.steps > 0 ? Math.min(1, snapshot.step / snapshot.steps) : 0;
  const percent = `${(100 * part).toFixed(1)} %`;
  id("progress").value = part;
  say(id("progress"), percent);
  say(id("percent"), percent);
  say(id("loss"), last ? format.loss(last.loss) : "–");
  say(id("throughput"), last ? format.count(last.tokens_per_second) : "–");
  say(id("mfu"), format.share(last?.mfu));
  say(id("eta"), snapshot.phase === "finished" ? "done" : format.duration(snapshot.eta_seconds));
  say(id("workers-count"), format.count(snapshot.workers.filter((w) => w.member).length));
  say(id("generation"), snapshot.generation > 0 ? `g${snapshot.generation}` : "–");
  say(id("checkpoint"), snapshot.checkpoint == null ? "–" : `step ${format.count(snapshot.checkpoint)}`);
  const state = last ? `step ${format.count(snapshot.step)} · ${format.loss(last.loss)}` : snapshot.phase;
  document.title = `${state} · ${snapshot.run || "Caravan"}`;
}

export function connection(state, text) {
  put(id("connection"), "state", state);
  put(document.body, "connection", state);
  say(id("connection"), text);
}

export function lanes(snapshot) {
  const holders = snapshot.workers.filter((w) => w.member && w.lanes[1] > w.lanes[0]);
  holders.sort((a, b) => a.lanes[0] - b.lanes[0] || a.worker - b.worker);
  // Stages of one pipeline have the same lanes: they stand below each other.
  const pipelines = Map.groupBy(holders, (w) => w.lanes[0]);
  const depth = Math.max(1, ...[...pipelines.values()].map((stages) => stages.length));
  const total = Math.max(0, ...holders.map((w) => w.lanes[1]));
  const list = id("lanes");
  // Between two plans nobody holds a lane; the last picture stays, faded.
  put(list, "stale", String(total === 0 && list.children.length > 0));
  if (total === 0) return;
  const some = (n, one) => `${n} ${n === 1 ? one : `${one}s`}`;
  const of = depth > 1 ? `${some(pipelines.size, "pipeline")} of ` : "";
  say(id("lanes-note"), `${some(total, "lane")} on ${of}${some(holders.length, "worker")}`);
  const shape = JSON.stringify(holders.map((w) => [w.worker, w.lanes]));
  if (list.dataset.shape === shape) return;
  list.dataset.shape = shape;
  put(list, "deep", String(depth > 1));
  list.style.setProperty("--lanes", String(total));
  list.style.setProperty("--cells", String(total <= MOST_CELLS ? total : 1));
  list.replaceChildren(
    ...holders.map((w) => {
      const item = document.createElement("li");
      item.style.setProperty("--hue", hue(w.worker));
      item.style.gridColumn = `${w.lanes[0] + 1} / ${w.lanes[1] + 1}`;
      item.style.gridRow = String(1 + pipelines.get(w.lanes[0]).indexOf(w));
      item.style.setProperty("--own", String(w.lanes[1] - w.lanes[0]));
      item.title = `w${w.worker} (${w.name}): lanes ${format.lanes(w.lanes)}`;
      const who = document.createElement("strong");
      who.textContent = `w${w.worker}`;
      const which = document.createElement("span");
      which.textContent = format.lanes(w.lanes);
      item.append(who, which);
      return item;
    }),
  );
}

const rows = new Map();

function row(worker) {
  const element = document.createElement("tr");
  element.dataset.worker = String(worker);
  element.style.setProperty("--hue", hue(worker));
  const cells = {};
  for (const [name, tag, className] of [
    ["worker", "th", "who"],
    ["name", "td", "name"],
    ["activity", "td", "activity"],
    ["lanes", "td", "number"],
    ["slices", "td", "number"],
    ["step", "td", "number"],
    ["heard", "td", "number heard"],
  ]) {
    cells[name] = document.createElement(tag);
    cells[name].className = className;
    element.append(cells[name]);
  }
  cells.worker.scope = "row";
  const pill = document.createElement("span");
  pill.className = "pill";
  cells.activity.append(pill);
  return { element, cells, pill, goneAt: null };
}

export function workers(snapshot, now) {
  const body = id("workers");
  const present = new Set(snapshot.workers.map((w) => w.worker));
  for (const w of snapshot.workers) {
    let known = rows.get(w.worker);
    if (!known) {
      known = row(w.worker);
      rows.set(w.worker, known);
      const next = [...body.children].find((other) => Number(other.dataset.worker) > w.worker);
      body.insertBefore(known.element, next ?? null);
    }
    known.goneAt = null;
    const activity = w.member || w.activity === "Finished" ? w.activity.toLowerCase() : "not in the plan";
    const silence = w.silent_ms > SILENT_MS ? "silent" : w.silent_ms > QUIET_MS ? "quiet" : "fresh";
    put(known.element, "state", "here");
    put(known.element, "member", String(w.member));
    say(known.cells.worker, `w${w.worker}`);
    say(known.cells.name, w.name);
    known.cells.name.title = w.name;
    say(known.pill, activity);
    put(known.pill, "activity", activity);
    say(known.cells.lanes, format.lanes(w.lanes));
    say(known.cells.slices, format.count(w.owned_slices));
    say(known.cells.step, format.count(w.applied));
    say(known.cells.heard, silence === "fresh" ? "now" : `${(w.silent_ms / 1000).toFixed(1)} s ago`);
    put(known.cells.heard, "silence", silence);
  }
  for (const [worker, known] of rows) {
    if (present.has(worker)) continue;
    known.goneAt ??= now;
    if (now - known.goneAt > FAREWELL_MS) {
      known.element.remove();
      rows.delete(worker);
    } else {
      put(known.element, "state", "gone");
      say(known.pill, "gone");
      put(known.pill, "activity", "gone");
    }
  }
  const spare = snapshot.workers.filter((w) => !w.member).length;
  say(id("workers-note"), spare > 0 ? `${spare} not in the plan yet` : "");
  id("workers-empty").hidden = rows.size > 0;
}

export function clearEvents() {
  id("events").replaceChildren();
  put(id("events"), "total", "0");
}

export function event(logged) {
  const left = logged.kind === "lost" && logged.reason === "left";
  const [word, look] = KINDS[left ? "left" : logged.kind] ?? [logged.kind, "plain"];
  const item = document.createElement("li");
  item.dataset.look = look;
  item.dataset.kind = logged.kind;
  const tag = document.createElement("span");
  tag.className = "tag";
  tag.textContent = word;
  const text = document.createElement("span");
  text.className = "text";
  text.textContent = logged.text;
  const time = document.createElement("time");
  time.dateTime = new Date(logged.unix_ms).toISOString();
  time.title = format.dateTime(logged.unix_ms);
  time.append(format.time(logged.unix_ms), " · ", document.createElement("span"), ` · step ${format.count(logged.at_step)}`);
  time.children[0].dataset.unixMs = String(logged.unix_ms);
  item.append(tag, text, time);
  const list = id("events");
  const newest = list.firstElementChild;
  if (logged.kind === "checkpoint_written" && newest?.dataset.kind === logged.kind) {
    // One checkpoint after the other is one piece of news; a death must not drown in them.
    item.dataset.earlier = String(Number(newest.dataset.earlier ?? 0) + 1);
    text.textContent += ` (${item.dataset.earlier} more before it)`;
    newest.remove();
  }
  list.prepend(item);
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
}

// "12 s ago", by the coordinator's clock.
export function ages(now) {
  for (const span of id("events").querySelectorAll("[data-unix-ms]")) say(span, format.ago(now - Number(span.dataset.unixMs)));
}

// Entries are read aloud only once the past has been loaded.
export function announceEvents(live) {
  id("events").setAttribute("aria-live", live ? "polite" : "off");
}

export function eventsNote(text) {
  say(id("events-note"), text);
}
