// One answer as one sees it: its text as it comes, its figures, what went wrong, and what can be done with it.

import { button, element } from "./dom.js";

export class AnswerView {
  constructor() {
    this.said = element("p", { className: "said" });
    this.foot = element("div", { className: "foot" });
    this.element = element(
      "li",
      { className: "turn answer waiting" },
      element("span", { className: "unseen" }, "Answer: "),
      this.said,
      this.foot,
    );
  }

  /** More of the text. */
  append(text) {
    this.element.classList.remove("waiting");
    this.said.append(text);
  }

  /** [figure, what it is, more about it] of each. */
  showFigures(figures) {
    this.stats ??= this.foot.appendChild(element("p", { className: "stats" }));
    this.stats.replaceChildren(
      ...figures.map(([figure, name, more]) => element("span", { title: more }, element("b", {}, String(figure)), ` ${name}`)),
    );
  }

  /** There is no more; `note` says why, unless it is simply the end. */
  end(note = "") {
    this.element.classList.remove("waiting");
    if (note) this.foot.prepend(element("p", { className: "note" }, note));
  }

  /** What went wrong, and the ways on: [label, what to do] of each. */
  fail(message, ways) {
    this.element.classList.remove("waiting");
    this.element.classList.add("failed");
    const buttons = ways.map(([label, onclick]) => element("button", { type: "button", className: "button", onclick }, label));
    this.foot.prepend(
      element("p", { className: "error", role: "alert" }, message),
      element("div", { className: "row" }, ...buttons),
    );
  }

  /** Buttons under the answer: [label, what to do] of each. */
  offer(actions) {
    const buttons = actions.map(([label, act]) => button("copy", label, act, { className: "link" }));
    this.foot.append(element("div", { className: "actions" }, ...buttons));
  }
}
