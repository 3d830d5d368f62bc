// Small pieces that several views are made of: times, badges, bars, tables, empty states.
import { now } from "./api.js";
import { h, svg } from "./dom.js";
import { absolute, NONE, relative } from "./format.js";

/** "12 s ago", with the absolute time as its title; `tickTimes` keeps it true. */
export function timeOf(epochSeconds) {
  if (epochSeconds === null || epochSeconds === undefined) return NONE;
  return h(
    "time",
    {
      datetime: new Date(epochSeconds * 1000).toISOString(),
      title: absolute(epochSeconds),
      "data-at": epochSeconds,
    },
    relative(epochSeconds, now()),
  );
}

export function tickTimes() {
  for (const element of document.querySelectorAll("time[data-at]")) {
    const text = relative(Number(element.dataset.at), now());
    if (element.firstChild.data !== text) element.firstChild.data = text;
  }
}

const TONES = {
  finished: "good",
  completed: "good",
  running: "busy",
  in_progress: "busy",
  finalizing: "busy",
  validating: "busy",
  failed: "bad",
  expired: "bad",
  cancelled: "mute",
  cancelling: "mute",
  stopped: "mute",
  queued: "wait",
  waiting: "wait",
};

export function badge(status) {
  return h("span", { class: `badge ${TONES[status] ?? "mute"}` }, status.replace("_", " "));
}

/** A bar of shares of `total`: [{value, style}]. `label` says it in words. */
export function bar(parts, total, label) {
  let from = 0;
  const rects = parts.map(({ value, style }) => {
    const width = total > 0 ? (100 * value) / total : 0;
    const rect = svg("rect", { class: style, x: `${from.toFixed(2)}%`, width: `${width.toFixed(2)}%`, height: "100%" });
    from += width;
    return rect;
  });
  return svg("svg", { class: "meter", role: "img", "aria-label": label }, ...rects);
}

/**
 * A table that becomes cards on a narrow screen. `columns`: [{name, cell(row), style?}]; the first one is each row's
 * heading. `keyOf` names a row, so that it is brought up to date in place.
 */
export function table({ caption, columns, rows, keyOf, empty }) {
  if (!rows.length) return h("p", { class: "empty", "data-key": `empty ${caption}` }, empty);
  return h(
    "div",
    { class: "table-box", "data-key": `table ${caption}` },
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, caption),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map(({ name, style }) =>
            h("th", { scope: "col", class: style }, name || h("span", { class: "hidden" }, "Action")),
          ),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((row) =>
          h(
            "tr",
            { "data-key": keyOf(row) },
            columns.map((column, at) => cell(column, row, at)),
          ),
        ),
      ),
    ),
  );
}

function cell({ name, cell: show, style }, row, at) {
  const attributes = { class: style, "data-label": name };
  return at === 0 ? h("th", { scope: "row", ...attributes }, show(row)) : h("td", attributes, show(row));
}

/** A section with a heading; `aside` stands at its right. */
export function panel(id, heading, aside, ...content) {
  return h(
    "section",
    { class: "panel", "data-key": id, "aria-labelledby": `${id}-heading` },
    h("div", { class: "panel-head" }, h("h2", { id: `${id}-heading` }, heading), aside),
    ...content,
  );
}

export function actionButton(action, id, text, describedAs, style = "small") {
  return h(
    "button",
    { type: "button", class: style, "data-action": action, "data-id": id, "aria-label": describedAs },
    text,
  );
}
