"""The decision: does this utterance call a tool, and with which arguments.

The answer is constrained by a grammar to `[]` or a list of calls that are valid for the tools' schemas.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec

from yaptext.dialogue.history import Message, keep_recent
from yaptext.dialogue.prompt import Shape, in_roles, joint_to_user, learn_shape
from yaptext.engine.base import DECIDE, Engine, Sampling
from yaptext.errors import BadMessage, EngineFailed, SettingsError, YapError
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
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_INSTRUCTION = """\
You decide whether the user's last message asks for one of these tools. Answer with a JSON list of calls, \
for example [{"name":"NAME","arguments":{...}}]. Answer [] when the message is talk or a question that \
needs no tool. Tools:
"""
_TALK = (
    "How are you today?",
    "Why is the sky blue?",
    "Tell me about your day",
    "I had a long day at work",
    "Who wrote Hamlet?",
    "Good morning!",
    "Tell me a story",
    "I am so happy",
    "What is the largest planet?",
    "Thanks, bye",
)
"""Messages that call for nothing: one stands before each of the tools' own examples, or a small model learns from
them that every message is a call."""
_calls_decoder = msgspec.json.Decoder(list[Call])


class Example(msgspec.Struct, frozen=True):
    """A message that calls a tool, for models whose chat template knows no tools."""

    message: str
    arguments: dict[str, Any]


class ToolSet:
    """A validated list of tools, with the JSON schema of the decisions it allows."""

    __slots__ = ("examples", "key", "names", "schema", "tools")

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        """Takes `{"name", "description", "parameters", "examples"}` or the same under `"function"`; all but the
        name may be absent. Raises `BadMessage`, which names the tool and the field."""
        if len(tools) > MAX_TOOLS:
            raise BadMessage(f"{len(tools)} tools; limit is {MAX_TOOLS} - at $.tools")
        try:
            size = len(msgspec.json.encode(tools))
            if size > MAX_TOOLS_BYTES:
                raise BadMessage(f"tools are {size} bytes of JSON; limit is {MAX_TOOLS_BYTES} - at $.tools")
            self.tools = [_plain(tool, index) for index, tool in enumerate(tools)]
            self.names = [tool["name"] for tool in self.tools]
            self.examples = [
                (example.message, [Call(name, example.arguments)])
                for index, (name, tool) in enumerate(zip(self.names, tools, strict=True))
                for example in _examples(tool, index)
            ]
            self.key = msgspec.json.encode([self.tools, self.examples])
            self.schema = msgspec.json.encode(_answer_schema(self.tools)).decode()
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
    waiting = [(schema, 0)]
    for count in range(1, MAX_SCHEMAS + 2):
        if not waiting:
            return
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


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tool model said. `reason` is set where a fault or the timeout made it a no."""

    calls: list[Call]
    tool_ms: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reason: str | None = None


