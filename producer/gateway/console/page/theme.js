// The colours: the system's, or those that were chosen here. A classic script in the head, so that no page is painted
// in the wrong ones first.
"use strict";
{
  const ORDER = ["auto", "light", "dark"];
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("promptmill.theme") ?? "auto";
  } catch {
    // No storage: the system's colours.
  }

  const apply = () => {
    const theme = ORDER.includes(chosen) ? chosen : "auto";
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const name = document.getElementById("theme-name");
    if (name) name.textContent = theme;
  };

  apply();
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = ORDER[(ORDER.indexOf(chosen) + 1) % ORDER.length];
      try {
        localStorage.setItem("promptmill.theme", chosen);
      } catch {
        // It holds until the page is closed.
      }
      apply();
    });
  });
}
