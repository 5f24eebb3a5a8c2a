// Light or dark: the system's choice until somebody presses the button, from then on theirs. Loaded before the rest,
// so that the page never flashes in the wrong colours. Fires "themechange" at the document.

const STORED = "tympan-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const stored = () => {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // storage may be forbidden
  }
};

let chosen = stored();

/** Whether the page is dark now. */
const isDark = () => (chosen ? chosen === "dark" : system.matches);

function apply() {
  if (chosen) document.documentElement.dataset.theme = chosen;
  const toggle = document.getElementById("theme");
  if (toggle) {
    toggle.querySelector("use").setAttribute("href", isDark() ? "#icon-sun" : "#icon-moon");
    toggle.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
    toggle.title = toggle.getAttribute("aria-label");
  }
  document.dispatchEvent(new Event("themechange"));
}

/** Wire the button, once the page is there. */
export function startTheme() {
  document.getElementById("theme").onclick = () => {
    chosen = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(STORED, chosen);
    } catch {
      // it holds for this visit then
    }
    apply();
  };
  system.addEventListener("change", apply);
  apply();
}

apply();
