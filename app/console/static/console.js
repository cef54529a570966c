// Small comforts; every page works without them. Copy buttons, tabs over snippets, and wide tables
// that are scrolled by keyboard.
"use strict";

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  const text = source.value ?? source.textContent;
  try {
    await navigator.clipboard.writeText(text);
    say(button, "Copied");
  } catch {
    // Without https a browser has no clipboard: select the text, so that one key press copies it.
    if (source.select) source.select();
    else getSelection().selectAllChildren(source);
    say(button, document.execCommand("copy") ? "Copied" : "Press Ctrl+C");
  }
});

function say(button, text) {
  button.dataset.label ??= button.textContent;
  button.textContent = text;
  setTimeout(() => { button.textContent = button.dataset.label; }, 1600);
}

function makeTabs(root) {
  const panels = [...root.querySelectorAll("[data-tab]")];
  if (panels.length < 2 || root.querySelector("[role=tablist]")) return;
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", root.dataset.tabs);
  const tabs = panels.map((panel, index) => {
    const tab = document.createElement("button");
    tab.type = "button";
    tab.id = `${panel.id}-tab`;
    tab.textContent = panel.dataset.tab;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    tab.addEventListener("click", () => show(index));
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    list.append(tab);
    return tab;
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length;
    show(next);
    tabs[next].focus();
  });
  function show(chosen) {
    panels.forEach((panel, index) => {
      panel.hidden = index !== chosen;
      tabs[index].setAttribute("aria-selected", String(index === chosen));
      tabs[index].tabIndex = index === chosen ? 0 : -1;
    });
  }
  root.prepend(list);
  root.classList.add("tabbed");
  show(0);
}

function makeAllTabs() {
  document.querySelectorAll("[data-tabs]").forEach(makeTabs);
}

// What is wider than its frame can be focused, and then scrolled with the arrow keys; what fits is
// no stop on the way.
const frames = new ResizeObserver((entries) => entries.forEach((entry) => reach(entry.target)));

function reach(frame) {
  if (frame.scrollWidth > frame.clientWidth) {
    const heading = frame.closest(".panel")?.querySelector("h2, summary");
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", heading?.textContent ?? "Table");
  } else {
    for (const name of ["tabindex", "role", "aria-label"]) frame.removeAttribute(name);
  }
}

function reachAllFrames() {
  for (const frame of document.querySelectorAll(".table-wrap, .code pre")) {
    if (frame.dataset.isReached === undefined && frame.hasAttribute("tabindex")) continue;
    frame.dataset.isReached = "";
    frames.observe(frame);
  }
}

function dress() {
  makeAllTabs();
  reachAllFrames();
}
dress();
document.addEventListener("htmx:afterSettle", dress);
document.addEventListener("htmx:sseMessage", dress);
