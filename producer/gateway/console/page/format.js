// Numbers with their units, durations and times, as people read them. Pure, but for the time zone.

const WHOLE = new Intl.NumberFormat("en");
export const NONE = "–";

/** 0, 7, 950, 1,234, 56.7k, 1.2M */
export function count(value) {
  if (value === null || value === undefined) return NONE;
  if (Math.abs(value) < 10_000) return WHOLE.format(Math.round(value));
  if (Math.abs(value) < 999_500) return `${trim(value / 1e3, 1)}k`;
  return Math.abs(value) < 999.5e6 ? `${trim(value / 1e6, 1)}M` : `${trim(value / 1e9, 1)}G`;
}

/** A rate: as `count`, with decimals where it is small. */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  if (Math.abs(value) < 0.095) return trim(value, 3);
  return Math.abs(value) < 100 ? trim(value, Math.abs(value) < 10 ? 2 : 1) : count(value);
}

/** 12 ms, 0.85 s, 4.2 s, 75 s, 12 min, 3 h 5 min, 2 d 4 h */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const value = Math.max(0, seconds);
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${trim(value, value < 1 ? 2 : 1)} s`;
  if (value < 99.5) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  const days = Math.floor(hours / 24);
  return hours % 24 ? `${days} d ${hours % 24} h` : `${days} d`;
}

/** "now", "12 s ago", "3 min ago"; of what lies ahead: "in 5 min". */
export function relative(epochSeconds, nowSeconds) {
  const ago = nowSeconds - epochSeconds;
  if (Math.abs(ago) < 1.5) return "now";
  const text = duration(Math.abs(ago) < 100 ? Math.round(Math.abs(ago)) : Math.abs(ago)).replace(/\.0 s$/, " s");
  return ago > 0 ? `${text} ago` : `in ${text}`;
}

/** Local date and time, to the second. */
export function absolute(epochSeconds) {
  const at = new Date(epochSeconds * 1000);
  const pad = (value) => String(value).padStart(2, "0");
  const day = `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
  return `${day} ${clock(epochSeconds, true)}`;
}

/** 22:31, or 22:31:30. */
export function clock(epochSeconds, withSeconds = false) {
  const at = new Date(epochSeconds * 1000);
  const pad = (value) => String(value).padStart(2, "0");
  const text = `${pad(at.getHours())}:${pad(at.getMinutes())}`;
  return withSeconds ? `${text}:${pad(at.getSeconds())}` : text;
}

/** 43 % */
export function share(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)} %` : NONE;
}

/** "1 job", "2,000 jobs" */
export function plural(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
}

function trim(value, decimals) {
  return value
    .toFixed(decimals)
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
}
