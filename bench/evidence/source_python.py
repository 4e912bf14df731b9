"""What Python says: its modules' imports followed, its statements without comments and layout."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.util import resolve_name
from typing import Any

PACKAGE = "deit.kernels"  # what kernels/ is imported as
MARKS = {("triton", "jit"): {"cuda"}, ("ops", "deit_cpu"): {"cpu"}}  # of an implementation


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Python:
    """The modules of kernels/ and of what begins there: their imports and their statements."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.paths = {_module(path): path for path in texts if path.endswith(".py")}
        self.modules = {name: Module(texts[path]) for name, path in self.paths.items()}
        self.defined = {name: _definitions(each.body) for name, each in self.modules.items()}
        self.definitions: dict[tuple[str, str], str] = {}
        # module -> a name in it -> the module that it comes from, and its name there; None: itself
        self.imported: dict[str, dict[str, tuple[str, str | None]]] = {}
        self.follows: dict[str, set[str]] = {}
        self.at_once: dict[str, set[str]] = {}  # of what it follows, as it is imported itself
        for name in self.modules:
            self._imports(name)
        self.triton = {name for name, each in self.modules.items() if each.needs_triton}
        while more := {n for n, to in self.at_once.items() if to & self.triton} - self.triton:
            self.triton |= more

    def _imports(self, module: str) -> None:
        """What a module imports of ours, as it is loaded or later, or by a text that names it."""
        names = self.imported[module] = {}
        follows, at_once = self.follows[module], self.at_once[module] = set(), set()
        for node, deferred in self.modules[module].names:
            found = set()
            if isinstance(node, ast.ImportFrom) and (base := self._base(module, node)):
                found.add(base)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    is_module = inner in self.modules
                    found |= {inner} if is_module else set()
                    target = (inner, None) if is_module else (base, alias.name)
                    names[alias.asname or alias.name] = target
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found.add(alias.name)
                    if alias.asname:
                        names[alias.asname] = (alias.name, None)
            elif isinstance(node, ast.Constant):
                found.add(node.value)
            # A module's packages are loaded before it.
            found = {p for each in found for p in _with_packages(each)} & self.modules.keys()
            follows |= found
            at_once |= set() if deferred else found

    def _base(self, module: str, node: ast.ImportFrom) -> str | None:
        """The module of ours that `from ... import` names, or None."""
        is_package = self.paths[module].endswith("/__init__.py")
        package = module if is_package else module.rpartition(".")[0]
        base = resolve_name("." * node.level + (node.module or ""), package)
        if base in self.modules:
            return base
        inside = any(f"{base}.{alias.name}" in self.modules for alias in node.names)
        return base if inside else None  # from deit import kernels

    def reached(self, device: str, begins: str, allowed: Callable[[str, str], bool]) -> set[str]:
        """The files that run on this type of device, from the package itself on.

        What lies below `begins` is a beginning, too. So is what holds an implementation, which is
        found by its name and not by an import. What needs Triton to be imported runs on no CPU.
        allowed: (path, path it is imported by or "") -> whether to follow that.
        """
        left_out = self.triton if device == "cpu" else set()
        found = {name for name, path in self.paths.items() if path.startswith(begins)}
        found |= {name for name, each in self.modules.items() if device in each.implements}
        found |= {PACKAGE} & self.modules.keys()
        todo = [name for name in found - left_out if allowed(self.paths[name], "")]
        seen = set(todo)
        while todo:
            source = todo.pop()
            new = self.follows[source] - seen - left_out
            new = {each for each in new if allowed(self.paths[each], self.paths[source])}
            seen |= new
            todo += new
        return {self.paths[name] for name in seen}

    def said(self, paths: set[str]) -> Iterator[str]:
        """A digest for each top-level statement of these files."""
        modules = {name for name, path in self.paths.items() if path in paths}
        for module in modules:
            for node in _saying(self.modules[module].body):
                if self._is_own_import(node, module):
                    continue
                if isinstance(node, (ast.Import, ast.ImportFrom)):  # as if a line each
                    base = f"{node.level}{node.module}" if isinstance(node, ast.ImportFrom) else ""
                    for alias in node.names:
                        yield digest(f"import {base} {alias.name} {alias.asname}")
                else:
                    yield digest(self._text(node, module, modules))

    def _is_ours(self, name: str) -> bool:
        return name in self.modules or name == PACKAGE.partition(".")[0]

    def _text(self, node: object, module: str, counts: set[str]) -> str:
        """A node's syntax in one line, the same under every Python: what is absent is left out."""
        recur = lambda value: self._text(value, module, counts)
        if isinstance(node, list):
            kept = _saying(node) if node and isinstance(node[0], ast.stmt) else node
            kept = [n for n in kept if not self._is_own_import(n, module)]
            return f"[{','.join(map(recur, kept))}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Constant) and node.value in self.modules:
            return f"module {str(node.value).rpartition('.')[2]}"
        own = self._own(node, module)
        if own:
            return self._reference(*own, counts)
        given = ((name, getattr(node, name, None)) for name in node._fields)
        fields = [
            f"{name}={recur(value)}"
            for name, value in given
            if name not in ("ctx", "kind", "type_comment") and value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(fields)})"

    def _is_own_import(self, node: object, module: str) -> bool:
        if isinstance(node, ast.ImportFrom):
            return self._base(module, node) is not None
        return isinstance(node, ast.Import) and all(self._is_ours(a.name) for a in node.names)

    def _own(self, node: ast.AST, module: str) -> tuple[str, str] | None:
        """The module and the name in it that a name, or a module's attribute, stands for."""
        names = self.imported[module]
        if isinstance(node, ast.Name):
            base, name = names.get(node.id, (None, None))
            if base and name:
                return base, name
            return (module, node.id) if node.id in self.defined[module] else None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            base, name = names.get(node.value.id, (None, None))
            return (base, node.attr) if base and not name else None
        return None

    def _reference(self, module: str, name: str, counts: set[str]) -> str:
        """A definition by its name and, where it counts, by what it says; by no place."""
        for _ in self.modules:  # through modules that only pass it on
            if module not in self.modules or name in self.defined[module]:
                break
            base, inner = self.imported[module].get(name, (None, None))
            if base is None:
                break
            module, name = base, inner or ""
        if module not in counts or name not in self.defined[module]:
            return f"own {name}"
        return f"own {name} {self._definition(module, name)}"

    def _definition(self, module: str, name: str) -> str:
        if (module, name) not in self.definitions:
            said = [self._text(node, module, set()) for node in self.defined[module][name]]
            self.definitions[module, name] = digest("\n".join(said))
        return self.definitions[module, name]


