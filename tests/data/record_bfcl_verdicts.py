"""Record the reference checker's verdicts on perturbed answers: `python record_bfcl_verdicts.py OUT [--all]`.

Needs `bfcl-eval==2026.3.23` (installed with --no-deps) in the interpreter that runs it, nothing else. Every case's
accepted answer is rendered, then perturbed in the ways a model errs; the reference judges each one. Without `--all` a
seeded sample of the cases is written after a few hand-made ones, one case a line, without the functions' descriptions.
"""

import copy
import json
import random
import sys
import types
from importlib import resources
from operator import itemgetter
from pathlib import Path

# The checker imports the table of all model back-ends only to learn whether dots in names were replaced. They are not.
_models = types.ModuleType("bfcl_eval.constants.model_config")
_models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules["bfcl_eval.constants.model_config"] = _models

from bfcl_eval.constants.enums import Language  # noqa: E402  (after the stand-in above)
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402

CATEGORIES = {"simple_python": 30, "multiple": 12, "parallel": 12, "parallel_multiple": 12}
CATEGORIES |= {"live_simple": 30, "live_multiple": 12}


def argument(kind, *accepted, required=True, items=None):
    """One argument of a hand-made case: declared type, accepted values, element type of a list."""
    declared = {"type": kind} | ({"items": {"type": items}} if items else {})
    return declared, list(accepted), required


# Small cases for rules that few of the leaderboard's cases exercise.
HAND_MADE = [
    {"size": argument("float", 2.0, 5), "unit": argument("string", "m", "", required=False)},
    {"level": argument("integer", 3, "n", ""), "to": argument("string", "St. John's, 5^2_a-b/c*", "x")},
    {"to": argument("integer", "n"), "on": argument("boolean", True, ""), "any": argument("any", 1, "b", "c d", "e")},
    {
        "values": argument("array", [1, 2], [3], items="float"),
        "words": argument("array", ["A b", "c"], "", items="string"),
    },
    {"pair": argument("tuple", [1, 2], items="integer"), "mixed": argument("array", ["a", 1], ["b"], items="string")},
    {
        "person": argument(
            "dict", "", {"name": ["Ann Lee", "A. Lee"], "age": [3, ""], "tags": [["x"], ""]}, required=False
        )
    },
    {"rows": argument("array", [{"a": [1], "b": ["", "y"]}, {"a": [2]}], [{"a": [7]}], items="dict")},
    {"rows": argument("array", "", [{"a": [1, 2]}], items="dict", required=False), "need": argument("string", "q")},
    {"name": argument("string", "", "n", required=False), "must": argument("integer", 1, required=False)},
    {"hidden": argument("integer", 1, ""), "list": argument("array", ["a", 1], "", items="string")},
]


def hand_made_cases():
    for number, arguments in enumerate(HAND_MADE):
        properties = {name: declared for name, (declared, _, _) in arguments.items()}
        properties["undocumented"] = {"type": "string"}  # declared, but no value of it is accepted
        required = [name for name, (_, _, needed) in arguments.items() if needed]
        function = {"name": "lab.f", "parameters": {"type": "dict", "properties": properties, "required": required}}
        accepted = {name: values for name, (_, values, _) in arguments.items()}
        expected = [{"lab.f": accepted}]
        common = {"id": f"hand_made_{number}", "function": [function]}
        yield {**common, "category": "simple_python", "expected": expected}
        if number in (0, 6):
            yield {**common, "category": "parallel", "expected": expected * 2}


def truth(expected, choose, *, optional):
    """Calls that satisfy the case: `choose` picks among accepted values, `optional` keeps what may be left out."""
    calls = []
    for item in expected:
        (name, accepted), *_ = item.items()
        arguments = {}
        for argument, values in accepted.items():
            given = [v for v in values if v != ""]
            if given and (optional or "" not in values):
                arguments[argument] = plain(choose(given))
        calls.append([name, arguments])
    return calls


def plain(value):
    """An accepted value as a model writes it: inside dictionaries the accepted values are lists of options."""
    if isinstance(value, dict):
        options = {k: [o for o in v if o != ""] if isinstance(v, list) else [v] for k, v in value.items()}
        return {k: plain(v[0]) for k, v in options.items() if v}
    if isinstance(value, list):
        return [plain(v) if isinstance(v, dict) else v for v in value]
    return value


