"""Flags, --config and the environment become one Settings object, or an error that names the problem."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.server_process import CHECKPOINT, ROOT

from light_tts.engine.llm.options import PREFILL_TOKENS
from light_tts.server import api_cli
from light_tts.server.core.settings import Settings, SettingsError, load, save

MODEL = ["--model_dir", str(CHECKPOINT)]


def parse(*argv: str, **options) -> Settings:
    return api_cli.parse([*MODEL, *argv], environ={}, **options).settings


def notes(*argv: str) -> str:
    return "\n".join(api_cli.parse([*MODEL, *argv], environ={}).notes)


def refusal(*argv: str, **options) -> str:
    with pytest.raises(SettingsError) as error:
        api_cli.parse([*MODEL, *argv], environ={}, **options)
    return str(error.value)


def test_a_mistyped_flag_is_answered_with_the_nearest_one():
    assert refusal("--decode_procces_num", "2") == (
        "--decode_procces_num: unknown flag; did you mean --decode_process_num?"
    )
    assert "--help" in refusal("--qqq")
    assert "--port" in refusal("--port")  # without a value


def test_without_flags_the_defaults_hold():
    assert parse() == Settings(model_dir=str(CHECKPOINT))


@pytest.mark.parametrize("name", [name for name in Settings.__struct_fields__])
def test_every_setting_is_a_flag_with_a_help_text(name):
    text = api_cli._parser().format_help()
    assert f"--{name}" in text
    assert api_cli._description(api_cli._HINTS[name]), f"--{name} has no description"


@pytest.mark.parametrize(("text", "value"), [("True", True), ("False", False), ("true", True), ("0", False)])
def test_booleans_take_true_and_false(text, value):
    assert parse("--load_trt", text).load_trt is value


def test_a_bare_boolean_flag_means_true():
    assert parse("--health_monitor", "--port", "9000").health_monitor is True


def test_a_word_that_is_no_boolean_is_refused():
    assert "--load_trt maybe" in refusal("--load_trt", "maybe")


@pytest.mark.parametrize(
    "argv",
    [
        ["--mode", "triton_flashdecoding,triton_int8kv"],
        ["--mode", "triton_flashdecoding", "triton_int8kv"],
        ["--mode", "triton_flashdecoding", "--mode", "ppl_int8kv"],
        ["--mode", "triton_flashdecoding, ppl_int8kv"],
    ],
)
def test_modes_are_separated_by_commas_or_spaces(argv):
    assert parse(*argv).mode == ("triton_flashdecoding", "triton_int8kv")


def test_an_unknown_mode_is_refused_with_the_names_there_are():
    message = refusal("--mode", "triton_flashdecoding,fast")
    assert "fast" in message and "triton_int8kv" in message


@pytest.mark.parametrize(("short", "long"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_data_types_have_short_names(short, long):
    assert parse("--data_type", short).data_type == long


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--port", "seventy"], "--port seventy"),
        (["--port", "70000"], "--port 70000"),
        (["--decode_process_num", "0"], "--decode_process_num 0"),
        (["--data_type", "int4"], "float16"),
        (["--flow_memory_gpu_mb", "much"], "--flow_memory_gpu_mb much: give a number or auto"),
        (["--flow_memory_gpu_mb", "-1"], "--flow_memory_gpu_mb -1"),
        (["--zmq_mode", "udp://"], "--zmq_mode"),
        (["--max_prompt_seconds", "31"], "--max_prompt_seconds"),
    ],
)
def test_a_wrong_value_is_refused_by_name(argv, named):
    assert named in refusal(*argv)


def test_flags_that_contradict_each_other_are_refused_naming_both():
    message = refusal("--max_req_total_len", "9000", "--max_total_token_num", "8000")
    assert "--max_req_total_len 9000" in message and "--max_total_token_num 8000" in message


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("0", 0), ("40000", 40_000)], ids=["auto", "none", "a size"]
)
@pytest.mark.parametrize("flag", ["flow_memory_mb", "flow_memory_gpu_mb"])
def test_a_size_may_be_automatic(tmp_path, flag, text, value):
    assert getattr(parse(f"--{flag}", text), flag) == value
    file = tmp_path / "settings.yaml"
    file.write_text(f"{flag}: {text}\n")
    settings = parse("--config", str(file))
    assert getattr(settings, flag) == value
    save(settings, str(tmp_path / "settings.json"))
    assert load(str(tmp_path / "settings.json")) == settings
    assert "auto|N" in api_cli._parser().format_help()


def test_prefills_have_cuda_graphs_unless_larger_ones_are_asked_for():
    assert parse().batch_max_tokens == PREFILL_TOKENS


def test_a_prefill_batch_may_be_smaller_than_the_longest_request():
    settings = parse("--batch_max_tokens", "8192", "--max_req_total_len", "32768")
    assert settings.batch_max_tokens == 8192


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("port: 9001\ndecode_process_num: 3\nload_trt: false\nmode: triton_int8kv\n")
    settings = parse("--config", str(file), "--port", "9002")
    assert (settings.port, settings.decode_process_num, settings.load_trt) == (9002, 3, False)
    assert settings.mode == ("triton_int8kv",)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("prot: 1", "'prot'"),
        ("- 1", "name: value"),
        ("port: [", "settings.yaml"),
        ("port: many", "--port many"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, named):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    assert named in refusal("--config", str(file))


def test_a_missing_file_is_refused_by_name():
    assert "/nowhere.yaml" in refusal("--config", "/nowhere.yaml")


def test_flags_of_lighttts_that_never_acted_are_accepted_and_named_in_one_line():
    argv = ["--trust_remote_code", "--tokenizer_mode", "fast", "--load_jit", "True", "--load_way", "HF"]
    argv += ["--cache_reserved_ratio", "0.5", "--sample_close"]
    lines = [line for line in notes(*argv).splitlines() if "without effect" in line]
    assert len(lines) == 1
    assert all(f"--{name}" in lines[0] for name in api_cli.WITHOUT_EFFECT)


def test_flags_that_cannot_act_without_cuda_are_named_in_one_line():
    text = notes(
        "--device", "cpu", "--load_trt", "True", "--data_type", "bf16", "--mode", "triton_flashdecoding"
    )
    assert text.count("\n") == 0
    assert all(name in text for name in ("--load_trt", "--data_type", "--mode triton_flashdecoding"))


def test_defaults_and_flags_that_act_are_not_remarked_on():
    assert notes("--device", "cpu", "--load_trt", "False", "--mode", "triton_int8kv") == ""


def test_the_health_check_interval_comes_from_the_environment_unless_given():
    environ = {"HEALTH_CHECK_INTERVAL_SECONDS": "7"}
    assert api_cli.parse(MODEL, environ=environ).settings.health_check_interval == 7
    argv = [*MODEL, "--health_check_interval", "9"]
    assert api_cli.parse(argv, environ=environ).settings.health_check_interval == 9


def test_the_wrapper_reads_flags_over_file_over_its_own_defaults(tmp_path):
    file = tmp_path / "production.yaml"
    file.write_text(f"model_dir: '{CHECKPOINT}'\nport: 9001\nmax_text_length: 77\n")
    environ = {"LIGHT_TTS_CONFIG": str(file), "LIGHT_TTS_FLAGS": "--port 9002 --spk_dir 'my voices'"}
    settings = api_cli.from_environment(environ).settings
    assert (settings.port, settings.max_text_length, settings.spk_dir) == (9002, 77, "my voices")
    assert (settings.host, settings.httpserver_workers) == ("0.0.0.0", 4)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model_dir", "/nowhere"], "/nowhere"),
        (["--model_dir", str(CHECKPOINT), "--prot", "80"], "--prot"),
    ],
)
def test_a_wrong_command_ends_with_code_2_and_says_what_to_do(argv, named):
    done = subprocess.run(
        [sys.executable, "-m", "light_tts.server.api_server", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr
