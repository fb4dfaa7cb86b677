// One stream on the page: its picture, its numbers, its counters.

import { ask, pathOf } from "./api.js";
import { drawCurve } from "./curve.js";
import { Editor, shadeOf } from "./editor.js";

const AWAY = {
  connecting: "Connecting…",
  reconnecting: "Lost. Connecting again…",
  ended: "This stream has ended.",
  failed: "This stream has failed.",
};

export class Tile {
  // report: given an Error that people should read. refresh: asks for news at once.
  constructor(stream, { report, refresh }) {
    this.name = stream.name;
    this.refresh = refresh;
    this.report = report;
    this.element = document.querySelector("#tile").content.cloneNode(true).firstElementChild;
    this.find = (selector) => this.element.querySelector(selector);
    this.element.dataset.name = stream.name;
    this.element.setAttribute("aria-label", stream.name);
    this.canvas = this.find("canvas");
    this.pen = this.canvas.getContext("2d", { alpha: false });
    this.canvas.setAttribute("aria-label", `Picture of ${stream.name}`);
    this.rows = new Map();
    this.find("h2").textContent = this.find("h2").title = stream.name;
    this.editor = new Editor(this.find(".stage"), this.find(".hint"), {
      drawn: (kind, points) => this.add(kind, points),
      moved: (counter, points) => this.change(counter, { points }),
    });
    this.find(".line").addEventListener("click", () => this.editor.begin("line"));
    this.find(".zone").addEventListener("click", () => this.editor.begin("zone"));
    this.find(".large").addEventListener("click", (event) => {
      const large = this.element.classList.toggle("is-large");
      event.target.setAttribute("aria-pressed", String(large));
      this.element.scrollIntoView({ block: "nearest" });
    });
    this.find(".remove").addEventListener("click", () => {
      if (confirm(`Stop watching ${this.name}? Its results so far are kept.`)) this.do(pathOf(this.name), "DELETE");
    });
  }

  // bitmap: the newest annotated picture.
  picture(bitmap) {
    if (this.canvas.width !== bitmap.width || this.canvas.height !== bitmap.height) {
      this.canvas.width = bitmap.width;
      this.canvas.height = bitmap.height;
    }
    this.pen.drawImage(bitmap, 0, 0);
    bitmap.close();
    this.element.dataset.pictures = Number(this.element.dataset.pictures ?? 0) + 1;
  }

  show(stream) {
    const text = (selector, words) => {
      const element = this.find(selector);
      if (element.textContent !== words) element.textContent = words;
    };
    const recent = stream.recent_age_ms;
    const middle = [...recent].sort((a, b) => a - b)[recent.length >> 1];
    text(".state", stream.state);
    this.find(".state").dataset.state = stream.state;
    text(".address", `${stream.address} · ${stream.size.join("×")}`);
    text(".reason", stream.state === "live" ? "" : stream.reason);
    text(".fps", stream.fps.toFixed(1));
    text(".age", middle === undefined ? "–" : `${Math.round(middle)} ms`);
    text(".p95", stream.age_ms.count ? `${Math.round(stream.age_ms.p95)} ms` : "–");
    const dropped = Object.entries(stream.dropped).filter(([, count]) => count);
    text(".dropped", String(dropped.reduce((sum, [, count]) => sum + count, 0)));
    this.find(".dropped").title = dropped.map(([reason, count]) => `${count} ${reason}`).join(", ");
    const objects = Object.entries(stream.state === "live" ? stream.objects : {}).sort(([a], [b]) => a.localeCompare(b));
    text(".objects", objects.map(([label, count]) => `${label} ${count}`).join(" · "));
    drawCurve(this.find(".curve"), recent);
    const away = AWAY[stream.state];
    this.element.classList.toggle("is-away", Boolean(away));
    this.find(".away").hidden = !away || Boolean(this.editor.drawing);
    text(".away", away ?? "");
    this.showCounters(stream.counters);
  }

  showCounters(counters) {
    this.counters = counters;
    this.editor.show(counters);
    this.find(".counters").hidden = counters.length === 0;
    for (const [number, row] of this.rows) {
      if (!counters.some((each) => each.number === number)) {
        row.remove();
        this.rows.delete(number);
      }
    }
    for (const counter of counters) {
      let row = this.rows.get(counter.number);
      if (!row) {
        row = this.newRow(counter.number);
        this.rows.set(counter.number, row);
        this.find("tbody").append(row);
      }
      row.style.setProperty("--shade", shadeOf(counter));
      const name = row.querySelector(".name");
      if (document.activeElement !== name) name.value = counter.name;
      row.querySelector(".in").textContent = counter.in;
      row.querySelector(".out").textContent = counter.out;
      row.querySelector(".now").textContent = counter.inside ?? "";
      row.querySelector(".flip").hidden = counter.kind !== "line";
      row.querySelector(".move").setAttribute("aria-pressed", String(this.editor.moving === counter.number));
      const classes = Object.entries(counter.by_class).map(([label, by]) => `${label}: ${by.in} in, ${by.out} out`);
      row.title = classes.join("\n");
    }
  }

  newRow(number) {
    const row = document.querySelector("#counter").content.cloneNode(true).firstElementChild;
    const counter = () => this.counters.find((each) => each.number === number);
    const name = row.querySelector(".name");
    name.addEventListener("change", () => {
      if (name.value.trim()) this.change(counter(), { name: name.value.trim() });
    });
    name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
    row.querySelector(".flip").addEventListener("click", () => {
      this.change(counter(), { points: [...counter().points].reverse() });
    });
    row.querySelector(".move").addEventListener("click", () => {
      this.editor.move(this.editor.moving === number ? null : number);
      this.showCounters(this.counters);
    });
    row.querySelector(".delete").addEventListener("click", () => {
      this.do(pathOf(this.name, "counters", number), "DELETE");
    });
    return row;
  }

  add(kind, points) {
    const taken = new Set(this.counters.map((each) => each.name));
    let number = 1;
    while (taken.has(`${kind} ${number}`)) number += 1;
    return this.do(pathOf(this.name, "counters"), "POST", { kind, points, name: `${kind} ${number}` });
  }

  change(counter, difference) {
    const { kind, name, points } = { ...counter, ...difference };
    return this.do(pathOf(this.name, "counters", counter.number), "PUT", { kind, name, points });
  }

  async do(path, method, body) {
    try {
      await ask(path, method, body);
    } catch (error) {
      this.report(error);
    }
    await this.refresh();
  }
}
