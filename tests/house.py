"""The shape of the package, by its syntax trees: lines, modules, chains of imports, and habits.

``python -m tests.house`` prints the figures that `tests/test_house.py` holds the package to.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ncbatch"


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _docstring(node: ast.AST) -> ast.Expr | None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    first = node.body[0] if node.body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if is_text and isinstance(first.value.value, str) else None


@dataclass(frozen=True)
class Module:
    """A module of the package and what its text says."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        kinds = ast.FunctionDef | ast.AsyncFunctionDef
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    @cached_property
    def kinds_of_lines(self) -> dict[str, int]:
        """Lines of code, of docstrings, of comments, and blank ones."""
        documented: set[int] = set()
        for node in ast.walk(self.tree):
            if (text := _docstring(node)) is not None:
                documented.update(range(text.lineno, text.end_lineno + 1))
        counts = {"code": 0, "docstring": len(documented), "comment": 0, "blank": 0}
        for number, line in enumerate(self.text.splitlines(), 1):
            if number in documented:
                continue
            stripped = line.strip()
            kind = "blank" if not stripped else "comment" if stripped[0] == "#" else "code"
            counts[kind] += 1
        return counts

    @cached_property
    def imports(self) -> list[tuple[list[str], bool]]:
        """What each import of this package brings, and whether it stands within a function."""
        return list(self._imports(self.tree, False))

    def _imports(self, node: ast.AST, inside: bool) -> Iterator[tuple[list[str], bool]]:
        for child in ast.iter_child_nodes(node):
            # Expressions hold no statements.
            if isinstance(child, ast.expr) or _is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [f"{child.module}.{alias.name}" for alias in child.names]
            else:
                names = []
            if names and names[0].split(".")[0] == "ncbatch":
                yield names, inside
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from self._imports(child, inside or is_function)


@dataclass(frozen=True)
class House:
    """The modules of the package, by name."""

    modules: dict[str, Module]

    @classmethod
    def read(cls, folder: Path = PACKAGE) -> House:
        modules = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules[name] = Module(name, path.read_text(encoding="utf-8"))
        return cls(modules)

    def _module_of(self, imported: str) -> str | None:
        while imported and imported not in self.modules:
            imported = imported.rpartition(".")[0]
        return imported or None

    def imported_by(self, name: str) -> set[str]:
        """Modules that a module imports when it is loaded."""
        imports = self.modules[name].imports
        targets = {self._module_of(t) for names, inside in imports if not inside for t in names}
        return {target for target in targets if target and target != name}

    @cached_property
    def longest_chain(self) -> list[str]:
        """The longest chain of modules that import each other when loaded.

        Raises
        ------
        ValueError
            When modules import each other in a circle.
        """
        chains: dict[str, list[str]] = {}

        def chain(name: str, above: tuple[str, ...]) -> list[str]:
            if name in above:
                raise ValueError(f"a circle of imports: {' -> '.join([*above, name])}")
            if name not in chains:
                below = [chain(n, (*above, name)) for n in sorted(self.imported_by(name))]
                chains[name] = [name, *max(below, key=len, default=[])]
            return chains[name]

        return max((chain(name, ()) for name in self.modules), key=len)

    @property
    def packed_assignments(self) -> list[str]:
        """Where several names are assigned several values in one statement."""
        return [
            f"{module.name}:{node.lineno}"
            for module in self.modules.values()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ]

    @property
    def vague_names(self) -> list[str]:
        """Functions with a local variable called ``found``, which says nothing."""
        return [
            f"{module.name}:{function.name}"
            for module in self.modules.values()
            for function in module.functions
            if any(
                isinstance(node, ast.Name)
                and node.id == "found"
                and isinstance(node.ctx, ast.Store)
                for node in ast.walk(function)
            )
        ]

    def function_imports(self, *, outside: str = "") -> list[str]:
        """List imports of this package within functions, without those of the room `outside`."""
        return [
            f"{module.name}: {names[0]}"
            for module in self.modules.values()
            if not outside or not f"{module.name}.".startswith(f"ncbatch.{outside}.")
            for names, inside in module.imports
            if inside
        ]

    @property
    def skipped_formatting(self) -> list[str]:
        """Where the formatter is told to keep off."""
        return [
            f"{module.name}:{number}"
            for module in self.modules.values()
            for number, line in enumerate(module.text.splitlines(), 1)
            if "# fmt:" in line
        ]

    @property
    def lines(self) -> dict[str, int]:
        """Lines of the whole package by kind."""
        totals: dict[str, int] = {}
        for module in self.modules.values():
            for kind, count in module.kinds_of_lines.items():
                totals[kind] = totals.get(kind, 0) + count
        return totals

    @property
    def function_lengths(self) -> list[tuple[int, str]]:
        """Lines of every function without its docstring, longest first."""
        lengths = []
        for module in self.modules.values():
            for function in module.functions:
                text = _docstring(function)
                told = 0 if text is None else text.end_lineno - text.lineno + 1
                length = function.end_lineno - function.lineno + 1 - told
                lengths.append((length, f"{module.name}:{function.name}"))
        return sorted(lengths, reverse=True)

    @cached_property
    def figures(self) -> dict[str, float]:
        """Return what the package is held to, as numbers."""
        lines = self.lines
        return {
            "lines of code": lines["code"],
            "lines of docstrings": lines["docstring"],
            "comment lines per 100 of code": round(100 * lines["comment"] / lines["code"], 1),
            "modules": len(self.modules),
            "entries at the top": len(top_entries()),
            "longest chain of imports": len(self.longest_chain),
            "imports within functions": len(self.function_imports()),
            "imports within functions, outside cli": len(self.function_imports(outside="cli")),
            "packed assignments": len(self.packed_assignments),
            "formatting skipped": len(self.skipped_formatting),
            "functions with a local 'found'": len(self.vague_names),
            "longest function": self.function_lengths[0][0],
        }


def top_entries(folder: Path = PACKAGE) -> list[str]:
    """List what stands at the top of the package."""
    return sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")


def main() -> None:
    """Print the figures, and where each habit is seen with ``-v``."""
    house = House.read()
    for name, value in house.figures.items():
        print(f"{name:40} {value:>8,}")
    if "-v" in sys.argv:
        print("longest chain:", *house.longest_chain, sep="\n  ")
        print(
            "longest functions:", *(f"{n} {f}" for n, f in house.function_lengths[:10]), sep="\n  "
        )
        print("packed assignments:", *house.packed_assignments, sep="\n  ")
        print("formatting skipped:", *house.skipped_formatting, sep="\n  ")
        print("'found':", *house.vague_names, sep="\n  ")


if __name__ == "__main__":
    main()
