"""Cache keys from code: one hash of everything in the package that calls of some functions can reach.

    key = code_of(predict.score_model, checkpoint.load_model)

1. Start at the top-level definitions that hold the functions. Their syntax names others of the package: bare names,
   attributes of modules, imported names, `"package.module:name"` in a string; a module that is used as a value stands
   for all that it defines. Those are followed in turn, classes through annotations too. Nothing is imported or run.
2. A definition counts by its syntax tree without positions, docstrings, imports and annotations of functions. A name of
   the package is replaced by its last part, one from outside by its full dotted path. Moving or merging modules,
   renaming an import, comments and layout change no key; a changed body, constant or default within reach does.
3. The hash is that of the sorted set of the definitions, each with the hashes of those that it names: calling another
   function of the same name is a change too. Where one of `TEXTS` is among them, which reads tables and prompts that
   come with the package, all text files of its folders count.

What is looked up by a name at run time cannot be seen (`table[name]` counts with the whole table): the caller hands in
what it chose, as in `code_of(ENGINES[name])`, and the table is in `NOT_FOLLOWED`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from avalab.lab.errors import InputError

PACKAGE = __name__.partition(".")[0]

NOT_FOLLOWED = (  # modules and definitions that are in the hash by name only
    # where things lie and what is noted of them: no result depends on how
    "avalab.lab.artifacts",
    "avalab.lab.assets",
    "avalab.lab.cache",
    "avalab.lab.code",
    "avalab.lab.run",
    # tables from which the caller chooses a row
    "avalab.engines:ENGINES",
    "avalab.compress.quantize:METHODS",
)

TEXTS = {"avalab.data.arguments:read_packaged": ("data/prompts", "data/domains")}  # who reads text, and from where

DEFINED = re.compile(r"[A-Za-z_]\w*(\.\w+)*:\w+")  # `package.module:name`, as `process.call` takes it

Reference = tuple[str, str]  # module and name; without a name, the module as a value


def code_of(*functions: Callable | type | str) -> str:
    """SHA-256 of the code of the package that functions, classes or `"module:name"` can reach.

    Raises ValueError for one that no file defines at its top level.
    """
    return _hash(tuple(sorted(map(_start, functions))))


def reached(*functions: Callable | type | str) -> list[str]:
    """The definitions behind `code_of`, as `module:name`."""
    return sorted(":".join(at) for at in _closure(map(_start, functions)))


@cache
def _hash(starts: tuple[Reference, ...]) -> str:
    entries = set()
    closure = _closure(starts)
    for folder in (
        folder for reader, folders in TEXTS.items() if _as_reference(reader) in closure for folder in folders
    ):
        entries.add(_texts_sha256(Path(__file__).parents[1] / folder))
    for at in closure:
        definition = _definition(*at)
        others = [_definition(*other).sha256 for other in definition.references if other[1] and _is_followed(other)]
        entries.add("\n".join([definition.dump, *others]))
    return _sha256("\n\n".join(sorted(entries)))


def _as_reference(text: str) -> Reference:
    module, _, name = text.partition(":")
    return module, name


def _texts_sha256(folder: Path) -> str:
    """The names and contents of the text files of a folder."""
    return _sha256(
        "\n".join(f"{file.name} {_sha256(file.read_text('utf-8'))}" for file in sorted(folder.glob("*.txt")))
    )


def _closure(starts: Iterable[Reference]) -> set[Reference]:
    found: set[Reference] = set()
    waiting = list(starts)
    while waiting:
        at = waiting.pop()
        if at in found:
            continue
        found.add(at)
        for module, name in _definition(*at).references:
            names = [name] if name else _module(module).definitions
            waiting += [(module, each) for each in names if _is_followed((module, each))]
    return found


def _is_followed(at: Reference) -> bool:
    return at[0] not in NOT_FOLLOWED and ":".join(at) not in NOT_FOLLOWED


def _start(function: Callable | type | str) -> Reference:
    if isinstance(function, str):
        module, _, name = function.partition(":")
    else:
        while isinstance(function, functools.partial):
            function = function.func
        function = function if hasattr(function, "__qualname__") else type(function)
        module, name = function.__module__, function.__qualname__.partition(".")[0]
    if module == "__main__":  # of `python -m`
        module = getattr(sys.modules["__main__"].__spec__, "name", module)
    found = _module(module)
    if found is None or name not in found.definitions:
        raise InputError(f"no file defines {name!r} at the top level of module {module!r}")
    return module, name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Module:
    """What a module's top level binds: its own definitions, as places in its body, and what it imports."""

    name: str
    body: list[ast.stmt]
    definitions: dict[str, list[int]]
    imports: dict[str, str]  # local name -> dotted path


