"""Which JSON schemas the arguments of a tool may have: those that the engine turns into a grammar soon.

The grammar is made of a list of words, and within bounds; all other words of a schema only reach the model, and a call
is checked by them. Compiling is what is dear: with a vocabulary of 49,000, a `maxLength` of 100 takes 1.1 s, one of 16
takes 0.12, `minProperties` 1 among 100 properties 2.4, 64 ranges of numbers 0.13, 128 properties 0.04.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from yaptext.errors import BadMessage

MAX_SCHEMAS = 128
MAX_SCHEMA_DEPTH = 16
_SLOW = {"pattern", "patternProperties", "format", "unevaluatedProperties", "unevaluatedItems"}
_NOT_COMPILED = {
    "uniqueItems", "multipleOf", "contains", "minContains", "maxContains", "propertyNames", "$dynamicRef", "$anchor",
}  # fmt: skip
"""xgrammar 0.2.8, and vLLM 0.32 in front of it."""
_IN_GRAMMAR = {
    "type", "enum", "const", "required", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "$ref",
}  # fmt: skip
_CHECKED = _IN_GRAMMAR | {"minLength", "maxLength", "minProperties", "maxProperties", "dependentRequired"}
"""What else may refuse arguments, beside the schemas in a schema."""
MAX_CHECKS = 2_000
"""On one way into the arguments. jsonschema-rs takes 19 ms for a million."""
_LEVELS = 24
"""So deep values in values are counted. Schemas that multiply do so at each level."""
_MAX_COUNTED_PROPERTIES = 24
"""Of an object whose `minProperties` or `maxProperties` the grammar holds to."""
MAX_RANGES = 64
_LARGEST = 10**15
"""Of a bound; xgrammar takes none of hundreds of digits."""
_RANGES = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_ONE_SCHEMA = {"items", "additionalProperties", "not", "if", "then", "else"}
_NAMED_SCHEMAS = {"properties", "$defs", "definitions", "dependentSchemas"}
_LISTED_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
_TYPES = {"object", "array", "string", "integer", "number", "boolean", "null"}
_SIZES = ("Length", "Items", "Properties")
_REFERENCE = re.compile(r"#(/(\$defs|definitions|properties)/[^/]+|/items)*")
"""A `$ref` to what is looked at here. Any other the grammar's library quotes on stderr."""


def check_schema(schema: Any, name: str, where: str) -> int:
    """How many schemas there are in it. Raises `BadMessage`, which names the tool, the word and the place, for what is
    no JSON schema, for what no grammar can be made of, and for what costs the engine seconds: patterns, and schemas or
    ranges of numbers that are deep or many."""

    def refuse(problem: str) -> BadMessage:
        return BadMessage(f"tool {name!r}: {problem} - at {where}")

    waiting, count, ranges = [(schema, 0)], 0, 0
    while waiting:
        count += 1
        if count > MAX_SCHEMAS:
            raise refuse(f"more than {MAX_SCHEMAS} schemas in one tool")
        part, depth = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise refuse(f"Expected a schema (object or bool), got {type(part).__name__}")
        if depth > MAX_SCHEMA_DEPTH:
            raise refuse(f"schemas are nested deeper than {MAX_SCHEMA_DEPTH}")
        for word in sorted((_SLOW | _NOT_COMPILED) & part.keys()):
            if (word, part[word]) != ("uniqueItems", False):  # which asks for nothing
                raise refuse(f"{word!r} is not possible in a tool's schema")
        if (problem := _problem(part, schema)) is not None:
            raise refuse(problem)
        ranges += not _RANGES.isdisjoint(part)
        if ranges > MAX_RANGES:
            raise refuse(f"more than {MAX_RANGES} ranges of numbers in one tool")
        inner: list[Any] = [part[word] for word in _ONE_SCHEMA & part.keys()]
        for word in _NAMED_SCHEMAS & part.keys():
            if not isinstance(part[word], dict):
                raise refuse(f"{word!r} must be an object")
            if False in part[word].values():
                raise refuse(f"{word!r} holds the schema false, which nothing fits")
            inner += part[word].values()
        for word in _LISTED_SCHEMAS & part.keys():
            if not isinstance(part[word], list) or not part[word]:
                raise refuse(f"{word!r} must be a list that is not empty")
            if word == "allOf" and len(part[word]) > 1:
                raise refuse("'allOf' of more than one schema is not possible: write them as one")
            inner += part[word]
        waiting += [(item, depth + 1) for item in inner]
    return count


