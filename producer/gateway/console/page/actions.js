// What the buttons do: cancel, retry, save. Each asks first where something would be lost, and says what came of it.
import { post, request } from "./api.js";
import { fill, h } from "./dom.js";
import { plural } from "./format.js";
import { announce } from "./notices.js";

const ACTIONS = {
  "cancel-job": async (id) => {
    if (!(await confirmed("Cancel this job?", `Job ${id} keeps its output so far.`, "Cancel the job"))) return false;
    return report(await post("/console/jobs/cancel", { job_ids: [id] }), "cancelled");
  },
  "retry-job": async (id) => report(await post("/console/jobs/retry", { job_ids: [id] }), "queued again"),
  "retry-jobs": async (ids) => {
    const all = ids.split(" ");
    if (!(await confirmed(`Retry ${plural(all.length, "job")}?`, "They start over.", "Retry them"))) return false;
    return report(await post("/console/jobs/retry", { job_ids: all }), "queued again");
  },
  "cancel-batch": async (id) => {
    const text = `Unanswered requests of ${id} end as cancelled; answers are kept.`;
    if (!(await confirmed("Cancel this batch?", text, "Cancel the batch"))) return false;
    await post(`/v1/batches/${encodeURIComponent(id)}/cancel`);
    announce("The batch is being cancelled.");
    return true;
  },
  "save-file": async (id) => {
    const response = await request("GET", `/v1/files/${encodeURIComponent(id)}/content`);
    const url = URL.createObjectURL(await response.blob());
    h("a", { href: url, download: `${id}.jsonl` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
    return false;
  },
};

/** `onDone` is called when something was changed, `onError` with what went wrong. */
export function listenForActions(onDone, onError) {
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-action]");
    const action = ACTIONS[button?.dataset.action];
    if (!action || button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    try {
      if (await action(button.dataset.id)) onDone();
    } catch (error) {
      onError(error);
    } finally {
      button.removeAttribute("aria-disabled");
    }
  });
}

function report({ jobs }, what) {
  const done = jobs.filter((job) => job.is_done);
  const missed = jobs.filter((job) => !job.is_done);
  if (done.length) announce(`${plural(done.length, "job")} ${what}.`);
  for (const job of missed.slice(0, 3)) announce(`Job ${job.job_id}: ${job.reason}`, "warn");
  return done.length > 0;
}

function confirmed(question, text, deed) {
  const dialog = h("dialog", { "aria-labelledby": "confirm-title" });
  fill(
    dialog,
    h(
      "form",
      { method: "dialog" },
      h("h2", { id: "confirm-title" }, question),
      h("p", {}, text),
      h(
        "div",
        { class: "row" },
        h("button", { value: "yes", class: "primary" }, deed),
        h("button", { value: "no", class: "quiet" }, "Keep going"),
      ),
    ),
  );
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
  });
}
