"""The web page in a real browser: the audio it plays, on a desktop and on a phone, and the effect of its
security headers. The audio is captured where the browser passes it to the device."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from support.server_process import ROOT, VOICE, launch
from support.waiting import eventually

from light_tts.tools.evaluation.recogniser import transcribe
from light_tts.tools.evaluation.sound import Sound
from light_tts.tools.evaluation.words import word_errors

TEXT = "The boat was on its way to the sea."
SEED = "3"
KEY = "0123456789abcdef0123456789abcdef"
RATE = 24_000
FADE = 0.006  # seconds at both ends of what is played
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 900}}
WAIT_MS = 120_000

# Copies everything sent to an AudioContext's destination to `heard`, as float32 samples.
LISTEN = """
const connect = AudioNode.prototype.connect;
window.heard = [];
AudioNode.prototype.connect = function (target, ...rest) {
  if (target instanceof AudioDestinationNode) {
    if (!target.tap) {
      target.tap = target.context.createScriptProcessor(16384, 1, 1);
      target.tap.onaudioprocess = (event) => heard.push(event.inputBuffer.getChannelData(0).slice());
      connect.call(target.tap, target);
    }
    connect.call(this, target.tap);
  }
  return connect.call(this, target, ...rest);
};
window.takeHeard = () => {
  const all = new Float32Array(heard.reduce((size, piece) => size + piece.length, 0));
  let at = 0;
  for (const piece of heard) { all.set(piece, at); at += piece.length; }
  heard = [];
  let text = "";
  const bytes = new Uint8Array(all.buffer);
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
};
"""


@pytest.fixture
def server(voice_server):
    return voice_server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    flags = [
        "--autoplay-policy=no-user-gesture-required",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={VOICE / 'voices' / 'anna.wav'}",
    ]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


# Keeps the words that light up, in order.
LIGHTS = """() => {
  window.lit = [];
  setInterval(() => {
    for (const range of CSS.highlights.get("spoken") ?? [])
      if (lit.at(-1) !== String(range)) lit.push(String(range));
  }, 20);
}"""


@pytest.fixture
def page(server, browser, request):
    """The page in English; script errors and policy violations fail the test."""
    context = browser.new_context(locale="en-GB", **getattr(request, "param", DESKTOP))
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.add_init_script(LISTEN)
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.goto(server.url)
    page.get_by_label("anna").wait_for()
    yield page
    context.close()
    assert not troubles


def speak(page, text: str = TEXT, voice: str = "anna") -> None:
    page.get_by_role("radio", name=voice).check()
    page.get_by_role("textbox", name="Text", exact=True).fill(text)
    page.get_by_label("Seed").fill(SEED)
    page.get_by_role("button", name="Speak", exact=True).click()
    wait_until_silent(page)


def wait_until_silent(page) -> None:
    """Wait until something has been played to its end."""
    page.locator("body[data-player=idle]:has(#download:enabled)").wait_for()
    page.wait_for_timeout(800)  # the capture works in blocks of 0.7 s


def heard(page) -> np.ndarray:
    """(samples,) float32 since the last call."""
    return np.frombuffer(base64.b64decode(page.evaluate("takeHeard()")), np.float32)


def downloaded(page) -> np.ndarray:
    """Return (samples,) float32 of the WAV file that the page offers for download."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    samples, rate = soundfile.read(Path(download.value.path()), dtype="float32")
    assert rate == RATE
    return samples


def largest_difference(played: np.ndarray, received: np.ndarray) -> float:
    """Return the difference between what was received and the best-matching section of what was played,
    except at the ends, which fade."""
    size = 1 << (len(played) + len(received)).bit_length()
    likeness = np.fft.irfft(np.fft.rfft(played, size) * np.conj(np.fft.rfft(received, size)), size)
    begin = int(np.argmax(likeness[: len(played)]))
    inner = slice(int(FADE * RATE), len(received) - int(FADE * RATE))
    return float(np.abs(played[begin : begin + len(received)][inner] - received[inner]).max())


def check_words(samples: np.ndarray, text: str, most: int = 1) -> None:
    said = transcribe(Sound(samples, RATE).wave16k)
    wrong, _ = word_errors(text, said)
    assert wrong <= most, said


@pytest.mark.parametrize("page", [DESKTOP, PHONE], ids=["desktop", "phone"], indirect=True)
def test_a_text_is_heard_as_the_server_spoke_it_to_the_sample(page, server):
    speak(page)
    first = heard(page)
    check_words(first, TEXT)
    received = downloaded(page)
    fields = {"input": TEXT, "voice": "anna", "seed": int(SEED), "response_format": "wav"}
    with server.client() as client:
        answer = client.post("/v1/audio/speech", json=fields)
    expected, _ = soundfile.read(io.BytesIO(answer.content), dtype="float32")
    np.testing.assert_array_equal(received, expected)

    if page.locator("#gaps").inner_text() == "0":  # a busy machine may be slower than speech
        assert largest_difference(first, received) < 1e-4, "a gap or a click while it streamed"
    page.get_by_role("button", name="Play").click()
    wait_until_silent(page)
    assert largest_difference(heard(page), received) < 1e-4, "a gap or a click"
    assert page.locator("#first-audio").inner_text() != "–" and page.locator("#rtf").inner_text() != "–"


