// How the server is: ready or not, and how busy each stage has been since the last look.

import { metrics, readiness } from "./api.js";
import { onLanguage, t } from "./i18n.js";

const STAGES = ["encode", "llm", "decode"];
const EVERY_MS = 2000;
const element = (id) => document.getElementById(id);

/** Sums of a metric by stage in Prometheus's text. */
export function byStage(text, name) {
  const sums = {};
  const line = new RegExp(`^${name}\\{stage="(\\w+)"\\} (\\S+)$`, "gm");
  for (const [, stage, value] of text.matchAll(line)) sums[stage] = (sums[stage] ?? 0) + Number(value);
  return sums;
}

export class Status {
  #before = null;
  #shown = { ready: null, stages: {} };

  constructor() {
    onLanguage(() => this.#show());
    setInterval(() => document.visibilityState === "visible" && this.#look(), EVERY_MS);
    this.#look();
  }

  async #look() {
    try {
      const state = await readiness();
      this.#shown.ready = state.status === "ok" ? "ready" : "notReady";
      const processes = {};
      for (const { stage } of state.stages) processes[stage] = (processes[stage] ?? 0) + 1;
      await this.#read(processes);
    } catch (error) {
      if (!error.status) this.#shown.ready = "unreachable";
      this.#before = null;
    }
    this.#show();
  }

  async #read(processes) {
    const text = await metrics();
    const now = performance.now() / 1000;
    const work = byStage(text, "light_tts_stage_work_seconds_sum");
    const queue = byStage(text, "light_tts_stage_queue_depth");
    for (const stage of STAGES) {
      const did = this.#before ? (work[stage] ?? 0) - (this.#before.work[stage] ?? 0) : 0;
      const took = this.#before ? now - this.#before.now : 1;
      const share = Math.max(0, Math.min(1, did / took / (processes[stage] ?? 1)));
      this.#shown.stages[stage] = { share, queue: Math.round(queue[stage] ?? 0) };
    }
    this.#before = { now, work };
  }

  #show() {
    const { ready, stages } = this.#shown;
    element("ready").textContent = ready ? t(ready) : "";
    element("ready").dataset.state = ready ?? "";
    element("stages").replaceChildren(...STAGES.map((stage) => this.#row(stage, stages[stage])));
  }

  #row(stage, { share, queue } = { share: 0, queue: 0 }) {
    const row = document.createElement("li");
    const name = document.createElement("span");
    const meter = document.createElement("meter");
    const words = document.createElement("span");
    name.textContent = t(`stage_${stage}`);
    meter.value = share;
    meter.setAttribute("aria-label", t(`stage_${stage}`));
    words.textContent = t("busy", Math.round(share * 100), queue);
    words.className = "hint";
    row.append(name, meter, words);
    return row;
  }
}
