// A request as code to paste. Audio is read from the file that it is, or that the page saves it as: never in the text.

import { urlOf } from "./api.js";
import { messagesOf } from "./conversation.js";
import { hasKey } from "./key.js";

const KEY_VARIABLE = "OPENAI_API_KEY";

/** For a shell: curl with a body from a here-document, in which base64 reads the files. */
export async function asCurl(request) {
  const { json, names } = await outline(request);
  const body = names.reduce(
    (text, [mark, name]) => text.replaceAll(mark, () => `$(base64 < ${quoted(name)} | tr -d '\\n')`),
    json.replace(/[\\$`]/g, "\\$&"),
  );
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  return `curl -s ${quoted(urlOf("v1/chat/completions"))} \\
  -H 'Content-Type: application/json'${key} --data-binary @- <<EOF
${body}
EOF
`;
}

/** For Python: OpenAI's client, as a stream. */
export async function asPython(request) {
  const { json, names } = await outline(request);
  const fields = json.slice(2, -2).replace(/^ {2}"(\w+)": /gm, "  $1=");
  const call = names.reduce(
    (text, [mark, name]) => text.replaceAll(`"${mark}"`, () => `audio(${JSON.stringify(name)})`),
    fields.replace(/^ +/gm, (spaces) => spaces.repeat(2)),
  );
  const modules = [...(names.length ? ["import base64"] : []), ...(hasKey() ? ["import os"] : [])];
  const reader = ["def audio(name):", '    return base64.b64encode(open(name, "rb").read()).decode()', "", "", ""];
  return `${modules.length ? `${modules.join("\n")}\n\n` : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(urlOf("v1"))}, api_key=${hasKey() ? `os.environ["${KEY_VARIABLE}"]` : '"none"'})


${names.length ? reader.join("\n") : ""}stream = client.chat.completions.create(
${call},
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

/** The request's JSON with a mark in the place of each clip's audio. -> it, and [mark, file name] of each clip. */
async function outline({ model, turns, system, options }) {
  const names = [];
  const salt = Math.random().toString(36).slice(2);
  const messages = await messagesOf(turns, system, (clip) => {
    const mark = `audio-${salt}-${names.length}-`;
    names.push([mark, clip.name]);
    return { type: "input_audio", input_audio: { data: mark, format: clip.format } };
  });
  return { json: JSON.stringify({ model, messages, ...options }, null, 2), names };
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
