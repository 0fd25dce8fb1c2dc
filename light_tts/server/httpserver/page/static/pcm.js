// 16-bit mono PCM: gathered from bytes that come in any cut, and written as WAV.

/** Turns byte pieces into whole samples; a sample cut in two is kept until its other half comes. */
export class SampleReader {
  #half = null;

  /** @param {Uint8Array} bytes @returns {Int16Array} */
  read(bytes) {
    const before = this.#half === null ? 0 : 1;
    const whole = (before + bytes.length) & ~1;
    const joined = new Uint8Array(whole);
    if (whole && before) joined[0] = this.#half;
    joined.set(bytes.subarray(0, whole - (whole ? before : 0)), whole ? before : 0);
    if ((before + bytes.length) % 2) this.#half = bytes.length ? bytes[bytes.length - 1] : this.#half;
    else this.#half = null;
    return new Int16Array(joined.buffer);
  }
}

/** Samples that grow at their end. */
export class SampleStore {
  #buffer = new Int16Array(1 << 16);
  length = 0;

  append(samples) {
    const needed = this.length + samples.length;
    if (needed > this.#buffer.length) {
      const larger = new Int16Array(Math.max(needed, this.#buffer.length * 2));
      larger.set(this.all());
      this.#buffer = larger;
    }
    this.#buffer.set(samples, this.length);
    this.length = needed;
  }

  all() {
    return this.#buffer.subarray(0, this.length);
  }

  clear() {
    this.length = 0;
  }
}

/** @param {Int16Array} samples @returns {Blob} a WAV file */
export function wav(samples, rate) {
  const head = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  head.setUint32(4, 36 + samples.byteLength, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, 1, true);
  head.setUint32(24, rate, true);
  head.setUint32(28, rate * 2, true);
  head.setUint16(32, 2, true);
  head.setUint16(34, 16, true);
  text(36, "data");
  head.setUint32(40, samples.byteLength, true);
  return new Blob([head.buffer, samples], { type: "audio/wav" });
}

/** @param {Float32Array} values -1 to 1 @returns {Int16Array} */
export function toInt16(values) {
  return Int16Array.from(values, (value) => Math.round(Math.max(-1, Math.min(1, value)) * 32767));
}

/** @param {Int16Array} samples @returns {Float32Array} */
export function toFloat(samples) {
  return Float32Array.from(samples, (sample) => sample / 32768);
}