def value_variants(value):
    """Values near `value`: other types, other spellings, other contents."""
    yield from (None, str(value), [value], [], "", {})
    if isinstance(value, bool):
        yield from (not value, int(value))
    elif isinstance(value, int | float):
        yield from (value + 1, -value, float(value), int(value), bool(value))
    elif isinstance(value, str):
        yield from (value.upper(), value.replace(" ", ""), f"{value}.", f"{value} more", f"'{value}'", f'"{value}"')
        yield from (value.replace(" ", "_"), value.replace(",", " -"), value.replace("-", ":"), value[:-1])
        yield from (value.replace(character, "") for character in ",./-_*^'\"" if character in value)
        yield value.translate(str.maketrans("'\"", "\"'"))
    elif isinstance(value, list):
        yield from (value[::-1], value[:-1], [*value, *value[:1]], [str(v) for v in value], [[v] for v in value])
        yield [v.upper() if isinstance(v, str) else v for v in value]
        yield [float(v) if isinstance(v, int) else v for v in value]
        yield [{**v, "unknown": 1} if isinstance(v, dict) else v for v in value]
        yield from ([*value[:i], variant, *value[i + 1 :]] for i, v in enumerate(value) for variant in some(v))
    elif isinstance(value, dict):
        yield {**value, "unknown": 1}
        yield from ({k: v for k, v in value.items() if k != dropped} for dropped in value)
        yield from ({**value, k: variant} for k, v in value.items() for variant in some(v))


def some(value):
    return list(value_variants(value))[:12] if not isinstance(value, dict | list) else [None, str(value), {}]


def perturbed(calls, functions):
    """Yield (kind of perturbation, calls)."""
    yield "nothing", []
    yield "twice", calls + calls[:1]
    yield "fewer", calls[:-1]
    yield "reversed", calls[::-1]
    yield "repeated first", calls[:1] * len(calls)
    for i, (name, arguments) in enumerate(calls):

        def put(call, i=i):
            return [*calls[:i], call, *calls[i + 1 :]]

        yield from (("name", put([other, arguments])) for other in (name.replace(".", "_"), name.upper(), f"{name}s"))
        yield from (("other function", put([f["name"], arguments])) for f in functions if f["name"] != name)
        yield "extra", put([name, {**arguments, "unexpected": 1}])
        declared = next(f for f in functions if f["name"] == name)["parameters"]["properties"]
        yield from (("optional", put([name, {**arguments, k: "x"}])) for k in declared if k not in arguments)
        for key, value in arguments.items():
            yield "missing", put([name, {k: v for k, v in arguments.items() if k != key}])
            yield from (("value", put([name, {**arguments, key: v}])) for v in value_variants(value))
        values = list(arguments.values())
        yield "swapped", put([name, dict(zip(arguments, values[::-1], strict=True))])


def verdict(case, calls):
    """The reference's error type, or "" when it accepts, or "crash" when it raises."""
    output = [{name: copy.deepcopy(arguments)} for name, arguments in calls]
    try:
        result = ast_checker(case["function"], output, case["expected"], Language.PYTHON, case["category"], "any")
    except Exception as error:
        return f"crash:{type(error).__name__}"
    return "" if result["valid"] else result["error_type"]


def load(category):
    data = resources.files("bfcl_eval") / "data"
    rows = [json.loads(line) for line in (data / f"BFCL_v4_{category}.json").read_text().splitlines()]
    answers = (data / "possible_answer" / f"BFCL_v4_{category}.json").read_text().splitlines()
    expected = {row["id"]: row["ground_truth"] for row in map(json.loads, answers)}
    return [
        {"id": r["id"], "category": category, "function": r["function"], "expected": expected[r["id"]]} for r in rows
    ]


def stripped(declared):
    kept = {k: declared[k] for k in ("name", "type", "required") if k in declared}
    if "items" in declared:
        kept["items"] = stripped(declared["items"])
    if "parameters" in declared:
        kept["parameters"] = stripped(declared["parameters"])
    if "properties" in declared:
        kept["properties"] = {k: stripped(v) for k, v in declared["properties"].items()}
    return kept


def judged(case, rng, *, values=None):
    """The case as one line with judged answers; `values` limits how many of the changed arguments are kept."""
    first = itemgetter(0)
    bases = [(first, False), (first, True), (rng.choice, True)]
    answers = [("right", truth(case["expected"], choose, optional=optional)) for choose, optional in bases]
    variants = [v for _, calls in answers for v in perturbed(calls, case["function"])]
    if values is not None:  # every kind of perturbation equally likely, not every variant
        kinds = sorted({kind for kind, _ in variants} - {"value"})
        changed = [v for v in variants if v[0] == "value"]
        variants = [rng.choice([v for v in variants if v[0] == k]) for k in rng.sample(kinds, 2)]
        variants += rng.sample(changed, min(len(changed), values))
    distinct = {json.dumps(calls): [kind, calls] for kind, calls in answers + variants}
    row = {**case, "function": [stripped(f) for f in case["function"]]}
    row["answers"] = [[kind, calls, verdict(case, calls)] for kind, calls in distinct.values()]
    return json.dumps(row, separators=(",", ":"))


def main(path, everything):
    rng = random.Random(0)
    lines = [judged(case, rng) for case in hand_made_cases()]
    for category, count in CATEGORIES.items():
        cases = load(category)
        chosen = cases if everything else rng.sample(cases, count)
        lines += [judged(case, rng, values=None if everything else 2) for case in chosen]
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], "--all" in sys.argv)
