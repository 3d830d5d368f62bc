// Where values lie on an axis, and which of them are labelled. Pure.

/** A scale from 0 to a round number at or above `max`; `ticks` are its labelled values. */
export function linearScale(max, numTicks = 4) {
  const step = roundStep((max > 0 ? max : 1) / numTicks);
  const top = step * Math.max(1, Math.ceil((max > 0 ? max : 1) / step - 1e-9));
  const ticks = [];
  for (let at = 0; at <= Math.round(top / step); at += 1) ticks.push(at * step);
  return { ticks, place: (value) => value / top };
}

const DURATIONS = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000]; // seconds

/** A logarithmic scale of durations, between the round ones around the values; `min` and `max` are above 0. */
export function durationScale(min, max) {
  const low = Math.max(
    0,
    DURATIONS.findLastIndex((tick) => tick <= min),
  );
  const above = DURATIONS.findIndex((tick) => tick >= max);
  const high = Math.max(low + 1, above < 0 ? DURATIONS.length - 1 : above);
  const ticks = DURATIONS.slice(low, high + 1);
  const [bottom, top] = [Math.log(ticks[0]), Math.log(ticks.at(-1))];
  const place = (value) => Math.min(1, Math.max(0, (Math.log(value) - bottom) / (top - bottom)));
  return { ticks, place };
}

function roundStep(raw) {
  const power = 10 ** Math.floor(Math.log10(raw));
  const digit = [1, 2, 2.5, 5, 10].find((candidate) => candidate * power >= raw - 1e-12);
  return digit * power;
}

/** The epoch seconds between `begin` and `end` that are labelled: whole quarters of an hour, by the local clock. */
export function timeTicks(begin, end, stepSeconds = 900) {
  const offset = new Date(begin * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let at = Math.ceil((begin - offset) / stepSeconds) * stepSeconds + offset; at <= end; at += stepSeconds) {
    ticks.push(at);
  }
  return ticks;
}

/** The path of a line through points [x, y]; a null among them is a gap. A point alone becomes a dot (round caps). */
export function linePath(points) {
  let path = "";
  let isOpen = false;
  for (const point of points) {
    if (point === null) {
      isOpen = false;
      continue;
    }
    const [x, y] = point.map((value) => value.toFixed(1));
    path += isOpen ? `L${x} ${y}` : `M${x} ${y}h0`;
    isOpen = true;
  }
  return path;
}
