// Jobs in lists: those that run, wait, have ended or failed.
import { get } from "./api.js";
import { fill, h } from "./dom.js";
import { plural } from "./format.js";
import { jobsTable } from "./jobs_table.js";
import { actionButton } from "./pieces.js";

const STATES = { running: "Running", waiting: "Waiting", ended: "Ended", failed: "Failed" };
const FIRST = 50;
const MOST = 200;

export class Jobs {
  title = "Jobs";

  constructor(root, session, poller, parameters) {
    this._root = root;
    this._session = session;
    this._state = parameters.get("state") in STATES ? parameters.get("state") : "running";
    this._limit = FIRST;
    this._jobs = null;
    poller.every(3_000, () => this._load());
    this._onClick = (event) => {
      if (event.target.id !== "more") return;
      this._limit = Math.min(MOST, this._limit * 2);
      poller.refresh();
    };
    root.addEventListener("click", this._onClick);
    root.addEventListener("submit", open);
    this._draw();
  }

  close() {
    this._root.removeEventListener("click", this._onClick);
    this._root.removeEventListener("submit", open);
  }

  async _load() {
    this._jobs = (await get(`/console/jobs?state=${this._state}&limit=${this._limit}`)).jobs;
    this._draw();
  }

  _draw() {
    const failed = this._state === "failed" ? (this._jobs ?? []).slice(0, 100).map((job) => job.id) : [];
    fill(
      this._root,
      h("div", { class: "head" }, h("h1", { tabindex: -1 }, "Jobs"), findForm()),
      h(
        "nav",
        { class: "tabs", "aria-label": "Jobs by state" },
        Object.entries(STATES).map(([state, label]) =>
          h("a", { href: `#/jobs?state=${state}`, "aria-current": state === this._state ? "page" : null }, label),
        ),
      ),
      this._session.scope === "all" ? null : h("p", { class: "muted" }, explain(this._session)),
      failed.length
        ? h(
            "p",
            { class: "row" },
            actionButton(
              "retry-jobs",
              failed.join(" "),
              `Retry these ${plural(failed.length, "job")}`,
              `Retry these ${plural(failed.length, "job")} that failed`,
              "",
            ),
          )
        : null,
      this._jobs === null ? h("p", { class: "empty" }, "Loading…") : jobsTable(this._state, this._jobs),
      this._jobs?.length >= this._limit && this._limit < MOST
        ? h("p", { class: "row" }, h("button", { type: "button", id: "more" }, "Show more"))
        : null,
      this._jobs?.length >= MOST ? h("p", { class: "muted" }, `The first ${MOST} are shown.`) : null,
    );
  }
}

function findForm() {
  return h(
    "form",
    { class: "find", role: "search" },
    h("label", { class: "hidden", for: "find" }, "Job id"),
    h("input", { id: "find", name: "id", placeholder: "Job id", autocomplete: "off", spellcheck: "false" }),
    h("button", { type: "submit" }, "Open"),
  );
}

function open(event) {
  event.preventDefault();
  const id = new FormData(event.target)
    .get("id")
    .trim()
    .replace(/^(chatcmpl|cmpl)-/, "");
  if (id) location.hash = `#/jobs/${encodeURIComponent(id)}`;
}

function explain(session) {
  return session.scope === "own"
    ? "These are the jobs that this key submitted. An operator's key shows everybody's."
    : "Without a key no jobs are listed; a job can be opened by its id.";
}
