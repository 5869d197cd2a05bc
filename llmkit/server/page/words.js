// Every word of the page, in English and Chinese; the browser's language chooses.

const WORDS = {
  en: {
    model: "Model", newChat: "New chat", theme: "Light or dark", settings: "Settings", conversation: "Conversation",
    message: "Message", send: "Send", stop: "Stop", keys: "Enter sends, Shift+Enter begins a new line, Esc stops",
    system: "System prompt", temperature: "Temperature", topP: "Top p", maxTokens: "Longest answer in tokens", seed: "Seed",
    apiKey: "API key", defaults: "An empty field leaves the choice to the model.", you: "You", thinking: "Thinking",
    copy: "Copy", copied: "Copied", again: "Try again", stopped: "stopped", cut: "cut off at the longest answer",
    tokens: "tokens", first: "first after", needsKey: "This server wants an API key: it is asked for in the settings.",
    unreachable: "The server does not answer.", empty: "Ask something.",
  },
  zh: {
    model: "模型", newChat: "新对话", theme: "浅色或深色", settings: "设置", conversation: "对话",
    message: "消息", send: "发送", stop: "停止", keys: "Enter 发送，Shift+Enter 换行，Esc 停止",
    system: "系统提示", temperature: "温度", topP: "Top p", maxTokens: "回答最多词元数", seed: "随机种子",
    apiKey: "API 密钥", defaults: "留空则由模型决定。", you: "你", thinking: "思考过程",
    copy: "复制", copied: "已复制", again: "重新回答", stopped: "已停止", cut: "达到最大长度，已截断",
    tokens: "词元", first: "首词元", needsKey: "此服务器需要 API 密钥，请在设置中填写。",
    unreachable: "服务器没有响应。", empty: "问点什么吧。",
  },
};

export const language = (navigator.language || "en").toLowerCase().startsWith("zh") ? "zh" : "en";
export const words = WORDS[language];

// Fill in the page: data-word is the text, data-title the name of what has no text, data-hint the text of an empty field.
export function fillIn(document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-word]")) node.textContent = words[node.dataset.word];
  for (const node of document.querySelectorAll("[data-title]")) {
    node.title = words[node.dataset.title];
    node.setAttribute("aria-label", node.title);
  }
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = words[node.dataset.hint];
}
