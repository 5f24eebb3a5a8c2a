// A recording under way: its button, the loudness as it comes, the time, and how to end it.

import { button, clock, element, find } from "./dom.js";
import { announce, notify } from "./notices.js";
import { Recorder, reasonNotToRecord } from "./recorder.js";

const BAR_PIXELS = 4;

export class RecordingBar {
  #recorder = null;
  #levels = [];

  /** The ids of the place and of the button; onClip is called with each clip, onChange when it begins and ends. */
  constructor(placeId, buttonId, { onClip, onChange = () => {} }) {
    this.place = find(placeId);
    this.toggle = find(buttonId);
    this.onClip = onClip;
    this.onChange = onChange;
    this.canvas = element("canvas", { className: "levels", role: "img", "aria-label": "Loudness of the recording" });
    this.time = element("span", { className: "time" }, "0:00");
    const cancel = button("close", "Discard the recording", () => this.#cancel(), { isLabelShown: false });
    this.place.append(element("span", { className: "pulse" }), this.canvas, this.time, cancel);
    this.toggle.onclick = () => (this.isRecording ? this.stop() : this.#start());
  }

  get isRecording() {
    return this.#recorder !== null;
  }

  /** End the recording; its clip goes to onClip before this returns. */
  async stop() {
    const recorder = this.#recorder;
    this.#recorder = null;
    const clip = await recorder.stop();
    this.#show(false);
    this.onClip(clip);
    announce("Recording ended.");
  }

  async #start() {
    const reason = reasonNotToRecord();
    if (reason) return notify(reason);
    const recorder = new Recorder((level) => this.#draw(level));
    this.toggle.disabled = true; // while the browser asks
    try {
      await recorder.start();
    } catch (error) {
      notify(error.message);
      return;
    } finally {
      this.toggle.disabled = false;
    }
    this.#recorder = recorder;
    this.#levels = [];
    this.#show(true);
    announce("Recording.");
  }

  #cancel() {
    this.#recorder.cancel();
    this.#recorder = null;
    this.#show(false);
    this.toggle.focus();
    announce("Recording discarded.");
  }

  #show(isOn) {
    this.place.hidden = !isOn;
    this.toggle.classList.toggle("on", isOn);
    this.toggle.querySelector("span").textContent = isOn ? "Stop recording" : "Record";
    this.onChange(isOn);
  }

  #draw(level) {
    if (!this.#recorder) return;
    const { canvas } = this;
    const ratio = devicePixelRatio;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    this.#levels = [...this.#levels, level].slice(-Math.ceil(width / BAR_PIXELS));
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.fillStyle = getComputedStyle(canvas).color;
    const left = width - this.#levels.length * BAR_PIXELS;
    this.#levels.forEach((value, index) => {
      const bar = Math.max(2, value * height);
      context.fillRect(left + index * BAR_PIXELS, (height - bar) / 2, 2, bar);
    });
    this.time.textContent = clock(this.#recorder.seconds);
  }
}
