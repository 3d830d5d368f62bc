// Jobs in a table: what each is, how it stands or ended, and what may be done about it.
import { count, duration, NONE } from "./format.js";
import { actionButton, badge, table, timeOf } from "./pieces.js";
import { h } from "./dom.js";

const name = {
  name: "Job",
  style: "job",
  cell: (job) => [
    h("a", { href: `#/jobs/${encodeURIComponent(job.id)}`, class: "id", title: job.id }, shortId(job.id)),
    h("span", { class: "what", title: job.description }, job.description ?? ""),
  ],
};
const status = { name: "Status", cell: (job) => badge(job.status) };
const model = { name: "Model", style: "name", cell: (job) => job.model ?? NONE };
const queue = { name: "Queue", style: "name", cell: (job) => job.queue ?? NONE };
const tokens = {
  name: "Tokens in / out",
  style: "number",
  cell: (job) => (job.output_tokens === null ? NONE : `${count(job.prompt_tokens)} / ${count(job.output_tokens)}`),
};
const firstToken = { name: "First token", style: "number", cell: (job) => duration(job.first_token_seconds) };
const total = { name: "Total", style: "number", cell: (job) => duration(job.total_seconds) };
const ended = { name: "Ended", style: "when", cell: (job) => timeOf(job.ended_at) };
const started = { name: "Started", style: "when", cell: (job) => timeOf(job.started_at) };
const enqueued = { name: "Enqueued", style: "when", cell: (job) => timeOf(job.enqueued_at) };
const reason = {
  name: "Reason",
  style: "reason",
  cell: (job) => (job.error ? [h("code", {}, job.error.code), " ", h("span", {}, job.error.message)] : NONE),
};
const attempts = { name: "Attempts", style: "number", cell: (job) => job.attempts ?? NONE };
const cancel = {
  name: "",
  style: "deed",
  cell: (job) => actionButton("cancel-job", job.id, "Cancel", `Cancel job ${job.id}`),
};
const retry = {
  name: "",
  style: "deed",
  cell: (job) => (job.status === "failed" ? actionButton("retry-job", job.id, "Retry", `Retry job ${job.id}`) : ""),
};

const COLUMNS = {
  running: [name, status, model, queue, started, enqueued, cancel],
  waiting: [name, status, model, queue, enqueued, cancel],
  ended: [name, status, model, queue, tokens, firstToken, total, ended, retry],
  failed: [name, reason, queue, attempts, ended, retry],
};

const EMPTY = {
  running: "No job is running.",
  waiting: "No job is waiting.",
  ended: "No job has ended in the last hour.",
  failed: "No job has failed in the last 24 hours.",
};

/** `state`: running, waiting, ended or failed. */
export function jobsTable(state, jobs) {
  const columns = COLUMNS[state];
  return table({ caption: `Jobs: ${state}`, columns, rows: jobs, keyOf: (job) => job.id, empty: EMPTY[state] });
}

/** Enough of an id to tell it from others at a glance. */
export function shortId(id) {
  return id.length > 14 ? `${id.slice(0, 12)}…` : id;
}
