// The choice of a voice: those of the server as radio buttons, a recording or a file of one's own.

import * as api from "./api.js";
import { onLanguage, t } from "./i18n.js";
import { LONGEST, Recorder, SHORTEST, asWav } from "./recorder.js";

const SURE_MS = 3000; // in which a second click removes a voice
const OWN = "\0own"; // no name of a voice
const element = (id) => document.getElementById(id);

export class Voices {
  #listed = { spk_ids: [], voices: [] };
  #chosen = "";
  #recording = null;
  #recorder = new Recorder();
  #state = () => "";

  constructor(failed) {
    this.failed = failed;
    element("record").addEventListener("click", () => this.#record());
    element("upload").addEventListener("click", () => element("file").click());
    element("file").addEventListener("change", () => this.#upload());
    element("sample").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#keep();
    });
    onLanguage(() => this.#show());
  }

  /** {spk_id}, or {recording, text} of the user's own; null where there is none. */
  get choice() {
    if (this.#chosen === OWN) return { recording: this.#recording, text: element("sample-text").value.trim() };
    return this.#chosen ? { spk_id: this.#chosen } : null;
  }

  async load() {
    this.#listed = await api.voices();
    const names = this.#listed.spk_ids;
    if (this.#chosen !== OWN && !names.includes(this.#chosen)) this.#chosen = names[0] ?? "";
    this.#show();
  }

  #show() {
    const own = this.#recording ? [OWN] : [];
    element("voices").replaceChildren(...[...this.#listed.spk_ids, ...own].map((name) => this.#chip(name)));
    element("sample").hidden = this.#chosen !== OWN;
    element("record-text").textContent = t(this.#recorder.running ? "recordStop" : "record");
    element("record").classList.toggle("recording", this.#recorder.running);
    element("record-state").textContent = this.#state();
  }

  #say(words) {
    this.#state = words;
    this.#show();
  }

  #chip(name) {
    const chip = document.createElement("span");
    const label = document.createElement("label");
    const input = document.createElement("input");
    chip.className = "chip";
    input.type = "radio";
    input.name = "voice";
    input.value = name === OWN ? "" : name;
    input.checked = name === this.#chosen;
    input.addEventListener("change", () => {
      this.#chosen = name;
      element("sample").hidden = name !== OWN;
    });
    label.append(input, name === OWN ? t("yourRecording") : name);
    chip.append(label);
    if (this.#listed.voices.includes(name)) chip.append(this.#removal(name));
    return chip;
  }

  #removal(name) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "remove";
    button.textContent = "×";
    button.setAttribute("aria-label", t("remove", name));
    button.addEventListener("click", async () => {
      if (!button.dataset.sure) {
        button.dataset.sure = "yes";
        button.textContent = t("removeReally");
        setTimeout(() => this.#show(), SURE_MS);
        return;
      }
      try {
        await api.removeVoice(name);
        this.#say(() => t("removed", name));
        await this.load();
      } catch (error) {
        this.failed(error);
      }
    });
    return button;
  }

  async #record() {
    if (this.#recorder.running) return this.#recorder.stop();
    try {
      const finished = this.#recorder.record((seconds) => this.#say(() => t("recording", seconds)));
      await this.#take(await finished);
    } catch {
      this.#say(() => t("noMicrophone"));
    }
  }

  async #upload() {
    const file = element("file").files[0];
    element("file").value = "";
    if (file) await this.#take(file);
  }

  async #take(blob) {
    this.#say(() => t("reading"));
    let read;
    try {
      read = await asWav(blob);
    } catch {
      return this.#say(() => t("unreadable"));
    }
    if (read.seconds < SHORTEST) return this.#say(() => t("tooShort"));
    this.#recording = read.recording;
    this.#chosen = OWN;
    URL.revokeObjectURL(element("sample-audio").src);
    element("sample-audio").src = URL.createObjectURL(read.recording);
    element("sample-text").value = "";
    this.#say(() => (read.cut ? t("cut", LONGEST) : ""));
    element("sample-text").focus();
  }

  async #keep() {
    const name = element("sample-name").value.trim();
    if (!name) return element("sample-name").focus();
    try {
      await api.addVoice(name, this.#recording, element("sample-text").value.trim());
      this.#recording = null;
      this.#chosen = name;
      element("sample-name").value = "";
      this.#say(() => t("kept", name));
      await this.load();
    } catch (error) {
      this.failed(error);
    }
  }
}