def test_a_file_of_another_format_is_given(page):
    page.get_by_label("Speed").select_option("1.5×")
    speak(page)
    page.get_by_label("File format").select_option("MP3")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "speech.mp3"
    samples, rate = soundfile.read(Path(download.value.path()), dtype="float32")
    assert rate == RATE
    check_words(samples, TEXT, most=2)


@pytest.mark.parametrize("page", [PHONE], ids=["phone"], indirect=True)
def test_nothing_is_wider_than_a_phone(page):
    for tab in ("Type and listen", "Speak a text"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_is_typed_is_heard_while_it_is_typed(page):
    page.get_by_role("tab", name="Type and listen").click()
    page.get_by_label("henry").check()
    words = "Please close the window before you leave the house."
    page.evaluate(LIGHTS)
    page.get_by_label("Type here").press_sequentially(words, delay=20)
    page.get_by_label("Type here").press("Enter")
    wait_until_silent(page)
    check_words(heard(page), words)
    assert page.get_by_role("log").inner_text().strip() == words
    lit, spoken = page.evaluate("lit"), iter(words.split())
    assert len(lit) > 3 and all(word in spoken for word in lit)  # in this order


def test_a_long_text_shows_its_progress_and_can_be_stopped(page, server):
    page.get_by_role("textbox", name="Text", exact=True).fill((TEXT + " ") * 25)
    page.get_by_role("button", name="Speak", exact=True).click()
    before = server.metric("light_tts_requests_total", outcome="disconnected")
    page.get_by_text("part 1 of 3").wait_for()
    page.get_by_role("button", name="Download").and_(page.locator(":enabled")).wait_for()
    assert 0 < float(page.get_by_role("progressbar").get_attribute("value")) < 1
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("progressbar").wait_for(state="hidden")
    page.locator("body[data-player=paused]").wait_for()
    assert len(downloaded(page)) > 0
    assert eventually(lambda: server.metric("light_tts_requests_total", outcome="disconnected") > before, 10)


def test_a_voice_is_recorded_kept_used_and_removed(page, server):
    page.get_by_role("button", name="Record").click()
    page.get_by_text("Recording: 3 of 30 s").wait_for()
    page.get_by_role("button", name="Stop recording").click()
    page.get_by_label("Your recording").wait_for()
    page.get_by_placeholder("Name").fill("recorded")
    page.get_by_role("button", name="Save this voice").click()
    page.get_by_label("recorded", exact=True).wait_for()
    speak(page, "Good morning.", "recorded")
    assert len(downloaded(page)) > 0.4 * RATE
    page.get_by_role("button", name="Remove recorded").click()
    page.get_by_role("button", name="Remove recorded").click()
    page.get_by_label("recorded", exact=True).wait_for(state="detached")
    with server.client() as client:
        assert client.get("/spk_list").json()["voices"] == []


def test_a_file_gives_its_voice(page):
    page.locator("#file").set_input_files(VOICE / "voices" / "henry.wav")
    page.get_by_label("Your recording").wait_for()
    page.get_by_label("Transcript of the recording").fill(
        (VOICE / "voices" / "henry.txt").read_text("utf-8").strip()
    )
    speak(page, "Good evening, everybody.", "Your recording")
    check_words(heard(page), "Good evening, everybody.")


def test_it_speaks_chinese_and_can_be_used_by_keys(page):
    page.get_by_role("button", name="中文").click()
    page.get_by_role("button", name="朗读", exact=True).wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh"
    page.get_by_role("tab", name="朗读文本").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="边打边听").get_attribute("aria-selected") == "true"


def test_an_error_is_shown(page):
    page.get_by_role("textbox", name="Text", exact=True).fill("…")
    page.get_by_role("button", name="Speak", exact=True).click()
    page.get_by_role("alert").get_by_text("There is no text").wait_for()


def test_an_api_key_is_asked_for(browser):
    with launch(model_dir=None, api_key=KEY) as guarded:
        page = browser.new_page(locale="en-GB")
        page.set_default_timeout(WAIT_MS)
        page.goto(guarded.url)
        page.get_by_text("requires an API key").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use", exact=True).click()
        speak(page, "Good morning.")
        page.get_by_role("tab", name="Type and listen").click()
        page.get_by_label("Type here").press_sequentially("Good evening. ")
        page.get_by_label("Type here").press("Enter")
        wait_until_silent(page)
        assert len(downloaded(page)) > 0.4 * RATE
        page.close()


def test_its_files_may_be_of_this_server_only(server):
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(server.url, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    for name in ("missing.js", "..%2f__init__.py", "%2e%2e/__init__.py"):
        assert httpx.get(f"{server.url}/page/{name}").status_code == 404
    for file in (ROOT / "light_tts/server/httpserver/page/static").iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text, file
        assert httpx.get(f"{server.url}/page/{file.name}").status_code == 200
