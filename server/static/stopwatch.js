// How fast an answer came: the first token after the request, and the rate of those behind it.

export class Stopwatch {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.usage = null;
  }

  /** Text has come. */
  mark() {
    this.last = performance.now();
    this.first ??= this.last;
  }

  /** What is known by now: [figure, what it is, more about it] of each. */
  figures() {
    const { usage } = this;
    const figures = [];
    if (this.first !== null) {
      figures.push([`${Math.round(this.first - this.began)} ms`, "to the first token", "from the request to the first text"]);
    }
    if (!usage) return figures;
    const seconds = (this.last - this.first) / 1000;
    const behind = usage.completion_tokens - 1;
    if (behind > 0 && seconds > 0) figures.push([(behind / seconds).toFixed(1), "tokens/s", "after the first token"]);
    figures.push([usage.completion_tokens, usage.completion_tokens === 1 ? "token" : "tokens", "of the answer"]);
    const { audio_tokens: audio, cached_tokens: cached } = usage.prompt_tokens_details;
    figures.push([usage.prompt_tokens, "in the prompt", `${audio} of audio; ${cached} were computed before`]);
    return figures;
  }
}
