// The upload page: drop a file, several, or a folder; see how far it is, pause it, go on, cancel.
// A folder travels as a tar that is never built: its pieces stay on disk until they are sent. How
// it travels is tus.js's. Without JavaScript the plain form works.
"use strict";

(() => {
  const form = document.querySelector("[data-upload]");
  if (!form) return;
  const WINDOW_MS = 5000; // speed is that of the last seconds
  const one = (name, root = form) => root.querySelector(`[data-${name}]`);
  const { file: field, name: nameField, csrf_token: { value: token } } = form.elements;
  const line = one("line"), alert = one("alert"), said = one("said");
  const title = document.title;
  let chosen = null, transfer = null, samples = [];

  // --- choosing ---------------------------------------------------------------------------

  async function choose(file) {
    if (!file || isBusy()) return;
    chosen = file;
    transfer = newTransfer(file);
    alert.replaceChildren();
    one("transfer").hidden = true;
    // What was dropped or is a folder never was in the file field, which then must not insist.
    field.required = false;
    if (field.files[0] !== file) field.value = "";
    one("chosen").textContent = `${file.name}, ${bytes(file.size)}`;
    if (!nameField.value) {
      nameField.value = file.name.toLowerCase()
        .replace(/(\.(pt2|onnx|pt|tar|tgz|gz|zip))+$/, "")
        .replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 63);
    }
    nameField.focus();
    one("resume-hint").hidden = true;
    const found = await transfer.found();
    if (chosen !== file || !found) return;
    one("resume-hint").hidden = false;
    one("found").textContent = found < file.size
      ? `${bytes(found)} of this file are here already.` : "All of this file is here already.";
  }

  // Several files, or a folder's, go as one tar.
  function together(files) {
    return files.length === 1 ? files[0]
      : packed(files.map((file) => [`${nameField.value || "model"}/${file.name}`, file]));
  }

  const attempt = (work) => async (event) => {
    try { await choose(await work(event)); } catch (error) { fail(error); }
  };
  field.multiple = true;
  field.addEventListener("change", attempt(() => together([...field.files])));
  one("folder").addEventListener("change", attempt((event) => packed([...event.target.files]
    .map((file) => [file.webkitRelativePath, file]))));
  const drop = one("drop");
  for (const type of ["dragenter", "dragover"]) {
    drop.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", attempt(async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    // Before the first wait: the browser takes them away after the event.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
    const files = [...event.dataTransfer.files];
    if (!entries.some((entry) => entry?.isDirectory)) return files.length ? together(files) : null;
    const root = entries.length === 1 ? "" : "model/";
    const found = [];
    for (const entry of entries) found.push(...await filesBelow(entry, `${root}${entry.name}`));
    return packed(found);
  }));

  async function filesBelow(entry, path) {
    if (entry.isFile) return [[path, await new Promise((done, no) => entry.file(done, no))]];
    const reader = entry.createReader(), found = [];
    for (;;) {
      const entries = await new Promise((done, no) => reader.readEntries(done, no));
      if (!entries.length) return found;
      for (const each of entries) found.push(...await filesBelow(each, `${path}/${each.name}`));
    }
  }

  // --- sending ----------------------------------------------------------------------------

  function newTransfer(file) {
    return new Transfer(file, {
      url: form.dataset.upload, token, owner: form.dataset.owner,
      metadata: () => ({ name: nameField.value }), onState: show, onProgress: tell,
    });
  }

  form.addEventListener("submit", async (event) => {
    if (!chosen) return; // the browser asks for a file, as without JavaScript
    event.preventDefault();
    if (isBusy()) return;
    alert.replaceChildren();
    one("resume-hint").hidden = true;
    samples = [];
    const id = await transfer.start();
    if (id === null) return;
    try {
      const page = await createVersion(id);
      transfer.forget();
      location.assign(page);
    } catch (error) {
      if (error.status === 422) transfer.forget(); // it can never be served: the box let it go
      transfer.become("failed", error);
    }
  });
  one("pause").addEventListener("click", () => transfer.pause());
  one("resume").addEventListener("click", () => form.requestSubmit());
  one("cancel").addEventListener("click", () => transfer.cancel());

  async function createVersion(id) {
    const { inputs, accepts_loss: loss, had_inputs: hadInputs } = form.elements;
    const body = new URLSearchParams({ upload_id: id, name: nameField.value, inputs: inputs.value });
    if (loss.checked) body.set("accepts_loss", "on");
    if (hadInputs) body.set("had_inputs", "on");
    const done = await transfer.send("POST", form.dataset.versions, body, { "HX-Request": "true" });
    return transfer.header(done, "HX-Redirect");
  }

  // --- telling ----------------------------------------------------------------------------

  const isBusy = () => ["running", "waiting", "received"].includes(transfer?.state);

  function show(state, about) {
    const words = {
      running: "Uploading",
      waiting: `The connection was cut. Trying again in ${Math.ceil(about)} s`,
      paused: "Paused. What was sent is kept for a day, also when you leave this page.",
      failed: "Not uploaded.",
      received: "Received. Checking what is inside…",
      cancelled: "Cancelled. Nothing of it was kept.",
    };
    said.textContent = words[state];
    const isOver = state === "failed" && !transfer.id;
    one("transfer").hidden = isOver;
    one("bar").hidden = line.hidden = ["failed", "cancelled"].includes(state) && !transfer.offset;
    one("pause").hidden = !["running", "waiting"].includes(state);
    one("resume").hidden = state !== "paused";
    one("cancel").hidden = !["running", "waiting", "paused"].includes(state)
      && !(state === "failed" && transfer.id);
    one("send").disabled = isBusy() || state === "paused";
    one("transfer").dataset.transfer = state;
    for (const control of [field, one("folder")]) control.disabled = isBusy();
    // The list is older than this, and discarding what runs is Cancel's.
    const unfinished = document.querySelector("[data-unfinished]");
    if (unfinished) unfinished.hidden = true;
    samples = [];
    if (state !== "running") line.textContent = line.textContent.split(",")[0];
    if (state === "failed") fail(about);
    if (state !== "running") document.title = title;
    if (state === "cancelled") {
      one("bar").value = 0;
      line.textContent = "";
    }
  }

  function tell(offset) {
    const now = performance.now();
    samples.push([now, offset]);
    while (samples.length > 2 && now - samples[0][0] > WINDOW_MS) samples.shift();
    if (now - (samples.told ?? -Infinity) < 300 && offset < chosen.size) return;
    samples.told = now;
    const seconds = (now - samples[0][0]) / 1000;
    const speed = seconds > 0 ? (offset - samples[0][1]) / seconds : 0;
    const share = offset / chosen.size;
    one("bar").value = share;
    const left = speed > 0 && offset < chosen.size
      ? `, ${bytes(speed)}/s, ${duration((chosen.size - offset) / speed)} left` : "";
    line.textContent = `${bytes(offset)} of ${bytes(chosen.size)}${left}`;
    document.title = `${Math.floor(share * 100)} % – ${title}`;
  }

  function fail(error) {
    const box = document.createElement("div");
    box.className = "alert";
    if (error.told) box.append(...document.importNode(error.told, true).childNodes);
    else box.textContent = error.message;
    if (transfer?.id && transfer.state === "failed") {
      const kept = document.createElement("p");
      kept.textContent = "What was sent is kept. Upload again to go on from there.";
      box.append(kept);
    }
    alert.replaceChildren(box);
    alert.scrollIntoView({ block: "nearest" });
  }

  function bytes(number) {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let index = 0;
    for (; number >= 999.5 && index < units.length - 1; index += 1) number /= 1000;
    return `${number.toFixed(index && number < 99.5 ? 1 : 0)} ${units[index]}`;
  }

  function duration(seconds) {
    if (seconds < 60) return `${Math.ceil(seconds)} s`;
    if (seconds < 3600) return `${Math.ceil(seconds / 60)} min`;
    return `${Math.floor(seconds / 3600)} h ${Math.ceil(seconds % 3600 / 60)} min`;
  }
})();
