"""Cache keys from code: what changes them, what does not, and what the real ones reach."""

import functools
import itertools
import shutil
import symtable
import textwrap
from pathlib import Path

import pytest

from avalab import engines
from avalab.compress import prune, quantize
from avalab.lab import code
from avalab.lab.code import code_of, reached
from avalab.report.dependencies import module_paths
from avalab.train import finetune

ROUND = """
    import math

    STEP = 4

    def nearest(value, step=STEP):
        return math.floor(value / step + 0.5) * step
"""
TABLE = """
    from codes.rounding import nearest

    def twice(value):
        return 2 * nearest(value)

    METHODS = {"nearest": nearest, "twice": twice}
"""
MAIN = """
    from codes import table

    def compress(values):
        return [table.METHODS["twice"](value) for value in values]

    def unrelated():
        return 1
"""
LAB = {"rounding": ROUND, "table": TABLE, "main": MAIN}
counter = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules as a package of a new name, `codes` in their text, and return that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> str:
        name = f"codes{next(counter)}"
        for module, source in ({"__init__": ""} | files).items():
            file = tmp_path.joinpath(name, *module.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source).replace("codes", name))
        return name

    return write


@pytest.fixture
def key(package):
    """The key of a function of a package of these modules."""
    return lambda files, start="main:compress": code_of(f"{package(files)}.{start}")


def replaced(module: str, old: str, new: str) -> dict[str, str]:
    assert old in LAB[module]
    return LAB | {module: LAB[module].replace(old, new)}


def test_what_is_reached_is_named_through_modules_tables_and_constants(package):
    name = package(LAB)
    assert reached(f"{name}.main:compress") == [
        f"{name}.{at}" for at in ("main:compress", "rounding:STEP", "rounding:nearest", "table:METHODS", "table:twice")
    ]


UNCHANGED = {
    "comment": replaced("table", "def twice(value):", "# a comment\n    def twice(value):"),
    "layout": replaced("table", "return 2 * nearest(value)", "return (\n            2 * nearest(value)\n        )"),
    "docstring": replaced("table", "def twice(value):", 'def twice(value):\n        """Doubled."""'),
    "annotation": replaced("table", "def twice(value):", "def twice(value: float) -> float:"),
    "a function that is not called": replaced("main", "return 1", "return 2"),
    "alias of a function": LAB | {"table": TABLE.replace("nearest", "nearest as at", 1).replace("nearest(", "at(")
                                  .replace(": nearest", ": at")},
    "alias of a module": LAB | {"main": MAIN.replace("from codes import table", "import codes.table as t")
                                .replace("table.METHODS", "t.METHODS")},
    "import inside": LAB | {"main": MAIN.replace("from codes import table", "").replace(
        "        return [", "        from codes import table\n\n        return [")},
    "import from outside": LAB | {"rounding": ROUND.replace("import math", "from math import floor as down")
                                  .replace("math.floor", "down")},
}  # fmt: skip
CHANGED = {
    "body two modules away": replaced("rounding", "+ 0.5", "+ 0.4"),
    "constant": replaced("rounding", "STEP = 4", "STEP = 8"),
    "default": replaced("rounding", "step=STEP", "step=2"),
    "function from outside": replaced("rounding", "math.floor", "math.ceil"),
    "module from outside": replaced("rounding", "import math", "import cmath as math"),
    "row of a table": replaced("table", '"twice": twice', '"twice": nearest'),
    "row set below": LAB | {"table": TABLE + '\n    METHODS["twice"] = nearest\n'},
    "table changed below": LAB | {"table": TABLE + "\n    METHODS.clear()\n"},
}


@pytest.mark.parametrize("same", UNCHANGED.values(), ids=UNCHANGED)
def test_what_computes_nothing_else_keeps_the_key(key, same):
    assert key(same) == key(LAB)


def test_moving_functions_and_merging_modules_keep_the_key(key):
    moved = {
        "numbers.grid": ROUND,
        "numbers.__init__": "from codes.numbers.grid import nearest",
        "table": TABLE.replace("codes.rounding", "codes.numbers"),
        "main": MAIN,
    }
    together = {"main": "\n".join((ROUND, TABLE, MAIN)).replace("from codes.rounding import nearest", "")}
    together["main"] = together["main"].replace("from codes import table", "").replace("table.METHODS", "METHODS")
    assert key(moved) == key(together) == key(LAB)


@pytest.mark.parametrize("other", CHANGED.values(), ids=CHANGED)
def test_what_computes_something_else_changes_the_key(key, other):
    assert key(other) != key(LAB)


def test_another_function_of_the_same_name_changes_the_key_though_both_are_reached(key):
    files = {"one": "def save():\n    return 1", "two": "def save():\n    return 2"}
    main = "from codes import one, two\ndef compress():\n    one.save()\n    return two.save()"
    swapped = main.replace("one.save", "two.save", 1)
    assert key(files | {"main": main}) != key(files | {"main": swapped})


def test_functions_that_call_each_other_have_one_key(key):
    even = "def even(n):\n    return n == 0 or odd(n - 1)\ndef odd(n):\n    return n != 0 and even(n - 1)"
    assert key({"main": even}, "main:even") == key({"main": even}, "main:odd")
    assert key({"main": even}, "main:even") != key({"main": even.replace("n - 1", "n - 3")}, "main:even")


