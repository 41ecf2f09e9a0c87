// Keeps the page current without moving what the reader looks at; without it, the page is one picture of the moment.
"use strict";
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
async function follow() {
  for (;;) {
    await pause(document.querySelector("[data-running]") ? 1000 : 5000);
    if (document.hidden) continue;
    try {
      const answer = await fetch("/", { headers: { accept: "text/html" } });
      if (!answer.ok) throw new Error(answer.status);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      const main = document.querySelector("main");
      const open = new Set([...main.querySelectorAll("details[open]")].map((details) => details.id));
      const focused = document.activeElement && document.activeElement.id;
      fresh.querySelectorAll("details").forEach((details) => { if (open.has(details.id)) details.open = true; });
      main.replaceChildren(...fresh.childNodes);
      if (focused) { const again = document.getElementById(focused); if (again) again.focus(); }
      document.body.classList.remove("stale");
      document.body.dataset.refreshed = new Date().toISOString();
    } catch (error) {
      document.body.classList.add("stale");
    }
  }
}
follow();
