"use strict";
// Draws what the slider and the switches ask for over the picture.
const data = JSON.parse(document.getElementById("data").textContent);
const picture = document.getElementById("picture");
const canvas = document.getElementById("overlay");
const slider = document.getElementById("layer");
const said = document.getElementById("said");
const form = document.getElementById("controls");
// The colours of matplotlib's cividis, dark to bright.
const colours = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
                 [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

function colour(share) {
  const place = share * (colours.length - 1);
  const low = Math.min(Math.floor(place), colours.length - 2);
  const mix = colours[low].map((from, i) => Math.round(from + (colours[low + 1][i] - from) * (place - low)));
  return `rgb(${mix.join(", ")})`;
}

function percent(value) {
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
}

function draw() {
  const layer = Number(slider.value);
  const name = form.elements.run ? form.elements.run.value : Object.keys(data.runs)[0];
  const run = data.runs[name];
  const attention = form.elements.show.value === "attention";
  canvas.width = picture.naturalWidth || 1;
  canvas.height = picture.naturalHeight || 1;
  const pen = canvas.getContext("2d");
  // Where anyres tiles lie over the whole picture, the stronger of the two is seen.
  const order = data.boxes.map((_, i) => i).sort((a, b) => run.attention[layer][a] - run.attention[layer][b]);
  for (const i of order) {
    const [left, top, right, bottom] = data.boxes[i];
    const x = Math.round(Math.max(0, left) * canvas.width), y = Math.round(Math.max(0, top) * canvas.height);
    const w = Math.round(Math.min(1, right) * canvas.width) - x, h = Math.round(Math.min(1, bottom) * canvas.height) - y;
    const there = run.there[layer][i] === "1";
    if (attention) {
      pen.globalAlpha = 0.72;
      pen.fillStyle = colour(run.attention[layer][i] / 255);
      pen.fillRect(x, y, w, h);
    } else if (there) {
      pen.globalAlpha = 1;
      pen.strokeStyle = "#d55e00";
      pen.lineWidth = Math.max(1, canvas.width / 250);
      pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
    } else {
      pen.globalAlpha = 0.8;
      pen.fillStyle = "#ffffff";
      pen.fillRect(x, y, w, h);
    }
  }
  document.getElementById("scale").hidden = !attention;
  document.getElementById("top").textContent = percent(run.max[layer]);
  const words = attention
    ? `Layer ${layer}, ${name}: the last row of the prompt gives ${percent(run.image[layer])} of its attention ` +
      `to the picture, at most ${percent(run.max[layer])} to one patch.`
    : `Layer ${layer}, ${name}: ${run.count[layer]} of ${data.total} patches are there.`;
  said.textContent = words;
  slider.setAttribute("aria-valuetext", `layer ${layer}`);
  canvas.setAttribute("aria-label", words);
}

form.hidden = false;
form.addEventListener("input", draw);
form.addEventListener("submit", (event) => event.preventDefault());
if (picture.complete) draw(); else picture.addEventListener("load", draw);
