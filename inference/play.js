const examples = {
  "The night ferry": "The night ferry between the two islands will stop running at the end of March, after forty-one years. The company says that fewer than thirty people take it on a usual night, and that its engines would have to be replaced by next summer to meet the new limits on smoke, at a cost of about two million. The islands' council offered to pay a third of that. It was told that even a full subsidy would not bring back the passengers, most of whom have changed to the morning flight since the airfield was lengthened. Fishermen, who use the ferry to send their catch to the market before dawn, have asked for a smaller boat to be chartered until autumn. The council will vote on that next week, and its chairwoman said she expects it to pass.",
  "Bees and street trees": "Over two summers, researchers counted the wild bees that visited 120 street trees in a mid-sized city. Lime and maple trees drew the most visits, yet the greatest number of species was found on small, late-flowering trees that stand in narrow strips of unmown grass. When the strips were mown every second week, the number of species on the same trees fell by about a third within a month, although the blossoms had not changed. The authors think that the grass matters because many wild bees nest in bare or sparsely covered ground within a short flight of their food. They advise cities to plant fewer kinds of large trees and to leave the ground beneath the small ones alone from May to August. The study did not look at honeybees, which are kept in hives and fly much farther.",
  "A release that failed": "On Tuesday at 9:40 the new version of the booking service was released to all customers. Eleven minutes later the number of failed payments rose from almost none to one in six. The engineer on duty first suspected the payment provider, since its status page showed a disturbance, and waited for it to end. At 10:25 a colleague noticed that only bookings with a voucher failed: the new version rounded the discount twice, so that the amount sent to the provider differed by a cent from the amount in the order. The release was taken back at 10:38 and the failures stopped at once. About 900 bookings were lost, of which 640 were made again by the customers themselves. The tests had covered vouchers, but only with discounts that come out even."
};
const served = JSON.parse(document.querySelector("#served").textContent);
const [form, text, size, problem, progress, answers] = ["form", "text", "size", "problem", "progress", "answers"].map(id => document.getElementById(id));
const [runButton, stopButton, readButton, fileInput, address, zone] = ["run", "stop", "read", "file", "address", "zone"].map(id => document.getElementById(id));
let stopping;

function make(name, options = {}, ...children) {
  const element = Object.assign(document.createElement(name), options);
  element.append(...children);
  return element;
}
const countWords = string => (string.match(/[\p{L}\p{N}_]+/gu) ?? []).length;
const many = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
function showSize(note = "") {
  const words = countWords(text.value);
  size.textContent = note || (words ? many(words, "word") : "");
}

const choices = [];
function showTasks() {
  const found = served.tasks.filter(task => task.systems.length);
  const adapted = task => task.systems.some(system => system.adapter);
  const picked = found.some(adapted) ? adapted : one => one === found[0];
  for (const task of found) {
    const chosen = make("input", { type: "checkbox", checked: picked(task) });
    const legend = make("legend", {}, make("label", {}, chosen, make("span", {}, task.name)));
    const list = make("div", { className: "choices" });
    const fieldset = make("fieldset", { className: "panel", disabled: !chosen.checked }, legend, list);
    chosen.onchange = () => { fieldset.disabled = !chosen.checked; };
    for (const system of task.systems) {
      const box = make("input", { type: "checkbox", checked: true });
      list.append(make("label", {}, box, make("span", {}, system.title, " ", make("span", { className: "quiet" }, system.about))));
      choices.push({ box, chosen, system });
    }
    document.querySelector("#tasks").append(fieldset);
  }
  if (!found.length) {
    problem.textContent = `No endpoint at ${served.url}. Start one with “just serve RUN”, then load this page again.`;
    runButton.disabled = true;
  }
}

// The words of a failed reply: this server's, the endpoint's, or only its status.
async function explain(response) {
  const body = await response.text();
  let said;
  try {
    const found = JSON.parse(body);
    said = found.error?.message ?? found.message ?? found.detail;
  } catch { /* not JSON */ }
  const fallback = response.status === 400 ? "it cannot be read" : `the server answers ${response.status} ${response.statusText}`;
  return typeof said === "string" && said ? said : fallback;
}
const gone = "this page's server does not answer; start “just play” again";
async function ask(path, options) {
  const response = await fetch(path, { method: "POST", ...options }).catch(error => { throw error.name === "AbortError" ? error : new Error(gone); });
  if (!response.ok) throw new Error(await explain(response));
  return response;
}

