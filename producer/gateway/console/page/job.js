// One job: how it stands, its output live, and what it asked for. `#/jobs/ID` leads here, from anywhere.
import { ApiError, get, now } from "./api.js";
import { fill, h } from "./dom.js";
import { count, duration, NONE, plural, rate } from "./format.js";
import { JobOutput } from "./job_output.js";
import { JobStream } from "./job_stream.js";
import { actionButton, badge, panel, timeOf } from "./pieces.js";

const ENDED = new Set(["finished", "failed", "cancelled", "stopped"]);
const STREAM_STATES = {
  connecting: "connecting…",
  live: "live",
  waiting: "the stream broke off; resuming at its cursor…",
  ended: "",
};

export class Job {
  constructor(root, session, poller, parameters, id) {
    this.title = `Job ${id}`;
    this._root = root;
    this._id = id;
    this._path = `/console/jobs/${encodeURIComponent(id)}`;
    this._detail = null;
    this._problem = null;
    this._state = "connecting";
    this._run = null; // told by when the job was enqueued
    this._since = null; // when the first token was seen here, and how many had come by then
    poller.every(3_000, () => this._load());
    this._draw();
  }

  close() {
    this._stream?.close();
  }

  async _load() {
    const isStale = this._detail && ENDED.has(this._detail.job.status) && this._state === "ended";
    if (isStale && !this._mayComeBack()) return;
    try {
      await this._read();
    } catch (error) {
      if (!(error instanceof ApiError && error.kind === "not_found")) throw error;
      this._problem = error.message;
    }
    this._draw();
  }

  /** A job that failed may be put back, here or elsewhere. */
  _mayComeBack() {
    return this._detail.job.status === "failed";
  }

  async _read() {
    this._detail = await get(this._path);
    this._problem = null;
    const hasEnded = ENDED.has(this._detail.job.status);
    if (!this._output) this._output = new JobOutput(numChoices(this._detail.request));
    // What was enqueued again is another run; the status alone does not tell: it lags behind the stream's end.
    const run = this._detail.job.enqueued_at;
    if (!this._stream || (this._state === "ended" && run !== this._run)) this._open();
    this._run = run;
    return hasEnded;
  }

  _open() {
    this._stream?.close();
    this._output.reset();
    this._since = null;
    const on = {
      event: (event) => this._take(event),
      reset: () => {
        this._output.reset();
        this._since = null;
      },
      state: (state) => this._enter(state),
    };
    this._state = "connecting";
    this._stream = new JobStream(this._id, on, () => this._read());
  }

  _enter(state) {
    this._state = state;
    this._draw();
    if (state === "ended") this._load().catch(() => {});
  }

  _take(event) {
    this._output.take(event);
    this._since ??= { at: performance.now(), numTokens: this._output.numTokens };
    this._timer ||= setTimeout(() => {
      this._timer = 0;
      this._draw();
    }, 250);
  }

  _draw() {
    const job = this._detail?.job;
    fill(
      this._root,
      h("p", { class: "crumb" }, h("a", { href: "#/jobs" }, "Jobs")),
      h(
        "div",
        { class: "head" },
        h("h1", { tabindex: -1, class: "id" }, this._id),
        job ? badge(job.status) : null,
        job ? buttons(job) : null,
      ),
      this._problem ? h("p", { class: "notice bad" }, this._problem) : null,
      job?.error
        ? h("p", { class: "notice bad", "data-key": "error" }, h("code", {}, job.error.code), " ", job.error.message)
        : null,
      job ? facts(this._detail) : null,
      this._output
        ? panel(
            "stream",
            "Output",
            h("p", { class: "muted", "data-key": "state" }, this._progress()),
            this._output.element,
          )
        : null,
      this._detail ? asked(this._detail) : null,
      !job && !this._problem ? h("p", { class: "empty" }, "Loading…") : null,
    );
  }

  _progress() {
    const text = [];
    if (this._output.numTokens) text.push(plural(this._output.numTokens, "token"));
    const seconds = this._since ? (performance.now() - this._since.at) / 1000 : 0;
    const isRunning = this._state === "live" && this._detail.job.status === "running";
    if (isRunning && seconds > 1)
      text.push(`${rate((this._output.numTokens - this._since.numTokens) / seconds)} tokens/s`);
    const state =
      this._state === "live" && !this._output.numTokens ? "waiting for the first token" : STREAM_STATES[this._state];
    return [...text, state].filter(Boolean).join(" · ");
  }
}

function numChoices(request) {
  return Number.isInteger(request.n) && request.n > 0 && request.n <= 128 ? request.n : 1;
}

function buttons(job) {
  if (!ENDED.has(job.status)) return actionButton("cancel-job", job.id, "Cancel", `Cancel job ${job.id}`, "");
  return job.status === "failed" ? actionButton("retry-job", job.id, "Retry", `Retry job ${job.id}`, "") : null;
}

function facts({ job, request, usage, stored }) {
  const waited = job.queued_seconds ?? (job.started_at && job.enqueued_at ? job.started_at - job.enqueued_at : null);
  const running = job.status === "running" && job.started_at ? duration(now() - job.started_at) : null;
  const entries = [
    ["Model", job.model ?? request.model ?? NONE],
    ["Queue", job.queue ?? NONE],
    ["Enqueued", timeOf(job.enqueued_at)],
    ["Started", timeOf(job.started_at)],
    ["Ended", timeOf(job.ended_at)],
    ["Waited", duration(waited)],
    ["First token after", duration(job.first_token_seconds)],
    running ? ["Running for", running] : ["Total", duration(job.total_seconds)],
    ["Prompt", job.prompt_tokens === null ? NONE : tokens(job.prompt_tokens, usage)],
    ["Output", job.output_tokens === null ? NONE : plural(job.output_tokens, "token")],
    ["Attempts", job.attempts ?? NONE],
    stored ? ["Stored", stored] : null,
  ];
  const known = entries.filter((entry) => entry && entry[1] !== NONE);
  return h(
    "dl",
    { class: "facts", "data-key": "facts" },
    known.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

function tokens(number, usage) {
  return usage?.cached_tokens
    ? `${plural(number, "token")}, ${count(usage.cached_tokens)} cached`
    : plural(number, "token");
}

function asked({ request, metadata }) {
  const { prompt, messages, ...others } = request;
  return panel(
    "asked",
    "Request",
    null,
    typeof prompt === "string" ? h("pre", { class: "text", tabindex: 0, "aria-label": "Prompt" }, prompt) : null,
    Array.isArray(prompt)
      ? h(
          "pre",
          { class: "text", tabindex: 0, "aria-label": "Prompt" },
          `${plural(prompt.length, "token id")}: ${prompt.slice(0, 2000).join(" ")}`,
        )
      : null,
    Array.isArray(messages) ? messages.map((message) => said(message)) : null,
    h(
      "details",
      {},
      h("summary", {}, "Parameters and metadata"),
      h(
        "pre",
        { class: "text", tabindex: 0, "aria-label": "Parameters" },
        JSON.stringify({ ...others, metadata }, null, 2),
      ),
    ),
  );
}

function said(message) {
  const content =
    typeof message?.content === "string"
      ? message.content
      : JSON.stringify(message?.content ?? message?.tool_calls ?? message, null, 2);
  return h(
    "div",
    { class: "message" },
    h("h3", {}, String(message?.role ?? "message")),
    h("pre", { class: "text", tabindex: 0, "aria-label": `Message of ${message?.role}` }, content),
  );
}
