// Runs before the page is painted, so that it does not flash in the other colours.
"use strict";
try {
  const theme = localStorage.getItem("qmix.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* storage is switched off: the system's colours */ }
