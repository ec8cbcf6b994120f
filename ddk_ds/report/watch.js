// Loads the page again when the run's files have changed; not while a picture is zoomed or a text is selected.
(() => {
  const busy = () => document.hidden || String(getSelection()) || document.documentElement.classList.contains("zoomed");
  setInterval(async () => {
    try {
      const answer = await fetch("/state");
      if ((await answer.text()) !== "STATE" && !busy()) location.reload();
    } catch {
      document.title = "(not served any more) " + document.title.replace(/^\(.*?\) /, "");
    }
  }, EVERY_MS);
})();
