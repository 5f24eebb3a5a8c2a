// A clip as one sees it: a button to play it, its waveform, name and length, and perhaps a button to take it away.

import { button, clock, download, element, setIcon } from "./dom.js";
import { Waveform } from "./waveform.js";

export class ClipCard {
  /** onRemove: called when the clip is taken away; without it, it stays. */
  constructor(clip, { onRemove = null } = {}) {
    this.clip = clip;
    const wave = element("div", { className: "wave", role: "img", "aria-label": `Waveform of ${clip.name}` });
    this.time = element("span", { className: "time" }, "");
    this.play = button("play", `Play ${clip.name}`, () => this.waveform.toggle(), {
      isLabelShown: false,
      className: "icon-button play",
    });
    this.element = element(
      "li",
      { className: "clip" },
      this.play,
      wave,
      element("span", { className: "about" }, element("span", { className: "name", title: clip.name }, clip.name), this.time),
      button("down", `Save ${clip.name}`, () => download(clip.blob, clip.name), {
        isLabelShown: false,
        className: "icon-button save",
      }),
      onRemove && button("close", `Remove ${clip.name}`, onRemove, { isLabelShown: false, className: "icon-button" }),
    );
    this.wave = wave;
  }

  /** Draw the waveform, once the card is in the page. */
  draw() {
    this.waveform = new Waveform(this.wave, this.clip.blob, {
      onReady: (seconds) => {
        this.seconds = seconds;
        this.time.textContent = clock(seconds);
        this.element.classList.add("drawn");
      },
      onPlaying: (isPlaying) => {
        setIcon(this.play, isPlaying ? "pause" : "play");
        this.play.setAttribute("aria-label", `${isPlaying ? "Pause" : "Play"} ${this.clip.name}`);
      },
      onTime: (seconds) => (this.time.textContent = clock(seconds || this.seconds)),
      onFailure: () => {
        this.play.disabled = true;
        this.wave.textContent = "This browser cannot play it; the server may read it all the same.";
      },
    });
  }

  destroy() {
    this.waveform.destroy();
    this.element.remove();
  }
}
