// A folder as one tar file, without copying it: headers in memory, contents left on disk. Equal
// folders give equal bytes, so an upload of one can be resumed.
"use strict";

// `files` holds [path, File] pairs below one folder; hidden files stay home. Returns a Blob with
// `name`, as a File has, and `contents`: the [path, File] pairs that went in.
function packed(files) { // eslint-disable-line no-unused-vars
  const folder = files[0]?.[0].split("/")[0] ?? "model";
  const inside = files.map(([path, file]) => [path.split("/").slice(1).join("/"), file])
    .filter(([path]) => path && !path.split("/").some((part) => part.startsWith(".")))
    .sort(([one], [other]) => (one < other ? -1 : 1));
  if (!inside.length) throw new Error("This folder holds no files.");
  const pieces = [];
  for (const [path, file] of inside) {
    pieces.push(tarHeader(path, file.size), file, new Uint8Array(-file.size & 511));
  }
  pieces.push(new Uint8Array(1024));
  const blob = new Blob(pieces);
  blob.name = `${folder}.tar`;
  blob.contents = inside;
  return blob;
}

// One POSIX ustar header block of 512 bytes.
function tarHeader(path, size) {
  const block = new Uint8Array(512), encoder = new TextEncoder();
  const put = (at, text) => block.set(encoder.encode(text), at);
  let [name, prefix] = [path, ""];
  if (encoder.encode(path).length > 100) {
    const cut = path.lastIndexOf("/");
    [prefix, name] = [path.slice(0, cut), path.slice(cut + 1)];
  }
  if (encoder.encode(name).length > 100 || encoder.encode(prefix).length > 155) {
    throw new Error(`The path ${path} is too long; give the folder shorter names.`);
  }
  put(0, name);
  put(100, "0000644\0");
  put(108, "0000000\0");
  put(116, "0000000\0");
  if (size < 8 ** 11) put(124, `${size.toString(8).padStart(11, "0")}\0`);
  else { // beyond 8 GB: base 256
    block[124] = 0x80;
    for (let at = 135, rest = size; at > 124 && rest; at -= 1, rest = Math.floor(rest / 256)) {
      block[at] = rest % 256;
    }
  }
  put(136, "00000000000\0");
  put(148, "        0");
  put(257, "ustar\x0000");
  put(345, prefix);
  const sum = block.reduce((total, byte) => total + byte, 0);
  put(148, `${sum.toString(8).padStart(6, "0")}\0 `);
  return block;
}
