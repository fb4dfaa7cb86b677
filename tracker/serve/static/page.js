// The page: a tile for each stream, news of all once a second, pictures of those in view.

import { ask } from "./api.js";
import { Tile } from "./tile.js";
import { Video } from "./video.js";

const NEWS_MS = 1000;
const find = (selector) => document.querySelector(selector);
const tiles = new Map();
const inView = new Set();
const video = new Video((name, bitmap) => tiles.get(name)?.picture(bitmap));
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      inView[isIntersecting ? "add" : "delete"](target.dataset.name);
    }
    watch();
  },
  { rootMargin: "80px" },
);

function watch() {
  const wanted = document.hidden ? [] : [...inView].filter((name) => tiles.has(name));
  video.watch(wanted);
}

function report(error) {
  const notice = find("#notice");
  notice.textContent = error.message;
  notice.hidden = false;
  clearTimeout(report.timer);
  report.timer = setTimeout(() => (notice.hidden = true), 8000);
}

function show({ engine, tracker, streams }) {
  find("#engine").textContent = `${engine}, ${tracker}`;
  for (const [name, tile] of tiles) {
    if (!streams.some((stream) => stream.name === name)) {
      observer.unobserve(tile.element);
      tile.element.remove();
      tiles.delete(name);
      inView.delete(name);
    }
  }
  for (const stream of streams) {
    if (!tiles.has(stream.name)) {
      const tile = new Tile(stream, { report, refresh: news });
      tiles.set(stream.name, tile);
      find("#tiles").append(tile.element);
      observer.observe(tile.element);
    }
    tiles.get(stream.name).show(stream);
  }
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const live = streams.filter((stream) => stream.state === "live");
  find("#total-streams").textContent = live.length === streams.length ? live.length : `${live.length} of ${streams.length}`;
  find("#total-objects").textContent = sum(live.flatMap((stream) => Object.values(stream.objects)));
  find("#total-fps").textContent = sum(streams.map((stream) => stream.fps)).toFixed(1);
  find("#empty").hidden = streams.length > 0;
  watch();
}

async function news() {
  let answer;
  try {
    answer = await ask("/streams");
    find("#offline").hidden = true;
  } catch {
    find("#offline").hidden = false;
    return;
  }
  show(answer);
}

async function newsForEver() {
  for (;;) {
    if (!document.hidden) await news();
    await new Promise((resolve) => setTimeout(resolve, NEWS_MS));
  }
}

find("#add").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  find("#add-error").textContent = "";
  try {
    await ask("/streams", "POST", { address: form.elements.address.value.trim(), name: form.elements.name.value.trim() });
  } catch (error) {
    find("#add-error").textContent = error.message;
    return;
  }
  form.reset();
  find("#adding").open = false;
  find("#adding summary").focus();
  await news();
});
find("#adding").addEventListener("toggle", () => find("#adding").open && find("#add").elements.address.focus());
find("#adding").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  find("#adding").open = false;
  find("#adding summary").focus();
});
document.addEventListener("visibilitychange", () => {
  watch();
  if (!document.hidden) news();
});
newsForEver();
