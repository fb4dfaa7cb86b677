// The ages of the last frames as a line: how far it is from the ground tells how late they were.

export function drawCurve(svg, ages) {
  const path = svg.querySelector("path");
  if (ages.length < 2) {
    path.setAttribute("d", "");
    svg.setAttribute("aria-label", "no frames yet");
    return;
  }
  const top = Math.max(20, ...ages); // ms: a flat line of a fast run stays low
  const step = 120 / (ages.length - 1);
  const points = ages.map((age, k) => `${(k * step).toFixed(1)},${(26 - (24 * age) / top).toFixed(1)}`);
  path.setAttribute("d", `M${points.join("L")}`);
  svg.setAttribute("aria-label", `age of the last ${ages.length} frames, ${Math.round(top)} ms at most`);
}
