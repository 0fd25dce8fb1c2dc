"""style_config.json, and the counters that HTTP workers share."""

from __future__ import annotations

import json

import pytest

from light_tts.server.core.counters import ActiveRequests
from light_tts.server.core.styles import Style, StyleError, load_styles


@pytest.fixture()
def model_dir(tmp_path):
    for name in ("llm.pt", "calm.pt"):
        (tmp_path / name).touch()
    return tmp_path


def write(model_dir, *entries, **more) -> None:
    (model_dir / "style_config.json").write_text(json.dumps({"lora_info": list(entries), **more}))


def test_without_a_style_file_there_is_one_style(model_dir):
    assert load_styles(model_dir) == (Style("cosyvoice", model_dir / "llm.pt"),)


def test_styles_keep_their_order_and_paths_are_relative_to_the_checkpoint(model_dir):
    write(
        model_dir,
        {"style_name": "calm", "llm_path": "calm.pt"},
        {"style_name": "plain", "gpt_model_path": str(model_dir / "llm.pt"), "prompt_cache_token_ids": [1]},
    )
    assert load_styles(model_dir) == (
        Style("calm", model_dir / "calm.pt"),
        Style("plain", model_dir / "llm.pt"),
    )


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([], "empty"),
        ([{"style_name": "a"}], "llm_path"),
        ([{"style_name": "a", "llm_path": "none.pt"}], "none.pt"),
        ([{"style_name": "a", "llm_path": "llm.pt"}] * 2, "twice"),
        ([{"style_name": "default", "llm_path": "llm.pt"}], "reserved"),
        ([{"llm_path": "llm.pt"}], "style_name"),
        (["calm"], "object"),
    ],
)
def test_a_wrong_style_file_is_refused_by_name(model_dir, entries, reason):
    write(model_dir, *entries)
    with pytest.raises(StyleError, match=reason) as error:
        load_styles(model_dir)
    assert "style_config.json" in str(error.value)


def test_a_style_file_that_is_no_json_is_refused(model_dir):
    (model_dir / "style_config.json").write_text("{")
    with pytest.raises(StyleError, match=r"style_config\.json"):
        load_styles(model_dir)


def test_workers_share_one_limit_and_a_dead_worker_gives_its_places_back(tmp_path):
    first, second, supervisor = (ActiveRequests(tmp_path) for _ in range(3))
    assert first.try_add(0, limit=2) and second.try_add(1, limit=2)
    assert not first.try_add(0, limit=2)
    second.remove(1)
    assert first.try_add(0, limit=2)
    assert supervisor.total() == 2
    supervisor.clear(0)
    assert second.try_add(1, limit=2)
    for counters in (first, second, supervisor):
        counters.close()
        counters.close()
