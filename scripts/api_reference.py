"""The reference in docs/api.md (routes, fields, errors), generated from the server's OpenAPI schema.

python scripts/api_reference.py            print it
python scripts/api_reference.py --write    put it into docs/api.md between its two markers
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from light_tts.server.api_http import create_app
from light_tts.server.core.rundir import RunDir
from light_tts.server.core.settings import Settings
from light_tts.server.httpserver.openapi import ERRORS
from light_tts.tools.generated_section import GeneratedSection

ROOT = Path(__file__).resolve().parent.parent
SHARED = "Fields of every speech request"
VALIDATION = "#/components/schemas/HTTPValidationError"  # FastAPI's, for paths that are any text here

LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "at most"}

Schema = dict[str, Any]


def operations() -> Iterator[tuple[str, str, Schema]]:
    """(method, path, operation) of every route in the schema."""
    app = create_app(
        Settings(model_dir=str(ROOT / "pretrained_models" / "light-tts-mini")), RunDir.__new__(RunDir)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # routes of CosyVoice have one name for GET and POST
        schema = app.openapi()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def body(operation: Schema) -> Schema | None:
    content = operation.get("requestBody", {}).get("content", {})
    return content["application/json"]["schema"] if content else None


def statuses(operation: Schema) -> str:
    """Return the error statuses of a route, separated by commas."""
    return ", ".join(
        status
        for status, answer in operation["responses"].items()
        if status >= "4" and VALIDATION not in str(answer.get("content"))
    )


def first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def kind(field: Schema, definitions: Schema) -> str:
    """The type and the limits of a field, in words."""
    if "$ref" in field:
        return kind(definitions[field["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in field:
        kinds = [kind(choice, definitions) for choice in field["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`".lower() for value in field.get("enum", [field.get("const")]))
    if field.get("format") == "binary":
        return "recording"
    limits = [f"{words} {field[key]:.10g}" for key, words in LIMITS.items() if key in field]
    named = {"boolean": "`true`, `false`", "string": "text"}.get(field["type"], str(field["type"]))
    return " ".join([named, *limits, *(["characters"] if "maxLength" in field else [])])


def default(name: str, field: Schema, model: Schema) -> str:
    if name in model.get("required", ()):
        return "required"
    value = field.get("default")
    return "" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def rows(model: Schema) -> list[str]:
    """A row of Markdown for each field of a body."""
    definitions = model.get("$defs", {})
    return [
        f"| `{name}` | {kind(field, definitions)} | {default(name, field, model)} | "
        f"{cell(field.get('description', ''))} |"
        for name, field in model["properties"].items()
        if field.get("type") != "null"
    ]


def table(found: list[str]) -> list[str]:
    return ["| field | type | default | meaning |", "| --- | --- | --- | --- |", *found, ""]


def reference() -> str:
    """The reference as Markdown."""
    lines = ["### Routes", "", "| route | | fields | errors |", "| --- | --- | --- | --- |"]
    models: dict[str, list[str]] = {}
    routes: dict[tuple[str, str], list[str]] = {}  # what is said of a path -> its methods
    for method, path, operation in operations():
        fields = ", ".join(f"`{query['name']}`" for query in operation.get("parameters", ()))
        model = body(operation)
        if model is not None:
            models[model["title"]] = rows(model)
            fields = ", ".join(filter(None, [fields, f"[{model['title']}](#{model['title'].lower()})"]))
        what = cell(first_paragraph(operation.get("description", "")))
        routes.setdefault((path, f"{what} | {fields} | {statuses(operation)}"), []).append(method)
    lines += [f"| `{'`, `'.join(methods)} {path}` | {said} |" for (path, said), methods in routes.items()]
    speech = [set(found) for found in models.values() if any("`seed`" in row for row in found)]
    shared = [row for row in next(iter(models.values())) if all(row in found for found in speech)]
    lines += ["", f"### {SHARED}", "", *table(shared)]
    for title, found in models.items():
        own = [row for row in found if row not in shared]
        lines += [f"### {title}", ""]
        if len(own) < len(found):
            lines += [f"And the [fields of every speech request](#{SHARED.lower().replace(' ', '-')}).", ""]
        lines += table(own)
    lines += ["### Errors", "", "| status | meaning |", "| --- | --- |"]
    lines += [f"| {status} | {meaning} |" for status, meaning in ERRORS.items()]
    return "\n".join(lines) + "\n"


SECTION = GeneratedSection(
    page=ROOT / "docs" / "api.md",
    begin="<!-- reference: written by scripts/api_reference.py -->\n",
    end="<!-- end of reference -->",
    make=reference,
)


if __name__ == "__main__":
    SECTION.main()
