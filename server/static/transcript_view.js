// A transcript as one sees it: text as it comes, or segments that play, and buttons to save and copy it.

import { copy } from "./clipboard.js";
import { button, clock, download, element, find } from "./dom.js";
import { announce } from "./notices.js";

export class TranscriptView {
  /** name: of the file that it can be saved as. It takes the place of the one before. */
  constructor(name) {
    this.name = name;
    this.text = "";
    this.words = element("pre", { tabIndex: 0, "aria-label": "Words", role: "region" });
    this.place = find("result");
    this.place.hidden = false;
    this.place.classList.add("waiting");
    this.place.replaceChildren(element("h2", {}, name), this.words);
  }

  append(text) {
    this.text += text;
    this.words.append(text);
  }

  /** A line for each segment of a verbose answer; playFrom(seconds) plays it. */
  showSegments(answer, playFrom) {
    this.text = JSON.stringify(answer, null, 2);
    const lines = answer.segments.map(({ start, end, text }) => {
      const times = `${clock(start)} – ${clock(end)}`;
      const play = button("play", times, () => playFrom(start), { className: "link" });
      return element("li", {}, play, element("span", {}, text));
    });
    this.words.replaceWith(element("ol", { className: "segments" }, ...lines));
    this.hasWords = lines.length > 0;
  }

  finish() {
    this.place.classList.remove("waiting");
    const save = () => download(new Blob([this.text], { type: "text/plain" }), this.name);
    if (!(this.hasWords ?? this.text.trim())) this.place.append(element("p", { className: "note" }, "No words were heard."));
    this.place.append(
      element(
        "div",
        { className: "row" },
        button("down", `Save ${this.name}`, save),
        button("copy", "Copy", () => copy(this.text, "Transcript")),
      ),
    );
    announce(this.hasWords === undefined ? this.text : "The transcript is there.");
  }

  fail(message) {
    this.place.classList.remove("waiting");
    this.place.append(element("p", { className: "error", role: "alert" }, message));
  }
}
