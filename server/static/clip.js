// A piece of audio on its way to the server: a recording or a file, as it is. What it holds is the server's to find out.

const FORMATS = { mpeg: "mp3", "x-wav": "wav", "vnd.wave": "wav", wave: "wav", "x-m4a": "m4a", "x-flac": "flac" };

/** The part of a media type that names the format: "webm" of "audio/webm;codecs=opus". */
export function formatOf(type) {
  const subtype = type.split(";")[0].split("/")[1] ?? "";
  return FORMATS[subtype] ?? subtype;
}

export class Clip {
  #base64 = null;

  /** blob: the encoded audio; name: of a file that it could be. */
  constructor(blob, name) {
    this.blob = blob;
    this.name = name;
  }

  /** A name's ending, or what the browser takes the file for. */
  get format() {
    return this.name.match(/\.(\w{1,8})$/)?.[1].toLowerCase() ?? (formatOf(this.blob.type) || "wav");
  }

  /** A content part with the audio in it. */
  async part() {
    this.#base64 ??= readBase64(this.blob); // every later turn sends it again
    return { type: "input_audio", input_audio: { data: await this.#base64, format: this.format } };
  }
}

function readBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read any more. Was it moved?"));
    reader.readAsDataURL(blob);
  });
}
