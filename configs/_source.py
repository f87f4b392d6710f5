"""Where a config file assigns each name, and where it fails: running it does not say."""

import ast
import sys
import traceback
from collections.abc import Iterator, Set
from pathlib import Path

from refocused.entry import from_here

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
OWN_NAMES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, *COMPREHENSIONS)


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """What is below a node, without what has names of its own: functions, classes, comprehensions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, OWN_NAMES):
            yield child
            yield from top_level(child)


def assigned(path: Path, keys: Set[str], seen: tuple[str, ...] = ()) -> dict[str, str]:
    """{name: file:line that assigned it last}, through the files that it has imported from.

    Names that only a loop, an import or a with statement binds are not among them. Raises OSError, SyntaxError, ValueError.
    """
    places: dict[str, str] = {}
    for node in top_level(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.ImportFrom):
            file = getattr(sys.modules.get(node.module or ""), "__file__", None) or ""
            names = {a.name: a.asname or a.name for a in node.names if a.asname in (None, *keys)}  # else a helper's
            if file.endswith(".py") and file not in seen and names.keys() & {"*", *keys}:
                there = assigned(Path(from_here(file)), keys, (*seen, file))
                places |= there if "*" in names else {names[n]: place for n, place in there.items() if n in names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                names_in = [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]
                places |= dict.fromkeys(names_in, f"{path}:{node.lineno}")
    return places


def line_of(error: BaseException, path: Path) -> str:
    """file:line of the config file, or of one beside it, that an error comes from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).absolute()
        if file.parent in (path.parent.absolute(), Path(__file__).parent) and not file.name.startswith("_"):
            return f"{from_here(file)}:{frame.lineno}"
    return str(path)
