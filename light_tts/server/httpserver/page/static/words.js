// Lights up the words of a text while they are heard.

const EVERY_MS = 50;
const NAME = "spoken"; // of the highlight in the style sheet

export class SpokenWords {
  #words = []; // {begin, end} in seconds, {from, to} in the text
  #found = 0; // where the text behind the words so far begins

  /** `element` holds nothing but text. */
  constructor(element, player) {
    this.element = element;
    this.player = player;
    if (window.CSS?.highlights) setInterval(() => this.#show(), EVERY_MS);
  }

  append(text) {
    this.element.append(text);
    this.element.normalize();
  }

  clear() {
    this.element.textContent = "";
    this.#words = [];
    this.#found = 0;
  }

  /** `entries`: the server's; `offset`: the second at which their audio begins. */
  add(entries, offset) {
    const text = this.element.textContent;
    for (const { word, start_ms, end_ms } of entries) {
      let from = -1;
      for (const piece of word.split(/\s+/)) {
        const at = text.indexOf(piece, this.#found);
        if (at < 0) break;
        if (from < 0) from = at;
        this.#found = at + piece.length;
      }
      const [begin, end] = [offset + start_ms / 1000, offset + end_ms / 1000];
      if (from >= 0) this.#words.push({ begin, end, from, to: this.#found });
    }
  }

  #show() {
    const now = this.player.position;
    const word = this.player.state === "playing" && this.#words.find(({ begin, end }) => begin <= now && now < end);
    if (!word) return CSS.highlights.delete(NAME);
    const range = new Range();
    range.setStart(this.element.firstChild, word.from);
    range.setEnd(this.element.firstChild, word.to);
    CSS.highlights.set(NAME, new Highlight(range));
  }
}
