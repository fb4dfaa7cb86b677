// Lines and zones over a picture: drawn by mouse, finger or keys, moved by their corners.

const SHADES = ["#ffd43b", "#4dabf7", "#ff8787", "#69db7c", "#da77f2", "#ffa94d", "#3bc9db", "#f783ac"];
const NEAR = 14; // CSS pixels: a click so close to the first corner closes a zone
const DRAG = 12; // and a pointer moved so far draws its line in one go
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export const shadeOf = (counter) => SHADES[(counter.number - 1) % SHADES.length];
const SNAP = 0.015; // of the picture: so near to its edge is meant to be the edge
const clamp = (share) => Math.min(1, Math.max(0, share));
const snapped = (share) => (share < SNAP ? 0 : share > 1 - SNAP ? 1 : share);
const rounded = (point) => point.map((share) => Number(clamp(share).toFixed(4)));

export class Editor {
  // stage: the element over which is drawn. hint: the one that says how. drawn: given kind and points of a new
  // one. moved: given a counter and its new points.
  constructor(stage, hint, { drawn, moved }) {
    this.stage = stage;
    this.hint = hint;
    this.overlay = stage.querySelector(".overlay");
    this.handles = stage.querySelector(".handles");
    this.report = { drawn, moved };
    this.counters = [];
    this.drawing = null; // { kind, points, at, byKey }
    this.moving = null; // number of the counter whose corners can be moved
    this.moved = null; // { number, points } while one is being moved, until the run says so too
    this.hint.querySelector(".cancel").addEventListener("click", () => this.stop());
    this.hint.querySelector(".done").addEventListener("click", () => this.finish());
    stage.addEventListener("pointerdown", (event) => this.press(event));
    stage.addEventListener("pointermove", (event) => this.follow(event));
    stage.addEventListener("pointerup", (event) => this.release(event));
    stage.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(stage);
  }

  show(counters) {
    this.counters = counters;
    if (this.moving !== null && !counters.some((each) => each.number === this.moving)) this.moving = null;
    this.paint();
  }

  begin(kind) {
    this.moving = null;
    this.drawing = { kind, points: [], at: [0.5, 0.5], byKey: false };
    this.stage.classList.add("is-drawing");
    this.stage.tabIndex = 0;
    this.stage.setAttribute("role", "application");
    this.stage.setAttribute("aria-label", `Draw a ${kind}: arrow keys move the cross, Enter sets a point, Escape ends`);
    this.stage.focus({ preventScroll: true });
    this.paint();
  }

  stop() {
    this.drawing = null;
    this.stage.classList.remove("is-drawing");
    for (const name of ["tabindex", "role", "aria-label"]) this.stage.removeAttribute(name);
    this.paint();
  }

  // Show the corners of this counter, to be moved; null for none.
  move(number) {
    if (this.drawing) this.stop();
    this.moving = number;
    this.moved = null;
    this.paint();
  }

  finish() {
    const { kind, points } = this.drawing;
    if (points.length < (kind === "line" ? 2 : 3)) return;
    this.stop();
    this.report.drawn(kind, points.map(rounded));
  }

  set(point) {
    const { kind, points } = this.drawing;
    if (kind === "zone" && points.length >= 3 && this.pixels(point, points[0]) < NEAR) return this.finish();
    if (points.length && this.pixels(point, points.at(-1)) < 3) return undefined; // a double click
    points.push(point);
    if (points.length === (kind === "line" ? 2 : 32)) return this.finish();
    return this.paint();
  }

  press(event) {
    if (!this.drawing || event.button) return;
    event.preventDefault();
    this.drawing.byKey = false;
    this.stage.setPointerCapture(event.pointerId);
    this.set(this.place(event));
  }

  follow(event) {
    if (!this.drawing) return;
    this.drawing.at = this.place(event);
    this.drawing.byKey = false;
    this.paint();
  }

  release(event) {
    if (this.drawing?.kind !== "line" || this.drawing.points.length !== 1) return;
    const at = this.place(event);
    if (this.pixels(at, this.drawing.points[0]) > DRAG) this.set(at);
  }

  key(event) {
    if (!this.drawing || event.target !== this.stage) return;
    const arrow = ARROWS[event.key];
    if (arrow) {
      const step = event.shiftKey ? 0.05 : 0.01;
      this.drawing.at = this.drawing.at.map((share, k) => clamp(share + arrow[k] * step));
      this.drawing.byKey = true;
      this.paint();
    } else if (event.key === "Enter" || event.key === " ") {
      this.drawing.byKey = true;
      this.set([...this.drawing.at]);
    } else if (event.key === "Backspace") {
      this.drawing.points.pop();
      this.paint();
    } else if (event.key === "Escape") {
      this.stop();
    } else {
      return;
    }
    event.preventDefault();
  }

  place(event) {
    const box = this.stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map(snapped);
  }

  pixels(a, b) {
    return Math.hypot((a[0] - b[0]) * this.stage.clientWidth, (a[1] - b[1]) * this.stage.clientHeight);
  }

