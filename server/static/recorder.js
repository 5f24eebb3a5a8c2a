// The microphone: one recording at a time, encoded by the browser (webm/opus; ogg or mp4 where it has no webm).

import { Clip, formatOf } from "./clip.js";

const TYPES = ["audio/webm;codecs=opus", "audio/ogg;codecs=opus", "audio/mp4"];
const LEVELS_PER_SECOND = 20;
const CONSTRAINTS = { channelCount: 1, echoCancellation: false, noiseSuppression: true, autoGainControl: true };
const REASONS = {
  NotAllowedError: "The browser did not let this page use the microphone. Allow it beside the address, then try again.",
  NotFoundError: "There is no microphone.",
  NotReadableError: "The microphone is taken by another program.",
};

let numRecordings = 0;

/** Why nothing can be recorded here, or null. */
export function reasonNotToRecord() {
  if (!isSecureContext) {
    return "Browsers give the microphone only to pages over https or on localhost. Files can be added all the same.";
  }
  return navigator.mediaDevices && window.MediaRecorder ? null : "This browser cannot record. Files can be added all the same.";
}

export class Recorder {
  #chunks = [];

  /** onLevel: called with the loudness, 0 to 1, twenty times a second. */
  constructor(onLevel) {
    this.onLevel = onLevel;
  }

  /** Ask for the microphone and begin. Throws an Error in words. */
  async start() {
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ audio: CONSTRAINTS });
    } catch (error) {
      throw new Error(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    const mimeType = TYPES.find((type) => MediaRecorder.isTypeSupported(type));
    this.recorder = new MediaRecorder(this.stream, { mimeType, audioBitsPerSecond: 64_000 });
    this.recorder.ondataavailable = ({ data }) => this.#chunks.push(data);
    this.recorder.start();
    this.began = performance.now();
    this.#watchLevel();
  }

  get seconds() {
    return (performance.now() - this.began) / 1000;
  }

  /** End it. -> the clip. */
  async stop() {
    const ended = new Promise((resolve) => (this.recorder.onstop = resolve));
    this.recorder.stop();
    await ended;
    this.#release();
    const type = this.recorder.mimeType.split(";")[0];
    return new Clip(new Blob(this.#chunks, { type }), `recording-${++numRecordings}.${formatOf(type)}`);
  }

  /** End it and forget it. */
  cancel() {
    this.recorder.stop();
    this.#release();
  }

  #watchLevel() {
    this.context = new AudioContext();
    const analyser = this.context.createAnalyser();
    const samples = new Float32Array(analyser.fftSize);
    this.context.createMediaStreamSource(this.stream).connect(analyser);
    this.timer = setInterval(() => {
      analyser.getFloatTimeDomainData(samples);
      const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
      this.onLevel(Math.min(1, Math.sqrt(power) * 4));
    }, 1000 / LEVELS_PER_SECOND);
  }

  #release() {
    clearInterval(this.timer);
    this.context.close();
    for (const track of this.stream.getTracks()) track.stop();
  }
}
