// Elements made in one call, and found by their id. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

/** The element of the page with this id, which must be there. */
export const find = (id) => document.getElementById(id);

/** `element("p", {className: "note", onclick}, "text", child)`; properties, or attributes where a name has a dash. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** One of the page's own symbols. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Show another symbol in a button that has one. */
export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#icon-${name}`);
}

/** A button with a symbol; without a visible text, `label` names it. */
export function button(name, label, onclick, { isLabelShown = true, ...properties } = {}) {
  const made = element("button", { type: "button", className: "button", onclick, ...properties }, icon(name));
  if (isLabelShown) made.append(element("span", {}, label));
  else {
    made.setAttribute("aria-label", label);
    made.title = label;
  }
  return made;
}

/** Seconds as 0:07 or 1:02:09. */
export function clock(seconds) {
  const whole = Math.floor(seconds);
  const two = (number) => String(number).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** Give a blob to the user as a file. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