def test_a_local_name_is_no_reference_to_a_definition_of_that_name(package):
    source = """
        total = 1
        def given(total):
            return total
        def bound():
            for total in (1, 2):
                print(total)
            return [total for total in (1, 2)]
        def after():
            return [each for total in (1,) for each in (total,)] + [total]
        def declared():
            global total
            total = 2
        class Row:
            total = 3
            def read(self):
                return total
    """
    name = package({"main": source})
    found = {start: len(reached(f"{name}.main:{start}")) for start in ("given", "bound", "after", "declared", "Row")}
    assert found == {"given": 1, "bound": 1, "after": 2, "declared": 2, "Row": 2}


def test_a_module_as_a_value_counts_with_all_its_definitions(package, key):
    main = "from codes import rounding\ndef compress(name):\n    return getattr(rounding, name)"
    name = package({"rounding": ROUND, "main": main})
    assert reached(f"{name}.main:compress") == [
        f"{name}.{at}" for at in ("main:compress", "rounding:STEP", "rounding:nearest")
    ]
    changed = {"rounding": ROUND.replace("STEP = 4", "STEP = 5"), "main": main}
    assert code_of(f"{name}.main:compress") != key(changed)


def test_a_definition_named_in_a_string_is_followed(package):
    source = (
        'def run():\n    return 1\ndef ask():\n    return "codes.main:run"\ndef own():\n    return f"{__name__}:run"'
    )
    name = package({"main": source})
    assert f"{name}.main:run" in reached(f"{name}.main:ask")
    assert f"{name}.main:run" in reached(f"{name}.main:own")


def test_methods_of_what_is_handed_in_are_reached_through_the_annotation(package):
    source = "class Job:\n    def size(self):\n        return 1\ndef compress(job: Job):\n    return job.size()"
    name = package({"main": source})
    assert f"{name}.main:Job" in reached(f"{name}.main:compress")


def test_a_name_that_nothing_defines_is_refused():
    with pytest.raises(
        ValueError, match=r"no file defines 'nothing' at the top level of .* 'avalab\.compress\.quantize'"
    ):
        code_of("avalab.compress.quantize:nothing")
    with pytest.raises(ValueError, match=r"'avalab\.nowhere'"):
        code_of("avalab.nowhere:load")


def test_no_global_name_that_the_compiler_sees_in_a_definition_is_missed():
    def names(table: symtable.SymbolTable) -> set[str]:
        found = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        return found.union(*map(names, table.get_children()))

    for name, path in module_paths().items():
        module = code._module(name)
        for table in symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec").get_children():
            if table.get_name() in module.definitions:
                wanted = {(name, each) for each in names(table) & set(module.definitions)}
                assert wanted <= set(code._definition(name, table.get_name()).references)


# --- the package's own keys -------------------------------------------------------------------------------------------


def test_every_definition_that_is_not_followed_exists():
    for at in code.NOT_FOLLOWED:
        assert code_of(at) if ":" in at else code._module(at)


def test_a_name_a_function_and_a_partial_lead_to_the_same_code():
    nf4 = quantize.METHODS["nf4"].compress
    assert code_of(nf4) == code_of(functools.partial(nf4)) == code_of("avalab.compress.libraries:bitsandbytes_4bit")


def test_real_keys_differ_from_each_other_and_stay():
    def keys() -> list[str]:
        found = [
            quantize._code(quantize.METHODS[name], quantize.CALIBRATIONS["docs"])
            for name in ("nf4", "gptq", "int8", "ava")
        ]
        found += [code_of(finetune.train_adapter), code_of(prune.prune_artifact)]
        return found + [code_of(load) for load in engines.ENGINES.values()]

    before = keys()
    for cached in (code._hash, code._definition, code._statement, code._module):
        cached.cache_clear()
    assert keys() == before
    assert len(set(before)) == len(before)


def test_real_keys_reach_what_computes_and_leave_out_paths_records_and_other_engines():
    nf4, gptq = reached(quantize.METHODS["nf4"].compress), reached(quantize.METHODS["gptq"].compress)
    assert {"avalab.kernels.encoding:encode_tiles", "avalab.kernels.formats:LEVELS"} <= set(nf4)
    assert "avalab.kernels.encoding:encode_tiles" not in gptq
    everything = reached(finetune.train_adapter, "avalab.measure.answers:answer_questions", engines.ENGINES["openvino"])
    wanted = {"avalab.kernels.lora:linear", "avalab.train.loop:fit", "avalab.data.grammars:call_grammar"}
    assert wanted <= set(everything)
    assert not {at for at in everything if at.startswith(("avalab.lab.run", "avalab.engines.llamacpp"))}


def test_a_changed_row_of_a_packaged_table_changes_the_keys_of_what_can_read_it_and_no_other(monkeypatch, tmp_path):
    """`toolbox.tools` reads its table through `arguments.lines_of`; the head of a model reads no text."""
    folder = tmp_path / "avalab" / "data" / "prompts"
    shutil.copytree(Path(code.__file__).parents[1] / "data" / "prompts", folder)
    monkeypatch.setattr(code, "TEXTS", {"avalab.data.arguments:read_packaged": (folder,)})

    def keys():
        code._hash.cache_clear()
        return code_of("avalab.data.toolbox:tools"), code_of("avalab.models.predict:output_head")

    before, row = keys(), (folder / "toolbox.txt").read_text()
    assert keys() == before
    (folder / "toolbox.txt").write_text(row.replace("math.comb", "math.perm", 1))
    after = keys()
    assert (after[0] != before[0], after[1]) == (True, before[1])
    (folder / "toolbox.txt").write_text(row)
    assert keys() == before
    code._hash.cache_clear()