class Decider:
    """Asks the tool model. Whatever fails, the answer is a decision; only cancellation passes through."""

    def __init__(
        self, engine: Engine, tools: ToolSet, *, max_out: int, history_tokens: int, timeout_s: float, newline: list[int]
    ) -> None:
        self._engine, self.tools, self._newline = engine, tools, newline
        self._max_out, self._history_tokens, self._timeout_s = max_out, history_tokens, timeout_s
        self._heads: OrderedDict[bytes, _Head] = OrderedDict()

    @classmethod
    async def open(
        cls, engine: Engine, tools: ToolSet, *, max_out: int, history_tokens: int, timeout_s: float
    ) -> Decider:
        return cls(
            engine,
            tools,
            max_out=max_out,
            history_tokens=history_tokens,
            timeout_s=timeout_s,
            newline=await engine.encode("\n"),
        )

    async def prime(self) -> None:
        """Runs one throw-away decision, so that the fixed prompt and the grammar are warm."""
        prompt = await self._prompt(self.tools, [], "Hello!")
        async with aclosing(self._engine.stream(prompt, self._sampling(self.tools), priority=DECIDE)) as deltas:
            async for _ in deltas:
                pass

    async def decide(self, tools: ToolSet, messages: Sequence[Message], utterance: str) -> Decision:
        """Decides within the hard timeout. A fault is a `no` with its reason."""
        begun = time.perf_counter()
        text, finish, prompt_tokens, cached = "", None, 0, 0
        calls: list[Call] = []
        reason = None
        try:
            async with asyncio.timeout(self._timeout_s):
                prompt = await self._prompt(tools, messages, utterance)
                stream = self._engine.stream(prompt, self._sampling(tools), priority=DECIDE)
                async with aclosing(stream) as deltas:
                    async for delta in deltas:
                        text += delta.text
                        prompt_tokens, cached = delta.prompt_tokens, delta.cached_tokens
                        finish = delta.finish_reason
            calls = tools.parse(text) if finish == "stop" else []
            reason = None if finish == "stop" else "truncated"
        except TimeoutError:
            reason = "timeout"
        except EngineFailed:
            reason = "engine_failed"
        except ValueError:
            reason = "invalid"
        tool_ms = (time.perf_counter() - begun) * 1000
        return Decision(calls, tool_ms, prompt_tokens, cached, reason)

    def _sampling(self, tools: ToolSet) -> Sampling:
        return Sampling(max_tokens=self._max_out, json_schema=tools.schema)

    async def _prompt(self, tools: ToolSet, messages: Sequence[Message], utterance: str) -> list[int]:
        head = self._heads.get(tools.key)
        if head is None:
            head = self._heads[tools.key] = await _learn_head(self._engine, tools)
            if len(self._heads) > 64:
                self._heads.popitem(last=False)
        else:
            self._heads.move_to_end(tools.key)
        recent = await self._recent(messages, head.labels)
        if head.labels:
            ids = head.ids + [token for message in recent for token in message.ids["tool as text"]]
            return ids + await self._engine.encode(f"Message: {utterance}") + head.shape.closing
        told, role = in_roles(head.shape, recent, "tool", self._newline)
        joint = [] if role == "system" else joint_to_user(head.shape, role, self._newline)
        if role != "system":
            told = told[len(head.shape.after_system) :]  # the head already opens the first message
        return head.ids + told + joint + await self._engine.encode(utterance) + head.shape.closing

    async def _recent(self, messages: Sequence[Message], labels: bool) -> list[Message]:
        """The last whole messages within the limit, beginning with the user's."""
        key = "tool as text" if labels else "tool"
        recent = [m for m in messages[-16:] if m.speaker != "note"]
        for message in recent:
            if key not in message.ids:
                text = f"{message.speaker.capitalize()}: {message.text.strip()}\n" if labels else message.text.strip()
                message.ids[key] = await self._engine.encode(text)
        recent = recent[keep_recent([len(m.ids[key]) for m in recent], self._history_tokens) :]
        while recent and recent[0].speaker != "user":
            recent = recent[1:]
        return recent


@dataclass(frozen=True, slots=True)
class _Head:
    """The fixed beginning of a tool prompt. `labels` says that history is told as labelled text in one user
    message (the general instruction), not in the template's roles."""

    ids: list[int]
    shape: Shape
    labels: bool


async def _learn_head(engine: Engine, tools: ToolSet) -> _Head:
    probe = [{"role": "user", "content": "hello"}]
    functions = [{"type": "function", "function": tool} for tool in tools.tools]
    native = engine.render(probe, functions)
    if native is not None and native != engine.render(probe):
        shape = await learn_shape(engine, functions)
        if shape is not None:
            return _Head(shape.opening, shape, labels=False)
    signatures = (
        f"{tool['name']}({', '.join(tool['parameters'].get('properties', {}))}): {tool['description']}"
        for tool in tools.tools
    )
    instruction = await engine.encode(_INSTRUCTION + "\n".join(signatures))
    shape = await learn_shape(engine)
    if shape is None:
        bare = Shape([], *[await engine.encode(text) for text in ("\n\n", "\nCalls: ", "\n", "\nCalls: ")])
        return _Head(instruction + await _shots(engine, bare, tools), bare, labels=True)
    return _Head(shape.opening + instruction + await _shots(engine, shape, tools), shape, labels=True)


async def _shots(engine: Engine, shape: Shape, tools: ToolSet) -> list[int]:
    """The tools' examples and as many of plain talk as earlier exchanges, up to where the next message opens."""
    ids = list(shape.after_system)
    for talk, (message, calls) in zip(cycle(_TALK), tools.examples, strict=False):
        for said, answer in ((talk, []), (message, calls)):
            ids += await engine.encode(f"Message: {said}") + shape.after_user
            ids += await engine.encode(_dumps(answer)) + shape.after_reply
    return ids


def _dumps(calls: list[Call]) -> str:
    """Calls as the grammar lets the model write them."""
    return msgspec.json.encode(calls).decode()
