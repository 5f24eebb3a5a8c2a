// A clip's waveform, which plays it: wavesurfer.js (vendor/) in the page's colours.

import WaveSurfer from "./vendor/wavesurfer.esm.js";

/** Pixels. The library writes it into a style sheet that the page's policy allows by its hash. */
const HEIGHT = 44;

export class Waveform {
  /** onReady(seconds), onPlaying(isPlaying), onTime(seconds), onFailure() when the browser cannot decode the clip. */
  constructor(container, blob, { onReady, onPlaying, onTime, onFailure }) {
    this.container = container;
    this.player = WaveSurfer.create({
      container,
      height: HEIGHT,
      barWidth: 2,
      barGap: 2,
      barRadius: 2,
      cursorWidth: 1,
      normalize: true,
      dragToSeek: true,
      ...this.#colours(),
    });
    this.player.on("ready", onReady);
    this.player.on("play", () => onPlaying(true));
    this.player.on("pause", () => onPlaying(false));
    this.player.on("finish", () => this.player.setTime(0));
    this.player.on("timeupdate", onTime);
    this.recolour = () => this.player.setOptions(this.#colours());
    document.addEventListener("themechange", this.recolour);
    this.player.on("error", onFailure); // which is told of what makes the promise wait for ever, too
    this.player.loadBlob(blob).catch(onFailure);
  }

  toggle() {
    this.player.playPause();
  }

  playFrom(seconds) {
    this.player.setTime(seconds);
    this.player.play();
  }

  destroy() {
    document.removeEventListener("themechange", this.recolour);
    this.player.destroy();
  }

  #colours() {
    const { color, outlineColor } = getComputedStyle(this.container);
    return { waveColor: color, progressColor: outlineColor, cursorColor: outlineColor };
  }
}
