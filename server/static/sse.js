// Server-sent events from a fetch, which EventSource cannot do: it knows no POST and no headers.

import { toApiError } from "./api.js";

/** The JSON of each event, until [DONE]. Throws ApiError where an event tells of a failure. */
export async function* eventsOf(response) {
  for await (const data of dataOf(response)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw toApiError(response.status, event.error);
    yield event;
  }
}

async function* dataOf(response) {
  let data = [];
  for await (const line of linesOf(response)) {
    if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
  }
}

async function* linesOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {}); // a stream that was aborted cannot be cancelled once more
  }
}
