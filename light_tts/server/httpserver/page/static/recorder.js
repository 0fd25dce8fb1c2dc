// A recording of the microphone, or a file of any kind that the browser can decode, as a WAV file.

import { toInt16, wav } from "./pcm.js";

export const LONGEST = 30; // seconds
export const SHORTEST = 0.5;
const RATE = 24000;

export class Recorder {
  #recorder = null;
  #stream = null;

  get running() {
    return this.#recorder !== null;
  }

  /** Ends after `stop` or 30 s. @returns {Promise<Blob>} what was recorded. Throws without a microphone. */
  async record(ticked) {
    this.#stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: true },
    });
    const recorder = new MediaRecorder(this.#stream);
    this.#recorder = recorder;
    const pieces = [];
    const begun = performance.now();
    const timer = setInterval(() => {
      const seconds = (performance.now() - begun) / 1000;
      ticked(Math.floor(seconds));
      if (seconds >= LONGEST) this.stop();
    }, 200);
    try {
      await new Promise((resolve, reject) => {
        recorder.ondataavailable = ({ data }) => pieces.push(data);
        recorder.onstop = resolve;
        recorder.onerror = ({ error }) => reject(error);
        recorder.start();
      });
    } finally {
      clearInterval(timer);
      for (const track of this.#stream.getTracks()) track.stop();
      this.#recorder = null;
    }
    return new Blob(pieces, { type: recorder.mimeType });
  }

  stop() {
    if (this.#recorder?.state === "recording") this.#recorder.stop();
  }
}

/** @returns {{recording: Blob, seconds: number, cut: boolean}} mono WAV, at most 30 s. Throws where the browser
 * cannot decode it. */
export async function asWav(blob) {
  const decoder = new OfflineAudioContext(1, 1, RATE);
  const decoded = await decoder.decodeAudioData(await blob.arrayBuffer());
  const length = Math.min(decoded.length, LONGEST * RATE);
  const mixed = new Float32Array(length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
    const samples = decoded.getChannelData(channel);
    for (let i = 0; i < length; i++) mixed[i] += samples[i] / decoded.numberOfChannels;
  }
  return { recording: wav(toInt16(mixed), RATE), seconds: length / RATE, cut: decoded.length > length };
}
