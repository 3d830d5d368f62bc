// Asks again and again while somebody looks: pauses in a hidden tab, waits longer while nothing answers.
const MAX_WAIT_MS = 15_000;

export class Poller {
  /** `onOutcome` is told after each answer: null, or the error of something that fails at the moment. */
  constructor(onOutcome) {
    this._onOutcome = onOutcome;
    this._loops = new Set();
    this._isStopped = false;
    this._onVisible = () => document.hidden || this.refresh();
    document.addEventListener("visibilitychange", this._onVisible);
  }

  /** Call `work` now and every `ms` milliseconds. */
  every(ms, work) {
    const loop = { ms, work, numFailures: 0, timer: 0, isAtWork: false, isDue: false, error: null };
    this._loops.add(loop);
    this._run(loop);
  }

  /** Do everything again at once. */
  refresh() {
    for (const loop of this._loops) this._run(loop);
  }

  stop() {
    this._isStopped = true;
    document.removeEventListener("visibilitychange", this._onVisible);
    for (const loop of this._loops) clearTimeout(loop.timer);
  }

  async _run(loop) {
    clearTimeout(loop.timer);
    if (this._isStopped) return;
    if (loop.isAtWork) {
      loop.isDue = true;
      return;
    }
    loop.isAtWork = true;
    loop.isDue = false;
    try {
      await loop.work();
      loop.numFailures = 0;
      loop.error = null;
    } catch (error) {
      loop.numFailures += 1;
      loop.error = error;
    }
    loop.isAtWork = false;
    if (this._isStopped) return;
    this._onOutcome([...this._loops].find((other) => other.error)?.error ?? null);
    if (loop.isDue) this._run(loop);
    else if (!document.hidden) {
      const wait = loop.numFailures ? Math.min(MAX_WAIT_MS, Math.max(loop.ms, 1000 * 2 ** loop.numFailures)) : loop.ms;
      loop.timer = setTimeout(() => this._run(loop), wait);
    }
  }
}
