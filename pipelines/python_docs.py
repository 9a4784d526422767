"""The documentation that comes with every Python, as documents.

Two sources: the language reference topics behind ``help("assert")`` (``pydoc_data.topics``) and the docstrings of
the standard library, one document a module, read from the source files without importing them. This is the corpus of
``make demo`` and a part of the text the shipped checkpoint is trained on.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "__pycache__", "site-packages"})
"""Folders of the standard library that hold tests and generated code rather than documentation."""


def iterate_topics() -> Iterator[dict[str, str]]:
    """Yields one document a language reference topic, in the order of the topics' names."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield {"id": f"topic/{name}", "text": topics[name], "source": "python-topics"}


def _list_modules() -> Iterator[tuple[str, Path]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        if name in SKIPPED_FOLDERS:
            continue
        single, package = library / f"{name}.py", library / name
        if single.is_file():
            yield name, single
        elif package.is_dir():
            for path in sorted(package.rglob("*.py")):
                relative = path.relative_to(library)
                if SKIPPED_FOLDERS.isdisjoint(relative.parts):
                    dotted = ".".join(relative.with_suffix("").parts)
                    yield dotted.removesuffix(".__init__"), path


def _collect_docstrings(tree: ast.Module, module_name: str) -> str:
    parts = []
    stack: list[tuple[ast.AST, str]] = [(tree, module_name)]
    while stack:
        node, qualified_name = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                parts.append(f"{qualified_name}\n\n{docstring.strip()}\n")
            children = [
                (child, f"{qualified_name}.{child.name}")
                for child in node.body
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            ]
            stack.extend(reversed(children))
    return "\n".join(parts)


def iterate_docstrings() -> Iterator[dict[str, str]]:
    """Yields one document a standard library module that has docstrings, in the order of the modules' names."""
    for module_name, path in _list_modules():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates such as those of lib2to3 are not Python of this version
        text = _collect_docstrings(tree, module_name)
        if text:
            yield {"id": f"module/{module_name}", "text": text, "source": "python-docstrings"}


def iterate_python_docs() -> Iterator[dict[str, str]]:
    """Yields every document of both sources: keys ``id``, ``text`` and ``source``."""
    yield from iterate_topics()
    yield from iterate_docstrings()
