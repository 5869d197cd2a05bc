// One request and its answer as it comes: plain fetch, server-sent events, no library.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const address = (path) => new URL(path, document.baseURI);
const headers = (key) => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    const { error } = JSON.parse(text);
    message = error?.message ?? text;
  } catch (problem) {
    if (!(problem instanceof SyntaxError)) throw problem; // a proxy's page is no JSON: it is shown as it is
  }
  throw new Refused(response.status, message.slice(0, 500) || `HTTP ${response.status}`);
}

export async function models(key) {
  const response = await checked(await fetch(address("v1/models"), { headers: headers(key) }));
  return (await response.json()).data.map((model) => model.id);
}

// The pieces of an answer: {text} or {thought} or {finish} or {usage}. `signal` ends the request, here and on the server.
export async function* answer(body, key, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", headers: { ...headers(key), Accept: "text/event-stream" }, body: JSON.stringify(asked), signal };
  const response = await checked(await fetch(address("v1/chat/completions"), options));
  for await (const event of events(response.body)) {
    if (event.error) throw new Refused(event.error.code ?? 500, event.error.message);
    if (event.usage) yield { usage: event.usage };
    const [choice] = event.choices ?? [];
    const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
    if (thought) yield { thought };
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
  }
}

export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}
