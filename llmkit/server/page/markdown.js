// Markdown -> a tree of plain objects -> nodes. Text becomes text nodes and nothing else, so nothing a model says can become markup.

const DEEPEST = 6; // lists in quotes in lists ...; beyond it, text

// ---- blocks: an array of {kind, source, ...}

export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) { i += 1; continue; }
    const kind = kindAt(lines, i, depth);
    let end = i + 1;
    while (end < lines.length && kind.goesOn(lines, end, i, depth)) end += 1;
    const part = lines.slice(i, end);
    found.push({ ...kind.make(part, depth), source: part.join("\n") });
    i = end;
  }
  return found;
}

const kindAt = (lines, i, depth) => KINDS.find((kind) => (depth < DEEPEST || !kind.nests) && kind.begins(lines, i));
const fenceOf = (line) => /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/.exec(line);
const itemOf = (line) => /^( *)([-*+]|\d{1,9}[.)])(?: +(.*)|)$/.exec(line.replace(/\t/g, "    "));
const isRule = (line) => /^(?:-{3,}|\*{3,}|_{3,})$/.test(line.replace(/\s/g, ""));
const isQuote = (line) => /^ {0,3}>/.test(line);
const indent = (line) => line.length - line.trimStart().length;
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isDivider = (line) => line?.includes("|") && cells(line).every((cell) => /^:?-+:?$/.test(cell));

