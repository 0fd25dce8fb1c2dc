// The waveform with its playhead; also the slider that chooses a position.

const SHORTEST_SECONDS = 6; // what the whole width stands for at least
const BAR = 2;
const SPACE = 1;
const STEP_SECONDS = 2; // of the arrow keys
const BUCKET_SECONDS = 0.01;

export class Waveform {
  #peaks = []; // of each bucket, 0 to 1
  #seen = 0; // samples in the peaks
  #frame = 0;

  constructor(canvas, player, describe) {
    this.canvas = canvas;
    this.player = player;
    this.describe = describe;
    new ResizeObserver(() => this.draw()).observe(canvas);
    player.addEventListener("change", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#seekTo(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) this.#seekTo(event);
    });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  clear() {
    this.#peaks = [];
    this.#seen = 0;
    this.draw();
  }

  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#paint());
  }

  get #seconds() {
    return Math.max(SHORTEST_SECONDS, this.player.duration);
  }

  #takeIn() {
    const samples = this.player.store.all();
    const size = Math.round(BUCKET_SECONDS * this.player.rate);
    if (samples.length < this.#seen) this.#peaks = [];
    for (let at = this.#peaks.length * size; at + size <= samples.length; at += size) {
      let peak = 0;
      for (let i = at; i < at + size; i++) peak = Math.max(peak, Math.abs(samples[i]));
      this.#peaks.push(peak / 32768);
    }
    this.#seen = samples.length;
  }

  #paint() {
    this.#takeIn();
    const { canvas, player } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const style = getComputedStyle(canvas);
    const drawing = canvas.getContext("2d");
    drawing.setTransform(scale, 0, 0, scale, 0, 0);
    drawing.clearRect(0, 0, width, height);
    const perPixel = this.#seconds / BUCKET_SECONDS / width;
    const head = (player.position / this.#seconds) * width;
    const loudest = Math.max(0.2, this.#peaks.reduce((most, peak) => Math.max(most, peak), 0));
    for (let x = 0; x < width; x += BAR + SPACE) {
      const first = Math.floor(x * perPixel);
      if (first >= this.#peaks.length && first > 0) {
        drawing.fillStyle = style.getPropertyValue("--line");
        drawing.fillRect(x, height / 2 - 0.5, BAR, 1);
        continue;
      }
      const last = Math.max(first + 1, Math.floor((x + BAR + SPACE) * perPixel));
      let peak = 0;
      for (let i = first; i < last && i < this.#peaks.length; i++) peak = Math.max(peak, this.#peaks[i]);
      const bar = Math.max(2, (peak / loudest) * (height - 10));
      drawing.fillStyle = style.getPropertyValue(x < head ? "--accent" : "--wave");
      drawing.beginPath();
      drawing.roundRect(x, (height - bar) / 2, BAR, bar, 1);
      drawing.fill();
    }
    if (player.duration) {
      drawing.fillStyle = style.getPropertyValue("--text");
      drawing.fillRect(Math.min(width - 1.5, Math.max(0, head - 0.75)), 2, 1.5, height - 4);
    }
    canvas.setAttribute("aria-valuemax", player.duration.toFixed(1));
    canvas.setAttribute("aria-valuenow", player.position.toFixed(1));
    canvas.setAttribute("aria-valuetext", this.describe());
    if (player.state !== "idle" && player.state !== "paused") this.draw();
  }

  #seekTo(event) {
    if (!this.player.duration) return;
    const box = this.canvas.getBoundingClientRect();
    this.#seek(((event.clientX - box.left) / box.width) * this.#seconds);
  }

  #seek(seconds) {
    this.player.seek(Math.max(0, Math.min(this.player.duration, seconds)));
    this.draw();
  }

  #key(event) {
    const { position, duration } = this.player;
    const places = {
      ArrowRight: position + STEP_SECONDS,
      ArrowUp: position + STEP_SECONDS,
      ArrowLeft: position - STEP_SECONDS,
      ArrowDown: position - STEP_SECONDS,
      PageUp: position + 5 * STEP_SECONDS,
      PageDown: position - 5 * STEP_SECONDS,
      Home: 0,
      End: duration,
    };
    if (!(event.key in places) || !duration) return;
    event.preventDefault();
    this.#seek(places[event.key]);
  }
}
