// The user's next turn: clips, a question or none, and the buttons round them.

import { Clip } from "./clip.js";
import { ClipCard } from "./clip_card.js";
import { find } from "./dom.js";
import { announce } from "./notices.js";
import { RecordingBar } from "./recording_bar.js";

const TALLEST_PIXELS = 180;

export class Composer {
  #cards = [];
  #isBusy = false;

  /** onSend(turn), onStop(), onNew(). */
  constructor({ onSend, onStop, onNew }) {
    this.question = find("question");
    this.onSend = onSend;
    this.recording = new RecordingBar("recording", "record", {
      onClip: (clip) => this.add(clip),
      onChange: () => this.#refresh(),
    });
    find("composer").onsubmit = (event) => {
      event.preventDefault();
      this.#send();
    };
    find("stop").onclick = onStop;
    find("new").onclick = () => {
      onNew();
      this.question.focus();
    };
    find("attach").onclick = () => find("files").click();
    find("hero").onclick = () => find("record").click();
    find("files").onchange = ({ target }) => {
      this.addFiles([...target.files]);
      target.value = ""; // the same file may be chosen again
    };
    this.question.oninput = () => this.#refresh();
    this.question.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    };
    this.#refresh();
  }

  add(clip) {
    const card = new ClipCard(clip, { onRemove: () => this.#remove(card) });
    this.#cards.push(card);
    find("clips").append(card.element);
    card.draw();
    this.#refresh();
  }

  addFiles(files) {
    files.forEach((file) => this.add(new Clip(file, file.name)));
    if (files.length) announce(`${files.map((file) => file.name).join(", ")} added.`);
    this.question.focus();
  }

  /** Put a turn back, to be changed. */
  fill({ clips, text }) {
    this.clear();
    clips.forEach((clip) => this.add(clip));
    this.question.value = text;
    this.#refresh();
    this.question.focus();
  }

  clear() {
    this.#cards.forEach((card) => card.destroy());
    this.#cards = [];
    this.question.value = "";
    this.#refresh();
  }

  /** Whether an answer is coming. */
  setBusy(isBusy) {
    const hadFocus = [find("send"), find("stop")].includes(document.activeElement);
    this.#isBusy = isBusy;
    find("send").hidden = isBusy;
    find("stop").hidden = !isBusy;
    if (hadFocus) (isBusy ? find("stop") : this.question).focus();
    this.#refresh();
  }

  /** Whether there is a conversation to be ended. */
  setStarted(isStarted) {
    find("new").hidden = !isStarted;
  }

  async #send() {
    if (this.recording.isRecording) await this.recording.stop();
    const text = this.question.value.trim();
    const clips = this.#cards.map(({ clip }) => clip);
    if (!this.#isBusy && (text || clips.length)) await this.onSend({ role: "user", clips, text });
  }

  #remove(card) {
    card.destroy();
    this.#cards = this.#cards.filter((other) => other !== card);
    this.#refresh();
    this.question.focus();
    announce(`${card.clip.name} removed.`);
  }

  #refresh() {
    const { question } = this;
    const { isRecording } = this.recording ?? {};
    find("send").disabled = !question.value.trim() && !this.#cards.length && !isRecording;
    find("hero").classList.toggle("on", Boolean(isRecording));
    find("hero").setAttribute("aria-label", isRecording ? "End the recording" : "Record your voice");
    find("send").querySelector("span").textContent = isRecording ? "Stop and send" : "Send";
    question.style.height = "auto";
    question.style.height = `${Math.min(question.scrollHeight, TALLEST_PIXELS)}px`;
  }
}
