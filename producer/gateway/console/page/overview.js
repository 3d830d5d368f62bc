// The overview: the system in figures, the last hour in plots, queues and workers; what a key may see of it.
import { get } from "./api.js";
import { batchList, listBatches } from "./batches.js";
import { fill, h } from "./dom.js";
import { count, duration, NONE, plural, rate, share } from "./format.js";
import { jobsTable } from "./jobs_table.js";
import { bar, panel, table, timeOf } from "./pieces.js";
import { Plot } from "./plot.js";

const STEP_SECONDS = 30;
const NUM_ENDED = 8;
const NUM_FAILED = 5;

export class Overview {
  title = "Overview";

  constructor(root, session, poller) {
    this._root = root;
    this._session = session;
    this._data = { stats: null, series: null, ended: null, failed: null, batches: null };
    this._queue = "";
    this._plots = session.is_operator ? makePlots() : null;
    if (session.is_operator) {
      poller.every(2_000, () => this._load("stats", "/stats"));
      poller.every(10_000, () => this._loadSeries());
    }
    poller.every(4_000, () => this._load("ended", `/console/jobs?state=ended&limit=${NUM_ENDED}`));
    poller.every(4_000, () => this._load("failed", `/console/jobs?state=failed&limit=${NUM_FAILED}`));
    poller.every(4_000, async () => this._take("batches", await listBatches(5)));
    this._onChange = (event) => {
      if (event.target.id !== "series-queue") return;
      this._queue = event.target.value;
      poller.refresh();
    };
    root.addEventListener("change", this._onChange);
    this._draw();
  }

  close() {
    this._root.removeEventListener("change", this._onChange);
  }

  async _load(name, path) {
    this._take(name, await get(path));
  }

  async _loadSeries() {
    const asked = this._queue;
    const query = asked ? `&queue=${encodeURIComponent(asked)}` : "";
    const series = await get(`/console/series?step=${STEP_SECONDS}${query}`);
    if (asked !== this._queue) return;
    updatePlots(this._plots, series);
    this._take("series", series);
  }

  _take(name, value) {
    this._data[name] = value;
    this._draw();
  }

  _draw() {
    const { stats, series, ended, failed, batches } = this._data;
    const isOperator = this._session.is_operator;
    fill(
      this._root,
      h("h1", { class: "hidden", tabindex: -1 }, "Overview"),
      isOperator ? null : limits(this._session),
      isOperator ? tiles(stats, series) : null,
      isOperator ? this._hour(series) : null,
      isOperator && stats ? queuesPanel(stats.queues) : null,
      isOperator && stats ? workersPanel(stats.workers) : null,
      batches?.length
        ? panel("batches", "Batches", h("a", { href: "#/batches" }, "All batches"), batchList(batches))
        : null,
      ended
        ? panel(
            "ended",
            "Recent jobs",
            h("a", { href: "#/jobs?state=ended" }, "All ended jobs"),
            jobsTable("ended", ended.jobs),
          )
        : null,
      failed
        ? panel(
            "failed",
            "Failed jobs",
            h("a", { href: "#/jobs?state=failed" }, "All failed jobs"),
            jobsTable("failed", failed.jobs),
          )
        : null,
    );
  }

  _hour(series) {
    const options = ["", ...new Set([...(series?.queues ?? []), ...(this._queue ? [this._queue] : [])])];
    const choose = h(
      "label",
      { class: "choose" },
      "Queue ",
      h(
        "select",
        { id: "series-queue" },
        options.map((name) => h("option", { value: name }, name || "all queues")),
      ),
    );
    const note =
      series && !series.is_complete ? h("p", { class: "muted" }, "The last hour is still being read…") : null;
    return panel(
      "hour",
      "The last hour",
      choose,
      note,
      h(
        "div",
        { class: "plots", "data-keep": true, "data-key": "plots" },
        Object.values(this._plots).map((plot) => plot.element),
      ),
    );
  }
}

/** What a caller without an operator's key sees, and why. */
function limits(session) {
  const text =
    session.scope === "own"
      ? `The key “${session.key_name}” sees the jobs and batches that it submitted. Queues, workers and the figures of the whole system are shown to an operator's key: promptmill keys add NAME --operator.`
      : "Without a key no jobs are listed; a job can be followed by its id. An operator's key shows everything.";
  return h("p", { class: "notice info", "data-key": "limits" }, text);
}

function tiles(stats, series) {
  const queues = stats?.queues ?? [];
  const workers = stats?.workers ?? [];
  const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);
  const ages = queues.map((queue) => queue.oldest_seconds).filter((age) => age !== null);
  const whole = series?.window;
  const shown = (text) => (stats ? text : NONE);
  const hour = (value, format = count) => (series ? format(value) : NONE);
  return h(
    "dl",
    { class: "tiles", "data-key": "tiles" },
    tile(
      "Waiting",
      shown(count(sum(queues, (queue) => queue.depth))),
      ages.length ? `oldest ${duration(Math.max(...ages))}` : "nothing waits",
    ),
    tile(
      "Running",
      shown(count(sum(queues, (queue) => queue.registries.started))),
      `on ${plural(workers.length, "worker")}`,
    ),
    tile("Output", shown(rate(sum(workers, (worker) => worker.tokens_per_second))), "tokens/s now"),
    tile("Finished", hour(whole?.finished), "jobs, last hour"),
    tile("Failed", hour(whole?.failed), "jobs, last hour", whole?.failed ? "bad" : ""),
    tile("First token", hour(whole?.first_token_p50, duration), whole ? `p95 ${duration(whole.first_token_p95)}` : ""),
  );
}