def check_references(root: dict[str, Any], name: str, where: str) -> Iterator[None]:
    """In steps of some milliseconds, for a schema that `check_schema` takes. Raises `BadMessage` if validating a call
    might take long: `$ref`s that lead to each other in several ways multiply. Counts the schemas that look at one value
    of the arguments, and at those inside it, on the costliest way in."""
    parts = list(_parts(root))
    if not any("$ref" in part for part in parts):
        return
    within: dict[int, int] = {}
    for _ in range(_LEVELS):
        found: dict[int, Counter[str]] = {}
        totals = {}
        for part in parts:
            looks = _looks(part, root, within, found, set())
            inside = [count for place, count in looks.items() if place not in ("", "*")]
            totals[id(part)] = looks[""] + looks["*"] + max(inside, default=0)
        if max(totals.values(), default=0) > MAX_CHECKS:
            problem = f"its schemas would look at a value more than {MAX_CHECKS} times: '$ref' multiplies them"
            raise BadMessage(f"tool {name!r}: {problem} - at {where}")
        if totals == within:
            return
        within = totals
        yield


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and those in it."""
    if isinstance(schema, dict):
        yield schema
        for part in (schema[word] for word in _ONE_SCHEMA & schema.keys()):
            yield from _parts(part)
        for word in _NAMED_SCHEMAS & schema.keys():
            for part in schema[word].values():
                yield from _parts(part)
        for word in _LISTED_SCHEMAS & schema.keys():
            for part in schema[word]:
                yield from _parts(part)


def _looks(
    part: Any, root: dict[str, Any], within: dict[int, int], found: dict[int, Counter[str]], open: set[int]
) -> Counter[str]:
    """How many schemas look at a value and at those inside it: "" is the value, "*" any value inside, another key one
    place inside. `within` has the sums of one level further in, `found` what is known of this level. A part in `open`
    is being counted: one that leads back to itself at the same value is never done."""
    if not isinstance(part, dict):
        return Counter({"": 1})
    if id(part) in open:
        return Counter({"": MAX_CHECKS + 1})
    if id(part) not in found:
        open.add(id(part))
        here = [part[word] for word in ("not", "if", "then", "else") if word in part]
        here += [each for word in ("anyOf", "oneOf", "allOf") for each in part.get(word, ())]
        here += part.get("dependentSchemas", {}).values()
        if "$ref" in part:
            here.append(_target(part["$ref"], root))
        inside = [("*", part[word]) for word in ("items", "additionalProperties") if word in part]
        inside += [(f".{name}", each) for name, each in part.get("properties", {}).items()]
        inside += [(str(index), each) for index, each in enumerate(part.get("prefixItems", ()))]
        looks = Counter({"": 1})
        for place, each in inside:
            looks[place] += within.get(id(each), 1)
        for each in here:
            looks.update(_looks(each, root, within, found, open))
        found[id(part)] = Counter({place: min(count, MAX_CHECKS + 1) for place, count in looks.items()})
        open.discard(id(part))
    return found[id(part)]


def for_grammar(schema: Any, root: str = "#") -> Any:
    """What the grammar is made of; `$ref`s point below `root`, where the schema will stand."""
    if not isinstance(schema, dict):
        return schema
    kept = {word: value for word, value in schema.items() if word in _IN_GRAMMAR}
    if "$ref" in kept:
        kept["$ref"] = root + kept["$ref"][1:]
    for word in ("properties", "$defs", "definitions"):
        if word in schema:
            kept[word] = {name: for_grammar(part, root) for name, part in schema[word].items()}
    for word in ("items", "additionalProperties"):
        if word in schema:
            kept[word] = for_grammar(schema[word], root)
    for word in _LISTED_SCHEMAS & schema.keys():
        kept[word] = [for_grammar(part, root) for part in schema[word]]
    if schema.get("minLength"):
        kept["minLength"] = 1
    if len(schema.get("properties", ())) <= _MAX_COUNTED_PROPERTIES:
        kept |= {word: schema[word] for word in ("minProperties", "maxProperties") if word in schema}
    return kept


def for_validator(schema: Any) -> Any:
    """What a call's arguments are checked by: without words that only describe. The validator takes no schema with one
    that is not as JSON Schema has it, a `description` of null for one, or with a name twice in `required`."""
    if not isinstance(schema, dict):
        return schema
    kept = {
        word: list(dict.fromkeys(value)) if word in ("type", "required") and isinstance(value, list) else value
        for word, value in schema.items()
        if (word in _CHECKED and value is not None) or word == "const"
    }
    if "$ref" in kept:  # names are as they are written, and the validator reads a URI
        steps = schema["$ref"][1:].split("/")
        kept["$ref"] = "#" + "/".join(quote(step.replace("~", "~0"), safe="~") for step in steps)
    kept |= {word: for_validator(schema[word]) for word in _ONE_SCHEMA & schema.keys()}
    for word in _NAMED_SCHEMAS & schema.keys():
        kept[word] = {name: for_validator(part) for name, part in schema[word].items()}
    for word in _LISTED_SCHEMAS & schema.keys():
        kept[word] = [for_validator(part) for part in schema[word]]
    return kept


def _problem(part: dict[str, Any], root: dict[str, Any]) -> str | None:
    """What is wrong with the words of one schema that hold no schemas."""
    if "$ref" in part:
        reference = part["$ref"]
        if not isinstance(reference, str) or not _REFERENCE.fullmatch(reference) or _target(reference, root) is None:
            return "'$ref' must point to one of the schema's own $defs, as #/$defs/NAME"
    kinds = part.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not all(isinstance(kind, str) and kind in _TYPES for kind in kinds) or ("type" in part and not kinds):
        return f"'type' must be one or some of {', '.join(sorted(_TYPES))}"
    if "enum" in part and (not isinstance(part["enum"], list) or not part["enum"]):
        return "'enum' must be a list that is not empty"
    required = part.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "'required' must be a list of str"
    if isinstance(part.get("properties"), dict) and (missing := [n for n in required if n not in part["properties"]]):
        return f"'required' names {missing[0]!r}, which is not in 'properties'"
    for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if word in part and (isinstance(part[word], bool) or not isinstance(part[word], int | float)):
            return f"{word!r} must be a number"
        if word in part and not abs(part[word]) <= _LARGEST:
            return f"{word!r} must be within 10^15"
    lowest = max((part[word] for word in ("minimum", "exclusiveMinimum") if word in part), default=None)
    highest = min((part[word] for word in ("maximum", "exclusiveMaximum") if word in part), default=None)
    if lowest is not None and highest is not None and lowest >= highest and part.get("minimum") != part.get("maximum"):
        return "'minimum' is above 'maximum'"
    for size in _SIZES:
        least, most = part.get(f"min{size}") or 0, part.get(f"max{size}")
        for word, bound in ((f"min{size}", least), (f"max{size}", most)):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 0):
                return f"{word!r} must be a whole number from 0 on"
        if most is not None and least > most:
            return f"'min{size}' is above 'max{size}'"
    return _unfit_counts(part)


def _unfit_counts(part: dict[str, Any]) -> str | None:
    properties, listed = part.get("properties", {}), part.get("prefixItems", [])
    closed = not part.get("additionalProperties")
    if closed and isinstance(properties, dict) and (part.get("minProperties") or 0) > len(properties):
        return f"'minProperties' is above the {len(properties)} of 'properties'"
    required, most = part.get("required", []), part.get("maxProperties")
    if most is not None and len(required) > most:
        return f"'required' names {len(required)}, and 'maxProperties' allows {most}"
    if part.get("items", False) is False and isinstance(listed, list) and (part.get("minItems") or 0) > len(listed):
        return f"'minItems' is above the {len(listed)} of 'prefixItems', and 'items' allows no more"
    return None


def _target(reference: str, root: Any) -> Any:
    """What it points to, or None."""
    for step in reference.split("/")[1:]:
        if not isinstance(root, dict) or step not in root:
            return None
        root = root[step]
    return root
