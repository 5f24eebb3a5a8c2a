// The second half of the page: one recording, and its words as text or subtitles.

import { request } from "./api.js";
import { Clip } from "./clip.js";
import { ClipCard } from "./clip_card.js";
import { find } from "./dom.js";
import { LANGUAGES } from "./languages.js";
import { announce } from "./notices.js";
import { RecordingBar } from "./recording_bar.js";
import { chosenModel } from "./sampling.js";
import { eventsOf } from "./sse.js";
import { TranscriptView } from "./transcript_view.js";

const ENDINGS = { text: "txt", srt: "srt", vtt: "vtt", verbose_json: "json" };

export class Transcription {
  #card = null;
  #controller = null;

  constructor() {
    find("language").append(...Object.entries(LANGUAGES).map(([code, name]) => new Option(name, code)));
    new RecordingBar("transcription-recording", "transcription-record", { onClip: (clip) => this.#set(clip) });
    find("choose").onclick = () => find("file").click();
    find("file").onchange = ({ target }) => {
      this.take(target.files[0]);
      target.value = "";
    };
    find("transcription").onsubmit = (event) => {
      event.preventDefault();
      this.#run();
    };
    find("transcribe-stop").onclick = () => this.#controller?.abort();
  }

  /** A file that was chosen or dropped. */
  take(file) {
    if (!file) return;
    this.#set(new Clip(file, file.name));
    announce(`${file.name} added.`);
  }

  #set(clip) {
    this.#remove();
    this.#card = new ClipCard(clip, { onRemove: () => this.#remove() });
    find("recordings").append(this.#card.element);
    this.#card.draw();
    find("transcribe").disabled = false;
  }

  #remove() {
    this.#card?.destroy();
    this.#card = null;
    find("transcribe").disabled = true;
  }

  async #run() {
    const { clip } = this.#card;
    const [format, task] = [find("format").value, find("task").value];
    const view = new TranscriptView(`${clip.name.replace(/\.\w{1,8}$/, "")}.${ENDINGS[format]}`);
    this.#setBusy(true);
    try {
      const isStream = format === "text" && task === "transcriptions";
      const form = formOf(clip, format, isStream);
      const response = await request(`v1/audio/${task}`, { form, signal: this.#controller.signal });
      if (isStream) await showStream(response, view);
      else if (format === "verbose_json") view.showSegments(await response.json(), (start) => this.#playFrom(start));
      else view.append(await response.text());
      view.finish();
    } catch (error) {
      view.fail(error.name === "AbortError" ? "Stopped." : error.message);
    } finally {
      this.#setBusy(false);
    }
  }

  #playFrom(seconds) {
    this.#card?.waveform.playFrom(seconds);
  }

  #setBusy(isBusy) {
    this.#controller = isBusy ? new AbortController() : null;
    find("transcribe").hidden = isBusy;
    find("transcribe-stop").hidden = !isBusy;
    find(isBusy ? "transcribe-stop" : "transcribe").focus();
  }
}

function formOf(clip, format, isStream) {
  const form = new FormData();
  form.append("model", chosenModel());
  if (find("language").value) form.append("language", find("language").value);
  if (find("prompt").value) form.append("prompt", find("prompt").value);
  form.append("response_format", format);
  if (isStream) form.append("stream", "true");
  form.append("file", clip.blob, clip.name);
  return form;
}

async function showStream(response, view) {
  for await (const event of eventsOf(response)) {
    if (event.type === "transcript.text.delta") view.append(event.delta);
  }
}
