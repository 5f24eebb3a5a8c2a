// The settings of an answer. What is left empty is not sent: the server has defaults of its own.

import { find } from "./dom.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The model's name, as requests give it. */
export const chosenModel = () => find("model").value;

/** The system prompt, "" for the template's own. */
export const systemPrompt = () => find("system").value.trim();

/** Parameters of the API; null where a field holds what is no such number, which the browser then says. */
export function samplingOptions() {
  const options = {};
  for (const name of NUMBERS) {
    const field = find(name);
    if (!field.checkValidity()) {
      find("settings").open = true;
      field.reportValidity();
      return null;
    }
    if (field.value !== "") options[name] = Number(field.value);
  }
  return options;
}

/** Fill the list of names under which the model is served. */
export function listModels(names) {
  const select = find("model");
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}
