"""OpenAI's unmodified JavaScript client, if Node finds it (npm install openai; NODE_PATH)."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from support.server_process import ROOT, Server
from support.sound_files import seconds

SCRIPT = """
const { OpenAI } = require("openai");
const fs = require("node:fs");
const [, url, file] = process.argv;
(async () => {
  const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
  const ask = { model: "tts-1", voice: "alloy", input: "Hello there, how are you?", response_format: "opus" };
  const answer = await client.audio.speech.create(ask);
  fs.writeFileSync(file, Buffer.from(await answer.arrayBuffer()));
  const models = (await client.models.list()).data.map((model) => model.id);
  const error = await client.audio.speech.create({ ...ask, model: "none" }).catch((error) => error);
  console.log(JSON.stringify({ models, error: error.constructor.name, param: error.param }));
})();
"""


def test_speech_models_and_errors(server: Server, tmp_path):
    node = shutil.which("node")
    if (
        node is None
        or subprocess.run([node, "-e", "require('openai')"], cwd=ROOT, capture_output=True).returncode
    ):
        pytest.skip("needs Node with the package openai")
    command = [node, "-e", SCRIPT, f"{server.url}/v1", str(tmp_path / "speech.opus")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "tts-1" in said["models"] and (said["error"], said["param"]) == ("NotFoundError", "model")
    assert seconds((tmp_path / "speech.opus").read_bytes()) > 0.3
