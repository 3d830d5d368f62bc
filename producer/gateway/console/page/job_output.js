// The panes in which a job's output appears, one a choice: thoughts, text, calls, and how it ended.
import { h } from "./dom.js";

const PAINT_MS = 50; // text that came meanwhile is painted at once

export class JobOutput {
  constructor(numChoices) {
    this.element = h("div", { class: "output", "data-keep": true, "data-key": "output" });
    this._numChoices = numChoices;
    this._timer = 0;
    this.reset();
  }

  reset() {
    clearTimeout(this._timer);
    this._timer = 0;
    this._panes = new Map();
    this.numTokens = 0;
    this.element.replaceChildren();
    for (let index = 0; index < this._numChoices; index += 1) this._pane(index);
  }

  take(event) {
    if (event.usage) return;
    this.numTokens += event.num_tokens ?? 0;
    const pane = this._pane(event.index ?? 0);
    if (event.prompt) pane.pending.text += event.prompt;
    if (event.reasoning) pane.pending.reasoning += event.reasoning;
    if (event.text) pane.pending.text += event.text;
    for (const delta of event.tool_calls ?? []) takeCall(pane, delta);
    if (event.finish_reason) pane.end.textContent = `Ended: ${event.finish_reason.replace("_", " ")}`;
    this._timer ||= setTimeout(() => this._paint(), PAINT_MS);
  }

  _paint() {
    this._timer = 0;
    for (const pane of this._panes.values()) {
      for (const kind of ["reasoning", "text"]) {
        if (!pane.pending[kind]) continue;
        const box = pane[kind];
        const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
        if (!box.firstChild) box.append("");
        box.firstChild.appendData(pane.pending[kind]);
        pane.pending[kind] = "";
        if (follows) box.scrollTop = box.scrollHeight;
        pane.thoughts.hidden = !pane.reasoning.firstChild;
      }
    }
  }

  _pane(index) {
    let pane = this._panes.get(index);
    if (pane) return pane;
    const name = this._numChoices > 1 || index > 0 ? `Choice ${index + 1}` : "Output";
    const reasoning = h("pre", { class: "text", tabindex: 0, "aria-label": `${name}: reasoning` });
    pane = {
      reasoning,
      thoughts: h("details", { open: true, hidden: true }, h("summary", {}, "Reasoning"), reasoning),
      text: h("pre", { class: "text answer", tabindex: 0, "aria-label": name }),
      calls: h("ul", { class: "calls", hidden: true }),
      byIndex: new Map(),
      end: h("p", { class: "muted" }),
      pending: { text: "", reasoning: "" },
    };
    this._panes.set(index, pane);
    this.element.append(
      h(
        "section",
        { class: "pane" },
        h("h3", { class: this._numChoices > 1 ? null : "hidden" }, name),
        pane.thoughts,
        pane.text,
        pane.calls,
        pane.end,
      ),
    );
    return pane;
  }
}

function takeCall(pane, delta) {
  let call = pane.byIndex.get(delta.index);
  if (!call) {
    call = { name: h("strong", {}), body: h("code", {}) };
    pane.byIndex.set(delta.index, call);
    pane.calls.hidden = false;
    pane.calls.append(h("li", {}, call.name, " ", call.body));
  }
  if (delta.function?.name) call.name.append(delta.function.name);
  if (delta.function?.arguments) call.body.append(delta.function.arguments);
}
