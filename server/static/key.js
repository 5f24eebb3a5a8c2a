// The server's API key, where it asks for one. Kept for this tab alone (sessionStorage): never on disk.

import { find } from "./dom.js";

const STORED = "tympan-api-key";
let key = read();
let listener = () => {};

function read() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}

/** Headers that carry the key, if there is one. */
export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** Whether requests carry a key, which snippets must name. */
export const hasKey = () => key !== "";

/** Show the field, with the server's own words why. */
export function askForKey(reason) {
  find("key-hint").textContent = reason;
  if (!find("key-form").hidden) return;
  find("key-form").hidden = false;
  find("key").focus();
}

/** `onKey` is called when another key was given. */
export function startKey(onKey) {
  listener = onKey;
  find("key-form").onsubmit = (event) => {
    event.preventDefault();
    key = find("key").value.trim();
    try {
      sessionStorage.setItem(STORED, key);
    } catch {
      // it holds until the page is left then
    }
    find("key").value = "";
    find("key-form").hidden = true;
    listener();
  };
}
