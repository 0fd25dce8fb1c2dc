// The words of the page in English and Chinese. Elements name theirs in data-text, data-label (for screen
// readers) and data-placeholder.

const WORDS = {
  en: {
    language: "Language",
    ways: "Ways to speak",
    text: "Text",
    speakText: "Speak a text",
    typeAndListen: "Type and listen",
    textPlaceholder: "Text to speak",
    speak: "Speak",
    stop: "Stop",
    style: "Style",
    speed: "Speed",
    seed: "Seed",
    any: "any",
    progress: "Progress",
    typingHint: "Words are spoken while you type. Enter, or a pause, speaks the rest.",
    typeHere: "Type here",
    finish: "Speak the rest",
    said: "Text sent",
    listen: "Listen",
    position: "Position in the speech",
    play: "Play",
    pause: "Pause",
    download: "Download",
    preparing: "Preparing …",
    format: "File format",
    firstAudio: "First audio",
    realTimeFactor: "Real-time factor",
    audio: "Audio",
    gaps: "Gaps",
    voice: "Voice",
    record: "Record",
    recordStop: "Stop recording",
    upload: "Upload",
    whatIsSaid: "Transcript of the recording",
    whatIsSaidHint: "If empty, only the timbre is used, not the way of speaking.",
    name: "Name",
    keepVoice: "Save this voice",
    yourRecording: "Your recording",
    remove: (name) => `Remove ${name}`,
    removeReally: "Remove?",
    recording: (seconds) => `Recording: ${seconds} of 30 s. Read a sentence or two aloud.`,
    reading: "Reading the recording …",
    kept: (name) => `${name} has been saved.`,
    removed: (name) => `${name} has been removed.`,
    noMicrophone: "Recording is not available here: it requires https or localhost, and your permission. You can upload a file instead.",
    unreadable: "The browser cannot read this file.",
    tooShort: "The recording is too short.",
    cut: "Only the first 30 s were used.",
    server: "Server",
    api: "API",
    metrics: "Metrics",
    ready: "Ready",
    notReady: "Not ready",
    unreachable: "No connection",
    stage_encode: "Text",
    stage_llm: "Language model",
    stage_decode: "Sound",
    busy: (share, queue) => `${share} % busy` + (queue ? `, ${queue} waiting` : ""),
    characters: (count) => `${count} characters`,
    percent: (done, parts, all) => `${done} %` + (all > 1 ? `, part ${parts} of ${all}` : ""),
    at: (now, all) => `${now} of ${all} seconds`,
    noText: "There is no text to speak.",
    noConnection: "The server does not respond.",
    brokenOff: "The server closed the connection before the end.",
    key: "API key",
    useKey: "Use",
    needsKey: "This server requires an API key.",
    s: "s",
  },
  zh: {
    language: "语言",
    ways: "朗读方式",
    text: "文本",
    speakText: "朗读文本",
    typeAndListen: "边打边听",
    textPlaceholder: "想说什么？",
    speak: "朗读",
    stop: "停止",
    style: "风格",
    speed: "语速",
    seed: "随机种子",
    any: "随机",
    progress: "进度",
    typingHint: "一边输入一边朗读。按回车或停顿片刻，读完剩下的字。",
    typeHere: "在这里输入",
    finish: "读完剩下的",
    said: "已发送的文字",
    listen: "收听",
    position: "播放位置",
    play: "播放",
    pause: "暂停",
    download: "下载",
    preparing: "准备中……",
    format: "文件格式",
    firstAudio: "首包时间",
    realTimeFactor: "实时率",
    audio: "音频",
    gaps: "断音",
    voice: "音色",
    record: "录音",
    recordStop: "停止录音",
    upload: "上传",
    whatIsSaid: "录音里说的话",
    whatIsSaidHint: "留空则只取音色，不取说话方式。",
    name: "名称",
    keepVoice: "保存音色",
    yourRecording: "您的录音",
    remove: (name) => `删除 ${name}`,
    removeReally: "确定删除？",
    recording: (seconds) => `正在录音：${seconds} / 30 秒。请朗读一两句话。`,
    reading: "正在读取录音……",
    kept: (name) => `已保存 ${name}。`,
    removed: (name) => `已删除 ${name}。`,
    noMicrophone: "浏览器不允许在此录音：需要 https 或 localhost，并得到您的许可。也可以上传文件。",
    unreadable: "浏览器无法读取此文件。",
    tooShort: "录音太短。",
    cut: "只取了前 30 秒。",
    server: "服务器",
    api: "接口",
    metrics: "指标",
    ready: "就绪",
    notReady: "未就绪",
    unreachable: "无法连接",
    stage_encode: "文本",
    stage_llm: "语言模型",
    stage_decode: "声音",
    busy: (share, queue) => `忙 ${share}%` + (queue ? `，${queue} 个在等` : ""),
    characters: (count) => `${count} 字`,
    percent: (done, parts, all) => `${done}%` + (all > 1 ? `，第 ${parts} 段，共 ${all} 段` : ""),
    at: (now, all) => `${now} 秒，共 ${all} 秒`,
    noText: "没有可朗读的文本。",
    noConnection: "服务器没有应答。",
    brokenOff: "服务器在结束之前中断了。",
    key: "API 密钥",
    useKey: "使用",
    needsKey: "此服务器需要 API 密钥。",
    s: "秒",
  },
};
const STORED = "light-tts-language";

let language = localStorage.getItem(STORED) ?? (navigator.language.startsWith("zh") ? "zh" : "en");
const listeners = [];

/** The words of a name; `values` go into those that are functions. */
export function t(name, ...values) {
  const words = WORDS[language][name];
  return typeof words === "function" ? words(...values) : words;
}

/** `listener` is called now and whenever the language changes. */
export function onLanguage(listener) {
  listeners.push(listener);
  listener();
}

export function setLanguage(name) {
  language = name;
  localStorage.setItem(STORED, name);
  apply();
}

function apply() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]"))
    element.setAttribute("aria-label", t(element.dataset.label));
  for (const element of document.querySelectorAll("[data-placeholder]"))
    element.placeholder = t(element.dataset.placeholder);
  for (const button of document.querySelectorAll("[data-language]"))
    button.setAttribute("aria-pressed", String(button.dataset.language === language));
  for (const listener of listeners) listener();
}

for (const button of document.querySelectorAll("[data-language]"))
  button.addEventListener("click", () => setLanguage(button.dataset.language));
apply();
