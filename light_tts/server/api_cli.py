"""Parses flags and --config into one frozen Settings object. The flags are derived from the fields of
`Settings`."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import yaml

from light_tts.common import gpu
from light_tts.server.core.default_checkpoint import default_checkpoint
from light_tts.server.core.settings import Settings, SettingsError

# Flags of LightTTS that had no effect there either; accepted so that its command lines still work.
WITHOUT_EFFECT = (
    "tokenizer_mode",
    "trust_remote_code",
    "cache_reserved_ratio",
    "sample_close",
    "load_jit",
    "load_way",
)
NEEDS_CUDA = (
    "load_trt",
    "data_type",
    "mode",  # except for the int8 KV cache, which the CPU supports too
    "gpt_paral_step_num",
    "disable_cudagraph",
    "graph_max_batch_size",
    "graph_max_len_in_batch",
)
ALIASES: dict[str, dict[str | bool, str]] = {
    "data_type": {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"},
    "mode": {"ppl_int8kv": "triton_int8kv"},
    "mps": {True: "on", False: "off"},  # YAML parses on and off as booleans
}
BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
GUNICORN_DEFAULTS = {"host": "0.0.0.0", "httpserver_workers": 4}  # the defaults of run.sh
PRODUCTION_CONFIG = Path(__file__).resolve().parents[2] / "config" / "production.yaml"

_HINTS = typing.get_type_hints(Settings, include_extras=True)
_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}


class Parsed(NamedTuple):
    settings: Settings
    notes: list[str]  # messages for the operator about flags without effect


def parse(
    argv: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    config: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Parsed:
    """Return the settings from `argv`, falling back to --config (or `config` if given), then to `defaults`.

    Raises SettingsError, which names the flag.
    """
    parser = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise SettingsError(_unknown_flag(unknown[0], parser))
    flags = vars(known)
    file = Path(flags.pop("config")) if flags.get("config") else config
    flags.pop("config", None)
    ignored = [name for name in WITHOUT_EFFECT if name in flags]
    given = {
        **(_read_yaml(file, ignored) if file is not None else {}),
        **{name: value for name, value in flags.items() if name not in WITHOUT_EFFECT},
    }
    values = {name: _convert(name, value) for name, value in {**(defaults or {}), **given}.items()}
    interval = environ.get("HEALTH_CHECK_INTERVAL_SECONDS")
    if interval and "health_check_interval" not in values:
        values["health_check_interval"] = _convert(
            "health_check_interval", interval, "HEALTH_CHECK_INTERVAL_SECONDS"
        )
    if not values.get("model_dir"):
        values["model_dir"] = str(default_checkpoint())
    settings = Settings(**values)
    settings.check()
    if not Path(settings.model_dir).is_dir():
        raise SettingsError(f"--model_dir {settings.model_dir}: no such directory")
    return Parsed(settings, _notes(settings, set(given), ignored))


def from_environment(environ: Mapping[str, str] = os.environ) -> Parsed:
    """Return the settings of `gunicorn wsgi_wrapper:app`: LIGHT_TTS_FLAGS (a command line), then
    LIGHT_TTS_CONFIG or config/production.yaml, then the defaults of run.sh."""
    config = Path(environ["LIGHT_TTS_CONFIG"]) if environ.get("LIGHT_TTS_CONFIG") else PRODUCTION_CONFIG
    default = config == PRODUCTION_CONFIG and not config.exists()
    argv = shlex.split(environ.get("LIGHT_TTS_FLAGS", ""))
    return parse(argv, GUNICORN_DEFAULTS, None if default else config, environ)


def refuse(error: SettingsError) -> NoReturn:
    print(f"light-tts: error: {error}", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report the error without the usage of all flags, which would hide the message."""
        raise SettingsError(message)


def _unknown_flag(argument: str, parser: argparse.ArgumentParser) -> str:
    name = argument.partition("=")[0]
    flags = [action.option_strings[-1] for action in parser._actions]
    near = difflib.get_close_matches(name, flags, 1)
    return f"{name}: unknown flag; {f'did you mean {near[0]}?' if near else '--help lists all'}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m light_tts.server.api_server",
        description="Text-to-speech server for CosyVoice-format checkpoints.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="YAML file of settings with the same names; flags take precedence",
    )
    for name, hint in _HINTS.items():
        default = _FIELDS[name].default
        text = _description(hint)
        shown = " ".join(default) if isinstance(default, tuple) else default
        if default not in (None, ""):
            text += f" (default: {shown})"
        options: dict[str, Any] = {"help": text.replace("%", "%%")}
        if _is_bool(hint):
            options.update(nargs="?", const="True", metavar="True|False")
        elif name == "mode":
            options.update(nargs="+", action="extend", metavar="NAME")
        else:
            options.update(metavar=_metavar(hint))
        parser.add_argument(f"--{name}", **options)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", nargs="?", const="True", help=argparse.SUPPRESS)
    return parser


