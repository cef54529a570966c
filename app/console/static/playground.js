// Drawing an input: strokes become a PNG in the form's file field, and the form is sent when the
// pen rests. Without this script the file field alone does the same.
"use strict";

const REST_MS = 250;
const PEN_SHARE = 0.09; // of the canvas: about as thick as the strokes of handwritten digits

for (const canvas of document.querySelectorAll("[data-draw]")) {
  const field = document.getElementById(canvas.dataset.draw);
  const form = canvas.closest("form");
  const pen = canvas.getContext("2d");
  let timer = 0;
  let last = null;

  canvas.closest("[data-drawing]").hidden = false;
  clear();

  function clear() {
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    field.value = "";
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  }

  function draw(event) {
    const [x, y] = place(event);
    pen.strokeStyle = "#fff";
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = PEN_SHARE * Math.max(canvas.width, canvas.height);
    pen.beginPath();
    pen.moveTo(...(last ?? [x, y]));
    pen.lineTo(x, y);
    pen.stroke();
    last = [x, y];
  }

  canvas.addEventListener("pointerdown", (event) => {
    clearTimeout(timer);
    canvas.setPointerCapture(event.pointerId);
    draw(event);
  });
  canvas.addEventListener("pointermove", (event) => { if (last) draw(event); });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      last = null;
      timer = setTimeout(send, REST_MS);
    });
  }
  form.querySelector("[data-clear]").addEventListener("click", clear);

  function send() {
    canvas.toBlob((blob) => {
      const files = new DataTransfer();
      files.items.add(new File([blob], "drawing.png", { type: "image/png" }));
      field.files = files.files;
      form.requestSubmit();
    }, "image/png");
  }
}
