// The page put together: who tells whom.

import { request } from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { find } from "./dom.js";
import { startDrop } from "./drop.js";
import { startKey } from "./key.js";
import { listModels } from "./sampling.js";
import { shownTab, startTabs } from "./tabs.js";
import { startTheme } from "./theme.js";
import { Thread } from "./thread.js";
import { Transcription } from "./transcription.js";

const WIDE = matchMedia("(min-width: 1000px)");
const HINTS = {
  "tympan-tiny":
    "This is the small checkpoint that comes with Tympan. It understands some seventy English " +
    "words, digits (“four two seven”) and commands (“open the door”) among them, and six sounds: enough to try everything here.",
};

function start() {
  const composer = new Composer({
    onSend: (turn) => chat.send(turn),
    onStop: () => chat.stop(),
    onNew: () => chat.clear(),
  });
  const chat = new Chat(composer, new Thread());
  const transcription = new Transcription();
  startTheme();
  startTabs();
  startDrop((files) => (shownTab() === "chat" ? composer.addFiles(files) : transcription.take(files[0])));
  startKey(readModels);
  addEventListener("keydown", (event) => event.key === "Escape" && chat.stop());
  find("settings").open = WIDE.matches;
  WIDE.addEventListener("change", () => (find("settings").open = WIDE.matches));
  readModels();
}

/** Which models are there; asks for a key where the server wants one. */
async function readModels() {
  try {
    const { data } = await (await request("v1/models")).json();
    const names = data.map(({ id }) => id);
    listModels(names);
    showState("on", names[0]);
    find("model-hint").textContent = HINTS[names[0]] ?? "";
    find("model-hint").hidden = !(names[0] in HINTS);
  } catch (error) {
    showState("off", error.status === 401 ? "needs a key" : error.message);
  }
}

function showState(state, words) {
  find("state").dataset.state = state;
  find("served").textContent = words;
}

start();
