"use strict";
// Draws what the slider and the switches of each question ask for over its pictures.
const json = document.getElementById("data").textContent;
const data = JSON.parse(json);

function percent(value) {
  return `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
}

function bytes(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
}

// What one run's recorded row says of a layer; null where it was not recorded or did not get there.
function lookUp(run, row, layer) {
  const found = run.attention.find((each) => each.row === row);
  return found && found.image[layer] !== null
    ? { image: found.image[layer], top: found.top[layer], steps: bytes(found.steps[layer]) } : null;
}

function fillRows(select, question) {
  const groups = [["prompt", false], ["answer", true]];
  for (const [name, isAnswer] of groups) {
    const labels = new Map();
    for (const run of Object.values(question.runs)) {
      for (const { row, label } of run.attention.filter((each) => each.is_answer === isAnswer)) {
        labels.set(row, [...new Set([...(labels.get(row) || []), label])]);
      }
    }
    const group = document.createElement("optgroup");
    group.label = name;
    for (const row of [...labels.keys()].sort((a, b) => a - b)) {
      const isLast = row === question.num_rows - 1;
      const option = new Option(`${row}: ${labels.get(row).join(" / ")}${isLast ? " (the last: gives the answer’s first token)" : ""}`, row);
      option.defaultSelected = option.selected = isLast;
      group.append(option);
    }
    if (labels.size) select.append(group);
  }
}

function setUp(part) {
  const question = data.questions[Number(part.dataset.number)];
  const form = part.querySelector(".controls");
  const slider = part.querySelector(".layer");
  const views = [...part.querySelectorAll(".view")];
  const pruned = Object.values(question.runs).at(-1);
  fillRows(form.elements.row, question);
  // The first layer that runs with the kept patches alone.
  slider.value = Math.min(data.num_layers - 1, pruned.select_layer === null ? 0 : pruned.select_layer + 1);

  function draw() {
    const layer = Number(slider.value), show = form.elements.show.value, row = Number(form.elements.row.value);
    part.querySelector(".at").textContent = `${layer} of 0 to ${data.num_layers - 1}`;
    slider.setAttribute("aria-valuetext", `layer ${layer}`);
    form.elements.row.disabled = show !== "attention";
    for (const view of views) {
      const name = view.dataset.run;
      const words = paint(view, question, question.runs[name], layer, show, row);
      view.querySelector("figcaption").textContent = words;
      view.querySelector("canvas").setAttribute("aria-label", `${name}: ${words}`);
    }
  }

  form.hidden = false;
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const view of views) view.querySelector("img").addEventListener("load", draw);
  draw();
}

// Returns what can be seen, in words.
function paint(view, question, run, layer, show, row) {
  const picture = view.querySelector("img"), canvas = view.querySelector("canvas");
  // Small pictures are drawn on at a larger scale, so that frames do not hide them.
  const scale = Math.max(1, 768 / Math.max(picture.naturalWidth, picture.naturalHeight, 1));
  canvas.width = Math.round(picture.naturalWidth * scale) || 1;
  canvas.height = Math.round(picture.naturalHeight * scale) || 1;
  const pen = canvas.getContext("2d");
  const { boxes, is_tile: isTile, total } = question.patches;
  const count = run.num_there[layer];
  const there = run.there[layer];
  const attention = show === "attention" ? lookUp(run, row, layer) : null;
  boxes.forEach(([left, top, right, bottom], i) => {
    const x = Math.round(Math.max(0, left) * canvas.width), y = Math.round(Math.max(0, top) * canvas.height);
    const w = Math.round(Math.min(1, right) * canvas.width) - x, h = Math.round(Math.min(1, bottom) * canvas.height) - y;
    if (attention) {
      pen.globalAlpha = 0.85 * attention.steps[i] / 255;
      pen.fillStyle = "#d55e00";
      pen.fillRect(x, y, w, h);
    } else if (show === "kept" && there[i] === "1" && count < total) {
      pen.lineWidth = 5;
      pen.strokeStyle = "#ffffff";
      pen.strokeRect(x + 2.5, y + 2.5, w - 5, h - 5);
      pen.lineWidth = 3;
      pen.strokeStyle = isTile[i] ? "#0072b2" : "#d55e00";
      pen.strokeRect(x + 2.5, y + 2.5, w - 5, h - 5);
    }
  });
  if (show !== "attention") {
    return count === total ? `All ${total} visual tokens are there.` : `${count} of ${total} visual tokens are there.`;
  }
  return attention
    ? `Row ${row} gives ${percent(attention.image)} of its attention to the picture, at most ${percent(attention.top)} to one patch.`
    : `Row ${row} is not in layer ${layer} of this run.`;
}

for (const part of document.querySelectorAll(".question")) {
  if (part.tagName !== "DETAILS" || part.open) setUp(part);
  else part.addEventListener("toggle", () => setUp(part), { once: true });
}

function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
openTarget();

const save = document.getElementById("save");
save.href = URL.createObjectURL(new Blob([json], { type: "application/json" }));
save.hidden = false;
