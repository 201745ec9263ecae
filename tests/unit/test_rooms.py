"""The rule of the house: a file in common/ serves two programs or more, each folder in it one; no program another."""

import ast
from functools import cache
from pathlib import Path

HOUSE = Path(__file__).parents[2]
PROGRAMS = [HOUSE / f"{name}.py" for name in ("frontend", "processor", "router", "engine")]
COMMON = HOUSE / "common"


@cache
def imports(file: Path) -> frozenset[Path]:
    """The files of this repository that one imports, also inside its functions."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = {HOUSE.joinpath(*name.split(".")).with_suffix(".py") for name in names}
    return frozenset(file for file in files if file.is_file())


def needed(program: Path) -> set[Path]:
    """Every file that a program imports, directly or through others."""
    found, new = set[Path](), {program}
    while new:
        found |= new
        new = set[Path]().union(*map(imports, new)) - found
    return found - {program}


NEEDED = {program.stem: needed(program) for program in PROGRAMS}


def users(file: Path) -> set[str]:
    return {program for program, files in NEEDED.items() if file in files}


def test_a_file_in_common_serves_two_programs_or_more() -> None:
    files = [file for file in COMMON.glob("*.py") if file.name != "__init__.py"]
    assert {file.name: users(file) for file in files if len(users(file)) < 2} == {}


def test_a_folder_in_common_serves_one_program() -> None:
    rooms = {room.name: list(room.glob("*.py")) for room in COMMON.iterdir() if any(room.glob("*.py"))}
    serve = {room: set[str]().union(*map(users, files)) for room, files in rooms.items()}
    assert serve == {"http": {"frontend"}, "text": {"processor"}, "routing": {"router"}, "engines": {"engine"}}
    assert [file.name for files in rooms.values() for file in files if not users(file)] == []


def test_no_program_imports_another() -> None:
    assert {program: found for program, files in NEEDED.items() if (found := files.intersection(PROGRAMS))} == {}
