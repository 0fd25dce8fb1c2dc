// Speaks one text: its parts one request after the other, into the player as they come.

import { speech } from "./api.js";
import { SampleReader } from "./pcm.js";
import { guessSeconds, parts } from "./text.js";

const ENOUGH_AHEAD = 45; // seconds of audio not yet heard, at which the next part can wait
const WAIT_MS = 250;

/** `figures`: {firstAudio, rtf} in seconds and as a ratio, null where not known yet; `progress`: 0 to 1. */
export class Speaking {
  #controller = new AbortController();
  figures = { firstAudio: null, rtf: null };
  progress = 0;
  part = 0;
  count;

  constructor(text, voice, options, player, changed) {
    this.text = text;
    this.voice = voice;
    this.options = options;
    this.parts = parts(text);
    this.count = this.parts.length;
    this.player = player;
    this.changed = changed;
  }

  stop() {
    this.#controller.abort();
  }

  get stopped() {
    return this.#controller.signal.aborted;
  }

  /** Ends when all has come or it was stopped. Throws ApiError. */
  async run() {
    const all = this.parts.reduce((sum, part) => sum + part.length, 0);
    this.player.expected = guessSeconds(this.text);
    let said = 0;
    let working = 0; // ms of waiting for audio
    try {
      for (const part of this.parts) {
        this.part += 1;
        const begun = performance.now();
        await this.#speak(part, begun, (seconds) => {
          const share = Math.min(0.98, seconds / guessSeconds(part));
          this.progress = (said + share * part.length) / all;
        });
        working += performance.now() - begun;
        said += part.length;
        this.progress = said / all;
        this.figures.rtf = working / 1000 / this.player.duration;
        this.changed();
        while (!this.stopped && this.player.ahead > ENOUGH_AHEAD && this.part < this.count)
          await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
        if (this.stopped) break;
      }
      if (!this.stopped) this.progress = 1;
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      this.player.finish();
      this.changed();
    }
  }

  async #speak(part, begun, advanced) {
    const { rate, pieces } = await speech(part, this.voice, this.options, this.#controller.signal);
    if (this.part === 1 && rate !== this.player.rate) this.player.begin(rate);
    const reader = new SampleReader();
    let samples = 0;
    for (;;) {
      const { done, value } = await pieces.read();
      if (done) return;
      this.figures.firstAudio ??= (performance.now() - begun) / 1000;
      const piece = reader.read(value);
      samples += piece.length;
      this.player.append(piece);
      advanced(samples / rate);
      this.changed();
    }
  }
}
