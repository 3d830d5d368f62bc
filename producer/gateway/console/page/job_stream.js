// One job's output as it comes: follows its stream from the last cursor on, through reconnects, resets and restarts.
import { ApiError, request } from "./api.js";
import { readEvents } from "./sse.js";

const MIN_WAIT_MS = 500;
const MAX_WAIT_MS = 8_000;
// What a stream ends with although its job goes on, beside connections that break.
const GOES_ON = new Set(["gateway_stopping", "timeout", "queue_unavailable", "internal"]);

export class JobStream {
  /**
   * `on`: {event(event), reset(), state(name)}; the states are connecting, live, waiting (to try again) and ended.
   * `hasEnded` asks whether the job has, where its stream broke off.
   */
  constructor(jobId, on, hasEnded) {
    this._path = `/console/jobs/${encodeURIComponent(jobId)}/stream`;
    this._on = on;
    this._hasEnded = hasEnded;
    this._cursor = null;
    this._abort = new AbortController();
    this._wake = null;
    this._follow();
  }

  close() {
    this._abort.abort();
    this._wake?.();
  }

  async _follow() {
    let wait = MIN_WAIT_MS;
    while (!this._abort.signal.aborted) {
      const before = this._cursor;
      if (await this._read()) break;
      if (this._abort.signal.aborted) return;
      this._on.state("waiting");
      wait = this._cursor === before ? Math.min(MAX_WAIT_MS, wait * 2) : MIN_WAIT_MS;
      await this._sleep(wait);
    }
    if (!this._abort.signal.aborted) this._on.state("ended");
  }

  /** Whether the stream has come to its end. */
  async _read() {
    this._on.state("connecting");
    try {
      const query = this._cursor ? `?after=${this._cursor}` : "";
      const response = await request("GET", this._path + query, { signal: this._abort.signal });
      this._on.state("live");
      for await (const data of readEvents(response.body)) {
        if (this._abort.signal.aborted) return false;
        if (data === "[DONE]") return true;
        if (await this._take(JSON.parse(data))) return true;
      }
      return false; // cut short
    } catch (error) {
      if (error instanceof ApiError && error.kind === "not_found") return true;
      return error instanceof ApiError && error.kind === "refused" ? this._isOver() : false;
    }
  }

  async _take(event) {
    if (event.error) return GOES_ON.has(event.error.code) ? this._isOver() : true;
    if (event.cursor) this._cursor = event.cursor;
    if (event.reset) this._on.reset();
    else this._on.event(event);
    return false;
  }

  async _isOver() {
    try {
      return await this._hasEnded();
    } catch {
      return false;
    }
  }

  _sleep(ms) {
    return new Promise((resolve) => {
      this._wake = resolve;
      setTimeout(resolve, ms);
    });
  }
}
