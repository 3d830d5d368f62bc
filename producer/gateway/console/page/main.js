// The page from its start: who is looking, which view the address names, and whether the gateway answers.
import { listenForActions } from "./actions.js";
import { ApiError, get, now } from "./api.js";
import { Batches } from "./batches.js";
import { h, fill } from "./dom.js";
import { relative } from "./format.js";
import { Job } from "./job.js";
import { Jobs } from "./jobs.js";
import { closeKeyDialog, isKeyDialogOpen, listenForKeys, openKeyDialog } from "./key_dialog.js";
import { readKey } from "./key_store.js";
import { announce, setNotice } from "./notices.js";
import { Overview } from "./overview.js";
import { tickTimes } from "./pieces.js";
import { Poller } from "./poller.js";

const main = document.getElementById("main");
const RETRY_MS = 3_000;

let session = null;
let view = null;
let poller = null;
let lastSuccess = null; // epoch seconds
let retryTimer = 0;

async function start() {
  clearTimeout(retryTimer);
  try {
    session = await get("/console/session");
  } catch (error) {
    meet(error);
    if (error.kind !== "unauthorized") retryTimer = setTimeout(start, RETRY_MS);
    return;
  }
  closeKeyDialog();
  meet(null);
  document.getElementById("foot").textContent = `promptmill ${session.version} · ${whoIs(session)}`;
  show();
}

function whoIs({ key_name: name, is_operator: isOperator, tenant }) {
  if (!name) return isOperator ? "no key is needed here" : "without a key";
  return `key “${name}”${isOperator ? ", an operator's" : ""}${tenant ? `, tenant ${tenant}` : ""}`;
}

/** Open the view that the address names. */
function show({ isNavigation = false } = {}) {
  if (!session) return;
  view?.close();
  poller?.stop();
  poller = new Poller(meet);
  const { name, parameters, id } = readAddress();
  fill(main);
  const root = main.appendChild(h("div", { class: "view", "data-view": name }));
  main.replaceChildren(root);
  view = makeView(name, root, parameters, id);
  document.title = `${view.title} · promptmill`;
  for (const link of document.querySelectorAll("#nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (isNavigation) {
    scrollTo(0, 0);
    root.querySelector("h1")?.focus({ preventScroll: true });
  }
}

function makeView(name, root, parameters, id) {
  if (id) return new Job(root, session, poller, parameters, id);
  if (name === "jobs") return new Jobs(root, session, poller, parameters);
  if (name === "batches") return new Batches(root, session, poller);
  return new Overview(root, session, poller);
}

function readAddress() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  let id = rest.join("/");
  try {
    id = decodeURIComponent(id);
  } catch {
    // As it is: such an id is not known anyway.
  }
  const isKnown = name === "jobs" || name === "batches";
  return { name: isKnown ? name : "overview", parameters: new URLSearchParams(query), id: name === "jobs" ? id : "" };
}

/** What came of the last request: null, or an error. */
function meet(error) {
  if (error === null) {
    lastSuccess = now();
    setNotice("connection", null);
    return beat("live");
  }
  if (!(error instanceof ApiError)) console.error(error);
  switch (error.kind) {
    case "unauthorized":
      session = null;
      poller?.stop();
      openKeyDialog({
        why: "This gateway asks for an API key.",
        problem: readKey() ? "The key is not valid, or was revoked." : "",
      });
      return beat("locked");
    case "redis_away":
      setNotice("connection", `The gateway cannot reach Redis. ${stale()}`);
      return beat("away");
    case "unreachable":
      setNotice("connection", `The gateway cannot be reached: ${error.message}. ${stale()}`);
      return beat("away");
    default:
      setNotice("connection", error.message, "warn");
      return beat("away");
  }
}

function stale() {
  return lastSuccess ? "The figures shown are older; trying again." : "Trying again.";
}

let state = "live";
function beat(next = state) {
  state = next;
  const texts = { live: "Live", away: "Not connected", locked: "Key needed" };
  const since = state === "away" && lastSuccess ? `, last answer ${relative(lastSuccess, now())}` : "";
  const pulse = document.getElementById("pulse");
  pulse.dataset.state = state;
  if (pulse.textContent !== texts[state] + since) pulse.textContent = texts[state] + since;
  main.classList.toggle("stale", state === "away" && lastSuccess !== null);
}

addEventListener("hashchange", () => show({ isNavigation: true }));
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  main.focus();
});
document.getElementById("key").addEventListener("click", () => {
  openKeyDialog({ why: session ? `Now: ${whoIs(session)}.` : "This gateway asks for an API key." });
});
listenForKeys(() => {
  session = null;
  start();
});
listenForActions(
  () => poller?.refresh(),
  (error) => (error.kind === "unauthorized" ? meet(error) : announce(error.message, "bad")),
);
document.getElementById("key-dialog").addEventListener("close", () => {
  if (!session && !isKeyDialogOpen()) beat("locked");
});
setInterval(() => {
  tickTimes();
  beat();
}, 1_000);
start();
