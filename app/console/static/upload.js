// Resumable uploads from the browser, in the tus 1.0 protocol: drop a file or a folder, see how
// far it is, stop it, and go on after a cut or a reload. A folder travels as a tar that is never
// built: its pieces stay on disk until they are sent. Without JavaScript the plain form works.
"use strict";

(() => {
  const form = document.querySelector("[data-upload]");
  if (!form) return;
  const SLICE = 16 * 1024 * 1024;
  const RETRIES_MS = [500, 1000, 2000, 4000, 8000, 15000];
  const one = (name, root = form) => root.querySelector(`[data-${name}]`);
  const token = form.elements.csrf_token.value;
  const show = one("transfer"), bar = one("bar"), line = one("line"), alert = one("alert");
  let chosen = null, request = null, isStopped = false;

  // --- choosing ---------------------------------------------------------------------------

  function choose(file) {
    if (!file) return;
    chosen = file;
    // What was dropped or is a folder never was in the file field, which then must not insist.
    form.elements.file.required = false;
    if (form.elements.file.files[0] !== file) form.elements.file.value = "";
    one("chosen").textContent = `${file.name}, ${bytes(file.size)}`;
    const name = form.elements.name;
    if (!name.value) {
      name.value = file.name.toLowerCase().replace(/(\.(pt2|onnx|pt|tar|tgz|gz|zip))+$/, "")
        .replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 63);
    }
    one("resume-hint").hidden = !remembered(file);
    name.focus();
  }

  form.elements.file.addEventListener("change", (event) => choose(event.target.files[0]));
  one("folder").addEventListener("change", (event) => choose(packed([...event.target.files]
    .map((file) => [file.webkitRelativePath, file]))));
  const drop = one("drop");
  for (const type of ["dragenter", "dragover"]) {
    drop.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const entry = event.dataTransfer.items?.[0]?.webkitGetAsEntry?.();
    try {
      choose(entry?.isDirectory ? packed(await filesBelow(entry, entry.name))
        : event.dataTransfer.files[0]);
    } catch (error) { fail(error); }
  });

  async function filesBelow(directory, path) {
    const reader = directory.createReader(), found = [];
    for (;;) {
      const entries = await new Promise((done, no) => reader.readEntries(done, no));
      if (!entries.length) return found;
      for (const entry of entries) {
        const name = `${path}/${entry.name}`;
        if (entry.isDirectory) found.push(...await filesBelow(entry, name));
        else found.push([name, await new Promise((done, no) => entry.file(done, no))]);
      }
    }
  }

  // --- sending ----------------------------------------------------------------------------

  form.addEventListener("submit", async (event) => {
    if (!chosen) return; // the browser asks for a file, as without JavaScript
    event.preventDefault();
    isStopped = false;
    alert.replaceChildren();
    busy(true);
    try {
      const id = await transfer(chosen);
      localStorage.removeItem(fingerprint(chosen));
      line.textContent = "Received. Checking what is inside…";
      location.assign(await createVersion(id));
    } catch (error) {
      if (isStopped) line.textContent = "Stopped. Upload again to go on from here.";
      else fail(error);
      busy(false);
    }
  });
  one("stop").addEventListener("click", () => { isStopped = true; request?.abort(); });
  one("discard").addEventListener("click", async () => {
    const known = remembered(chosen);
    localStorage.removeItem(fingerprint(chosen));
    if (known) await send("DELETE", `${form.dataset.upload}/${known}`).catch(() => null);
    show.hidden = one("resume-hint").hidden = true;
  });

  async function transfer(file) {
    let id = remembered(file), offset = 0, failures = 0;
    const started = { at: performance.now(), offset: null };
    while (id === null || offset < file.size) {
      try {
        if (id === null) {
          id = await create(file);
          localStorage.setItem(fingerprint(file), id);
        } else if (started.offset === null || failures) {
          const head = await send("HEAD", `${form.dataset.upload}/${id}`);
          offset = Number(head.getResponseHeader("Upload-Offset"));
        }
        started.offset ??= offset;
        const piece = file.slice(offset, offset + SLICE);
        const from = offset;
        const done = await send("PATCH", `${form.dataset.upload}/${id}`, piece, {
          "Upload-Offset": offset, "Content-Type": "application/offset+octet-stream",
        }, (sent) => tell(file, from + sent, started));
        offset = Number(done.getResponseHeader("Upload-Offset"));
        failures = 0;
      } catch (error) {
        if (isStopped) throw error;
        if ([404, 410].includes(error.status) && id !== null) { // expired: begin anew
          localStorage.removeItem(fingerprint(file));
          id = null;
          offset = 0;
        } else if (error.isFinal || failures >= RETRIES_MS.length) throw error;
        line.textContent = "The connection was cut. Trying again…";
        await new Promise((done) => setTimeout(done, RETRIES_MS[failures]));
        failures += 1;
      }
    }
    return id;
  }

  async function create(file) {
    const encoded = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
    const made = await send("POST", form.dataset.upload, null, {
      "Upload-Length": file.size,
      "Upload-Metadata": `filename ${encoded(file.name)},name ${encoded(form.elements.name.value)}`,
    });
    return made.getResponseHeader("Location").split("/").pop();
  }

  async function createVersion(id) {
    const { name, inputs, accepts_loss: loss, had_inputs: hadInputs } = form.elements;
    const body = new URLSearchParams({ upload_id: id, name: name.value, inputs: inputs.value });
    if (loss.checked) body.set("accepts_loss", "on");
    if (hadInputs) body.set("had_inputs", "on");
    const done = await send("POST", form.dataset.versions, body, { "HX-Request": "true" });
    return done.getResponseHeader("HX-Redirect");
  }

  // XMLHttpRequest, because fetch does not tell how much of a body was sent.
  function send(method, url, body = null, headers = {}, onSent = null) {
    return new Promise((done, refuse) => {
      request = new XMLHttpRequest();
      request.open(method, url);
      request.setRequestHeader("X-CSRF-Token", token);
      request.setRequestHeader("Tus-Resumable", "1.0.0");
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      if (onSent) request.upload.onprogress = (event) => onSent(event.loaded);
      request.onload = function () {
        if (this.status < 300) return done(this);
        const page = new DOMParser().parseFromString(this.responseText, "text/html");
        const error = new Error(`The box answered ${this.status}.`);
        error.told = page.querySelector("[data-message]");
        error.status = this.status;
        error.isFinal = this.status === 507 || (this.status === 409 && method === "POST")
          || (this.status < 500 && ![404, 408, 409, 423, 429, 460].includes(this.status));
        refuse(error);
      };
      request.onerror = request.onabort = () => refuse(new Error("The connection was cut."));
      request.send(body);
    });
  }

  // --- telling ----------------------------------------------------------------------------

  function tell(file, offset, started) {
    const seconds = (performance.now() - started.at) / 1000;
    const speed = (offset - started.offset) / Math.max(seconds, 0.001);
    bar.value = offset / file.size;
    const left = speed > 0 ? `, ${duration((file.size - offset) / speed)} left` : "";
    const told = `${bytes(offset)} of ${bytes(file.size)}, ${bytes(speed)}/s${left}`;
    if (seconds - (started.told ?? -1) > 0.4 || offset >= file.size) {
      line.textContent = told;
      started.told = seconds;
    }
  }

  function busy(isBusy) {
    show.hidden = false;
    one("stop").hidden = !isBusy;
    one("discard").hidden = isBusy || !remembered(chosen);
    one("send").disabled = isBusy;
    if (isBusy) line.textContent = "Starting…";
  }

  function fail(error) {
    const box = document.createElement("div");
    box.className = "alert";
    if (error.told) box.append(...document.importNode(error.told, true).childNodes);
    else box.textContent = error.message;
    alert.replaceChildren(box);
    line.textContent = "Not uploaded.";
  }

  const fingerprint = (file) =>
    `tapeout-upload:${form.dataset.owner}:${file.name}:${file.size}:${file.lastModified}`;
  const remembered = (file) => localStorage.getItem(fingerprint(file));

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
