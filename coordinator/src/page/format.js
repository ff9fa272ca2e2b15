// Numbers and times as people read them. Nothing here touches the document.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
const date = new Intl.DateTimeFormat([], { dateStyle: "medium", timeStyle: "medium" });

const known = (value) => typeof value === "number" && Number.isFinite(value);

export const count = (value) => (known(value) ? whole.format(value) : "–");

// A number that is not finite has no JSON form and comes as null. For a loss that is news.
export const loss = (value) => (known(value) ? value.toFixed(value < 10 ? 4 : 3) : "NaN");

export const rate = (value) => (known(value) ? value.toExponential(2) : "–");

export const small = (value) => (known(value) ? value.toPrecision(3) : "–");

export const share = (value) => (known(value) ? `${(100 * value).toFixed(1)} %` : "–");

// 1,234 or 45.6k: at most five characters, so that an axis needs no room to grow.
export function compact(value) {
  if (!known(value)) return "–";
  if (Math.abs(value) < 10_000) return whole.format(value);
  if (Math.abs(value) < 1e6) return `${+(value / 1e3).toPrecision(3)}k`;
  if (Math.abs(value) < 1e9) return `${+(value / 1e6).toPrecision(3)}M`;
  return `${+(value / 1e9).toPrecision(3)}G`;
}

// The two largest units say enough: "3 m 20 s", "2 h 05 m".
export function duration(seconds) {
  if (!known(seconds) || seconds < 0) return "–";
  const s = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m ${two(s % 60)} s`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} m`;
  return `${Math.floor(s / 86_400)} d ${two(Math.floor((s % 86_400) / 3600))} h`;
}

export function ago(ms) {
  const s = Math.max(0, Math.floor(ms / 1000));
  if (s < 5) return "just now";
  if (s < 60) return `${s} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 86_400) return `${Math.floor(s / 3600)} h ago`;
  return `${Math.floor(s / 86_400)} d ago`;
}

export const time = (unixMs) => clock.format(unixMs);
export const dateTime = (unixMs) => date.format(unixMs);

// `lanes` is [first, one past the last].
export function lanes([from, to]) {
  if (to <= from) return "–";
  return to === from + 1 ? String(from) : `${from}–${to - 1}`;
}
