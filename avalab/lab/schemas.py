"""JSON Schemas of functions' arguments: one translation that everything reads, and one rewriting for grammars.

1. `to_json_schema` turns a function's description (BFCL's dialect, OpenAPI's, any draft's) into JSON Schema 2020-12;
   gates, checker, tools and grammars judge by its result.
2. `refuse_loops` finds references that lead nowhere, out of the schema, or back to themselves.
3. `Rewriting` puts a schema into the words that xgrammar enforces, and says whether something was lost.

Source: JSON Schema 2020-12 (core and validation). What it does not do: anchors, and schemas that lie elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any
from urllib.parse import unquote

import jsonschema

from avalab.lab.errors import InputError

JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}

REWRITTEN_KEYWORDS = ("type", "items", "properties", "required", "optional", "$id", "$schema")

IN_SCHEMA = (  # words whose value is a schema of other values than the object's own
    *("additionalProperties", "additionalItems", "contains", "propertyNames", "unevaluatedItems"),
    "unevaluatedProperties",
)

OPENING = {"$ref", "if", "patternProperties", "dependentSchemas", "unevaluatedProperties"}  # beside `properties`

NOT_ENFORCED = {  # xgrammar reads these words of a schema and accepts what they forbid, or forbids more
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
    *("dependentRequired", "dependentSchemas", "patternProperties", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
}

TYPES = ("object", "array", "string", "number", "boolean", "null")

LEAST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}

MOST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}

KEPT = {
    *("type", "enum", "properties", "required", "additionalProperties", "items", "prefixItems", "pattern", "format"),
    *("multipleOf", *LEAST, *MOST),
}

WORDS = {*KEPT, *NOT_ENFORCED, "$ref", "const", "allOf", "anyOf", "oneOf"}

MOST_PARTS, MOST_ALTERNATIVES = 5000, 64  # of one schema; a larger one is loosened

_WHOLE = re.compile(r"\^(?:[^|$^?\\]|\\[dwsDWS.+*/\-]|(?<!\()\?)*\$")

_MISPRINTED = re.compile(r"[\x7f-\xff][0-9A-Fa-f]")  # xgrammar prints `°C` as `\xb0C`, and reads another character


def to_json_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a function's arguments; an object with `properties` has no others unless it says so.

    BFCL's names of types are translated at every depth, "any" becomes a schema without a type; `nullable` and lists of
    `items`, of older dialects, are written as today. Without `parameters` a function takes no argument. Raises
    ValueError for what is no schema of an object.
    """
    declared = function.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(declared, dict):
        raise InputError(f"parameters are {declared!r}; they are the JSON schema of an object")
    schema = _schema({"type": "object", **declared}, closed=True, defs=not _composes(declared))
    schema.setdefault("type", "object")
    if "object" not in (kinds := schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")]):
        raise InputError(f"parameters are of the type {', '.join(map(str, kinds))}; arguments are an object")
    return schema


def _schema(declared: Any, *, closed: bool, defs: bool) -> Any:
    """A schema translated; `closed`: its objects have no other properties, `defs`: nor those of its definitions."""
    if isinstance(declared, bool):
        return declared
    if not isinstance(declared, dict):
        raise InputError(f"a schema is an object, true or false; this is {declared!r}")
    schema = {key: value for key, value in declared.items() if key not in REWRITTEN_KEYWORDS}
    kinds = declared.get("type", "any")
    listed = [JSON_TYPES.get(kind, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    if "any" not in listed:
        schema["type"] = listed if isinstance(kinds, list) else listed[0]
    inside = partial(_schema, defs=defs)
    branches = closed and not {"properties", "$ref", "allOf"} & declared.keys()
    for key, value in declared.items():
        if key in ("items", *IN_SCHEMA):
            several = isinstance(value, list)
            schema[key] = [inside(v, closed=True) for v in value] if several else inside(value, closed=True)
        elif key in ("anyOf", "oneOf", "allOf"):
            alone = branches and (key != "allOf" or len(value) == 1)
            schema[key] = [inside(member, closed=alone) for member in value]
        elif key == "prefixItems":
            schema[key] = [inside(member, closed=True) for member in value]
        elif key in ("not", "if", "then", "else"):
            schema[key] = inside(value, closed=False)
        elif key in ("$defs", "definitions", "patternProperties", "dependentSchemas"):
            open_ones = key == "dependentSchemas" or (key in ("$defs", "definitions") and not defs)
            schema[key] = {name: inside(member, closed=not open_ones) for name, member in value.items()}
    if isinstance(schema.get("items"), list):  # up to draft 2019-09
        schema["prefixItems"] = schema.pop("items")
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    return _nullable(_object(schema, declared, closed=closed, inside=inside))


def _object(schema: dict, declared: dict, *, closed: bool, inside: Callable) -> dict:
    """The schema with its properties; a required one that is none of them is dropped if there are no others."""
    wanted = list(declared["required"]) if isinstance(declared.get("required"), list) else []
    if "properties" not in declared:
        return schema | ({"required": wanted} if wanted else {})
    schema["properties"] = {name: inside(value, closed=True) for name, value in declared["properties"].items()}
    branches = [b for key in ("anyOf", "oneOf", "allOf") for b in declared.get(key, ())]
    elsewhere = OPENING & declared.keys() or any(not isinstance(b, dict) or b.keys() - {"required"} for b in branches)
    shut = closed and not elsewhere and "additionalProperties" not in schema
    schema["required"] = [name for name in wanted if not shut or name in schema["properties"]]
    if shut:
        schema["additionalProperties"] = False
    return schema


def _nullable(schema: dict) -> dict:
    """`nullable` of OpenAPI 3.0 as a type."""
    if schema.pop("nullable", False) is not True:
        return schema
    if "type" not in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    enum = {"enum": list(dict.fromkeys([*schema["enum"], None]))} if isinstance(schema.get("enum"), list) else {}
    return schema | {"type": list(dict.fromkeys([*kinds, "null"]))} | enum


def _composes(declared: Any) -> bool:
    """Whether definitions may be parts of a larger object, so that none of them may forbid further properties."""
    if isinstance(declared, list):
        return any(map(_composes, declared))
    if not isinstance(declared, dict):
        return False
    several = isinstance(declared.get("allOf"), list) and (len(declared["allOf"]) > 1 or "properties" in declared)
    return several or {"$ref", "properties"} <= declared.keys() or any(map(_composes, declared.values()))


def referred(root: Any, pointer: str) -> Any:
    """The sub-schema that a `$ref` names. Raises ValueError where it leads nowhere or out of the schema."""
    if not pointer.startswith("#") or pointer[1:2] not in ("", "/"):
        raise InputError(f"$ref {pointer!r} leads out of the schema; write it as #/$defs/Name")
    node = root
    for part in unquote(pointer).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(part)] if isinstance(node, list) else node[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise InputError(f"$ref {pointer!r} leads nowhere") from error
    if not isinstance(node, dict | bool):
        raise InputError(f"$ref {pointer!r} leads to no schema")
    return node


def refuse_loops(root: dict) -> None:
    """Raise ValueError for a `$ref` that leads nowhere, or back to itself without a value in between."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                _in_place(root, node, ())
            waiting += [value for key, value in node.items() if key not in ("enum", "const", "default", "examples")]
        elif isinstance(node, list):
            waiting += node


def _in_place(root: dict, node: Any, passed: tuple[str, ...]) -> None:
    """Follow what is applied to the same value."""
    if not isinstance(node, dict):
        return
    if isinstance(pointer := node.get("$ref"), str):
        if pointer in passed:
            raise InputError(f"$ref {pointer!r} leads back to itself")
        _in_place(root, referred(root, pointer), (*passed, pointer))
    for key in ("anyOf", "oneOf", "allOf"):
        for member in node.get(key, ()):
            _in_place(root, member, passed)
    for key in ("not", "if", "then", "else"):
        _in_place(root, node.get(key), passed)


# --- for grammars -----------------------------------------------------------------------------------------------------


class Rewriting:
    """A schema in words that xgrammar enforces: no `allOf`, no constraint beside `anyOf`, references only to itself.

    A schema becomes alternatives, each one set of words about the value: references are followed, `allOf` merged,
    `anyOf` multiplied out. What holds itself (a tree) keeps a reference, to `defs`. `exact` says whether the grammar
    forbids all that the schema forbids; it never forbids more.
    """

    def __init__(self, root: dict, prefix: str = "") -> None:
        self.root, self.prefix, self.exact, self.count = root, prefix, True, 0
        self.names: dict[str, str] = {}  # pointer of a schema that holds itself -> its name in `defs`
        self.defs: dict[str, Any] = {}

    def whole(self) -> dict:
        """The root rewritten; `defs` is filled. Raises ValueError for a root that nothing satisfies, or too large."""
        schema = self._expanded(self.root)
        while missing := [pointer for pointer, name in self.names.items() if name not in self.defs]:
            for pointer in missing:
                self.defs[self.names[pointer]] = self._expanded(referred(self.root, pointer))
        if schema is False or False in self.defs.values():
            raise InputError("nothing satisfies the schema")
        return schema

    def schema(self, schema: Any) -> Any:
        """A schema as one of xgrammar's, or False."""
        words = WORDS & schema.keys() if isinstance(schema, dict) else set()
        if words == {"$ref"} and (pointer := schema["$ref"]) in _pointers_from(self.root, pointer):
            name = self.names.setdefault(pointer, f"{self.prefix}{len(self.names)}")
            return {"$ref": f"#/$defs/{name}"}
        if words == {"allOf"} and len(schema["allOf"]) == 1:
            return self.schema(schema["allOf"][0])
        if words == {"anyOf"}:  # beside nothing, its members keep their references
            kept = [made for member in schema["anyOf"] if (made := self.schema(member)) is not False]
            return False if not kept else {} if {} in kept else {"anyOf": kept}
        return self._expanded(schema)

    def _expanded(self, schema: Any) -> Any:
        kept = [made for each in self._alternatives(schema) if (made := self._finished(each)) is not False]
        if {} in kept:
            return {}
        return False if not kept else kept[0] if len(kept) == 1 else {"anyOf": kept}

    def _alternatives(self, schema: Any) -> list[dict]:
        self.count += 1
        if self.count > MOST_PARTS:
            raise InputError("too large a schema for a grammar")
        if isinstance(schema, bool):
            return [{}] if schema else []
        self.exact &= not NOT_ENFORCED & schema.keys()
        found = [{key: value for key, value in schema.items() if key in KEPT}]
        if "const" in schema:
            found = self._product(found, [{"enum": [schema["const"]]}])
        if "$ref" in schema:
            found = self._product(found, self._alternatives(referred(self.root, schema["$ref"])))
        for member in schema.get("allOf", ()):
            found = self._product(found, self._alternatives(member))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                members = [self._alternatives(member) for member in schema[key]]
                self.exact &= key == "anyOf" or _disjoint(members)  # "exactly one" becomes "at least one"
                found = self._product(found, [each for member in members for each in member])
        return found

    def _product(self, ours: list[dict], theirs: list[dict]) -> list[dict]:
        if len(ours) * len(theirs) > MOST_ALTERNATIVES:
            raise InputError("too many alternatives for a grammar")
        return [both for a in ours for b in theirs if (both := self._merged(a, b)) is not None]

    def _merged(self, a: dict, b: dict) -> dict | None:
        """Words that hold where both hold, or None where none can; of two that cannot be one, the first."""
        both = {**b, **a}
        for key in a.keys() & b.keys():
            ours, theirs = a[key], b[key]
            if key in ("properties", "additionalProperties") or (ours == theirs and type(ours) is type(theirs)):
                continue
            if key == "type":
                both[key] = _common_types(ours, theirs)
                if not both[key]:
                    return None
            elif key in LEAST or key in MOST:
                both[key] = max(ours, theirs) if key in LEAST else min(ours, theirs)
            elif key == "required":
                both[key] = list(dict.fromkeys([*ours, *theirs]))
            elif key == "enum":
                texts = [json.dumps(value, sort_keys=True) for value in theirs]
                both[key] = [value for value in ours if json.dumps(value, sort_keys=True) in texts]
            elif key == "items" and not {"prefixItems"} & (a.keys() | b.keys()):
                both[key] = {"allOf": [ours, theirs]}
            else:
                self.exact = False
        if len(lists := [each for each in (a, b) if {"items", "prefixItems"} & each.keys()]) == 2 and (
            lists[0].get("prefixItems") != lists[1].get("prefixItems")
        ):
            self.exact = False
            both = {k: v for k, v in both.items() if k not in ("items", "prefixItems")} | {
                k: a[k] for k in ("items", "prefixItems") if k in a
            }
        rest = [each.get("additionalProperties", True) for each in (a, b)]
        names = dict.fromkeys([*a.get("properties", ()), *b.get("properties", ())])
        if names:  # what one does not name is, for it, a further property
            parts = {n: [e.get("properties", {}).get(n, r) for e, r in zip((a, b), rest, strict=True)] for n in names}
            both["properties"] = {name: _all_of(*pair) for name, pair in parts.items()}
        if "additionalProperties" in both:
            both["additionalProperties"] = _all_of(*rest)
        return both

    def _finished(self, words: dict) -> Any:
        """One set of words as a schema of xgrammar's, or False where no value satisfies it."""
        if "enum" in words:
            others = {key: value for key, value in words.items() if key != "enum"}
            fits = jsonschema.Draft202012Validator(self.root).evolve(schema=others).is_valid
            return _one_of([value for value in words["enum"] if fits(value)])
        if not words:
            return {}
        kinds = words.get("type", [*TYPES])
        readers = {"object": self._object, "array": self._array, "string": self._text}
        made: dict[str, Any] = {}
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            part = readers.get(kind, self._number)(words, kind)
            if part is not False:
                made |= part
                made["type"] = [*made.get("type", ()), kind]
        if not made:
            return False
        return made | {"type": made["type"][0] if len(made["type"]) == 1 else made["type"]}

    def _object(self, words: dict, _: str) -> Any:
        required, further = words.get("required", []), self.schema(words.get("additionalProperties", True))
        named = dict(words.get("properties", {}))
        named |= {name: words.get("additionalProperties", True) for name in required if name not in named}
        made = {name: self.schema(value) for name, value in named.items()}
        if any(made[name] is False for name in required):
            return False
        if any(_MISPRINTED.search(name) for name in made):
            raise InputError("a property's name that xgrammar prints wrong")
        self.exact &= further is False or False not in made.values()  # one name cannot be forbidden among all
        made = {name: value for name, value in made.items() if value is not False}
        sizes = {key: words[key] for key in ("minProperties", "maxProperties") if key in words}
        if not made and further == {} and not sizes:
            return {}
        open_ended = {"additionalProperties": True if further == {} else further}
        return {"properties": made, "required": required, **sizes, **open_ended}

    def _array(self, words: dict, _: str) -> Any:
        first = [self.schema(value) for value in words.get("prefixItems", ())]
        rest = self.schema(words.get("items", True))
        if False in first:  # none from there on
            first, rest = first[: first.index(False)], False
        sizes = {key: words[key] for key in ("minItems", "maxItems") if key in words}
        if rest is False:
            if sizes.get("minItems", 0) > len(first):
                return False
            sizes["maxItems"] = min(sizes.get("maxItems", len(first)), len(first))
        if sizes.get("minItems", 0) > sizes.get("maxItems", inf):
            return False
        made = {"prefixItems": first} if first else {}
        return made | sizes | ({} if rest == {} else {"items": rest})

    def _text(self, words: dict, _: str) -> Any:
        sizes = {key: words[key] for key in ("minLength", "maxLength") if key in words}
        if sizes.get("minLength", 0) > sizes.get("maxLength", inf):
            return False
        if (pattern := words.get("pattern")) is not None:
            if _WHOLE.fullmatch(pattern):  # xgrammar's has to match the whole text, JSON Schema's a part
                self.exact &= not sizes and "format" not in words
                return {"pattern": pattern}
            self.exact = False
        if "format" in words:
            self.exact &= not sizes
            return {"format": words["format"]}
        return sizes

    def _number(self, words: dict, kind: str) -> Any:
        ends = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        made = {key: words[key] for key in ends if key in words}
        if kind not in ("integer", "number"):
            return {}
        if "multipleOf" in words:
            if kind == "integer" and isinstance(words["multipleOf"], int):
                made["multipleOf"] = words["multipleOf"]
            else:
                self.exact = False
        return made


def _pointers_from(root: dict, pointer: str) -> set[str]:
    """The references that can be reached from where one leads."""
    found: set[str] = set()
    waiting = [referred(root, pointer)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            named = node.get("$ref")
            if isinstance(named, str) and named not in found:
                found.add(named)
                waiting.append(referred(root, named))
            waiting += [value for key, value in node.items() if key not in ("enum", "const", "default", "examples")]
        elif isinstance(node, list):
            waiting += node
    return found


def _all_of(a: Any, b: Any) -> Any:
    return b if a is True or a == b else a if b is True else {"allOf": [a, b]}


def _common_types(a: str | list, b: str | list) -> list[str]:
    ours, theirs = ([kinds] if isinstance(kinds, str) else kinds for kinds in (a, b))
    common = [kind for kind in ours if kind in theirs or (kind == "integer" and "number" in theirs)]
    return [*common, *(kind for kind in theirs if kind == "integer" and "number" in ours and kind not in common)]


def _disjoint(members: list[list[dict]]) -> bool:
    """Whether no value has the type of two members."""
    kinds = [[a.get("type", [*TYPES, "integer"]) for a in member] for member in members]
    flat = [{"number" if k == "integer" else k for t in of for k in ([t] if isinstance(t, str) else t)} for of in kinds]
    return sum(map(len, flat)) == len(set().union(*flat))


def _one_of(values: list) -> Any:
    """A schema of exactly these values, or False for none."""
    plain = [value for value in values if not isinstance(value, list | dict) and not _misprinted(value)]
    others = [exactly(value) for value in values if isinstance(value, list | dict) or _misprinted(value)]
    made = [*([{"enum": plain}] if plain else []), *others]
    return False if not made else made[0] if len(made) == 1 else {"anyOf": made}


def _misprinted(value: Any) -> bool:
    return isinstance(value, str) and bool(_MISPRINTED.search(value))


def exactly(value: Any) -> dict:
    """A schema of one value: xgrammar writes lists and objects without spaces, and a few characters wrong."""
    if isinstance(value, list):
        items = {"prefixItems": [exactly(item) for item in value]} if value else {}
        return {"type": "array", **items, "minItems": len(value), "maxItems": len(value), "items": False}
    if isinstance(value, dict):
        inner = {name: exactly(item) for name, item in value.items()}
        return {"type": "object", "properties": inner, "required": list(value), "additionalProperties": False}
    if _misprinted(value):
        escaped = "".join(f"[{c}]" if ord(c) > 126 else re.escape(c) for c in value)
        return {"type": "string", "pattern": f"^{escaped}$"}
    return {"const": value}
