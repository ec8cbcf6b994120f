// Puts Bokeh's figures into the page, switches curves by the legends, and follows light, dark and narrow windows.
(async () => {
  const store = "ddk_ds report " + document.title;
  const hidden = new Set(JSON.parse(sessionStorage.getItem(store) || "[]"));
  const content = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  root.classList.add("js");
  let figures = [];

  function show() {
    for (const figure of figures) {
      for (const renderer of figure.renderers) {
        if (renderer.tags.length) renderer.visible = !renderer.tags.some((tag) => hidden.has(tag));
      }
    }
    for (const button of document.querySelectorAll(".legend button")) {
      button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.key)));
    }
    sessionStorage.setItem(store, JSON.stringify([...hidden]));
  }

  function paint() {
    const style = getComputedStyle(root);
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    for (const figure of figures) {
      if (figure.title) figure.title.text_color = ink;
      for (const side of [figure.below, figure.left].flat()) {
        Object.assign(side, { axis_label_text_color: soft, major_label_text_color: soft, axis_label_text_font_style: "normal",
          axis_line_color: line, major_tick_line_color: line });
      }
      for (const grid of figure.center) if ("grid_line_color" in grid) grid.grid_line_color = line;
    }
  }

  function hint() {
    for (const table of document.querySelectorAll(".scroll")) {
      const words = table.previousElementSibling;
      if (words && words.classList.contains("hint")) {
        words.classList.toggle("shown", table.scrollWidth > table.clientWidth + 1);
      }
    }
  }

  // Values that lie close together would hide each other: each tooltip goes below the one above it.
  function spread() {
    const tips = [...document.querySelectorAll(".bk-Tooltip")];
    for (const tip of tips) tip.style.translate = "";
    let end = -Infinity;
    for (const [tip, box] of tips.map((one) => [one, one.getBoundingClientRect()]).sort((a, b) => a[1].top - b[1].top)) {
      const down = Math.max(0, end - box.top);
      tip.style.translate = `0 ${down}px`;
      end = box.bottom + down;
    }
  }

  document.addEventListener("pointermove", () => requestAnimationFrame(spread), true);
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button) return;
    const key = button.dataset.key;
    if (!hidden.delete(key)) hidden.add(key);
    show();
  });
  hint();
  addEventListener("resize", hint);
  try {
    await Bokeh.embed.embed_items(content.documents, content.items);
  } catch (error) {
    root.classList.remove("js"); // the still pictures remain
    throw error;
  }
  figures = Bokeh.documents.flatMap((one) => one.roots());
  if (matchMedia("(pointer: coarse)").matches) for (const figure of figures) figure.toolbar.gestures.pan.active = null;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
  show();
  root.classList.add("ready");
})();
