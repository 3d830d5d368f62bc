// Batches: how far each is, what it came to, its files, and a way to cancel it.
import { ApiError, get } from "./api.js";
import { fill, h } from "./dom.js";
import { count, plural, share } from "./format.js";
import { actionButton, badge, bar, timeOf } from "./pieces.js";

const PAGE = 20;
const UNDER_WAY = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const BEFORE = { validating: "being validated", failed: "the file failed validation", cancelling: "being cancelled" };
const MAY_CANCEL = new Set(["validating", "in_progress"]);

/** The last batches; none from a gateway that has no batches. */
export async function listBatches(limit = PAGE, after = null) {
  try {
    const list = await get(`/v1/batches?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`);
    return Object.assign(list.data, { hasMore: list.has_more });
  } catch (error) {
    if (error instanceof ApiError && error.kind === "not_found") return [];
    throw error;
  }
}

export class Batches {
  title = "Batches";

  constructor(root, session, poller) {
    this._root = root;
    this._session = session;
    this._batches = null;
    this._numPages = 1;
    poller.every(3_000, () => this._load());
    this._onClick = (event) => {
      if (event.target.id !== "more") return;
      this._numPages += 1;
      poller.refresh();
    };
    root.addEventListener("click", this._onClick);
    this._draw();
  }

  close() {
    this._root.removeEventListener("click", this._onClick);
  }

  async _load() {
    let page = await listBatches();
    let all = [...page];
    for (let number = 1; number < this._numPages && page.hasMore; number += 1) {
      page = await listBatches(PAGE, all.at(-1).id);
      all = [...all, ...page];
    }
    this._batches = all;
    this._hasMore = page.hasMore;
    this._draw();
  }

  _draw() {
    const whose = this._session.scope === "own" ? "These are the batches that this key made." : null;
    fill(
      this._root,
      h("h1", { tabindex: -1 }, "Batches"),
      whose ? h("p", { class: "muted" }, whose) : null,
      this._batches === null ? h("p", { class: "empty" }, "Loading…") : batchList(this._batches),
      this._hasMore ? h("p", { class: "row" }, h("button", { type: "button", id: "more" }, "Show more")) : null,
    );
  }
}

export function batchList(batches) {
  if (!batches.length) {
    return h(
      "p",
      { class: "empty", "data-key": "no-batches" },
      "There is no batch. POST /v1/batches creates one from a file; promptmill run answers a file without HTTP.",
    );
  }
  return h(
    "ul",
    { class: "batches", "data-key": "batches" },
    batches.map((batch) => h("li", { "data-key": batch.id }, card(batch))),
  );
}

function card(batch) {
  const { total = 0, completed = 0, failed = 0 } = batch.request_counts ?? {};
  const words = `${count(completed)} of ${plural(total, "request")} answered, ${count(failed)} failed`;
  return [
    h(
      "div",
      { class: "batch-head" },
      h("h3", { class: "id", title: batch.id }, batch.id),
      badge(batch.status),
      MAY_CANCEL.has(batch.status)
        ? actionButton("cancel-batch", batch.id, "Cancel", `Cancel batch ${batch.id}`)
        : null,
    ),
    total ? progress(total, completed, failed, words) : null,
    h(
      "p",
      { class: "batch-facts" },
      h("span", {}, total ? words : (BEFORE[batch.status] ?? "nothing to answer")),
      h("span", {}, batch.model ?? batch.endpoint),
      h("span", {}, ...when(batch)),
      tokensOf(batch),
    ),
    batch.errors?.data?.length ? problems(batch.errors.data) : null,
    files(batch),
  ];
}

function progress(total, completed, failed, words) {
  const parts = [
    { value: completed, style: "fill" },
    { value: failed, style: "bad" },
  ];
  return h(
    "div",
    { class: "batch-progress" },
    bar(parts, total, words),
    h("span", { class: "number" }, share(completed + failed, total)),
  );
}

function when(batch) {
  const ends = [
    ["completed", batch.completed_at],
    ["failed", batch.failed_at],
    ["expired", batch.expired_at],
    ["cancelled", batch.cancelled_at],
  ];
  const [word, at] = ends.find(([, time]) => time) ?? ["made", batch.created_at];
  const parts = [`${word} `, timeOf(at)];
  return UNDER_WAY.has(batch.status) && batch.expires_at ? [...parts, ", expires ", timeOf(batch.expires_at)] : parts;
}

function tokensOf(batch) {
  if (!batch.usage?.total_tokens) return null;
  return h("span", {}, `${count(batch.usage.input_tokens)} tokens in, ${count(batch.usage.output_tokens)} out`);
}

function problems(errors) {
  return h(
    "details",
    {},
    h("summary", {}, plural(errors.length, "problem")),
    h(
      "ul",
      {},
      errors
        .slice(0, 100)
        .map((error) =>
          h("li", {}, error.line ? `Line ${error.line}: ` : "", h("code", {}, error.code), " ", error.message),
        ),
    ),
  );
}

function files(batch) {
  const links = [
    ["Output", batch.output_file_id],
    ["Error", batch.error_file_id],
  ].filter(([, id]) => id);
  if (!links.length) return null;
  return h(
    "p",
    { class: "row" },
    links.map(([name, id]) =>
      actionButton("save-file", id, `${name} file`, `Save the ${name.toLowerCase()} file ${id}`),
    ),
  );
}
