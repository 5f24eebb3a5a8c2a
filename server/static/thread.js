// The conversation as one sees it: a list of turns, the newest at the end and in view.

import { AnswerView } from "./answer_view.js";
import { ClipCard } from "./clip_card.js";
import { element, find } from "./dom.js";

const NEAR_PIXELS = 120;

export class Thread {
  #cards = [];

  constructor() {
    this.list = find("turns");
    this.place = find("thread");
  }

  /** Show a turn of the user's. -> its element. */
  addQuestion({ clips, text }) {
    find("welcome").hidden = true;
    const cards = clips.map((clip) => new ClipCard(clip));
    this.#cards.push(...cards);
    const item = element(
      "li",
      { className: "turn question" },
      element("span", { className: "unseen" }, "You: "),
      cards.length ? element("ul", { className: "clips" }, ...cards.map((card) => card.element)) : null,
      text ? element("p", { className: "said" }, text) : null,
    );
    this.list.append(item);
    cards.forEach((card) => card.draw());
    this.scrollDown();
    return item;
  }

  /** A place for the answer that comes. */
  addAnswer() {
    const answer = new AnswerView();
    this.list.append(answer.element);
    this.scrollDown();
    return answer;
  }

  /** Keep the end in view, unless somebody has scrolled up to read. */
  follow() {
    const { scrollHeight, scrollTop, clientHeight } = this.place;
    if (scrollHeight - scrollTop - clientHeight < NEAR_PIXELS) this.scrollDown();
  }

  scrollDown() {
    this.place.scrollTop = this.place.scrollHeight;
  }

  clear() {
    this.#cards.forEach((card) => card.destroy());
    this.#cards = [];
    this.list.replaceChildren();
    find("welcome").hidden = false;
  }
}
