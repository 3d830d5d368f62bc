// One plot of the last hour: lines over time, drawn as SVG, with a read-out that follows pointer and arrow keys.
import { h, svg } from "./dom.js";
import { clock, NONE } from "./format.js";
import { durationScale, linearScale, linePath, timeTicks } from "./plot_scale.js";

const HEIGHT = 168;
const MARGIN = { top: 8, right: 8, bottom: 22, left: 52 };

export class Plot {
  /**
   * `lines`: [{key, label, style}], `style` one of the classes of parts.css. `format` makes a value text, with its unit;
   * `isDuration`: of seconds, over a logarithmic scale. `name` is the heading.
   */
  constructor({ id, name, note, lines, format, isDuration = false }) {
    this._lines = lines;
    this._format = format;
    this._isDuration = isDuration;
    this._name = name;
    this._data = null;
    this._at = null; // the point that is read out; null: the last hour as a whole
    this._svg = svg("svg", {
      class: "plot-area",
      role: "slider",
      tabindex: 0,
      "aria-label": `${name}, point by point`,
      height: HEIGHT,
    });
    this._values = lines.map((line) => h("dd", {}, NONE));
    this._when = h("p", { class: "plot-when muted" });
    this._empty = h("p", { class: "plot-empty muted", hidden: true }, "No job has ended in the last hour.");
    this.element = h(
      "figure",
      { class: "plot", "data-keep": true, "data-key": id },
      h("figcaption", {}, h("h3", {}, name), this._when, h("p", { class: "plot-note muted" }, note)),
      h(
        "dl",
        { class: "legend" },
        lines.map((line, at) => h("div", { class: line.style }, h("dt", {}, line.label), this._values[at])),
      ),
      h("div", { class: "plot-box" }, this._svg, this._empty),
    );
    this._listen();
    new ResizeObserver(() => this._draw()).observe(this._svg);
  }

  /** `points`: objects with the lines' keys, null for no value; `whole`: the same for all of the hour. */
  update({ begin, stepSeconds, points, whole }) {
    this._data = { begin, stepSeconds, points, whole };
    this._draw();
  }

  _listen() {
    const area = this._svg;
    area.addEventListener("pointermove", (event) => this._read(this._nearest(event)));
    area.addEventListener("pointerdown", (event) => this._read(this._nearest(event)));
    area.addEventListener("pointerleave", () => this._read(null));
    area.addEventListener("blur", () => this._read(null));
    area.addEventListener("keydown", (event) => {
      if (!this._data) return;
      const last = this._data.points.length - 1;
      const from = this._at ?? last + 1;
      const to = {
        ArrowLeft: from - 1,
        ArrowRight: from + 1,
        PageUp: from - 10,
        PageDown: from + 10,
        Home: 0,
        End: last,
        Escape: null,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this._read(to === null ? null : Math.min(last, Math.max(0, to)));
    });
  }

  _nearest(event) {
    if (!this._data) return null;
    const x = event.clientX - this._svg.getBoundingClientRect().left - MARGIN.left;
    const width = this._width - MARGIN.left - MARGIN.right;
    const at = Math.floor((x / width) * this._data.points.length);
    return Math.min(this._data.points.length - 1, Math.max(0, at));
  }

  _read(at) {
    if (at === this._at) return;
    this._at = at;
    this._draw();
  }

  _draw() {
    this._width = this._svg.clientWidth || this._svg.parentNode?.clientWidth || 0;
    if (!this._data || this._width < 60) return;
    const { begin, stepSeconds, points } = this._data;
    const values = points
      .flatMap((point) => this._lines.map(({ key }) => point[key]))
      .filter((value) => value !== null);
    const isEmpty = !values.some((value) => value > 0);
    this._empty.hidden = !isEmpty;
    const scale =
      this._isDuration && !isEmpty
        ? durationScale(Math.min(...values.filter((value) => value > 0)), Math.max(...values))
        : linearScale(Math.max(0, ...values));
    const end = begin + stepSeconds * points.length;
    const x = (at) => MARGIN.left + ((at + 0.5) / points.length) * (this._width - MARGIN.left - MARGIN.right);
    const y = (value) => HEIGHT - MARGIN.bottom - scale.place(value) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    this._svg.replaceChildren(
      ...this._axes(scale, y, begin, end, isEmpty),
      ...(isEmpty ? [] : this._paths(points, x, y)),
      ...this._cursor(points, x, y),
    );
    this._tell();
  }

  _axes(scale, y, begin, end, isEmpty) {
    const parts = [];
    const right = this._width - MARGIN.right;
    for (const tick of isEmpty ? [0] : scale.ticks) {
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }));
      parts.push(label(this._format(tick), { x: MARGIN.left - 8, y: y(tick) + 4, "text-anchor": "end" }));
    }
    for (const tick of timeTicks(begin, end)) {
      const at = MARGIN.left + ((tick - begin) / (end - begin)) * (right - MARGIN.left);
      if (at < MARGIN.left + 14 || at > right - 14) continue;
      parts.push(
        svg("line", { class: "tick", x1: at, x2: at, y1: HEIGHT - MARGIN.bottom, y2: HEIGHT - MARGIN.bottom + 4 }),
      );
      parts.push(label(clock(tick), { x: at, y: HEIGHT - 5, "text-anchor": "middle" }));
    }
    return parts;
  }

  _paths(points, x, y) {
    return this._lines.map(({ key, style }) => {
      const places = points.map((point, at) => (point[key] === null ? null : [x(at), y(point[key])]));
      return svg("path", { class: `line ${style}`, d: linePath(places) });
    });
  }

  _cursor(points, x, y) {
    if (this._at === null || !points[this._at]) return [];
    const at = x(this._at);
    const dots = this._lines
      .filter(({ key }) => points[this._at][key] !== null)
      .map(({ key, style }) => svg("circle", { class: `dot ${style}`, cx: at, cy: y(points[this._at][key]), r: 4 }));
    return [svg("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }), ...dots];
  }

  _tell() {
    const { begin, stepSeconds, points, whole } = this._data;
    const shown = this._at === null ? whole : points[this._at];
    const at = begin + stepSeconds * (this._at ?? 0);
    this._when.textContent = this._at === null ? "last hour" : `${clock(at, true)} – ${clock(at + stepSeconds, true)}`;
    const texts = this._lines.map(({ key }) => this._format(shown[key]));
    texts.forEach((text, line) => {
      this._values[line].textContent = text;
    });
    const spoken = this._lines.map((line, index) => `${line.label} ${texts[index]}`).join(", ");
    const attributes = {
      "aria-valuemin": 0,
      "aria-valuemax": points.length - 1,
      "aria-valuenow": this._at ?? points.length - 1,
      "aria-valuetext": `${this._when.textContent}: ${spoken}`,
    };
    for (const [name, value] of Object.entries(attributes)) this._svg.setAttribute(name, value);
  }
}

function label(text, attributes) {
  return svg("text", { class: "tick-label", ...attributes }, text);
}
