// What the page asks of the server.

const KEY = "light-tts-key";

/** An answer that is not what was asked for; `status` is that of HTTP, 0 without an answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

async function ask(path, options = {}) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "");
  }
  if (!answer.ok) throw new ApiError(answer.status, await reason(answer));
  return answer;
}

async function reason(answer) {
  const text = await answer.text();
  try {
    const body = JSON.parse(text);
    return body.message ?? body.error?.message ?? text;
  } catch {
    return text || `HTTP ${answer.status}`;
  }
}

export async function voices() {
  return (await ask("spk_list")).json();
}

export async function styles() {
  return (await (await ask("query_tts_model")).json()).tts_models;
}

export async function addVoice(name, recording, text) {
  const form = new FormData();
  form.set("spk_id", name);
  form.set("prompt_text", text);
  form.set("prompt_wav", recording, "voice.wav");
  await ask("add_spk", { method: "POST", body: form });
}

export async function removeVoice(name) {
  await ask(`spk/${encodeURIComponent(name)}`, { method: "DELETE" });
}

/** The stages' states; also where the server is not ready. */
export async function readiness() {
  return (await fetch("readiness")).json();
}

export async function metrics() {
  return (await ask("metrics")).text();
}

/** Speech in one of the formats of /v1/audio/speech. `voice`: {spk_id} or {recording, text}. */
async function spoken(text, voice, { seed, speed, style }, format, signal) {
  const body = { input: text, seed, speed, response_format: format };
  if (style) body.model = style;
  if (voice.recording) {
    body.ref_audio = await base64(voice.recording);
    body.ref_text = voice.text;
  } else {
    body.voice = voice.spk_id;
  }
  const headers = { "Content-Type": "application/json" };
  return ask("v1/audio/speech", { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** PCM as it is made. @returns {{rate: number, pieces: ReadableStreamDefaultReader}} */
export async function speech(text, voice, options, signal) {
  const answer = await spoken(text, voice, options, "pcm", signal);
  return { rate: Number(answer.headers.get("X-Sample-Rate")), pieces: answer.body.getReader() };
}

/** @returns {Blob} the whole of it */
export async function speechFile(text, voice, options, format) {
  return (await spoken(text, voice, options, format)).blob();
}

const models = { data: null };

/** Whether the server can say when each word is spoken. */
async function tellsWords(style) {
  try {
    models.data ??= (await (await ask("v1/models")).json()).data;
  } catch {
    return false; // the WebSocket will say what is wrong
  }
  return (models.data.find(({ id }) => id === style) ?? models.data[0]).word_timestamps;
}

/** A WebSocket that takes text and gives audio; its first message has been prepared as `opening`. */
export async function typingSocket(voice, { seed, style }) {
  const opening = { seed, word_timestamps: await tellsWords(style) };
  if (style) opening.tts_model_name = style;
  if (voice.recording) {
    opening.prompt_text = voice.text;
    opening.prompt_wav = await base64(voice.recording);
  } else {
    opening.spk_id = voice.spk_id;
  }
  const url = new URL("inference_bistream", document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const key = apiKey.get(); // which a browser can send with a WebSocket as a protocol only
  const socket = new WebSocket(url, key ? ["light-tts", `openai-insecure-api-key.${key}`] : []);
  socket.binaryType = "arraybuffer";
  return { socket, opening: JSON.stringify(opening) };
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
