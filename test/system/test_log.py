"""One log file with one writer, whatever the number of processes."""

from __future__ import annotations

import json
import logging
import select
import subprocess
import sys

from support.server_process import ROOT

from light_tts.common import log

SPEAKER = """
import logging, sys
from pathlib import Path
from light_tts.common import log
log.setup(sys.argv[1], "info", Path(sys.argv[2]))
for number in range(300):
    logging.getLogger("x").info("line %d", number)
"""


def test_lines_of_many_processes_reach_the_file_complete_and_in_each_ones_order(tmp_path):
    writer = log.LogWriter(tmp_path / "socket", str(tmp_path / "logs"))
    names = ["first", "second", "third"]
    speakers = [
        subprocess.Popen(
            [sys.executable, "-c", SPEAKER, name, str(tmp_path / "socket")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for name in names
    ]
    while any(speaker.poll() is None for speaker in speakers):
        if select.select([writer], [], [], 0.05)[0]:
            writer.take()
    writer.close()
    lines = (tmp_path / "logs" / log.FILE_NAME).read_text().splitlines()
    assert len(lines) == 3 * 300
    for name in names:
        own = [line.rsplit(" ", 1)[1] for line in lines if f" INFO {name}[" in line]
        assert own == [str(number) for number in range(300)]


def test_lines_can_be_json(tmp_path, capsys):
    log.setup("http", "info", format="json")
    try:
        logging.getLogger("x").info(
            "0123456789abcdef spoke %d %%", 7, extra={"fields": {"route": "zero_shot"}}
        )
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("x").exception("wrong")
    finally:
        logging.getLogger().handlers.clear()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["message"] == "0123456789abcdef spoke 7 %" and first["request"] == "0123456789abcdef"
    assert (first["level"], first["process"], first["route"]) == ("INFO", "http", "zero_shot")
    assert second["level"] == "ERROR" and "ValueError" in second["exception"] and "request" not in second


def test_a_process_goes_on_without_its_writer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SPEAKER, "alone", str(tmp_path / "nobody")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.count("line ") == 300
