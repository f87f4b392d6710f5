"""Where a config file assigns each name, and where it fails: running it does not say."""

import ast
import os
import sys
import traceback
from collections.abc import Set
from pathlib import Path


class Names(ast.NodeVisitor):
    """The names that a Python file binds at its top level."""

    def __init__(self, path: Path, keys: Set[str]):
        """Raises OSError, SyntaxError, ValueError."""
        self.path, self.keys = path, keys
        self.bound: list[tuple[str, int] | ast.ImportFrom] = []  # in order, with the line
        self.free: set[str] = set()  # bound by a loop, an import, a def: whatever is no assignment
        self.in_classes: list[tuple[str, int, str]] = []  # (class, line, key)
        self.visit(ast.parse(path.read_bytes(), str(path)))

    def visit_Assign(self, node):
        for target in getattr(node, "targets", None) or [node.target]:
            self.bound += [(name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name)]

    visit_AnnAssign = visit_AugAssign = visit_NamedExpr = visit_Assign

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Store):
            self.bound.append((node.id, node.lineno))
            self.free.add(node.id)

    def visit_Import(self, node):
        self.free |= {alias.asname or alias.name.split(".")[0] for alias in node.names}

    def visit_ImportFrom(self, node):
        self.bound.append(node)
        self.free |= {alias.asname or alias.name for alias in node.names}

    def visit_FunctionDef(self, node):
        self.free.add(node.name)

    def visit_ClassDef(self, node):
        self.free.add(node.name)
        for statement in node.body if not node.name.startswith("_") else ():
            for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
                if isinstance(target, ast.Name) and target.id in self.keys:
                    self.in_classes.append((node.name, statement.lineno, target.id))

    def visit_Lambda(self, node):
        pass

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda

    def resolved(self) -> tuple[dict[str, str], set[str]]:
        """{name: file:line that bound it last}, through files it has imported from; the names that need not be keys."""
        places, free = {}, set(self.free)
        for item in self.bound:
            if isinstance(item, tuple):
                places[item[0]] = f"{self.path}:{item[1]}"
                continue
            module = sys.modules.get(item.module or "")
            file = getattr(module, "__file__", None) or ""
            there, others = (
                Names(near(file), self.keys).resolved() if file.endswith(".py") else ({}, set(vars(module or ast)))
            )
            if not self.keys & there.keys():  # a module of helpers, not another config
                others |= there.keys()
            for alias in item.names:
                if alias.name == "*":
                    places |= there
                    free |= others
                elif alias.name in there:
                    places[alias.asname or alias.name] = there[alias.name]
        return places, free


def near(path: str | os.PathLike[str]) -> Path:
    """The path from the current folder, where it lies below that."""
    relative = os.path.relpath(path)
    return Path(os.path.abspath(path) if relative.startswith(os.pardir) else relative)


def line_of(error: BaseException, path: Path) -> str:
    """file:line of the config file, or of one beside it, that an error comes from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    folders = (path.parent.absolute(), Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).absolute()
        if file.parent in folders and not file.name.startswith("_"):
            return f"{near(file)}:{frame.lineno}"
    return str(path)