const KINDS = [
  {
    begins: (lines, i) => fenceOf(lines[i]),
    goesOn: (lines, i, start) => i - 1 === start || !closesFence(lines[start], lines[i - 1]),
    make: (lines) => {
      const closed = lines.length > 1 && closesFence(lines[0], lines.at(-1));
      return { kind: "code", language: fenceOf(lines[0])[2], text: lines.slice(1, closed ? -1 : undefined).join("\n") };
    },
  },
  {
    begins: (lines, i) => /^ {0,3}#{1,6}\s/.test(lines[i]),
    goesOn: () => false,
    make: ([line]) => {
      const [, marks, text] = /^ *(#+)\s+(.*)$/.exec(line) ?? [null, "#", ""];
      return { kind: "heading", level: marks.length, inline: inline(text) };
    },
  },
  { begins: (lines, i) => isRule(lines[i]), goesOn: () => false, make: () => ({ kind: "rule" }) },
  {
    nests: true,
    begins: (lines, i) => isQuote(lines[i]),
    goesOn: (lines, i) => isQuote(lines[i]),
    make: (lines, depth) => ({ kind: "quote", blocks: blocks(lines.map((line) => line.replace(/^ {0,3}> ?/, "")), depth + 1) }),
  },
  {
    begins: (lines, i) => lines[i].includes("|") && isDivider(lines[i + 1]) && cells(lines[i]).length === cells(lines[i + 1]).length,
    goesOn: (lines, i) => lines[i].includes("|"),
    make: ([head, divider, ...rows]) => ({
      kind: "table",
      align: cells(divider).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left")),
      rows: [head, ...rows].map((row) => cells(row).map((cell) => inline(cell))),
    }),
  },
  {
    nests: true,
    begins: (lines, i) => itemOf(lines[i]),
    goesOn: (lines, i, start) => listGoesOn(lines, i, start),
    make: (lines, depth) => list(lines, depth),
  },
  {
    begins: () => true,
    goesOn: (lines, i, start, depth) => lines[i].trim() !== "" && kindAt(lines, i, depth) === KINDS.at(-1),
    make: (lines) => ({ kind: "paragraph", inline: inline(lines.map((line) => line.trim()).join("\n")) }),
  },
];

function closesFence(open, line) {
  const [, marks] = fenceOf(open);
  const text = line.trim();
  return text.length >= marks.length && text === marks[0].repeat(text.length);
}

const sameList = (a, b) => /\d/.test(a[2]) === /\d/.test(b[2]);

function listGoesOn(lines, i, start) {
  const first = itemOf(lines[start]);
  if (!lines[i].trim()) return lines[i + 1] !== undefined && lines[i + 1].trim() !== "" && listGoesOn(lines, i + 1, start);
  const item = itemOf(lines[i]);
  if (item && item[1].length <= first[1].length + 1) return sameList(item, first);
  if (indent(lines[i]) > first[1].length) return true;
  return !item && lines[i - 1].trim() !== "" && !fenceOf(lines[i]) && !isQuote(lines[i]) && !/^#/.test(lines[i]);
}

function list(lines, depth) {
  const first = itemOf(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = itemOf(line);
    if (item && item[1].length <= first[1].length + 1) items.push({ width: line.length - (item[3] ?? "").length, lines: [item[3] ?? ""] });
    else items.at(-1).lines.push(line.slice(Math.min(indent(line), items.at(-1).width)));
  }
  const start = /\d/.test(first[2]) ? Number.parseInt(first[2], 10) : null;
  return { kind: "list", start, items: items.map((item) => blocks(item.lines, depth + 1)) };
}

// ---- inline: an array of texts and {kind, ...}

const SPECIAL = /[\\`*_~[!\n]|https?:\/\//g;
const URL_END = /[^\s<>"'`，。；：！？、）】」]*/y;
const LINK = /!?\[([^[\]\n]*)\]\(\s*([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"[^"\n]*")?\s*\)/y;
const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

export function inline(text, depth = 0) {
  const parts = [];
  let from = 0;
  const add = (start, part, end) => {
    if (start > from) parts.push(text.slice(from, start));
    parts.push(part);
    from = end;
    SPECIAL.lastIndex = end;
  };
  SPECIAL.lastIndex = 0;
  for (let match; (match = SPECIAL.exec(text)); ) {
    const next = SPECIAL.lastIndex;
    const found = special(text, match.index, depth);
    if (found) add(match.index, ...found);
    else SPECIAL.lastIndex = next; // looking inside has moved it
  }
  if (from < text.length) parts.push(text.slice(from));
  return parts;
}

// What begins at text[i], and where it ends; undefined when it is only text.
function special(text, i, depth) {
  const char = text[i];
  if (char === "\n") return [{ kind: "break" }, i + 1];
  if (char === "\\") return /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? [text[i + 1], i + 2] : undefined;
  if (char === "`") return code(text, i);
  if (char === "[" || char === "!") return link(text, i, depth);
  if (char === "h") return bareLink(text, i);
  return depth < DEEPEST ? pair(text, i, depth) : undefined;
}

function code(text, i) {
  let ticks = i;
  while (text[ticks] === "`") ticks += 1;
  const mark = text.slice(i, ticks);
  const end = text.indexOf(mark, ticks);
  if (end < 0 || text[end + mark.length] === "`") return [mark, ticks]; // all of them are text, and none is looked at again
  return [{ kind: "code", text: text.slice(ticks, end).replace(/^ (.*) $/s, "$1") }, end + mark.length];
}

function link(text, i, depth) {
  LINK.lastIndex = i;
  const match = LINK.exec(text);
  if (!match || depth >= DEEPEST) return undefined;
  const end = i + match[0].length;
  return safe(match[2]) ? [{ kind: "link", url: match[2], inline: inline(match[1] || match[2], DEEPEST) }, end] : [match[1], end];
}

// A link may lead to the web or to a mail program, and nowhere else: not to javascript:, not to data:, not into this server.
export const safe = (url) => /^(?:https?:\/\/|mailto:)/i.test(url);

function bareLink(text, i) {
  URL_END.lastIndex = i;
  let url = URL_END.exec(text)[0].replace(/[.,;:!?*_~]+$/, "");
  if (url.endsWith(")") && !url.includes("(")) url = url.slice(0, -1);
  return url.length > 8 ? [{ kind: "link", url, inline: [url] }, i + url.length] : undefined;
}

function pair(text, i, depth) {
  const [mark, kind] = PAIRS.find(([m]) => text.startsWith(m, i)) ?? [];
  if (!mark || /\s|^$/.test(text[i + mark.length] ?? "")) return undefined;
  if (mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[i - 1] ?? "")) return undefined;
  let end = text.indexOf(mark, i + mark.length + 1);
  while (end >= 0 && !closes(text, end, mark)) end = text.indexOf(mark, end + 1);
  return end < 0 ? undefined : [{ kind, inline: inline(text.slice(i + mark.length, end), depth + 1) }, end + mark.length];
}

function closes(text, end, mark) {
  if (/\s/.test(text[end - 1])) return false;
  if (mark.length === 2 && text[end + 2] === mark[0]) return false; // ***both***: the inner one ends first
  if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) return false;
  return mark[0] !== "_" || !/[\p{L}\p{N}]/u.test(text[end + mark.length] ?? "");
}

// ---- nodes

const make = (name, children = [], attributes = {}) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

const toInline = (part) => {
  if (typeof part === "string") return document.createTextNode(part);
  if (part.kind === "break") return make("br");
  if (part.kind === "code") return make("code", [part.text]);
  const children = part.inline.map(toInline);
  if (part.kind !== "link") return make(part.kind, children);
  return make("a", children, { href: part.url, target: "_blank", rel: "noopener noreferrer nofollow" });
};

const row = (parts, align, name) => make("tr", parts.map((part, i) => make(name, part.map(toInline), { class: align[i] ?? "left" })));

const NODES = {
  code: (block) => make("pre", [make("code", [block.text])], { tabindex: "0", "data-language": block.language }),
  heading: (block) => make(`h${Math.min(6, block.level + 2)}`, block.inline.map(toInline)),
  rule: () => make("hr"),
  quote: (block) => make("blockquote", block.blocks.map(toNode)),
  table: ({ rows: [head, ...body], align }) => make("div", [make("table", [
    make("thead", [row(head, align, "th")]), make("tbody", body.map((parts) => row(parts, align, "td")))])],
    { class: "table", tabindex: "0" }),
  list: (block) => make(block.start === null ? "ul" : "ol", block.items.map((item) => make("li", item.map(toItem))),
    block.start === null || block.start === 1 ? {} : { start: String(block.start) }),
  paragraph: (block) => make("p", block.inline.map(toInline)),
};

const toNode = (block) => NODES[block.kind](block);
const toItem = (block) => (block.kind === "paragraph" ? make("span", block.inline.map(toInline)) : toNode(block));

// Show `text` in `element`. Blocks that are as they were keep their nodes: a selection and a reader's place in them last.
export function show(element, text) {
  const tree = parse(text);
  tree.forEach((block, i) => {
    const old = element.children[i];
    if (old?.source === block.source) return;
    const node = toNode(block);
    node.source = block.source;
    if (old) old.replaceWith(node);
    else element.append(node);
  });
  while (element.children.length > tree.length) element.lastElementChild.remove();
}
