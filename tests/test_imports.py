"""Imports run downward only: each room may import the rooms before it."""

from __future__ import annotations

import ast
from pathlib import Path

import dino_xcit

FLOORS = (
    ("config", "shapes"),
    ("schedules", "xcit", "dino", "photometric", "run_folder", "machine", "watch"),
    ("formats", "dense"),
    ("crops", "attention", "figure", "video", "page"),
    ("data",),
    ("module", "weights"),
    ("features", "report"),
    ("knn", "linear", "segmentation", "plan", "views", "saving", "takeover"),
    ("layouts", "masks"),
    ("strip", "probe", "show", "export"),
    ("pretrain",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FOLDER = Path(dino_xcit.__file__).parent


def imported_rooms(room: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((FOLDER / f"{room}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dino_xcit"):
            found |= (
                {node.module.removeprefix("dino_xcit.")}
                if node.module != "dino_xcit"
                else {a.name for a in node.names}
            )
    return found - {"__version__"}


def test_every_room_stands_on_a_floor():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(FLOOR_OF)


def test_every_public_name_loads_and_is_no_rooms_name():
    for name in dino_xcit.__all__:
        assert getattr(dino_xcit, name) is not None
        assert name not in FLOOR_OF, "importing the room would hide the name"


def test_imports_run_downward():
    for room, floor in FLOOR_OF.items():
        for imported in imported_rooms(room):
            assert FLOOR_OF[imported] < floor, f"{room} imports {imported}"
