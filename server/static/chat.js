// A conversation with the model: each turn is sent with all before it, its answer shown as it comes.

import { request } from "./api.js";
import { copy } from "./clipboard.js";
import { Conversation, messagesOf } from "./conversation.js";
import { announce } from "./notices.js";
import { chosenModel, samplingOptions, systemPrompt } from "./sampling.js";
import { asCurl, asPython } from "./snippets.js";
import { eventsOf } from "./sse.js";
import { Stopwatch } from "./stopwatch.js";

const ENDS = { length: "Cut off: there was no room for more tokens." };

export class Chat {
  #conversation = new Conversation();
  #controller = null;

  constructor(composer, thread) {
    this.composer = composer;
    this.thread = thread;
  }

  /** Send the user's turn, {role, clips, text}, and show what comes back. */
  async send(turn) {
    const options = samplingOptions();
    if (options === null || this.#controller) return;
    const turns = this.#conversation.before(turn);
    const asked = { model: chosenModel(), turns, system: systemPrompt(), options };
    this.composer.clear();
    await this.#answer(turn, asked, this.thread.addQuestion(turn));
  }

  /** End the answer that is coming, if one is. */
  stop() {
    this.#controller?.abort();
  }

  clear() {
    this.stop();
    this.#conversation = new Conversation();
    this.thread.clear();
    this.composer.setStarted(false);
  }

  async #answer(turn, asked, question) {
    const conversation = this.#conversation;
    const controller = (this.#controller = new AbortController());
    const view = this.thread.addAnswer();
    const answer = { text: "", ending: null };
    this.composer.setBusy(true);
    this.composer.setStarted(true);
    try {
      await this.#stream(asked, answer, view, controller.signal);
      view.end(ENDS[answer.ending]);
      announce(answer.text || "The answer is empty.");
    } catch (error) {
      if (error.name === "AbortError") {
        view.end("Stopped.");
        announce("Stopped.");
      } else {
        answer.text = ""; // what had come is on the page, and no part of the conversation
        this.#fail(error, turn, question, view);
      }
    } finally {
      this.#controller = null;
      this.composer.setBusy(false);
    }
    if (answer.text) conversation.keep(turn, answer.text);
    else question.classList.add("failed");
    view.offer([
      ["Copy as curl", async () => copy(await asCurl(asked), "curl command")],
      ["Copy as Python", async () => copy(await asPython(asked), "Python program")],
    ]);
    this.thread.follow();
  }

  async #stream({ model, turns, system, options }, answer, view, signal) {
    const stopwatch = new Stopwatch();
    const messages = await messagesOf(turns, system, (clip) => clip.part());
    const json = { model, messages, ...options, stream: true, stream_options: { include_usage: true } };
    for await (const { choices, usage } of eventsOf(await request("v1/chat/completions", { json, signal }))) {
      const text = choices[0]?.delta.content;
      answer.ending = choices[0]?.finish_reason ?? answer.ending;
      if (text) {
        stopwatch.mark();
        answer.text += text;
        view.append(text);
      }
      if (usage) stopwatch.usage = usage;
      if (text || usage) {
        view.showFigures(stopwatch.figures());
        this.thread.follow();
      }
    }
  }

  #fail(error, turn, question, view) {
    const takeBack = () => {
      question.remove();
      view.element.remove();
    };
    const again = () => {
      takeBack();
      this.send(turn);
    };
    const edit = () => {
      takeBack();
      this.composer.fill(turn);
    };
    view.fail(error.message, [["Try again", again], ["Edit", edit]]);
  }
}
