// The dialog that asks for an API key, once.
import { forgetKey, isKept, readKey, saveKey } from "./key_store.js";

const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key-input");
const keep = document.getElementById("key-keep");
const error = document.getElementById("key-error");

/** Ask; `why` says what for, `problem` what was wrong with the last one. */
export function openKeyDialog({ why, problem = "" }) {
  document.getElementById("key-why").textContent = why;
  error.textContent = problem;
  document.getElementById("key-forget").hidden = !readKey();
  keep.checked = isKept();
  if (dialog.open) return;
  input.value = "";
  dialog.showModal();
  input.focus();
}

export function isKeyDialogOpen() {
  return dialog.open;
}

export function closeKeyDialog() {
  if (dialog.open) dialog.close();
}

/** `onChange` is called when there is another key, or none. */
export function listenForKeys(onChange) {
  document.getElementById("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) {
      error.textContent = "A key has letters, digits, - and _ only; promptmill keys add NAME prints one.";
      return;
    }
    saveKey(key, keep.checked);
    error.textContent = "";
    onChange();
  });
  document.getElementById("key-forget").addEventListener("click", () => {
    forgetKey();
    dialog.close();
    onChange();
  });
  document.getElementById("key-cancel").addEventListener("click", () => dialog.close());
}