def _description(hint: Any) -> str:
    notes = [meta.description for meta in typing.get_args(hint)[1:] if isinstance(meta, msgspec.Meta)]
    return next((text for text in reversed(notes) if text), "")


def _plain(hint: Any) -> Any:
    """Return the type without its Annotated wrappers."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _is_bool(hint: Any) -> bool:
    return _plain(hint) is bool


def _metavar(hint: Any) -> str:
    plain = _plain(hint)
    kinds = {int: "N", float: "X", str: "TEXT"}
    inner = [kinds.get(_plain(kind)) for kind in (plain, *typing.get_args(plain))]
    return "|".join([*_words(hint), *(name for name in inner if name)]) or "VALUE"


def _words(hint: Any) -> tuple[str, ...]:
    """Return the words that the type allows: those of a Literal, alone or beside another type."""
    plain = _plain(hint)
    if typing.get_origin(plain) is typing.Literal:
        return typing.get_args(plain)
    return tuple(
        word
        for kind in typing.get_args(plain)
        if typing.get_origin(kind) is typing.Literal
        for word in typing.get_args(kind)
    )


def _convert(name: str, value: Any, shown_as: str = "") -> Any:
    """Return the value converted to the setting's type. Raises SettingsError."""
    shown_as = shown_as or f"--{name}"
    aliases = ALIASES.get(name, {})
    if _is_bool(_HINTS[name]) and isinstance(value, str):
        if value.lower() not in BOOLEANS:
            raise SettingsError(f"{shown_as} {value}: give True or False")
        return BOOLEANS[value.lower()]
    if name == "mode":
        words = " ".join([value] if isinstance(value, str) else map(str, value)).replace(",", " ").split()
        names = typing.get_args(typing.get_args(_plain(_HINTS[name]))[0])
        for word in words:
            if word not in names and word not in aliases:
                available = ", ".join((*names, *map(str, aliases)))
                raise SettingsError(f"{shown_as} {word}: unknown; available: {available}")
        return tuple(dict.fromkeys(aliases.get(word, word) for word in words))
    if isinstance(value, str | bool):
        value = aliases.get(value, value)
    try:
        return msgspec.convert(value, type=_HINTS[name], strict=False)
    except msgspec.ValidationError as error:
        choices = ", ".join(_words(_HINTS[name]))
        if typing.get_origin(_plain(_HINTS[name])) is typing.Literal:
            hint = f"one of {choices}"
        else:
            hint = f"give a number or {choices} ({error})" if choices else str(error)
        raise SettingsError(f"{shown_as} {value}: {hint}") from None


def _read_yaml(path: Path, ignored: list[str]) -> dict[str, Any]:
    """Return the settings in a file; append settings without effect to `ignored`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"--config {path}: expected lines of the form `name: value`")
    values = {}
    for name, value in content.items():
        if name in WITHOUT_EFFECT:
            ignored += [name] if name not in ignored else []
        elif name not in _HINTS:
            raise SettingsError(f"--config {path}: unknown setting {name!r}")
        else:
            values[name] = value
    return values


def _notes(settings: Settings, given: set[str], ignored: list[str]) -> list[str]:
    notes = []
    if ignored:
        notes.append(f"without effect: {', '.join(f'--{name}' for name in ignored)}")
    off = (False, "float32")  # values that hold without CUDA anyway
    idle = [
        f"--{name}"
        for name in NEEDS_CUDA
        if name in given and name != "mode" and getattr(settings, name) not in off
    ]
    if "mode" in given and "triton_flashdecoding" in settings.mode:
        idle.append("--mode triton_flashdecoding")
    if idle and (settings.device == "cpu" or (settings.device == "auto" and not gpu.visible_gpus())):
        where = "--device cpu" if settings.device == "cpu" else "this machine has no CUDA device"
        notes.append(f"{where}: ignoring {', '.join(idle)}")
    return notes
