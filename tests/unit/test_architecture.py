"""Claims about the house itself: floors, homes of outside packages, empty `__init__.py`, the tree in README.md.

Only the syntax tree is read; nothing of the package is imported. Imports inside functions and under TYPE_CHECKING count
like all others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]

# A module or package and the floor it stands on. A module imports from its own floor or lower ones, never in a circle.
FLOORS = {
    "dist_mlpl.errors": 0, "dist_mlpl.labels": 0, "dist_mlpl.batch": 0, "dist_mlpl.world": 0,
    "dist_mlpl.settings": 0, "dist_mlpl.keyed": 0, "dist_mlpl.environment": 0,
    "dist_mlpl.storage": 1, "dist_mlpl.comm": 1, "dist_mlpl.kernels": 1, "dist_mlpl.spans": 1,
    "dist_mlpl.urls": 1, "dist_mlpl.retry": 1, "dist_mlpl.stores": 1,
    "dist_mlpl.listings": 1, "dist_mlpl.local_files": 1,
    "dist_mlpl.data": 2, "dist_mlpl.models": 2, "dist_mlpl.losses": 2, "dist_mlpl.banks": 2,
    "dist_mlpl.curriculum": 2, "dist_mlpl.metrics": 2,
    "dist_mlpl.methods": 3, "dist_mlpl.optimizer": 3,
    "dist_mlpl.engine": 4, "dist_mlpl.engines": 4, "dist_mlpl.chain": 4, "dist_mlpl.checkpoint": 4,
    "dist_mlpl.bank_files": 4,
    "dist_mlpl.evaluate": 4,
    "dist_mlpl.rounds": 4,
    "dist_mlpl.progress": 4, "dist_mlpl.display": 4,
    "dist_mlpl.profile": 4,
    "dist_mlpl.config": 5, "dist_mlpl.documents": 5, "shards": 5,
    "dist_mlpl.build": 6, "dist_mlpl.run": 6, "dist_mlpl.train": 6,
    "dist_mlpl.local": 7, "dist_mlpl.cluster": 7, "dist_mlpl.board": 7, "dist_mlpl.tasks": 7, "dist_mlpl.tools": 7,
    "dist_mlpl.cli": 7, "dist_mlpl.cli_options": 7, "dist_mlpl.cli_shards": 7, "dist_mlpl.cli_labels": 7,
}  # fmt: skip
SEPARATE_FLOOR = 2  # rooms here do not import one another; methods bring them together
SHARDS_CEILING = 2  # the highest floor that the sharding tool may import, itself apart

# An outside package and the only modules that may import it.
HOMES = {
    "ray": {"dist_mlpl.cluster", "dist_mlpl.board", "dist_mlpl.tasks"},
    "deepspeed": {"dist_mlpl.engines.zero"},
    "torch.distributed": {"dist_mlpl.comm", "dist_mlpl.engine", "dist_mlpl.local"},
    "fsspec": {"dist_mlpl.stores"},
    "torchvision": {"dist_mlpl.models.backbone", "dist_mlpl.data.transform", "dist_mlpl.data.jpeg"},
    "webdataset": {"shards.pack", "dist_mlpl.data.tars"},
    "moto": {"dist_mlpl.tools.object_store"},
    "boto3": {"dist_mlpl.tools.object_store"},
    "botocore": {"dist_mlpl.tools.object_store"},
    "triton": {"dist_mlpl.kernels.triton_scores"},
    "tensorboard": {"dist_mlpl.progress"},
    "torch.utils.tensorboard": {"dist_mlpl.progress"},
}

FORBIDDEN_WORDS = {"util", "utils", "helper", "helpers", "manager", "managers", "misc", "common"}


def source_files() -> list[Path]:
    return sorted(path for package in ("dist_mlpl", "shards") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in source_files()}


def imports_of(tree: ast.AST, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module; `from package import module` names the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known or full in HOMES else base


@cache
def all_imports() -> tuple[tuple[str, int, str], ...]:
    """(module, line, imported module) of every import in the package."""
    known = frozenset(modules())
    return tuple(
        (module, line, imported)
        for module, path in modules().items()
        for line, imported in imports_of(ast.parse(path.read_text()), known)
    )


def own_imports() -> Iterator[tuple[str, int, str]]:
    return (found for found in all_imports() if found[2].split(".")[0] in ("dist_mlpl", "shards"))


def room_of(module: str) -> str:
    """The row of FLOORS that a module belongs to."""
    return max((row for row in FLOORS if f"{module}.".startswith(f"{row}.")), key=len, default="")


def test_every_module_stands_on_a_floor() -> None:
    assert [m for m in modules() if m != "dist_mlpl" and not room_of(m)] == []


def test_no_module_imports_from_a_higher_floor() -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, line, imported in own_imports()
        if FLOORS[room_of(imported)] > FLOORS[room_of(module)]
    ]
    assert wrong == []


def test_rooms_of_the_second_floor_do_not_import_one_another() -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, line, imported in own_imports()
        if FLOORS[room_of(module)] == FLOORS[room_of(imported)] == SEPARATE_FLOOR
        and room_of(module) != room_of(imported)
    ]
    assert wrong == []


def test_the_sharding_tool_needs_only_the_lowest_floors() -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, line, imported in own_imports()
        if room_of(module) == "shards" and room_of(imported) != "shards" and FLOORS[room_of(imported)] > SHARDS_CEILING
    ]
    assert wrong == []


def test_imports_have_no_cycle() -> None:
    needs: dict[str, set[str]] = {module: set() for module in modules()}
    for module, _, imported in own_imports():
        needs[module].add(imported)
    done: set[str] = set()
    while ready := {module for module in needs if module not in done and needs[module] <= done}:
        done |= ready
    assert sorted(set(needs) - done) == [], "these import one another"


def test_every_outside_package_is_imported_in_its_home_alone() -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for module, line, imported in all_imports()
        for package, homes in HOMES.items()
        if f"{imported}.".startswith(f"{package}.") and module not in homes
    ]
    assert wrong == []


def test_init_files_hold_no_code() -> None:
    assert [str(path) for path in source_files() if path.name == "__init__.py" and path.read_text().strip()] == []


def test_every_module_says_what_it_owns() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for path in source_files()
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert bare == []


def test_no_file_is_named_for_being_a_collection_of_things() -> None:
    named = [
        str(path.relative_to(ROOT))
        for folder in ("dist_mlpl", "shards", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if FORBIDDEN_WORDS & set(path.stem.split("_"))
    ]
    assert named == []


def tree_in(readme: str) -> str:
    """The fenced block whose first line begins with `dist_mlpl/`."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if block.startswith("dist_mlpl/")]
    assert len(trees) == 1, "README.md draws the file tree in one fenced block that begins with dist_mlpl/"
    return trees[0]