@dataclass(frozen=True)
class _Definition:
    """Normalised syntax, and the definitions of the package that it names, in the order of the text."""

    dump: str
    references: tuple[Reference, ...]

    @cached_property
    def sha256(self) -> str:
        return _sha256(self.dump)


@cache
def _module(name: str) -> _Module | None:
    """The module of this name; None where no Python file has it."""
    path = _file(name)
    if path is None:
        return None
    found = _Module(name, ast.parse(path.read_text(encoding="utf-8")).body, {}, {})
    for place, statement in enumerate(found.body):
        bound = _bindings([statement])
        found.imports.update({local: path for local, path in bound.items() if path})
        for local in {local for local, path in bound.items() if not path} | _changed(statement):
            found.definitions.setdefault(local, []).append(place)
    for local in found.imports:  # `except ImportError: library = None` does not make it ours
        found.definitions.pop(local, None)
    return found


def _file(module: str) -> Path | None:
    package, *below = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not below:
        return Path(spec.origin) if spec and (spec.origin or "").endswith(".py") else None
    paths = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    files = [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")]
    return next((file for file in files if file.is_file()), None)


@cache
def _definition(module: str, name: str) -> _Definition:
    parts = [_statement(module, place) for place in _module(module).definitions[name]]
    return _Definition("\n".join(part.dump for part in parts), tuple(at for part in parts for at in part.references))


@cache
def _statement(module: str, place: int) -> _Definition:
    normaliser = _Normaliser(_module(module))
    dump = ast.dump(normaliser.visit(_module(module).body[place]))
    return _Definition(dump, tuple(normaliser.references))


def _changed(statement: ast.stmt) -> set[str]:
    """Names whose value a statement changes without binding them: `TABLE["x"] = y`, `TABLE.update(y)`."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    parts = [node for node in ast.walk(statement) if isinstance(node, ast.Subscript | ast.Attribute)]
    parts = [node.value for node in parts if isinstance(node.ctx, ast.Store) or isinstance(statement, ast.Expr)]
    return {part.id for part in parts if isinstance(part, ast.Name)}


def _bindings(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """Names that statements bind in their own scope: an import with its dotted path, everything else with ''."""
    bound: dict[str, str] = {}
    elsewhere: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound[node.name] = ""
                continue
            case ast.Lambda():
                continue
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                bound |= {inner.target.id: "" for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)}
                continue
            case ast.Import():
                bound |= {
                    a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                    for a in node.names
                }
            case ast.ImportFrom():
                if node.level:
                    raise InputError(f"a relative import of {node.module or '.'} cannot be followed: write it absolute")
                bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            case ast.Global() | ast.Nonlocal():
                elsewhere.update(node.names)
            case ast.Name(ctx=ast.Store()):
                bound[node.id] = ""
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound[name] = ""
            case ast.MatchMapping(rest=str(name)):
                bound[name] = ""
        waiting += ast.iter_child_nodes(node)
    return {name: path for name, path in bound.items() if name not in elsewhere}


def _resolved(path: str, home: str) -> tuple[Reference | str, list[str]]:
    """What a dotted path leads to, and the attributes left over: a definition or module, or a path from outside.

    Ours are this package and `home`, the one that the path stands in.
    """
    module, *parts = path.split(".")
    if module not in (PACKAGE, home) or _module(module) is None:
        return path, []
    while parts:
        here, below = _module(module), f"{module}.{parts[0]}"
        if parts[0] in here.definitions:
            return (module, parts[0]), parts[1:]
        imported = here.imports.get(parts[0], below)
        if imported != below:
            return _resolved(".".join([imported, *parts[1:]]), home)
        if _module(below) is None:
            break
        module, parts = below, parts[1:]
    return (module, ""), parts


@dataclass
class _Scope:
    """Names that a function, class or comprehension binds, as `_bindings` gives them."""

    names: dict[str, str]
    is_class: bool = False


class _Normaliser(ast.NodeTransformer):
    """Rewrites one top-level statement of a module in place, and collects what it refers to."""

    def __init__(self, module: _Module) -> None:
        self.module, self.references, self.scopes = module, [], []

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._chain(node, node.id, [])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        attributes, inner = [], node
        while isinstance(inner, ast.Attribute):
            attributes, inner = [inner.attr, *attributes], inner.value
        return self._chain(node, inner.id, attributes) if isinstance(inner, ast.Name) else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and DEFINED.fullmatch(node.value):
            return self._named(node, *node.value.split(":"))
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        match node.values:
            case [ast.FormattedValue(value=ast.Name(id="__name__")), ast.Constant(value=str(text))] if text[:1] == ":":
                return self._named(node, self.module.name, text[1:])
        return self.generic_visit(node)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        return None

    visit_ImportFrom = visit_Import

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        self._annotation(node.returns)
        node.returns = None
        return self._function(node, _without_docstring(node))

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._function(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        for outside in ("decorator_list", "bases", "keywords"):
            setattr(node, outside, [self.visit(each) for each in getattr(node, outside)])
        node.body = self._inside(_Scope(_bindings(body := _without_docstring(node)), is_class=True), body)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self.scopes and self.scopes[-1].is_class:
            return self.generic_visit(node)  # a dataclass reads it
        self._annotation(node.annotation)
        return node.value and ast.Assign([self.visit(node.target)], self.visit(node.value))

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> ast.AST:
        first, names = node.generators[0], _bindings(generator.target for generator in node.generators)
        first.iter = self.visit(first.iter)
        outside, first.iter = first.iter, ast.Constant(None)
        self.scopes.append(_Scope(names))
        node = self.generic_visit(node)
        self.scopes.pop()
        first.iter = outside
        return node

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def _function(self, node: ast.AST, body: list[ast.AST]) -> ast.AST:
        arguments = node.args
        arguments.defaults = [self.visit(each) for each in arguments.defaults]
        arguments.kw_defaults = [each and self.visit(each) for each in arguments.kw_defaults]
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [each for each in (arguments.vararg, arguments.kwarg) if each]
        for argument in every:
            self._annotation(argument.annotation)
            argument.annotation = None
        body = self._inside(_Scope(_bindings(body) | {argument.arg: "" for argument in every}), body)
        node.body = body[0] if isinstance(node, ast.Lambda) else body
        return node

    def _inside(self, scope: _Scope, body: list[ast.AST]) -> list[ast.AST]:
        self.scopes.append(scope)
        found = [self.visit(each) for each in body]
        self.scopes.pop()
        return [each for each in found if each is not None]

    def _annotation(self, node: ast.AST | None) -> None:
        if node is not None:
            self.visit(node)  # for its references: methods of what is handed in are called

    def _chain(self, node: ast.Name | ast.Attribute, name: str, attributes: list[str]) -> ast.AST:
        """`name.first.second`, whose first part is looked up as Python would."""
        own = f"{self.module.name}.{name}" if name in self.module.definitions else ""
        path = self.module.imports.get(name, own)
        for scope in self.scopes:  # the innermost decides; a class's names are not those of its methods
            if name in scope.names and (scope is self.scopes[-1] or not scope.is_class):
                path = scope.names[name]
        if not path:  # a local or built-in name
            return node
        target, rest = _resolved(".".join([path, *attributes]), self.module.name.partition(".")[0])
        if not isinstance(target, str):
            self.references.append(target)
            target = target[1] or target[0].rpartition(".")[2]
        made: ast.AST = ast.Name(target, node.ctx)
        for attribute in rest:
            made = ast.Attribute(made, attribute, node.ctx)
        return made

    def _named(self, node: ast.AST, module: str, name: str) -> ast.AST:
        found = _module(module) if module.partition(".")[0] in (PACKAGE, self.module.name.partition(".")[0]) else None
        if found is None or name not in found.definitions:
            return node
        self.references.append((module, name))
        return ast.Constant(f":{name}")


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> list[ast.stmt]:
    return node.body[ast.get_docstring(node, clean=False) is not None :]
