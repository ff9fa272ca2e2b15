// The page as a whole: takes what the feed brings, and draws it at a pace that eyes can follow.

import { Charts } from "./charts.js";
import { Feed } from "./feed.js";
import * as format from "./format.js";
import { Generations, Steps } from "./history.js";
import * as view from "./view.js";

// At most four pictures a second, however fast the run steps.
const DRAW_MS = 250;
// The coordinator's clock is read from a header in whole seconds; less than this is no difference.
const CLOCK_SLACK_MS = 2_000;
// Phases after which a coordinator says nothing more, and ends.
const OVER = new Set(["finished", "drained", "failed"]);

class Page {
  #steps = new Steps();
  #generations = new Generations();
  #charts = new Charts(document.getElementById("charts"), this.#steps, this.#generations);
  #snapshot = null;
  #lastEvent = null;
  #events = 0;
  #clockAhead = 0;
  #online = false;
  #seenAt = null;
  #drawing = false;

  constructor() {
    setInterval(() => this.#tick(), 1_000);
  }

  // What the feed brings.

  snapshot(snapshot) {
    this.#snapshot = snapshot;
    this.#seenAt = Date.now();
    this.#changed();
  }

  step(metrics) {
    this.#steps.push(metrics);
    this.#changed();
  }

  event(logged) {
    if (this.#lastEvent && logged.number <= this.#lastEvent.number) return;
    this.#lastEvent = logged;
    this.#events += 1;
    this.#generations.note(logged);
    if (logged.kind === "rolled_back") this.#steps.truncate(logged.to);
    view.event(logged);
    view.eventsNote(this.#events === 1 ? "1 event" : `${format.count(this.#events)} events`);
    view.ages(this.#now());
    this.#changed();
  }

  reset() {
    this.#steps.clear();
    this.#generations.clear();
    this.#lastEvent = null;
    this.#events = 0;
    view.clearEvents();
    view.eventsNote("");
    view.announceEvents(false);
  }

  clock(serverMs) {
    const ahead = serverMs - Date.now();
    this.#clockAhead = Math.abs(ahead) > CLOCK_SLACK_MS ? ahead : 0;
  }

  online() {
    this.#online = true;
    view.announceEvents(true);
    view.connection("live", "live");
    this.#changed();
  }

  offline() {
    this.#online = false;
    this.#sayOffline();
  }

  // What the feed asks.

  lastEvent() {
    return this.#lastEvent;
  }

  lastStep() {
    return this.#steps.last;
  }

  over() {
    return OVER.has(this.#snapshot?.phase);
  }

  #now() {
    return Date.now() + this.#clockAhead;
  }

  #tick() {
    view.ages(this.#now());
    if (!this.#online) this.#sayOffline();
    if (this.#snapshot) view.workers(this.#snapshot, Date.now());
  }

  #sayOffline() {
    if (this.#seenAt === null) {
      view.connection("connecting", "connecting …");
      return;
    }
    const seen = `last seen ${format.time(this.#seenAt)}, ${format.ago(Date.now() - this.#seenAt)}`;
    if (this.over()) view.connection("over", `the coordinator has ended; ${seen}`);
    else view.connection("lost", `connection lost, ${seen}`);
  }

  #changed() {
    if (this.#drawing) return;
    this.#drawing = true;
    setTimeout(() => requestAnimationFrame(() => this.#draw()), DRAW_MS);
  }

  #draw() {
    this.#drawing = false;
    this.#charts.update();
    if (!this.#snapshot) return;
    view.header(this.#snapshot);
    view.lanes(this.#snapshot);
    view.workers(this.#snapshot, Date.now());
  }
}

new Feed(new Page()).connect();
