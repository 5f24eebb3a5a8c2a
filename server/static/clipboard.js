// Text into the clipboard, or, where the browser does not allow it, before the user's eyes and selected.

import { find } from "./dom.js";
import { notify } from "./notices.js";

/** what: the text's name, for the note that it is there. */
export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    notify(`${what} copied.`);
  } catch {
    find("snippet-title").textContent = what;
    find("snippet-text").value = text;
    find("snippet").showModal();
    find("snippet-text").select();
  }
}
