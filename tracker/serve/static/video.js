// Pictures of all streams in view, through one connection: browsers open no more than six to a server.

const HEADERS_END = [13, 10, 13, 10];

export class Video {
  // show: given a stream's name and its newest picture, an ImageBitmap it may keep until the next.
  constructor(show) {
    this.show = show;
    this.names = "";
    this.running = null;
    this.decoding = new Set();
  }

  // From now on these streams. Fewer at once get more pictures each.
  watch(names) {
    const wanted = [...names].sort();
    const key = JSON.stringify(wanted);
    if (key === this.names) return;
    this.names = key;
    this.running?.abort();
    this.running = null;
    if (wanted.length) this.run(wanted, (this.running = new AbortController()));
  }

  async run(names, control) {
    const query = new URLSearchParams(names.map((name) => ["stream", name]));
    query.set("fps", String(Math.max(2, Math.min(25, Math.round(60 / names.length)))));
    for (let wait = 500; !control.signal.aborted; wait = Math.min(2 * wait, 5000)) {
      try {
        const response = await fetch(`/video?${query}`, { signal: control.signal });
        if (response.ok) {
          await this.read(response.body.getReader());
          wait = 500;
        }
      } catch {
        // broken off: by us, or by the network
      }
      if (!control.signal.aborted) await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  async read(reader) {
    const text = new TextDecoder("latin1");
    let held = new Uint8Array(0);
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const joined = new Uint8Array(held.length + value.length);
      joined.set(held);
      joined.set(value, held.length);
      held = joined;
      for (let end = endOfHeaders(held); end >= 0; end = endOfHeaders(held)) {
        const headers = new Map(
          text.decode(held.subarray(0, end)).split("\r\n").map((line) => {
            const colon = line.indexOf(":");
            return [line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim()];
          }),
        );
        const length = Number(headers.get("content-length"));
        if (held.length < end + length) break;
        this.picture(decodeURIComponent(headers.get("x-stream")), held.slice(end, end + length));
        held = held.slice(end + length);
      }
    }
  }

  // A browser too slow to decode all shows fewer, and never an older one after a newer.
  async picture(name, jpeg) {
    if (this.decoding.has(name)) return;
    this.decoding.add(name);
    try {
      this.show(name, await createImageBitmap(new Blob([jpeg], { type: "image/jpeg" })));
    } catch {
      // a picture this browser cannot read: the next may be better
    } finally {
      this.decoding.delete(name);
    }
  }
}

// Where the bytes of a picture begin, or -1 if its headers are not whole yet.
function endOfHeaders(bytes) {
  for (let at = bytes.indexOf(13); at >= 0 && at < 400; at = bytes.indexOf(13, at + 1)) {
    if (HEADERS_END.every((byte, k) => bytes[at + k] === byte)) return at + 4;
  }
  return -1;
}