async function read(name, body, type) {
  problem.textContent = "";
  showSize(`Reading ${name} …`);
  readButton.disabled = fileInput.disabled = true;
  try {
    if (body.size > 20e6) throw new Error("it is over 20 MB");
    const response = await ask("/read", { body, headers: { "Content-Type": type } });
    const found = await response.json();
    text.value = found.text;
    problem.textContent = found.notes.map(note => `${name}: ${note}`).join("\n");
    showSize(`${many(countWords(text.value), "word")} read from ${name}`);
  } catch (error) {
    problem.textContent = error.message.startsWith("cannot read") ? error.message : `${name}: ${error.message}`;
    showSize();
  }
  readButton.disabled = fileInput.disabled = false;
}
const readFile = file => file && read(file.name, file, "application/octet-stream");
function readAddress() {
  const given = address.value.trim();
  if (given) read(given, JSON.stringify({ address: given }), "application/json");
  else address.focus();
}

// The events of a streamed answer; throws where it ends before its end.
async function* stream(system, content, signal) {
  const messages = system.messages.map(one => ({ ...one, content: one.content.split("\0").join(content) }));
  const asked = { model: system.id, messages, max_tokens: system.longest, temperature: 0, stream: true, stream_options: { include_usage: true } };
  const response = await ask("/v1/chat/completions", { body: JSON.stringify(asked), signal, headers: { "Content-Type": "application/json" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", done, value; !done;) {
    ({ done, value } = await reader.read().catch(error => { throw error.name === "AbortError" ? error : new Error(gone); }));
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(one => one.startsWith("data:"))) {
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message ?? "the endpoint failed");
      yield found;
    }
  }
  throw new Error("the answer broke off; the endpoint may say why");
}

// What an answer waited and what it took itself, in seconds, and its tokens a second. An endpoint that times
// its answers, as just serve and llama.cpp do (`timings`), knows best: reading and writing are the answer's own,
// the rest was waiting. Of others the page sees when the first piece came and when the last.
function timesOf({ asked, first, last, timings, tokens }) {
  const total = (last - asked) / 1000;
  const timed = Number.isFinite(timings?.prompt_ms) && Number.isFinite(timings?.predicted_ms);
  const own = timed ? (timings.prompt_ms + timings.predicted_ms) / 1000 : (last - first) / 1000;
  const counted = timed ? timings.predicted_n : tokens - 1; // the first one came before the seconds that are seen
  return { waited: Math.max(0, total - own), own, rate: own > 0 && counted > 0 ? counted / own : null };
}
function showTimes(clock) {
  if (!clock.first) return [];
  const { waited, own, rate } = timesOf(clock);
  const parts = [`waited ${waited.toFixed(1)} s`, `answered in ${own.toFixed(1)} s`];
  return rate ? [...parts, `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`] : parts;
}

// Shows a system's answer as it comes; what it was, for a choice among several.
async function answer(system, content, card, signal) {
  const [shown, figures, failure] = ["answer", "figures", "failure"].map(name => card.querySelector(`.${name}`));
  const clock = { asked: performance.now() }, result = { system, card, text: "", finish: null, whole: false };
  let end = "", lastShown = 0;
  const show = () => {
    lastShown = performance.now();
    const copied = markCopied(shown, result.text, content);
    const parts = [many(countWords(result.text), "word"), `${Math.round(100 * copied)} % copied`, ...showTimes(clock), end];
    figures.textContent = parts.filter(part => part).join(" · ");
  };
  try {
    for await (const event of stream(system, content, signal)) {
      const { delta, finish_reason } = event.choices?.[0] ?? {};
      if (delta?.content) {
        clock.last = performance.now();
        clock.first ??= clock.last;
        result.text += delta.content;
      }
      clock.timings = event.timings ?? clock.timings;
      clock.tokens = event.usage?.completion_tokens ?? clock.tokens;
      result.finish = finish_reason ?? result.finish;
      if (performance.now() - lastShown > 150) show();
    }
    if (result.finish === "length") end = `cut off at ${system.longest} tokens`;
    result.whole = true;
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else failure.textContent = error.message;
  }
  if (result.text || !failure.textContent) show();
  card.ariaBusy = "false";
  if (shown.scrollHeight > shown.clientHeight) shown.tabIndex = 0;
  return result;
}

