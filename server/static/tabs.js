// The two halves of the page as tabs: arrow keys, Home and End move between them, as everywhere.

import { find } from "./dom.js";

const TABS = ["chat", "transcription"];
const MOVES = { ArrowRight: 1, ArrowLeft: -1, Home: -TABS.length, End: TABS.length };

/** Which half is shown. */
export const shownTab = () => TABS.find((name) => !find(`panel-${name}`).hidden);

export function startTabs() {
  for (const name of TABS) {
    find(`tab-${name}`).onclick = () => show(name);
    find(`tab-${name}`).onkeydown = (event) => {
      if (!(event.key in MOVES)) return;
      event.preventDefault();
      const index = Math.min(Math.max(TABS.indexOf(name) + MOVES[event.key], 0), TABS.length - 1);
      show(TABS[index]);
      find(`tab-${TABS[index]}`).focus();
    };
  }
  if (location.hash === "#transcription") show("transcription");
}

function show(shown) {
  for (const name of TABS) {
    find(`panel-${name}`).hidden = name !== shown;
    find(`tab-${name}`).setAttribute("aria-selected", String(name === shown));
    find(`tab-${name}`).tabIndex = name === shown ? 0 : -1;
  }
  history.replaceState(null, "", shown === "chat" ? location.pathname : `#${shown}`);
}
