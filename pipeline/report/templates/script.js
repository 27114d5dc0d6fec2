"use strict";
// The rollout browser and the search over curves. Text of people and models is set as text, never as HTML.
const index = JSON.parse(document.getElementById("index").textContent);
const at = (id) => document.getElementById(id);

function make(tag, classes, text) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}
const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

// --- curves ---------------------------------------------------------------------------------------------------------
for (const box of document.querySelectorAll(".rest > input")) {
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const card of box.parentElement.querySelectorAll(".card"))
      card.hidden = !words.every((word) => card.dataset.name.toLowerCase().includes(word));
  });
}

// --- videos: loaded when they come into view, and played together ---------------------------------------------------
const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting && !target.src) target.src = address(target.dataset.clip);
    if (isIntersecting) target.play().catch(() => {});
    else target.pause();
  }
});
function address(name) {
  return index.single ? "data:video/mp4;base64," + at("clip-" + name).textContent : "clips/" + name + ".mp4";
}
function screen(name, why) {
  if (!name) return make("div", "none", why);
  const video = make("video");
  Object.assign(video, { muted: true, loop: true, playsInline: true, preload: "none" });
  video.dataset.clip = name;
  video.addEventListener("loadedmetadata", () => {
    video.classList.toggle("small", video.videoWidth <= 128);
    video.classList.toggle("wide", video.videoWidth > 1.2 * video.videoHeight);
  });
  video.addEventListener("click", () => { video.controls = !video.controls; });
  seen.observe(video);
  return video;
}

// --- rollouts -------------------------------------------------------------------------------------------------------
const stageBox = at("stage"), slider = at("slider");
const views = {};
function view(stage, step) {
  const id = `step-${stage}-${step}`;
  return (views[id] ??= JSON.parse(at(id).textContent));
}

function bar(name, value, low, high, colour) {
  const row = make("div", "bar"), track = make("span", "track"), fill = make("span", "fill");
  const span = high - low || 1, zero = (Math.min(Math.max(0, low), high) - low) / span, end = (value - low) / span;
  fill.style.left = `${100 * Math.min(zero, end)}%`;
  fill.style.width = `${100 * Math.abs(end - zero)}%`;
  fill.style.background = colour;
  track.append(fill);
  const label = make("span", "", name);
  label.title = name;
  row.append(label, track, make("span", "", number(value)));
  return row;
}

function facts(member) {
  const box = make("details");
  box.append(make("summary", "", "more"));
  const lines = [];
  if (member.text) lines.push(member.text, "");
  for (const [title, values] of [["diagnostics", member.diagnostics], ["seconds", member.seconds], ["seeds", member.seeds]])
    for (const [name, value] of Object.entries(values))
      lines.push(`${title} ${name}: ${typeof value === "number" ? number(value) : value}`);
  if (member.tokens !== null) lines.push(`tokens: ${member.tokens} (${member.finish_reason})`);
  lines.push(`weights version: ${member.weights_version ?? "–"}, clip by version: ${member.clip_version ?? "–"}`);
  lines.push(`components disagree by: ${number(member.apart, 2)}`);
  box.append(make("pre", "", lines.join("\n")));
  return box;
}

function memberCard(member, ranges) {
  const card = make("div", member.lost ? "member lost" : "member");
  card.append(screen(member.clip, member.clip_version === null ? "no clip" : "clip not kept"));
  card.append(make("p", "caption", member.caption ?? ""));
  if (member.lost) card.append(make("p", "bad", `lost: ${member.lost}`));
  if (member.reward !== null) {
    const sum = make("div", "sum");
    sum.append(make("b", "", `#${member.index}  reward ${number(member.reward)}`));
    sum.append(make("span", member.advantage > 0 ? "up" : member.advantage < 0 ? "down" : "soft",
      (member.advantage > 0 ? "+" : "") + number(member.advantage, 2)));
    sum.lastChild.title = "advantage";
    card.append(sum);
  } else card.append(make("div", "sum", `#${member.index}`));
  Object.keys(ranges).forEach((name, i) => {
    if (name in member.scores)
      card.append(bar(name, member.scores[name], ...ranges[name], index.colours[i % index.colours.length]));
  });
  card.append(facts(member));
  return card;
}

const descending = (key) => (a, b) => (b[key] ?? -Infinity) - (a[key] ?? -Infinity);
const ascending = (key) => (a, b) => (a[key] ?? Infinity) - (b[key] ?? Infinity);
const orders = { number: ascending("number"), best: descending("best"), worst: ascending("worst"), spread: descending("spread"),
  apart: descending("apart"), seconds: descending("seconds"), lost: descending("lost") };
const memberOrders = { index: ascending("index"), best: descending("reward"), worst: ascending("reward"), apart: descending("apart") };
const filters = { all: () => true, gradient: (g) => g.spread > 0, flat: (g) => g.spread === 0, lost: (g) => g.lost > 0 };

