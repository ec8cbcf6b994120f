// Loads the page again when the run's files have changed; not while a picture is zoomed or a text is selected.
(() => {
  const moved = (figure) => figure.x_range.have_updated_interactively || figure.y_range.have_updated_interactively;
  const zoomed = () => globalThis.Bokeh?.documents.some((one) => one.roots().some(moved));
  const busy = () => document.hidden || String(getSelection()) || zoomed();
  setInterval(async () => {
    try {
      const answer = await fetch("/state");
      if ((await answer.text()) !== "STATE" && !busy()) location.reload();
    } catch {
      document.title = "(not served any more) " + document.title.replace(/^\(.*?\) /, "");
    }
  }, EVERY_MS);
})();
