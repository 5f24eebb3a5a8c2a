// What is said beside the conversation: to everybody in a note that fades, or to screen readers alone.

import { find } from "./dom.js";

const SHOWN_MS = 4000;
let timer = 0;

/** A short note for everybody. */
export function notify(text) {
  const toast = find("toast");
  toast.textContent = text;
  toast.classList.add("shown");
  clearTimeout(timer);
  timer = setTimeout(() => toast.classList.remove("shown"), SHOWN_MS);
}

/** Words for screen readers: a stream would read its pieces, so answers are announced whole. */
export function announce(text) {
  find("announcer").textContent = text;
}