function tile(name, value, note, style = "") {
  return h(
    "div",
    { class: `tile ${style}` },
    h("dt", {}, name),
    h("dd", {}, h("strong", {}, value), h("span", {}, note)),
  );
}

function queuesPanel(queues) {
  const columns = [
    { name: "Queue", style: "name", cell: (queue) => queue.name },
    { name: "Waiting", style: "number", cell: (queue) => count(queue.depth) },
    { name: "Oldest waiting", style: "number", cell: (queue) => duration(queue.oldest_seconds) },
    { name: "Running", style: "number", cell: (queue) => count(queue.registries.started) },
    {
      name: "Scheduled",
      style: "number",
      cell: (queue) => count(queue.registries.scheduled + queue.registries.deferred),
    },
    { name: "Finished", style: "number", cell: (queue) => count(queue.registries.finished) },
    { name: "Failed", style: "number", cell: (queue) => count(queue.registries.failed) },
  ];
  const busy = queues.filter((queue) => !queue.is_at_rest);
  const rest = queues.length - busy.length;
  return panel(
    "queues",
    "Queues",
    rest ? h("span", { class: "muted" }, `and ${plural(rest, "queue")} of tenants at rest`) : null,
    table({
      caption: "Queues",
      columns,
      rows: busy,
      keyOf: (queue) => queue.name,
      empty: "There is no queue yet: the first job creates one.",
    }),
  );
}

function workersPanel(workers) {
  const columns = [
    {
      name: "Worker",
      style: "name",
      cell: (worker) => [worker.name, h("span", { class: "what" }, worker.models.join(", "))],
    },
    { name: "Device", cell: (worker) => worker.device },
    { name: "Running", style: "number", cell: (worker) => count(worker.num_running) },
    { name: "Waiting", style: "number", cell: (worker) => count(worker.num_waiting) },
    { name: "Output", style: "number", cell: (worker) => `${rate(worker.tokens_per_second)} tokens/s` },
    { name: "KV cache", style: "gauge", cell: kvUse },
    { name: "Last beat", style: "when", cell: (worker) => timeOf(worker.beat_at) },
    { name: "Up since", style: "when", cell: (worker) => timeOf(worker.started_at) },
  ];
  return panel(
    "workers",
    "Workers",
    null,
    table({
      caption: "Workers",
      columns,
      rows: workers,
      keyOf: (worker) => worker.name,
      empty: "No worker is alive, so no job is being answered. To start one: promptmill worker",
    }),
  );
}

function kvUse(worker) {
  const total = worker.kv_blocks_used + worker.kv_blocks_free;
  const text = share(worker.kv_blocks_used, total);
  const words = `${count(worker.kv_blocks_used)} of ${plural(total, "block")}`;
  return [bar([{ value: worker.kv_blocks_used, style: "fill" }], total, words), h("span", { title: words }, text)];
}

function makePlots() {
  const latency = (label) => [
    { key: "p50", label: `p50 ${label}`.trim(), style: "first" },
    { key: "p95", label: "p95", style: "second" },
  ];
  return {
    tokens: new Plot({
      id: "plot-tokens",
      name: "Tokens",
      note: "a second; a job's count when it ends",
      lines: [
        { key: "output", label: "output", style: "first" },
        { key: "prompt", label: "prompt", style: "third" },
      ],
      format: (value) => `${rate(value)}/s`,
    }),
    jobs: new Plot({
      id: "plot-jobs",
      name: "Jobs",
      note: "that ended, a second",
      lines: [
        { key: "finished", label: "finished", style: "first" },
        { key: "failed", label: "failed", style: "bad" },
      ],
      format: (value) => `${rate(value)}/s`,
    }),
    first: new Plot({
      id: "plot-first",
      name: "Time to first token",
      note: "from the moment it was enqueued",
      lines: latency(""),
      format: duration,
      isDuration: true,
    }),
    total: new Plot({
      id: "plot-total",
      name: "Total time",
      note: "from enqueued to finished",
      lines: latency(""),
      format: duration,
      isDuration: true,
    }),
  };
}

function updatePlots(plots, series) {
  const step = series.step_seconds;
  const hour = step * series.points.length;
  const show = (plot, map) =>
    plot.update({
      begin: series.begin,
      stepSeconds: step,
      points: series.points.map((point) => map(point, step)),
      whole: map(series.window, hour),
    });
  show(plots.tokens, (point, seconds) => ({
    output: point.output_tokens / seconds,
    prompt: point.prompt_tokens / seconds,
  }));
  show(plots.jobs, (point, seconds) => ({ finished: point.finished / seconds, failed: point.failed / seconds }));
  show(plots.first, (point) => ({ p50: point.first_token_p50, p95: point.first_token_p95 }));
  show(plots.total, (point) => ({ p50: point.total_p50, p95: point.total_p95 }));
}
