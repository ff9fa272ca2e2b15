// The connection to the coordinator: what happened so far, then everything as it happens.
//
// Each (re)connection first opens the live stream and holds its messages back, then asks for
// what was missed, then lets the messages through: nothing falls between the two. A coordinator
// that was started again has a log of its own, recognised by its events not continuing ours;
// everything is loaded anew then.

const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 5_000;
// Snapshots come every second or so, whether anything changed or not. After several missing ones
// the connection counts as lost even if nobody closed it: a stopped process closes nothing.
const SILENCE_MS = 5_000;
// Messages held back while the past is loading; far more than can come in that time. Beyond it
// something is wrong, and connecting again is the cure.
const MOST_HELD_BACK = 50_000;

export class Feed {
  #page;
  #source = null;
  #heldBack = null;
  #retryMs = FIRST_RETRY_MS;
  #retry = 0;
  #heard = 0;

  // `page` takes what comes: snapshot, step, event, reset, online, offline; and says what it
  // has: lastEvent, lastStep, and whether the run is over, after which silence is no news.
  constructor(page) {
    this.#page = page;
    setInterval(() => this.#watch(), 1_000);
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && !this.#source) this.connect();
    });
  }

  connect() {
    clearTimeout(this.#retry);
    this.#source?.close();
    const source = new EventSource("/api/live");
    this.#source = source;
    this.#heldBack = [];
    this.#heard = performance.now();
    for (const kind of ["snapshot", "step", "event"]) {
      source.addEventListener(kind, (message) => this.#take(source, kind, message));
    }
    source.onopen = () => this.#catchUp(source);
    source.onerror = () => this.#lost(source);
  }

  #take(source, kind, message) {
    if (source !== this.#source) return;
    this.#heard = performance.now();
    const data = JSON.parse(message.data);
    if (!this.#heldBack) this.#page[kind](data);
    else if (this.#heldBack.length < MOST_HELD_BACK) this.#heldBack.push([kind, data]);
    else this.#lost(source);
  }

  async #catchUp(source) {
    try {
      const past = await this.#past();
      if (source !== this.#source) return;
      this.#apply(past);
    } catch (error) {
      console.warn("caravan: loading the past failed:", error);
      this.#lost(source);
      return;
    }
    const heldBack = this.#heldBack;
    this.#heldBack = null;
    this.#retryMs = FIRST_RETRY_MS;
    for (const [kind, data] of heldBack) this.#page[kind](data);
    this.#page.online();
  }

  async #past() {
    const known = this.#page.lastEvent();
    if (known) {
      const events = await this.#get(`/api/events?since=${known.number}`);
      if (events[0]?.number === known.number && events[0].unix_ms === known.unix_ms) {
        const back = events.filter((e) => e.kind === "rolled_back").map((e) => e.to);
        const since = Math.min(this.#page.lastStep(), ...back);
        return { events: events.slice(1), steps: await this.#get(`/api/steps?since=${since}`) };
      }
    }
    return { anew: true, events: await this.#get("/api/events?since=0"), steps: await this.#get("/api/steps?since=0") };
  }

  #apply({ anew, events, steps }) {
    if (anew) this.#page.reset();
    for (const event of events) this.#page.event(event);
    for (const step of steps) this.#page.step(step);
  }

  async #get(path) {
    const answer = await fetch(path, { signal: AbortSignal.timeout(SILENCE_MS) });
    if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
    this.#page.clock(Date.parse(answer.headers.get("date")));
    return answer.json();
  }

  #watch() {
    const silent = performance.now() - this.#heard > SILENCE_MS;
    if (this.#source && silent && !this.#page.over()) this.#lost(this.#source);
  }

  #lost(source) {
    if (source !== this.#source) return;
    source.close();
    this.#source = null;
    this.#heldBack = null;
    this.#page.offline();
    this.#retry = setTimeout(() => this.connect(), this.#retryMs);
    this.#retryMs = Math.min(2 * this.#retryMs, LONGEST_RETRY_MS);
  }
}