  paint() {
    const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
    if (!width) return;
    this.overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const scaled = (points) => points.map(([x, y]) => [x * width, y * height]);
    const parts = this.counters.flatMap((each) => shapeParts(each.kind, scaled(this.pointsOf(each)), shadeOf(each)));
    if (this.drawing) {
      const { kind, points, at, byKey } = this.drawing;
      const line = scaled([...points, at]);
      parts.push(...stroke(`M${line.join("L")}`, "#fff", "6 5"));
      for (const [x, y] of scaled(points)) parts.push(...stroke(`M${x - 4},${y}a4,4 0 1 0 8,0a4,4 0 1 0 -8,0`, "#fff"));
      const [x, y] = line.at(-1);
      if (byKey || !points.length) parts.push(...stroke(`M${x - 12},${y}H${x + 12}M${x},${y - 12}V${y + 12}`, "#fff"));
      this.hint.hidden = false;
      this.hint.querySelector(".done").hidden = kind !== "zone" || points.length < 3;
      this.hint.querySelector("span").textContent =
        kind === "line"
          ? "Drag along the line, or set its two ends."
          : points.length < 3
            ? "Set the corners of the zone, one after another."
            : "Set more corners, or the first again to close it.";
    } else {
      this.hint.hidden = true;
    }
    this.overlay.replaceChildren(...parts);
    this.paintHandles();
  }

  pointsOf(counter) {
    return this.moved?.number === counter.number ? this.moved.points : counter.points;
  }

  // Chips with the counts, and the corners that can be moved. Elements stay, or they would lose the focus.
  paintHandles() {
    const wanted = this.counters.flatMap((counter) => {
      const points = this.pointsOf(counter);
      const middle = [0, 1].map((k) => points.reduce((sum, point) => sum + point[k], 0) / points.length);
      const chip = { key: `chip ${counter.number}`, at: middle, counter };
      if (counter.number !== this.moving) return [chip];
      return [chip, ...points.map((at, index) => ({ key: `corner ${counter.number} ${index}`, at, counter, index }))];
    });
    const keys = new Set(wanted.map(({ key }) => key));
    const there = new Map([...this.handles.children].map((element) => [element.dataset.key, element]));
    for (const [key, element] of there) if (!keys.has(key)) element.remove();
    for (const { key, at, counter, index } of wanted) {
      const element = there.get(key) ?? this.handles.appendChild(this.newHandle(key, counter.number, index));
      element.style.left = `${100 * at[0]}%`;
      element.style.top = `${100 * at[1]}%`;
      element.style.setProperty("--shade", shadeOf(counter));
      if (index === undefined) {
        const now = counter.kind === "zone" ? ` · ${counter.inside} now` : "";
        element.textContent = `${counter.name} · ${counter.in} in · ${counter.out} out${now}`;
      } else {
        element.setAttribute("aria-label", `Point ${index + 1} of ${counter.name}: arrow keys move it`);
      }
    }
  }

  newHandle(key, number, index) {
    const element = document.createElement(index === undefined ? "span" : "button");
    element.dataset.key = key;
    if (index === undefined) {
      element.className = "chip";
      element.setAttribute("aria-hidden", "true");
      return element;
    }
    element.type = "button";
    const to = (point) => {
      const counter = this.counters.find((each) => each.number === number);
      const points = this.pointsOf(counter).map((old) => [...old]);
      points[index] = point;
      this.moved = { number, points };
      this.paint();
    };
    const settle = async () => {
      if (this.moved?.number !== number) return;
      const counter = this.counters.find((each) => each.number === number);
      const { points } = this.moved;
      await this.report.moved(counter, points.map(rounded));
      if (this.moved?.points === points) this.moved = null;
    };
    element.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      element.focus({ preventScroll: true });
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", (event) => {
      if (element.hasPointerCapture(event.pointerId)) to(this.place(event));
    });
    element.addEventListener("pointerup", settle);
    let pause = 0;
    element.addEventListener("keydown", (event) => {
      const arrow = ARROWS[event.key];
      if (event.key === "Escape") this.move(null);
      if (!arrow) return;
      event.preventDefault();
      const counter = this.counters.find((each) => each.number === number);
      const step = event.shiftKey ? 0.05 : 0.01;
      to(this.pointsOf(counter)[index].map((share, k) => clamp(share + arrow[k] * step)));
      clearTimeout(pause);
      pause = setTimeout(settle, 600);
    });
    return element;
  }
}

function stroke(d, colour, dashes = "", fill = "none") {
  return [["#000a", 5], [colour, 2.5]].map(([paint, width]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", d);
    path.setAttribute("stroke", paint);
    path.setAttribute("stroke-width", width);
    if (dashes) path.setAttribute("stroke-dasharray", dashes);
    path.setAttribute("fill", paint === colour ? fill : "none");
    return path;
  });
}

function shapeParts(kind, points, shade) {
  if (kind === "zone") {
    const parts = stroke(`M${points.join("L")}Z`, shade);
    parts[0].style.fill = `${shade}26`;
    return parts;
  }
  // The arrow points where "in" is: to the right hand of one who walks from the first point to the second.
  const [[ax, ay], [bx, by]] = points;
  const length = Math.hypot(bx - ax, by - ay) || 1;
  const [ux, uy] = [(bx - ax) / length, (by - ay) / length];
  const place = Math.min(0.25 * length, length / 2);
  const [x, y] = [ax + ux * place, ay + uy * place];
  const tip = [x - uy * 22, y + ux * 22];
  const wing = (side) => [tip[0] + uy * 8 + side * ux * 7, tip[1] - ux * 8 + side * uy * 7];
  const arrow = `M${x},${y}L${tip}M${wing(-1)}L${tip}L${wing(1)}`;
  return [...stroke(`M${points.join("L")}`, shade), ...stroke(arrow, shade)];
}
