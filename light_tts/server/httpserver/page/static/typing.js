// Type and listen: each word goes to the server when the blank behind it has been typed, over one WebSocket
// for each sentence or so; audio comes back meanwhile.

import { ApiError, typingSocket } from "./api.js";
import { SampleReader } from "./pcm.js";

export const RATE = 24000; // of the audio of a WebSocket
const PAUSE_MS = 4000; // without a key, after which the rest is said

/** What of `line` can be sent: up to its last blank, or up to its last Chinese character or mark. */
export function settled(line) {
  return line.match(/^.*[\s\p{Script=Han}，。！？；：、]/su)?.[0] ?? "";
}

/** Texts come by `send` and `finish`; what is typed while the audio of the sentence before still comes waits
 * for it. `changed` is called when figures change, `failed` with an ApiError, `words` with words and the second
 * of the player from which their times count. */
export class Typing {
  #socket = null;
  #waiting = ""; // for a socket that is open
  #finished = false; // the socket has had its last text
  #finishWaits = false;
  #pause = null;
  #begun = 0;
  #generation = 0;
  figures = { firstAudio: null, rtf: null };

  constructor(choose, player, changed, failed, words) {
    this.choose = choose; // () => {voice, options}
    this.player = player;
    this.changed = changed;
    this.failed = failed;
    this.words = words;
  }

  get active() {
    return this.#socket !== null;
  }

  send(text) {
    this.#waiting += text;
    if (this.#finishWaits && text.trim()) this.#finishWaits = false;
    clearTimeout(this.#pause);
    this.#pause = setTimeout(() => this.finish(), PAUSE_MS);
    if (this.#waiting.trim() || this.#socket) this.#flush();
  }

  /** Say what has been sent to its end. */
  finish() {
    clearTimeout(this.#pause);
    this.#finishWaits = true;
    this.#flush();
  }

  stop() {
    clearTimeout(this.#pause);
    this.#generation += 1;
    this.#socket?.close();
    this.#socket = null;
    this.#waiting = "";
    this.#finished = this.#finishWaits = false;
    this.player.finish();
  }

  #flush() {
    if (!this.#socket) {
      if (this.#waiting.trim()) this.#open();
      else this.#finishWaits = false;
      return;
    }
    if (this.#finished || this.#socket.readyState !== WebSocket.OPEN) return;
    if (this.#waiting) this.#socket.send(JSON.stringify({ tts_text: this.#waiting }));
    this.#waiting = "";
    if (this.#finishWaits) {
      this.#socket.send(JSON.stringify({ finish: true }));
      this.#finished = true;
      this.#finishWaits = false;
    }
  }

  async #open() {
    const generation = ++this.#generation;
    this.#socket = { readyState: WebSocket.CONNECTING, close() {} }; // until the real one is there
    this.#finished = false;
    this.#begun = performance.now();
    const { voice, options } = this.choose();
    const { socket, opening } = await typingSocket(voice, options);
    if (generation !== this.#generation) return socket.close();
    this.#socket = socket;
    const reader = new SampleReader();
    let first = null;
    let error = null;
    let started = this.player.duration;
    socket.onopen = () => {
      socket.send(opening);
      this.#flush();
    };
    socket.onmessage = ({ data }) => {
      if (generation !== this.#generation) return;
      if (typeof data === "string") {
        const { status, error: message, words } = JSON.parse(data);
        if (words) return this.words(words, started);
        error = new ApiError(status ?? 0, message);
        return;
      }
      if (first === null) {
        first = performance.now();
        this.figures.firstAudio = (first - this.#begun) / 1000;
        this.player.reopen();
        started = this.player.duration;
      }
      this.player.append(reader.read(new Uint8Array(data)));
      this.changed();
    };
    socket.onclose = ({ code }) => {
      if (generation !== this.#generation) return;
      if (first !== null) this.figures.rtf = (performance.now() - this.#begun) / 1000 / (this.player.duration - started);
      this.#socket = null;
      this.player.finish();
      this.changed();
      if (error || code !== 1000) {
        this.stop();
        this.failed(error ?? new ApiError(0, ""));
      } else {
        this.#flush();
      }
    };
  }
}
