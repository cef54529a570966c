// Streams a decoder's answer into its page and turns the meter. Without this script the form
// brings the whole answer at once.
"use strict";

const form = document.getElementById("chat");
const list = document.getElementById("turns");
const stop = document.getElementById("stop");
const send = document.getElementById("send");
const meter = Object.fromEntries(
  [...document.querySelectorAll("[data-meter]")].map((part) => [part.dataset.meter, part]),
);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (send.disabled) return;
  run().catch((error) => say(`The connection to the box broke: ${error.message}`));
});
form.elements.text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

async function run() {
  const controller = new AbortController();
  const text = form.elements.text.value;
  const isChat = Boolean(form.dataset.chat);
  const body = new FormData(form);
  if (!isChat) list.replaceChildren();
  const asked = isChat ? add("user", "You", text) : null;
  const answer = add("assistant", form.dataset.model, "");
  if (!isChat) answer.append(muted(text));
  let requestId = "";
  let made = "";
  const cancel = () => controller.abort();
  stop.addEventListener("click", cancel);
  started();
  try {
    const response = await fetch(form.dataset.stream, {
      method: "POST", body, signal: controller.signal, headers: { "HX-Request": "true" },
    });
    if (!response.ok) {
      refuse(await response.text(), response.headers.get("HX-Redirect"));
      asked?.parentElement.remove();
      answer.parentElement.remove();
      return;
    }
    requestId = response.headers.get("x-request-id");
    if (isChat) form.elements.text.value = "";
    for await (const event of events(response.body)) {
      if (event.text) {
        made += event.text;
        answer.append(event.text);
      }
      if (event.meter) show(event.meter);
      if (event.end) finish(event.end);
      if (event.error) say(event.error);
    }
  } catch (error) {
    if (!controller.signal.aborted) throw error;
    if (requestId) await settle(requestId);
    else say("Stopped before anything ran.");
  } finally {
    stop.removeEventListener("click", cancel);
    ended();
    if (isChat && requestId) remember(text, made);
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part.slice("data: ".length));
  }
}

async function settle(requestId) {
  say("Stopping.");
  const response = await fetch(form.dataset.runs + requestId, { headers: { "HX-Request": "true" } });
  if (response.ok) finish(await response.json());
  else say("Stopped. Its receipt takes longer than usual; the page Usage will show it.");
}

function remember(text, made) {
  const turns = JSON.parse(form.elements.turns.value);
  turns.push({ role: "user", content: text }, { role: "assistant", content: made });
  form.elements.turns.value = JSON.stringify(turns);
}

function add(role, name, text) {
  const turn = document.createElement("li");
  turn.className = role;
  const label = document.createElement("strong");
  label.className = "label";
  label.textContent = name;
  const said = document.createElement("p");
  said.textContent = text;
  turn.append(label, said);
  list.append(turn);
  return said;
}

function muted(text) {
  const part = document.createElement("span");
  part.className = "muted";
  part.textContent = text;
  return part;
}

function started() {
  document.getElementById("messages").replaceChildren();
  send.disabled = true;
  stop.hidden = meter.running.hidden = false;
  meter.receipt.hidden = true;
  for (const name of ["num_input", "num_cached", "num_output", "amount"]) meter[name].textContent = "–";
  say("Counting as it runs, at the prices it was admitted with.");
}

function ended() {
  send.disabled = false;
  stop.hidden = meter.running.hidden = true;
  form.elements.text.focus();
}

function show(reading) {
  for (const name of ["num_input", "num_cached", "num_output"]) {
    meter[name].textContent = reading[name].toLocaleString("en-US");
  }
  meter.amount.textContent = reading.amount;
}

function finish(reading) {
  show(reading);
  meter.receipt.href = `/console/receipts/${encodeURIComponent(reading.request_id)}`;
  meter.receipt.hidden = false;
  const how = reading.outcome === "completed" ? "This" : `It ended ${reading.outcome}; this`;
  say(`${how} is the receipt's amount.`);
}

function say(text) { meter.said.textContent = text; }

function refuse(html, redirect) {
  if (redirect) {
    location.assign(redirect);
    return;
  }
  const alert = new DOMParser().parseFromString(html, "text/html").body;
  document.getElementById("messages").replaceChildren(...alert.childNodes);
  say("It did not run, and cost nothing.");
}
