// What has been said: turns as the page has them, and as messages of the API. Failed turns stay on the page only.

/** The API's messages for these turns; partOf(clip): a content part, or a promise of one. */
export async function messagesOf(turns, system, partOf) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, text, clips } of turns) {
    messages.push({ role, content: clips.length ? await contentOf(clips, text, partOf) : text });
  }
  return messages;
}

async function contentOf(clips, text, partOf) {
  const parts = await Promise.all(clips.map(partOf));
  return text ? [...parts, { type: "text", text }] : parts; // audio alone is voice chat
}

export class Conversation {
  #turns = [];

  /** What the model is told when `turn`, the user's next, is sent: all that was answered before, and it. */
  before(turn) {
    return [...this.#turns, turn];
  }

  /** The turn was answered, if only in part. */
  keep(turn, answer) {
    this.#turns.push(turn, { role: "assistant", text: answer, clips: [] });
  }

  clear() {
    this.#turns = [];
  }
}