def files_in_tree(tree: str) -> set[str]:
    """Python files of a drawn tree. A line begins with the names that it is about: files, or one folder (`name/`);
    what stands deeper belongs to the folder above it."""
    files: set[str] = set()
    folders: list[tuple[int, str]] = []  # indent, path
    for line in tree.splitlines():
        bare = re.sub(r"[│├└─]", " ", line)
        indent = len(bare) - len(bare.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        folder = folders[-1][1] if folders else ""
        for word in bare.split():
            if re.fullmatch(r"\w+/", word):
                folders.append((indent, folder + word))
                break
            if not re.fullmatch(r"\w+\.py", word):
                break
            files.add(folder + word)
    return files


def test_a_drawn_tree_is_read_as_a_person_reads_it() -> None:
    tree = (
        "dist_mlpl/\n  cli.py   [7]  verbs, see train.py\n  data/  [2] order.py is first\n    order.py stream.py  x\n"
    )
    tree += "  a.py b.py  [0]\nshards/  the tool\n├── pack.py\n"
    assert files_in_tree(tree) == {
        "dist_mlpl/cli.py", "dist_mlpl/data/order.py", "dist_mlpl/data/stream.py", "dist_mlpl/a.py", "dist_mlpl/b.py",
        "shards/pack.py",
    }  # fmt: skip


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    drawn = files_in_tree(tree_in((ROOT / "README.md").read_text()))
    there = {str(path.relative_to(ROOT)) for path in source_files() if path.name != "__init__.py"}
    assert sorted(drawn - there) == [], "drawn, but not there"
    assert sorted(there - drawn) == [], "there, but not drawn"
