// What the page has to say: lasting notices, one a subject, and passing ones.
import { fill, h } from "./dom.js";

const PASSING_MS = 7_000;
const place = document.getElementById("notices");
const lasting = new Map();
let passing = [];

/** Say so until it is set anew; null: there is nothing to say any more. `kind`: bad, warn or info. */
export function setNotice(subject, text, kind = "bad") {
  if (text === null) lasting.delete(subject);
  else lasting.set(subject, { text, kind });
  draw();
}

/** Say so for a few seconds. */
export function announce(text, kind = "info") {
  const notice = { text, kind };
  passing = [...passing.slice(-2), notice];
  draw();
  setTimeout(() => {
    passing = passing.filter((other) => other !== notice);
    draw();
  }, PASSING_MS);
}

function draw() {
  const shown = [...lasting.values(), ...passing];
  fill(
    place,
    shown.map(({ text, kind }) => h("p", { class: `notice ${kind}` }, text)),
  );
}