// A button at each answer of a task, where they differ; the server keeps which one was clicked.
function offerChoice(task, content, results, note) {
  const whole = results.filter(result => result.whole && result.text.trim());
  if (new Set(whole.map(result => result.text.trim())).size < 2) return;
  const buttons = whole.map(chosen => {
    const button = make("button", { type: "button", className: "better", ariaPressed: "false", ariaLabel: `${chosen.system.title} is better` }, "Better");
    button.onclick = async () => {
      for (const one of buttons) one.disabled = true;
      if (await choose(task, content, chosen, whole.filter(one => one !== chosen), note))
        for (const one of buttons) one.ariaPressed = String(one === button);
      for (const one of buttons) one.disabled = false;
      button.focus();
    };
    chosen.card.append(button);
    return button;
  });
  note.textContent = "Which one is better? A click is kept, and can make a preference pair.";
}
async function choose(task, content, chosen, others, note) {
  const said = ({ system: { id, fingerprint, template }, text, finish }) => ({ text, model: id, fingerprint, template, finish_reason: finish });
  const body = JSON.stringify({ task, text: content, chosen: said(chosen), others: others.map(said) });
  try {
    const response = await ask("/choices", { body, headers: { "Content-Type": "application/json" } });
    const kept = await response.json();
    note.textContent = `Kept in ${kept.path}: ${chosen.system.title} is better (${many(kept.pairs, "pair")}). Another click changes it.`;
    return true;
  } catch (error) {
    note.textContent = error.message;
    return false;
  }
}

async function runAll() {
  const asked = choices.filter(({ box, chosen }) => box.checked && chosen.checked).map(({ system }) => system);
  problem.textContent = "";
  if (!text.value.trim() || !asked.length) {
    problem.textContent = asked.length ? "There is no text yet: paste one, or click an example." : "Pick a task and a system.";
    return;
  }
  const content = text.value, groups = Object.groupBy(asked, system => system.task), waiting = [];
  let done = 0;
  const tell = () => { progress.textContent = `${done} of ${many(asked.length, "answer")} done`; };
  stopping = new AbortController();
  answers.replaceChildren();
  for (const [task, systems] of Object.entries(groups)) {
    const cards = make("div", { className: "cards" }), note = make("p", { className: "note quiet", role: "status" }), results = [];
    answers.append(make("h2", {}, task), cards, note);
    for (const system of systems) {
      const head = make("header", {}, make("h3", {}, system.title), make("p", { className: "quiet" }, system.about));
      const parts = [make("p", { className: "answer" }), make("p", { className: "failure", role: "alert" }), make("p", { className: "figures quiet" }, "waiting")];
      const card = make("article", { className: system.adapter ? "panel adapter" : "panel", ariaBusy: "true" }, head, ...parts);
      cards.append(card);
      const result = answer(system, content, card, stopping.signal);
      results.push(result);
      waiting.push(result.then(() => { done++; tell(); }));
    }
    waiting.push(Promise.all(results).then(all => offerChoice(task, content, all, note)));
  }
  answers.append(make("p", { className: "quiet", style: "margin-top: 1rem" }, make("mark", {}, "Marked"), " runs of four words or more stand in the text too; the share is that of the answer’s words in them."));
  [runButton.disabled, stopButton.disabled] = [true, false];
  tell();
  await Promise.all(waiting);
  [runButton.disabled, stopButton.disabled] = [false, true];
}

for (const [name, content] of Object.entries(examples)) {
  const put = () => { text.value = content; problem.textContent = ""; showSize(); };
  document.querySelector(".examples").append(make("button", { type: "button", onclick: put }, name));
}
form.onsubmit = event => { event.preventDefault(); if (!runButton.disabled) runAll(); };
stopButton.onclick = () => stopping.abort();
readButton.onclick = readAddress;
address.onkeydown = event => { if (event.key === "Enter") { event.preventDefault(); readAddress(); } };
fileInput.onchange = () => { readFile(fileInput.files[0]); fileInput.value = ""; };
text.oninput = () => showSize();
text.onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit(); };
addEventListener("dragover", event => { event.preventDefault(); zone.classList.add("dropping"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) zone.classList.remove("dropping"); });
addEventListener("drop", event => {
  event.preventDefault();
  zone.classList.remove("dropping");
  const [file] = event.dataTransfer.files, dropped = event.dataTransfer.getData("text");
  if (file) readFile(file);
  else if (dropped) { text.value = dropped; showSize(); }
});
showTasks();
showSize();