class Module:
    """A file of Python.

    body: its statements. names: its imports, and its texts, which may name a module; each with
    whether only a function does so. needs_triton: to be imported itself. implements: of which
    devices it holds kernels of Triton, or calls those of the C++ library.
    """

    def __init__(self, text: str) -> None:
        self.body = ast.parse(text).body
        self.names: list[tuple[Any, bool]] = []
        self.needs_triton = False
        self.implements: set[str] = set()
        todo: list[tuple[ast.AST, bool]] = [(node, False) for node in _saying(self.body)]
        while todo:
            node, later = todo.pop()
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.names.append((node, later))
                module = getattr(node, "module", None) or node.names[0].name
                outside = not getattr(node, "level", 0)
                if outside and not later and module.partition(".")[0] == "triton":
                    self.needs_triton = True
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.names.append((node, True))
            elif isinstance(node, ast.Attribute):
                value = node.value  # torch.ops in torch.ops.deit_cpu, triton in triton.jit
                before = getattr(value, "attr", getattr(value, "id", ""))
                self.implements |= MARKS.get((before, node.attr), set())
            later = later or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            inside = (each for each in ast.iter_child_nodes(node) if not _is_typing(each))
            todo += [(each, later) for each in inside]


@functools.lru_cache(maxsize=2)
def project(texts: tuple[tuple[str, str], ...]) -> Python:
    """The modules of (path, text)."""
    return Python(dict(texts))


def _module(path: str) -> str:
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"deit.{name}" if path.startswith("kernels/") else name


def _with_packages(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _is_typing(node: object) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _saying(body: list[ast.stmt]) -> list[ast.stmt]:
    """Without docstrings and other texts by themselves, `pass`, and what types alone need."""

    def says(node: ast.stmt) -> bool:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return not isinstance(node.value.value, str)
        return not isinstance(node, ast.Pass) and not _is_typing(node)

    return list(filter(says, body))


def _definitions(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Name -> the top-level statements that bind it, in order."""
    found: dict[str, list[ast.stmt]] = defaultdict(list)
    for node in _saying(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[node.name].append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for each in ast.walk(target):
                    if isinstance(each, ast.Name):
                        found[each.id].append(node)
        else:
            for inner in ("body", "orelse", "handlers", "finalbody"):
                for each in getattr(node, inner, []):
                    nested = each.body if isinstance(each, ast.ExceptHandler) else [each]
                    for name in _definitions(nested):
                        found[name].append(node)
    return dict(found)
