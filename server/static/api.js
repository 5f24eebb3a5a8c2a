// Requests to the server that this page came from, under whatever prefix a proxy gives it; failures as words.

import { askForKey, authorization } from "./key.js";

/** What a request failed with, in the server's words. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The absolute URL of one of the server's routes, given without its slash: "v1/models". */
export const urlOf = (path) => new URL(path, document.baseURI).href;

/** Ask the server. -> its answer, whose status is 2xx. Throws ApiError; a stopped request throws AbortError. */
export async function request(path, { json, form, signal } = {}) {
  const headers = { ...authorization() };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const options = { headers, signal, cache: "no-store" };
  if (json !== undefined || form) Object.assign(options, { method: "POST", body: form ?? JSON.stringify(json) });
  const response = await fetch(urlOf(path), options).catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError(0, "The server cannot be reached.");
  });
  if (response.ok) return response;
  const error = await errorOf(response);
  if (error.status === 401) askForKey(error.message);
  throw error;
}

/** An error event of a stream, or the body of an error answer. */
export function toApiError(status, { message, param, code }) {
  const where = param && !message.includes(param) ? ` (${param})` : "";
  return new ApiError(status, `${message}${where}`, code);
}

async function errorOf(response) {
  try {
    return toApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status} ${response.statusText}.`);
  }
}
