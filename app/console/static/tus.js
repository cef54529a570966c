// One file on its way to the box in the tus 1.0 protocol: sent in pieces, on after a cut, a pause,
// a reload of the page and a restart of the box. Knows nothing of the page; `upload.js` shows it.
"use strict";

class Transfer { // eslint-disable-line no-unused-vars
  static SLICE = 16 * 1024 * 1024;
  static RETRIES_MS = [500, 1000, 2000, 4000, 8000, 15000, 30000];
  static KEPT_MS = 2 * 24 * 3600 * 1000; // the box itself forgets earlier
  static PASSING = [404, 408, 409, 410, 423, 429, 460];
  static SAMPLE = 1024 * 1024;

  // `metadata` gives tus's, anew for each creation. `onState` gets a word and what it is about:
  // running, waiting (seconds), paused, failed (error), received. `onProgress` gets bytes.
  constructor(file, { url, token, owner, metadata, onState, onProgress }) {
    Object.assign(this, { file, url, token, owner, metadata, onState, onProgress });
    this.key = null; // known once the file was identified
    this.state = "new";
    this.offset = 0;
  }

  // --- what the page asks for -------------------------------------------------------------

  // How much of this file the box has from an earlier try, in bytes; 0 for none.
  async found() {
    try {
      await this.identify();
      this.id ??= this.remembered();
      if (this.id === null) return 0;
      await this.askOffset();
    } catch (error) {
      return 0; // starting tells why
    }
    return this.id === null ? 0 : this.offset;
  }

  // Ends with the id of the complete upload, or null when it was paused, failed or cancelled.
  async start() {
    this.isStopped = false;
    this.become("running");
    let failures = 0;
    try {
      await this.identify();
    } catch (error) {
      this.become("failed", new Error("The file cannot be read. Choose it again."));
      return null;
    }
    if (this.isStopped) return null;
    this.id ??= this.remembered();
    let mustAsk = this.id !== null;
    while (this.id === null || mustAsk || this.offset < this.file.size) {
      try {
        if (mustAsk) await this.askOffset();
        if (this.id === null) await this.create();
        mustAsk = false;
        this.become("running");
        this.onProgress(this.offset);
        if (this.offset < this.file.size) await this.sendPiece();
        failures = 0;
      } catch (error) {
        if (this.isStopped) return null;
        if (!this.isPassing(error) || failures >= Transfer.RETRIES_MS.length) {
          this.become("failed", error);
          return null;
        }
        mustAsk = this.id !== null;
        this.become("waiting", Transfer.RETRIES_MS[failures] / 1000);
        await this.wait(Transfer.RETRIES_MS[failures]);
        if (this.isStopped) return null;
        failures += 1;
      }
    }
    this.become("received");
    return this.id;
  }

  pause() {
    this.stop();
    this.become("paused");
  }

  // Nothing of it is kept, here or there.
  async cancel() {
    this.stop();
    this.become("cancelled");
    const id = this.id ?? this.remembered();
    this.forget();
    if (id !== null) await this.send("DELETE", `${this.url}/${id}`).catch(() => null);
  }

  // Once a version was made of it.
  forget() {
    this.id = null;
    this.offset = 0;
    localStorage.removeItem(this.key);
  }

  // --- the protocol -----------------------------------------------------------------------

  async create() {
    const encoded = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
    const pairs = Object.entries({ filename: this.file.name, ...this.metadata() });
    const made = await this.send("POST", this.url, null, {
      "Upload-Length": this.file.size,
      "Upload-Metadata": pairs.map(([name, text]) => `${name} ${encoded(text)}`).join(","),
    });
    this.id = this.header(made, "Location").split("/").pop();
    this.offset = 0;
    localStorage.setItem(this.key, JSON.stringify({ id: this.id, at: Date.now() }));
  }

  async askOffset() {
    try {
      const head = await this.send("HEAD", `${this.url}/${this.id}`);
      this.offset = Number(this.header(head, "Upload-Offset"));
    } catch (error) {
      if (![404, 410].includes(error.status)) throw error;
      this.forget(); // expired, or discarded elsewhere: it begins anew
    }
  }

