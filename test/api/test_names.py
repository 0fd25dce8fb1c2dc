"""Voice aliases from a file."""

from __future__ import annotations

import pytest

from light_tts.server.httpserver.openai.aliases import read_aliases


def test_the_names_of_openai_are_the_default():
    assert read_aliases("")["alloy"] == ["anna"] and len(read_aliases("")) == 13


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "anna"}', '{"a": [1]}'])
def test_a_wrong_file_is_named(tmp_path, content):
    file = tmp_path / "aliases.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"aliases\.json: "):
        read_aliases(str(file))


def test_a_file_replaces_them(tmp_path):
    file = tmp_path / "aliases.json"
    file.write_text('{"me": ["maria", "anna"]}')
    assert read_aliases(str(file)) == {"me": ["maria", "anna"]}
