// The conversation: what was said, what is being said, and the settings it is said with.

import { answer, models, Refused } from "./answer.js";
import { show } from "./markdown.js";
import { fillIn, words } from "./words.js";

const by = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"]; // kept in the browser; the key only until it is closed
const history = []; // {role, content, node}, as the API wants it but for the node
let running = null; // the AbortController of the answer that is coming
let recalled = ""; // the last message, for the arrow key

fillIn(document);
restore();
loadModels();
by("log").dataset.empty = words.empty;

// ---- settings

function restore() {
  for (const name of [...SETTINGS, "theme"]) {
    const value = localStorage.getItem(`llmkit.${name}`) ?? "";
    if (name === "theme") useTheme(value);
    else by(name).value = value;
  }
  by("key").value = sessionStorage.getItem("llmkit.key") ?? "";
}

for (const name of SETTINGS) by(name).addEventListener("change", () => localStorage.setItem(`llmkit.${name}`, by(name).value));
by("key").addEventListener("change", () => {
  sessionStorage.setItem("llmkit.key", by("key").value);
  loadModels();
});

const number = (name) => (by(name).value === "" || !by(name).validity.valid ? {} : { [name]: Number(by(name).value) });

function request() {
  const system = by("system").value.trim() ? [{ role: "system", content: by("system").value }] : [];
  const messages = [...system, ...history.map(({ role, content }) => ({ role, content }))];
  return Object.assign({ model: by("model").value, messages }, ...SETTINGS.slice(1).map(number));
}

async function loadModels() {
  try {
    const names = await models(by("key").value);
    const chosen = by("model").value;
    by("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    document.querySelectorAll(".start-trouble").forEach((node) => node.remove());
  } catch (error) {
    trouble(error, "start-trouble");
  }
}

function openSettings(open) {
  by("settings").hidden = !open;
  by("open-settings").setAttribute("aria-expanded", String(open));
}

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  by("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

by("open-settings").addEventListener("click", () => openSettings(by("settings").hidden));
by("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  useTheme(now === "dark" ? "light" : "dark");
  localStorage.setItem("llmkit.theme", document.documentElement.dataset.theme);
});

// ---- the log

function element(name, className, ...children) {
  const node = document.createElement(name);
  node.className = className;
  node.append(...children);
  return node;
}

function bubble(role, content) {
  const text = element("div", "text");
  const node = element("article", role, element("h2", "who", role === "user" ? words.you : by("model").value), text);
  by("log").append(node);
  if (role === "user") text.textContent = content;
  return node;
}

function trouble(error, kind = "") {
  const known = error instanceof Refused;
  const node = element("p", `trouble ${kind}`, error.status === 401 ? words.needsKey : known ? error.message : words.unreachable);
  node.setAttribute("role", "alert");
  by("log").append(node);
  if (error.status === 401) {
    openSettings(true);
    by("key").focus();
  }
  return node;
}

function nearEnd() {
  const log = by("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function button(word, act) {
  const node = element("button", "small", word);
  node.type = "button";
  node.addEventListener("click", () => act(node));
  return node;
}

async function copy(text, node) {
  await navigator.clipboard.writeText(text);
  node.textContent = words.copied;
  setTimeout(() => (node.textContent = words.copy), 1500);
}

// ---- an answer

// What has come of one answer, drawn once a frame at most, however fast it comes.
class Coming {
  constructor(node) {
    Object.assign(this, { node, text: "", thought: "", finish: null, usage: null, begin: performance.now(), first: null, frame: 0 });
  }

  take(piece) {
    this.first ??= performance.now();
    this.text += piece.text ?? "";
    this.thought += piece.thought ?? "";
    this.finish = piece.finish ?? this.finish;
    this.usage = piece.usage ?? this.usage;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const follow = nearEnd();
    if (this.thought) this.drawThought();
    show(this.node.querySelector(".text"), this.text);
    if (follow) by("log").scrollTop = by("log").scrollHeight;
  }

  drawThought() {
    let box = this.node.querySelector(".thought");
    if (!box) {
      box = element("details", "thought", element("summary", "", words.thinking), element("div", ""));
      this.node.querySelector(".who").after(box);
    }
    box.lastElementChild.textContent = this.thought;
  }

  facts(stopped) {
    const seconds = (performance.now() - this.first) / 1000;
    const count = this.usage?.completion_tokens;
    const speed = count > 1 && seconds > 0 ? ` · ${((count - 1) / seconds).toFixed(1)} ${words.tokens}/s` : "";
    const facts = count ? `${count} ${words.tokens}${speed} · ${words.first} ${Math.round(this.first - this.begin)} ms` : "";
    const end = stopped ? words.stopped : this.finish === "length" ? words.cut : "";
    return [facts, end].filter(Boolean).join(" · ");
  }
}

async function reply() {
  const coming = new Coming(bubble("assistant", ""));
  const { node } = coming;
  let problem = null;
  running = new AbortController();
  busy(true);
  try {
    for await (const piece of answer(request(), by("key").value, running.signal)) coming.take(piece);
  } catch (error) {
    problem = error.name === "AbortError" ? null : error;
  }
  const stopped = running.signal.aborted;
  running = null;
  coming.draw();
  if (coming.text || coming.thought) history.push({ role: "assistant", content: coming.text, node });
  else node.remove();
  document.querySelectorAll(".again").forEach((older) => older.remove()); // only the last answer can be had again
  const actions = [button(words.copy, (copyButton) => copy(coming.text, copyButton)), button(words.again, again)];
  actions[1].classList.add("again");
  node.append(element("footer", "facts", element("span", "", coming.facts(stopped)), ...actions));
  busy(false);
  if (problem) trouble(problem);
}

function busy(now) {
  by("log").setAttribute("aria-busy", String(now)); // a screen reader gets the whole answer, not every token
  by("send").hidden = now;
  by("stop").hidden = !now;
  by("input").focus();
}

function again() {
  if (running || !history.length) return;
  document.querySelectorAll(".trouble").forEach((node) => node.remove());
  if (history.at(-1).role === "assistant") history.pop().node.remove();
  reply();
}

function send() {
  const content = by("input").value.trim();
  if (!content || running) return;
  document.querySelectorAll(".trouble").forEach((node) => node.remove());
  recalled = content;
  by("input").value = "";
  fit();
  if (history.at(-1)?.role === "user") history.pop().node.remove(); // it got no answer, and templates want turns to alternate
  history.push({ role: "user", content, node: bubble("user", content) });
  by("log").scrollTop = by("log").scrollHeight;
  reply();
}

// ---- keys and buttons

function fit() {
  const input = by("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight / 3)}px`;
}

by("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
by("stop").addEventListener("click", () => running?.abort());
by("new").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  by("log").replaceChildren();
  by("input").focus();
});
by("input").addEventListener("input", fit);
by("input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { // Enter also ends a word of an input method
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && by("input").value === "" && recalled) {
    event.preventDefault();
    by("input").value = recalled;
    fit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) running?.abort();
});