  async sendPiece() {
    const from = this.offset;
    const done = await this.send(
      "PATCH", `${this.url}/${this.id}`, this.file.slice(from, from + Transfer.SLICE),
      { "Upload-Offset": from, "Content-Type": "application/offset+octet-stream" },
      (sent) => { if (!this.isStopped) this.onProgress(from + sent); },
    );
    this.offset = Number(this.header(done, "Upload-Offset"));
  }

  // XMLHttpRequest, because fetch does not tell how much of a body was sent.
  send(method, url, body = null, headers = {}, onSent = null) {
    return new Promise((done, refuse) => {
      const request = this.request = new XMLHttpRequest();
      request.open(method, url);
      request.setRequestHeader("X-CSRF-Token", this.token);
      request.setRequestHeader("Tus-Resumable", "1.0.0");
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      if (onSent) request.upload.onprogress = (event) => onSent(event.loaded);
      request.onload = () => (request.status < 300 ? done(request) : refuse(refusal(request)));
      request.onerror = request.onabort = () => refuse(new Error("The box does not answer."));
      request.send(body);
    });
  }

  // What an answer of the protocol must have; another page is the one to sign in.
  header(answer, name) {
    const value = answer.getResponseHeader(name);
    if (value !== null) return value;
    const error = new Error("You are signed out. Sign in again and choose the same file: "
      + "the upload goes on from where it is.");
    error.status = 401;
    throw error;
  }

  isPassing(error) {
    if (error.status === undefined) return true;
    if (error.status === 409 && this.id === null) return false; // too many unfinished ones
    return error.status === 507 ? false
      : error.status >= 500 || Transfer.PASSING.includes(error.status);
  }

  // --- which file it is -------------------------------------------------------------------

  // Checkpoints of one name, size and time are common, out of an archive for one: so a sample of
  // what is inside goes into the key too, of a folder's every file.
  async identify() {
    if (this.key !== null) return;
    const contents = this.file.contents ?? [[this.file.name, this.file]];
    const length = Math.max(4096, Math.floor(Transfer.SAMPLE / contents.length));
    const pieces = [];
    for (const [path, { size, lastModified }] of contents) {
      pieces.push(`${path}:${size}:${lastModified}\n`);
    }
    for (const [, file] of contents) {
      for (const from of [0, Math.floor((file.size - length) / 2), file.size - length]) {
        pieces.push(file.slice(Math.max(from, 0), Math.max(from, 0) + length));
      }
    }
    const digest = await digestOf(await new Blob(pieces).arrayBuffer());
    this.key = `tapeout-upload:${this.owner}:${this.file.size}:${digest}`;
  }

  // --- small parts ------------------------------------------------------------------------

  become(state, about = null) {
    if (state === this.state && about === null) return;
    this.state = state;
    this.onState(state, about);
  }

  stop() {
    this.isStopped = true;
    this.request?.abort();
    this.wake?.();
  }

  // Not longer than until the network is back.
  wait(milliseconds) {
    return new Promise((done) => {
      this.wake = done;
      setTimeout(done, milliseconds);
      addEventListener("online", done, { once: true });
    });
  }

  remembered() {
    try {
      const { id, at } = JSON.parse(localStorage.getItem(this.key));
      return Date.now() - at < Transfer.KEPT_MS ? id : null;
    } catch (error) {
      return null; // nothing, or nothing of this script's
    }
  }
}

// In hexadecimal. Without HTTPS a browser has no crypto.subtle; FNV-1a then tells files apart well
// enough, two of them with different beginnings.
async function digestOf(buffer) {
  const hex = (number, digits) => number.toString(16).padStart(digits, "0");
  if (globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
    return [...digest].map((byte) => hex(byte, 2)).join("");
  }
  let [one, other] = [0x811c9dc5, 0x01234567];
  for (const byte of new Uint8Array(buffer)) {
    one = Math.imul(one ^ byte, 0x01000193);
    other = Math.imul(other ^ byte, 0x01000193);
  }
  return hex(one >>> 0, 8) + hex(other >>> 0, 8);
}

// An answer that is no success, with the box's own words as `told` where it has some.
function refusal(request) {
  const page = new DOMParser().parseFromString(request.responseText, "text/html");
  const error = new Error(`The box answered ${request.status}.`);
  error.told = page.querySelector("[data-message]");
  error.status = request.status;
  return error;
}
