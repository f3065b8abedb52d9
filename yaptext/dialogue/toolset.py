"""Tools: which lists of them are accepted, and which answers they allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from yaptext.errors import BadMessage, SettingsError, YapError
from yaptext.wire.messages import Call

MAX_TOOLS = 64
MAX_CALLS = 4
MAX_TOOLS_BYTES = 32_768
MAX_SCHEMAS = 128
MAX_SCHEMA_DEPTH = 16
_REFUSED_WORDS = {"pattern", "patternProperties", "format"}
_ONE_SCHEMA = {"items", "additionalProperties", "not", "contains", "propertyNames"}
_NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
_LISTED_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_REFERENCE = re.compile(r"#(/(\$defs|definitions|properties)/[^/]+|/items)*")
"""A `$ref` to what `_check_schema` looks at. Any other the grammar's library quotes on stderr."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_calls_decoder = msgspec.json.Decoder(list[Call])


class Example(msgspec.Struct, frozen=True):
    """A message that calls a tool, for models whose chat template knows no tools."""

    message: str
    arguments: dict[str, Any]


class ToolSet:
    """A validated list of tools, with the JSON schema of the decisions it allows: `schema`, or `call_schema` where no
    is not among them."""

    __slots__ = ("call_schema", "examples", "given", "key", "names", "schema", "tools")

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """Takes `{"name", "description", "parameters", "examples"}` or the same under `"function"`; all but the
        name may be absent. Raises `BadMessage`, which names the tool and the field."""
        if len(tools) > MAX_TOOLS:
            raise BadMessage(f"{len(tools)} tools; limit is {MAX_TOOLS} - at $.tools")
        try:
            size = len(msgspec.json.encode(tools))
            if size > MAX_TOOLS_BYTES:
                raise BadMessage(f"tools are {size} bytes of JSON; limit is {MAX_TOOLS_BYTES} - at $.tools")
            self.given = tools
            self.tools = [_plain(tool, index) for index, tool in enumerate(tools)]
            self.names = [tool["name"] for tool in self.tools]
            self.examples = [
                (example.message, [Call(name, example.arguments)])
                for index, (name, tool) in enumerate(zip(self.names, tools, strict=True))
                for example in _examples(tool, index)
            ]
            self.key = msgspec.json.encode([self.tools, self.examples])
            answer = _answer_schema(self.tools)
            self.schema = msgspec.json.encode(answer).decode()
            self.call_schema = msgspec.json.encode(answer | {"minItems": min(1, answer["maxItems"])}).decode()
        except RecursionError:
            raise BadMessage("the schemas are nested too deep - at $.tools") from None
        if len(set(self.names)) != len(self.names):
            raise BadMessage("two tools have the same name - at $.tools")

    @classmethod
    def from_file(cls, path: Path | None) -> ToolSet:
        """The tools of `TOOLS_FILE`, or the built-in five. Raises `SettingsError`."""
        try:
            if path is None:
                text = (resources.files("yaptext.dialogue") / "tools.json").read_bytes()
            else:
                text = path.read_bytes()
            return cls(msgspec.json.decode(text, type=list[dict[str, Any]]))
        except (OSError, msgspec.DecodeError, YapError) as error:
            raise SettingsError(f"TOOLS_FILE={str(path)!r} is not a list of tools: {error}") from None

    def parse(self, text: str) -> list[Call]:
        """The calls of a finished decision, whose arguments the grammar has held to their schemas.
        Raises `ValueError` for what is no list of calls of these tools."""
        try:
            calls = _calls_decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        unknown = [call.name for call in calls if call.name not in self.names]
        if unknown or len(calls) > MAX_CALLS:
            raise ValueError(f"{len(calls)} calls, {len(unknown)} of unknown tools")
        return calls


def _plain(tool: dict[str, Any], index: int) -> dict[str, Any]:
    tool = tool.get("function", tool)
    where = f"$.tools[{index}]"
    if not isinstance(tool, dict):
        raise BadMessage(f"Expected object, got {type(tool).__name__} - at {where}.function")
    name, description = tool.get("name"), tool.get("description", "")
    parameters = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadMessage(f"a tool's name is 1 to 64 of A-Z a-z 0-9 _ . - - at {where}.name")
    if not isinstance(description, str):
        raise BadMessage(f"Expected str - at {where}.description")
    if not isinstance(parameters, dict) or parameters.get("type") != "object":
        raise BadMessage(f"parameters must be a JSON schema of type object - at {where}.parameters")
    _check_schema(parameters, f"{where}.parameters")
    return {"name": name, "description": description, "parameters": parameters}


def _check_schema(schema: Any, where: str) -> None:
    """Refuses what is no JSON schema, and what costs the engine seconds to turn into a grammar: patterns, and
    schemas that are very deep or very many."""
    waiting, count = [(schema, 0)], 0
    while waiting:
        count += 1
        if count > MAX_SCHEMAS:
            raise BadMessage(f"more than {MAX_SCHEMAS} schemas in one tool - at {where}")
        part, depth = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise BadMessage(f"Expected a schema (object or bool), got {type(part).__name__} - at {where}")
        if depth > MAX_SCHEMA_DEPTH:
            raise BadMessage(f"schemas are nested deeper than {MAX_SCHEMA_DEPTH} - at {where}")
        for word in _REFUSED_WORDS & part.keys():
            raise BadMessage(f"{word!r} is not possible in a tool's schema - at {where}")
        reference = part.get("$ref", "#")
        if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference):
            raise BadMessage(f"'$ref' must point to one of the schema's own $defs, as #/$defs/NAME - at {where}")
        required = part.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise BadMessage(f"'required' must be a list of str - at {where}")
        inner: list[Any] = [part[word] for word in _ONE_SCHEMA & part.keys()]
        for word in _NAMED_SCHEMAS & part.keys():
            if not isinstance(part[word], dict):
                raise BadMessage(f"{word!r} must be an object - at {where}")
            inner += part[word].values()
        for word in _LISTED_SCHEMAS & part.keys():
            if not isinstance(part[word], list):
                raise BadMessage(f"{word!r} must be a list - at {where}")
            inner += part[word]
        waiting += [(item, depth + 1) for item in inner]


def _examples(tool: dict[str, Any], index: int) -> list[Example]:
    try:
        return msgspec.convert(tool.get("function", tool).get("examples", []), list[Example])
    except msgspec.ValidationError as error:
        raise BadMessage(f"{error} - of $.tools[{index}].examples".replace("`", "")) from None


def _answer_schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    if not tools:
        return {"type": "array", "maxItems": 0}
    calls, definitions = [], {}
    for number, tool in enumerate(tools):
        arguments = tool["parameters"]
        if b'"$ref"' in msgspec.json.encode(arguments):
            definitions[f"tool{number}"] = _rooted(arguments, f"#/$defs/tool{number}")
            arguments = {"$ref": f"#/$defs/tool{number}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 0, "maxItems": MAX_CALLS}
    return schema | {"$defs": definitions} if definitions else schema


def _rooted(schema: Any, root: str) -> Any:
    """A schema whose own references (`#`, `#/$defs/...`) point below `root`, where it will stand."""
    if isinstance(schema, list):
        return [_rooted(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rooted = {name: _rooted(value, root) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        rooted["$ref"] = root + reference[1:]
    return rooted
