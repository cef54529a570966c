// Small comforts; every page works without them. Copy buttons, and tabs over snippets.
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
makeAllTabs();
document.addEventListener("htmx:afterSettle", makeAllTabs);
document.addEventListener("htmx:sseMessage", makeAllTabs);