function groupCard(group, ranges) {
  const card = make("article", "group"), ask = make("div", "ask"), words = make("div", "words");
  card.dataset.group = group.number;
  for (const [name, clip] of [["input", group.input], ["truth", group.target]]) {
    const box = make("div", "screen");
    box.append(screen(clip, "not kept"), make("span", "soft", name));
    ask.append(box);
  }
  words.append(make("b", "", group.question), make("p", "", `truth: ${group.truth}`));
  words.append(make("p", "soft", `${group.id} · ${group.kind} · spread ${number(group.spread)} · components disagree by ${number(group.apart, 2)}` +
    (group.lost ? ` · ${group.lost} lost` : "") + (group.seconds ? ` · ${number(group.seconds, 1)} s` : "")));
  if (group.text) {
    const box = make("details");
    box.append(make("summary", "", "what the thinker wrote"), make("pre", "", group.text));
    words.append(box);
  }
  ask.append(words);
  const team = make("div", "team");
  for (const member of [...group.members].sort(memberOrders[at("members").value])) team.append(memberCard(member, ranges));
  card.append(ask, team);
  return card;
}

const kinds = { text: "the thinker writes", render: "the artist draws", score: "the scorer judges" };
function colour(kind) {
  return index.colours[Object.keys(kinds).indexOf(kind) % index.colours.length];
}
// Slowest group first. A bar is a request from its sending to its answer, waiting in the queue included.
function showPaths(timeline) {
  const whole = Math.max(...timeline.map((path) => path.end));
  at("timeline").hidden = !(whole > 0);
  at("paths").replaceChildren(...[...timeline].sort(descending("end")).map((path) => {
    const row = make("div", "path"), name = make("button", "", `group ${path.group}`), lanes = make("div", "lanes");
    name.type = "button";
    name.addEventListener("click", () => document.querySelector(`.group[data-group="${path.group}"]`)?.scrollIntoView());
    for (const [kind, began, ended, member] of path.spans) {
      const span = make("span", "span");
      span.style.left = `${100 * began / whole}%`;
      span.style.width = `${100 * (ended - began) / whole}%`;
      span.style.top = `${7 * Object.keys(kinds).indexOf(kind)}px`;
      span.style.background = colour(kind);
      span.title = `${kinds[kind] ?? kind}, #${member}: ${number(began, 2)} to ${number(ended, 2)} s`;
      lanes.append(span);
    }
    row.append(name, lanes, make("span", "soft", `${number(path.end, 2)} s`));
    return row;
  }));
}

function show() {
  const steps = index.numbers[stageBox.value], step = steps[slider.value];
  const data = view(stageBox.value, step), words = at("words").value.toLowerCase();
  at("shown").textContent = step;
  const ranges = {};
  for (const name of Object.keys(data.weights)) {
    const values = data.groups.flatMap((g) => g.members.map((m) => m.scores[name]).filter((v) => v !== undefined));
    ranges[name] = [Math.min(0, ...values), Math.max(0, ...values)];
  }
  const has = (group) => !words || JSON.stringify([group.question, group.truth, group.id, group.members.map((m) => [m.caption, m.lost])])
    .toLowerCase().includes(words);
  const chosen = data.groups.filter(filters[at("filter").value]).filter(has).sort(orders[at("order").value]);
  const weighed = Object.entries(data.weights).map(([name, weight]) => `${weight} × ${name}`).join(" + ");
  at("summary").textContent = `${chosen.length} of ${data.groups.length} groups · reward = ${weighed}`;
  showPaths(data.timeline);
  seen.disconnect();
  at("groups").replaceChildren(...chosen.map((group) => groupCard(group, ranges)));
}

function choose(stage, position) {
  stageBox.value = stage;
  slider.max = index.numbers[stage].length - 1;
  slider.value = position;
  show();
}

function follow() { // #stage1-12, from a curve's point or somebody's link
  const [, stage, step] = /^#(\w+)-(\d+)$/.exec(location.hash) ?? [];
  const position = (index.numbers[stage] ?? []).indexOf(Number(step));
  if (position < 0) return;
  choose(stage, position);
  at("rollouts").scrollIntoView();
}

function turn(by) {
  slider.value = Number(slider.value) + by;
  slider.dispatchEvent(new Event("input"));
}

if (stageBox) {
  for (const [kind, words] of Object.entries(kinds)) {
    const entry = make("span", "", words);
    entry.style.color = colour(kind);
    at("kinds").append(entry);
  }
  slider.addEventListener("input", () => {
    history.replaceState(null, "", `#${stageBox.value}-${index.numbers[stageBox.value][slider.value]}`);
    show();
  });
  stageBox.addEventListener("change", () => choose(stageBox.value, index.numbers[stageBox.value].length - 1));
  at("before").addEventListener("click", () => turn(-1));
  at("after").addEventListener("click", () => turn(1));
  for (const id of ["order", "filter", "members", "words"]) at(id).addEventListener("input", show);
  window.addEventListener("hashchange", follow);
  choose(stageBox.value, index.numbers[stageBox.value].length - 1);
  follow();
}
