"""Tools: which lists of them are accepted, and which answers they allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

from yaptext.dialogue.toolschema import check_schema
from yaptext.errors import BadMessage, SettingsError, YapError
from yaptext.wire.messages import Call

MAX_TOOLS = 64
MAX_CALLS = 4
MAX_TOOLS_BYTES = 32_768
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_calls_decoder = msgspec.json.Decoder(list[Call])


class Example(msgspec.Struct, frozen=True):
    """A message that calls a tool, for models whose chat template knows no tools."""

    message: str
    arguments: dict[str, Any]


class ToolSet:
    """A validated list of tools, with the JSON schema of the decisions it allows: `schema`, or `call_schema` where no
    is not among them."""

    __slots__ = ("_validators", "awaited", "call_schema", "examples", "given", "key", "names", "schema", "tools")

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """Takes `{"name", "description", "parameters", "examples"}` or the same under `"function"`; all but the
        name may be absent. `"await"` says that its calls are to be answered. Raises `BadMessage`, which names the
        tool and the field."""
        if len(tools) > MAX_TOOLS:
            raise BadMessage(f"{len(tools)} tools; limit is {MAX_TOOLS} - at $.tools")
        try:
            size = len(msgspec.json.encode(tools))
            if size > MAX_TOOLS_BYTES:
                raise BadMessage(f"tools are {size} bytes of JSON; limit is {MAX_TOOLS_BYTES} - at $.tools")
            self.given = tools
            self.tools = [_plain(tool, index) for index, tool in enumerate(tools)]
            self.names = [tool["name"] for tool in self.tools]
            self.awaited = {self.names[index] for index, tool in enumerate(tools) if _awaits(tool, index)}
            self._validators: dict[str, Draft202012Validator] = {}
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
        """The calls of a finished decision. Raises `ValueError` for what is no list of calls of these tools, and for
        arguments that do not fit their schema: the grammar holds to most of its words, not to all."""
        try:
            calls = _calls_decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from None
        unknown = [call.name for call in calls if call.name not in self.names]
        if unknown or len(calls) > MAX_CALLS:
            raise ValueError(f"{len(calls)} calls, {len(unknown)} of unknown tools")
        for call in calls:
            if not self._validator(call.name).is_valid(call.arguments):
                raise ValueError(f"the arguments of {call.name} do not fit its schema")
        return calls

    def _validator(self, name: str) -> Draft202012Validator:
        if name not in self._validators:
            self._validators[name] = Draft202012Validator(self.tools[self.names.index(name)]["parameters"])
        return self._validators[name]


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
    check_schema(parameters, name, f"{where}.parameters")
    return {"name": name, "description": description, "parameters": parameters}


def _awaits(tool: dict[str, Any], index: int) -> bool:
    """Whether a call of the tool is to be answered before the reply comes."""
    waits = tool.get("await", tool.get("function", tool).get("await", False))
    if not isinstance(waits, bool):
        raise BadMessage(f"Expected bool - at $.tools[{index}].await")
    return waits


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
