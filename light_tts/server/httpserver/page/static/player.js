// Plays samples while they arrive, on the clock of the audio device: pieces follow each other to the sample.

import { SampleStore, toFloat } from "./pcm.js";

const START_SECONDS = 0.06; // between a decision to play and the first sample
const AHEAD_SECONDS = 4; // how far ahead pieces are handed to the device; timers of hidden pages are slow
const PIECE_SECONDS = 1;
const FADE_SECONDS = 0.004; // at both ends of a stretch, against clicks
const FIRST_BUFFER = 0.05; // seconds of audio before the first sound
const REBUFFER = 0.4; // after running dry
const LONGEST_REBUFFER = 15;
const TICK_MS = 50;

/** One run of samples without a gap: it begins with a fade and always ends with one, which is put off as long
 * as more pieces come in time. */
class Stretch {
  #sources = [];

  constructor(context, rate, firstSample) {
    this.context = context;
    this.rate = rate;
    this.firstSample = firstSample;
    this.scheduled = 0; // samples
    this.start = Math.ceil((context.currentTime + START_SECONDS) * rate) / rate;
    this.gain = context.createGain();
    this.gain.gain.setValueAtTime(0, this.start);
    this.gain.gain.linearRampToValueAtTime(1, this.start + FADE_SECONDS);
    this.gain.connect(context.destination);
  }

  get end() {
    return this.start + this.scheduled / this.rate;
  }

  /** Whether another piece can still follow without a gap. */
  get open() {
    return this.scheduled === 0 || this.context.currentTime < this.end - FADE_SECONDS - 0.01;
  }

  add(samples) {
    const buffer = this.context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(toFloat(samples), 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.gain);
    source.onended = () => this.#sources.splice(this.#sources.indexOf(source), 1);
    source.start(this.end);
    this.#sources.push(source);
    const level = this.gain.gain;
    if (this.scheduled) level.cancelScheduledValues(this.end - FADE_SECONDS - 0.001);
    this.scheduled += samples.length;
    level.setValueAtTime(1, Math.max(this.start + FADE_SECONDS, this.end - FADE_SECONDS));
    level.linearRampToValueAtTime(0, this.end);
  }

  /** The sample that is heard now. */
  get heard() {
    const since = this.context.currentTime - (this.context.outputLatency || 0) - this.start;
    return this.firstSample + Math.max(0, Math.min(this.scheduled, Math.floor(since * this.rate)));
  }

  halt() {
    const now = this.context.currentTime;
    const level = this.gain.gain;
    level.cancelScheduledValues(now);
    level.setTargetAtTime(0, now, FADE_SECONDS / 3);
    for (const source of this.#sources) source.stop(now + 2 * FADE_SECONDS);
  }
}

/** Holds all samples of the present speech. Fires "change" when playing starts, stops, waits or ends. */
export class Player extends EventTarget {
  #context = null;
  #stretch = null;
  #cursor = 0; // next sample to hand to the device
  #buffer = FIRST_BUFFER;
  #timer = null;
  #state = "idle";
  store = new SampleStore();
  rate = 24000;
  expected = 0; // seconds that the whole speech may take, 0 where nobody knows
  complete = true; // no more samples will come
  gaps = 0;
  #firstArrival = null; // {time, seconds}

  /** "idle", "playing", "waiting" (for samples) or "paused". */
  get state() {
    return this.#state;
  }

  /** Call it in a click: browsers start sound only then. */
  unlock() {
    if (navigator.audioSession) navigator.audioSession.type = "playback";
    if (this.#context?.sampleRate !== this.rate) {
      this.#context?.close();
      this.#context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
    }
    this.#context.resume();
  }

  /** Forget everything; new samples are about to come and play as soon as they can. */
  begin(rate) {
    this.stop();
    this.rate = rate;
    this.unlock();
    this.store.clear();
    this.complete = false;
    this.expected = 0;
    this.gaps = 0;
    this.#firstArrival = null;
    this.#buffer = FIRST_BUFFER;
    this.#cursor = 0;
    this.#run("waiting");
  }

  append(samples) {
    this.store.append(samples);
    this.#firstArrival ??= { time: performance.now(), seconds: this.duration };
    this.#pump();
  }

  /** All samples have come. */
  finish() {
    this.complete = true;
    this.#pump();
  }

  /** More samples will follow those of a speech that had ended. */
  reopen() {
    this.complete = false;
    if (this.#state === "idle") {
      this.#cursor = this.store.length;
      this.#buffer = FIRST_BUFFER;
      this.#run("waiting");
    }
  }

  get position() {
    return (this.#stretch ? this.#stretch.heard : this.#cursor) / this.rate;
  }

  get duration() {
    return this.store.length / this.rate;
  }

  /** Seconds that have come and have not been heard. */
  get ahead() {
    return this.duration - this.position;
  }

  play() {
    this.unlock();
    if (this.#state === "idle" && this.#cursor >= this.store.length) this.#cursor = 0;
    this.#run("waiting");
  }

  pause() {
    const at = this.#stretch?.heard ?? this.#cursor;
    this.stop();
    this.#cursor = at;
    this.#set("paused");
  }

  seek(seconds) {
    const playing = this.#state === "playing" || this.#state === "waiting";
    this.stop();
    this.#cursor = Math.max(0, Math.min(this.store.length, Math.round(seconds * this.rate)));
    if (playing) this.#run("waiting");
    else this.#set("paused");
  }

  stop() {
    clearInterval(this.#timer);
    this.#stretch?.halt();
    this.#stretch = null;
    this.#set("idle");
  }

  #run(state) {
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#pump(), TICK_MS);
    this.#set(state);
    this.#pump();
  }

  #set(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.dispatchEvent(new Event("change"));
  }

  #pump() {
    if (this.#state !== "playing" && this.#state !== "waiting") return;
    const context = this.#context;
    const rest = () => this.store.length - this.#cursor;
    if (this.#stretch && !this.#stretch.open) {
      if (rest() === 0 && this.complete) {
        if (context.currentTime >= this.#stretch.end) this.#end();
        return;
      }
      if (context.currentTime < this.#stretch.end) return; // the last milliseconds fade out first
      this.gaps += rest() === 0 || !this.complete ? 1 : 0;
      this.#buffer = this.#needed();
      this.#stretch = null;
      this.#set("waiting");
    }
    if (!this.#stretch) {
      if (rest() === 0 && this.complete) return this.#end();
      if (!this.complete && rest() < this.#buffer * this.rate) return;
      this.#stretch = new Stretch(context, this.rate, this.#cursor);
      this.#set("playing");
    }
    while (rest() > 0 && this.#stretch.end - context.currentTime < AHEAD_SECONDS) {
      const next = Math.min(this.store.length, this.#cursor + PIECE_SECONDS * this.rate);
      this.#stretch.add(this.store.all().subarray(this.#cursor, next));
      this.#cursor = next;
    }
  }

  /** Seconds of audio to wait for, so that a server slower than speech does not run dry again: what it makes
   * in a second, r, is too little for the rest by (1 - r) of it. */
  #needed() {
    const { time, seconds } = this.#firstArrival;
    const pace = (this.duration - seconds) / ((performance.now() - time) / 1000);
    const short = (1 - Math.min(1, pace)) * Math.max(0, this.expected - this.duration);
    return Math.max(REBUFFER, Math.min(LONGEST_REBUFFER, short));
  }

  #end() {
    this.stop();
    this.#cursor = this.store.length;
  }
}
