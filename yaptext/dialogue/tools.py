"""Tools: the lists of them that are accepted, with the answers that each allows."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from cachetools import LRUCache
from jsonschema_rs import Draft202012Validator

from yaptext.dialogue.tool_schema import check_references, check_schema, for_grammar, for_validator
from yaptext.errors import BadMessage, SettingsError, YapError
from yaptext.files import read_file
from yaptext.wire.frames import Call

MAX_TOOLS = 64
MAX_CALLS = 4
MAX_TOOLS_BYTES = 32_768
_MOST_FILE_BYTES = 1_048_576
"""Of TOOLS_FILE, with the white space of people."""
MAX_SCHEMAS_IN_ALL = 1024
MAX_EXAMPLES = 64
_LATEST_SETS = 64
_BYTES_A_BYTE = 24
"""What a tool set takes in memory for each byte of its JSON, at worst (of `{}`s)."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_calls_decoder = msgspec.json.Decoder(list[Call])


class Example(msgspec.Struct, frozen=True):
    """A message that calls a tool, for models whose chat template knows no tools."""

    message: str
    arguments: dict[str, Any]


class ToolSet:
    """A validated list of tools, with the JSON schema of the decisions it allows: `schema`, or `call_schema` where no
    is not among them."""

    __slots__ = (
        "__weakref__", "_validators", "awaited", "bytes", "call_schema", "examples", "given", "key", "names", "schema",
        "tools",
    )  # fmt: skip

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """Takes `{"name", "description", "parameters", "examples"}` or the same under `"function"`; all but the
        name may be absent. `"await"` says that its calls are to be answered. Raises `BadMessage`, which names the
        tool and the field."""
        for _ in self._fill(tools):
            pass

    @classmethod
    async def made(cls, tools: Sequence[dict[str, Any]]) -> ToolSet:
        """The same in small steps, so that a long list does not hold up the event loop."""
        made = cls.__new__(cls)
        for _ in made._fill(tools):
            await asyncio.sleep(0)
        return made

    def _fill(self, tools: Sequence[dict[str, Any]]) -> Iterator[None]:
        if len(tools) > MAX_TOOLS:
            raise BadMessage(f"{len(tools)} tools; limit is {MAX_TOOLS} - at $.tools")
        try:
            size = len(msgspec.json.encode(tools))
            if size > MAX_TOOLS_BYTES:
                raise BadMessage(f"tools are {size} bytes of JSON; limit is {MAX_TOOLS_BYTES} - at $.tools")
            self.given = tools
            self.bytes = _BYTES_A_BYTE * size
            self.tools: list[dict[str, Any]] = []
            calls: list[dict[str, Any]] = []
            definitions: dict[str, Any] = {}
            self.examples: list[tuple[str, list[Call]]] = []
            self.awaited: set[str] = set()
            self._validators: dict[str, Draft202012Validator] = {}
            schemas = 0
            for index, given in enumerate(tools):
                tool, count = _plain(given, index)
                name = tool["name"]
                schemas += count
                if schemas > MAX_SCHEMAS_IN_ALL:
                    raise BadMessage(f"more than {MAX_SCHEMAS_IN_ALL} schemas in all tools - at $.tools")
                self.tools.append(tool)
                if _awaits(given, index):
                    self.awaited.add(name)
                self.examples += [
                    (example.message, [Call(name, example.arguments)]) for example in _examples(given, index)
                ]
                if len(self.examples) > MAX_EXAMPLES:
                    raise BadMessage(f"more than {MAX_EXAMPLES} examples in all tools - at $.tools")
                yield from check_references(tool["parameters"], name, f"$.tools[{index}].parameters")
                self._validators[name] = _validator(tool, index)
                call, definition = _call_schema(tool, index)
                calls.append(call)
                definitions |= definition
                yield
            self.names = [tool["name"] for tool in self.tools]
            self.key = msgspec.json.encode([self.tools, self.examples])
            yield
            answer = _answer_schema(calls, definitions)
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
                text = read_file(path, _MOST_FILE_BYTES)
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
            if not self._validators[call.name].is_valid(call.arguments):
                raise ValueError(f"the arguments of {call.name} do not fit its schema")
        return calls


def _validator(tool: dict[str, Any], index: int) -> Draft202012Validator:
    try:
        return Draft202012Validator(for_validator(tool["parameters"]))
    except ValueError as error:
        problem = " ".join(str(error).split())[:200]
        raise BadMessage(f"tool {tool['name']!r}: {problem} - at $.tools[{index}].parameters") from None


def _plain(tool: dict[str, Any], index: int) -> tuple[dict[str, Any], int]:
    """The tool in one form, and how many schemas it has."""
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
    schemas = check_schema(parameters, name, f"{where}.parameters")
    return {"name": name, "description": description, "parameters": parameters}, schemas


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


def _call_schema(tool: dict[str, Any], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of one call, and definitions that it points to."""
    parameters, definitions = tool["parameters"], {}
    if b'"$ref"' in msgspec.json.encode(parameters):
        place = f"#/$defs/tool{number}"
        definitions[f"tool{number}"] = for_grammar(parameters, place)
        arguments: Any = {"$ref": place}
    else:
        arguments = for_grammar(parameters)
    call = {
        "type": "object",
        "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return call, definitions


def _answer_schema(calls: list[dict[str, Any]], definitions: dict[str, Any]) -> dict[str, Any]:
    if not calls:
        return {"type": "array", "maxItems": 0}
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 0, "maxItems": MAX_CALLS}
    return schema | {"$defs": definitions} if definitions else schema


class ToolSets:
    """The tool sets of clients, each checked once and shared by all clients that send the same."""

    def __init__(self, check: Callable[[str], Awaitable[None]]) -> None:
        """`check` is the engine's: it raises `BadMessage` for a schema that takes too long to compile."""
        self._check = check
        self._sets: WeakValueDictionary[bytes, ToolSet] = WeakValueDictionary()
        self._latest: LRUCache[bytes, ToolSet] = LRUCache(_LATEST_SETS)

    def known(self, tools: list[dict[str, Any]]) -> ToolSet | None:
        """The set of such a list, if it was made before."""
        written = msgspec.json.encode(tools)
        found = self._sets.get(written)
        if found is not None:
            self._latest[written] = found
        return found

    async def make(self, tools: list[dict[str, Any]]) -> None:
        """From now on the list is known. Raises `BadMessage`."""
        made = await ToolSet.made(tools)
        if made.names:
            await self._check(made.schema)
        written = msgspec.json.encode(tools)
        self._sets[written] = self._latest[written] = made
