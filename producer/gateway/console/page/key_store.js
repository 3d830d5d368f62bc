// The API key that was typed in: of this tab alone, or kept in this browser, as was chosen.
const NAME = "promptmill.key";

let held = null; // where the browser has no storage

export function readKey() {
  return attempt(() => sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME)) ?? held;
}

export function isKept() {
  return attempt(() => localStorage.getItem(NAME)) !== null;
}

export function saveKey(key, isKeptAfterwards) {
  forgetKey();
  held = key;
  attempt(() => (isKeptAfterwards ? localStorage : sessionStorage).setItem(NAME, key));
}

export function forgetKey() {
  held = null;
  attempt(() => sessionStorage.removeItem(NAME));
  attempt(() => localStorage.removeItem(NAME));
}

function attempt(what) {
  try {
    return what() ?? null;
  } catch {
    return null;
  }
}
