// Joins the parts of the page.

import * as api from "./api.js";
import { onLanguage, t } from "./i18n.js";
import { wav } from "./pcm.js";
import { Player } from "./player.js";
import { Speaking } from "./speaking.js";
import { Status } from "./status.js";
import { RATE, Typing, settled } from "./typing.js";
import { Voices } from "./voices.js";
import { Waveform } from "./waveform.js";
import { SpokenWords } from "./words.js";

const MOST_SEED = 2 ** 32;
const SPEEDS = [0.75, 1, 1.25, 1.5, 2];
const FORMATS = ["wav", "mp3", "opus", "aac", "flac"];
const element = (id) => document.getElementById(id);

const player = new Player();
const waveform = new Waveform(element("wave"), player, () =>
  t("at", player.position.toFixed(1), player.duration.toFixed(1)),
);
const voices = new Voices(fail);
const transcript = new SpokenWords(element("transcript"), player);
const typing = new Typing(
  () => ({ voice: voices.choice, options: options() }),
  player,
  show,
  fail,
  (words, offset) => transcript.add(words, offset),
);
let speaking = null;
let figures = null; // of what is or was spoken last
let request = null; // the same: {text, voice, options}

// ---------------------------------------------------------------- what is chosen

function options() {
  const seed = element("seed").value.trim();
  return {
    seed: seed === "" ? Math.floor(Math.random() * MOST_SEED) : Number(seed),
    speed: Number(element("speed").value),
    style: element("style").value,
  };
}

// ---------------------------------------------------------------- speaking a text

element("panel-whole").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = element("text").value;
  const voice = voices.choice;
  if (!/[\p{L}\p{N}]/u.test(text) || !voice) return fail(new Error(t("noText")));
  endAll();
  begin();
  request = { text, voice, options: options() };
  const mine = (speaking = new Speaking(text, voice, request.options, player, show));
  figures = mine.figures;
  show();
  try {
    await mine.run();
  } catch (error) {
    if (mine === speaking) fail(error);
  }
  if (mine === speaking) speaking = null;
  show();
});

element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("panel-whole").requestSubmit();
});
element("text").addEventListener("input", showCount);
element("stop").addEventListener("click", () => {
  endAll();
  player.pause();
  show();
});

function endAll() {
  speaking?.stop();
  speaking = null;
  typing.stop();
}

function begin() {
  element("error").hidden = true;
  player.begin(RATE);
  waveform.clear();
}

// ---------------------------------------------------------------- type and listen

const line = element("line");
let typed = false; // whether the player holds what was typed

function say(text) {
  if (!typed) {
    endAll();
    begin();
    transcript.clear();
    typed = true;
    figures = typing.figures = { firstAudio: null, rtf: null };
    request = { text: "", voice: voices.choice, options: { ...options(), speed: 1 } };
  }
  element("error").hidden = true;
  player.unlock();
  request.text += text;
  typing.send(text);
  transcript.append(text);
  element("transcript").scrollTop = element("transcript").scrollHeight;
}

line.addEventListener("input", (event) => {
  if (event.isComposing || !voices.choice) return;
  const text = settled(line.value);
  if (text.trim()) {
    say(text);
    line.value = line.value.slice(text.length);
  }
});
line.addEventListener("compositionend", () => line.dispatchEvent(new InputEvent("input")));
element("panel-typing").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!voices.choice) return;
  if (line.value.trim()) say(`${line.value} `);
  line.value = "";
  typing.finish();
  line.focus();
});
element("typing-stop").addEventListener("click", () => {
  endAll();
  player.pause();
  typed = false;
  line.value = "";
});

// ---------------------------------------------------------------- tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") choose(tabs[1 - tabs.indexOf(tab)]).focus();
  });
}

function choose(chosen) {
  for (const tab of tabs) {
    const selected = tab === chosen;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    element(tab.getAttribute("aria-controls")).hidden = !selected;
  }
  typed = false;
  return chosen;
}

// ---------------------------------------------------------------- the player

const play = element("play");
play.addEventListener("click", () => {
  if (player.state === "idle" || player.state === "paused") player.play();
  else player.pause();
});
player.addEventListener("change", show);

// What has been heard as WAV; other formats are spoken by the server once more, with the same seed.
element("download").addEventListener("click", async () => {
  const format = element("format").value;
  const button = element("download");
  button.disabled = true;
  button.textContent = t("preparing");
  try {
    const file =
      format === "wav"
        ? wav(player.store.all(), player.rate)
        : await api.speechFile(request.text, request.voice, request.options, format);
    save(file, `speech.${format}`);
  } catch (error) {
    fail(error);
  }
  button.textContent = t("download");
  show();
});

function save(file, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---------------------------------------------------------------- what is shown

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

function show() {
  const running = player.state === "playing" || player.state === "waiting";
  document.body.dataset.player = player.state;
  play.disabled = player.duration === 0 && !running;
  play.classList.toggle("playing", running);
  play.setAttribute("aria-label", t(running ? "pause" : "play"));
  element("download").disabled = player.duration === 0;
  element("stop").hidden = !speaking;
  element("progress-line").hidden = !speaking;
  if (speaking) {
    element("progress").value = speaking.progress;
    element("progress-text").textContent = t(
      "percent",
      Math.round(speaking.progress * 100),
      speaking.part,
      speaking.count,
    );
  }
  const seconds = (value) => `${value.toFixed(2)} ${t("s")}`;
  element("first-audio").textContent = figures?.firstAudio ? seconds(figures.firstAudio) : "–";
  element("rtf").textContent = figures?.rtf ? figures.rtf.toFixed(2) : "–";
  element("length").textContent = player.duration ? seconds(player.duration) : "–";
  element("gaps").textContent = player.duration ? String(player.gaps) : "–";
  showClock();
  waveform.draw();
}

function showClock() {
  element("clock").textContent = `${clock(player.position)} / ${clock(player.duration)}`;
}
setInterval(showClock, 200);

function showCount() {
  element("count").textContent = element("text").value ? t("characters", element("text").value.length) : "";
}

/** Show what went wrong. */
function fail(error) {
  const message = error.status === 0 ? t(player.duration ? "brokenOff" : "noConnection") : error.message;
  element("key-form").hidden = error.status !== 401;
  element("error").textContent = error.status === 401 ? t("needsKey") : message;
  element("error").hidden = false;
  player.finish();
  show();
}

element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.apiKey.set(element("key").value.trim());
  element("key-form").hidden = true;
  element("error").hidden = true;
  load();
});

// ---------------------------------------------------------------- the start

async function load() {
  try {
    await voices.load();
    const styles = await api.styles();
    element("style").replaceChildren(...styles.map((name) => new Option(name, name)));
    element("style-choice").hidden = styles.length < 2;
  } catch (error) {
    fail(error);
  }
}

for (const format of FORMATS) element("format").append(new Option(format.toUpperCase(), format));
for (const speed of SPEEDS) element("speed").append(new Option(`${speed}×`, speed, speed === 1, speed === 1));
onLanguage(() => {
  show();
  showCount();
});
new Status();
load();
