// What the page asks the gateway: JSON and streams, under the key that was typed in.
import { readKey } from "./key_store.js";

const TIMEOUT_MS = 20_000;

/** `kind`: unreachable, unauthorized, forbidden, not_found, redis_away, refused. */
export class ApiError extends Error {
  constructor(kind, message, code = null) {
    super(message);
    this.kind = kind;
    this.code = code;
  }
}

let clockOffset = 0; // seconds that the gateway's clock is ahead of this browser's

/** Epoch seconds, by the gateway's clock. */
export function now() {
  return Date.now() / 1000 + clockOffset;
}

export function get(path) {
  return ask("GET", path);
}

export function post(path, body = {}) {
  return ask("POST", path, body);
}

async function ask(method, path, body) {
  const response = await request(method, path, { body, signal: AbortSignal.timeout(TIMEOUT_MS) });
  try {
    return await response.json();
  } catch {
    throw new ApiError("unreachable", "the answer was cut short");
  }
}

/** The response of a request that did not fail. Throws ApiError. */
export async function request(method, path, { body, signal } = {}) {
  const headers = {};
  const key = readKey();
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    response = await fetch(path, { method, headers, body: text, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw new ApiError("unreachable", error.name === "TimeoutError" ? "the gateway does not answer" : error.message);
  }
  setClock(response.headers.get("date"));
  if (!response.ok) throw await failure(response);
  return response;
}

function setClock(date) {
  const seconds = Date.parse(date) / 1000;
  // A header has whole seconds: only what differs by more is a clock that is wrong.
  if (Number.isFinite(seconds))
    clockOffset = Math.abs(seconds - Date.now() / 1000) > 2 ? seconds - Date.now() / 1000 : 0;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not ours: a proxy's, perhaps.
  }
  const kinds = { 401: "unauthorized", 403: "forbidden", 404: "not_found", 502: "unreachable", 504: "unreachable" };
  let kind = kinds[response.status] ?? "refused";
  if (error.code === "queue_unavailable") kind = "redis_away";
  return new ApiError(kind, error.message ?? `the gateway answers with status ${response.status}`, error.code);
}
