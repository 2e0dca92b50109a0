"""What keeps the project small and in one vocabulary: imports, room sizes, words."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMITS = {
    "macs": 8468,
    "megatron_macs": 1402,
    "deepspeed_macs": 1179,
    "vllm_macs": 724,
    "tools": 6278,
    "examples": 4303,
    "tests": 14617,
}
"""Lines of Python a room may have. A room that is full gives something up before it gets more."""

FORMER = (
    "Seam Limits Share Room Sums Terms Choice Findings Weighed Installed Agreement Disagreement outcasts "
    "straggler damage drop_padding max_load_factor min_capacity entropy_sharpness log_format RENAMED "
    "offer_scores take_scores place_among watching_steps"
).split()
"""Identifiers that have another name now, or are gone."""

PHRASES = "what is told", "who stays", "has a say", "left alone", "heeding", "it is said"
"""Not in docstrings and comments of the packages."""


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


LONGEST = 350
"""Lines of any file."""


def test_no_file_is_longer_than_a_reader_takes_in():
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*LIMITS)}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("room", LIMITS)
def test_rooms_stay_within_their_lines(room):
    assert sum(len(path.read_text().splitlines()) for path in sources(room)) <= LIMITS[room]


def test_adapters_import_nothing_of_the_core_but_what_it_offers_them():
    found = set()
    for path in sources("megatron_macs", "deepspeed_macs", "vllm_macs"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.level == 0
                and (node.module or "").startswith("macs")
            ):
                found.add(node.module)
            if isinstance(node, ast.Import):
                found |= {one.name for one in node.names if one.name.split(".")[0] == "macs"}
    assert found == {"macs.adapters"}


def test_imports_run_down():
    """Steps import no planner, the planner no runtime, the core no engine and no tool."""
    above = {
        "macs/steps": ("planner", "runtime", "records", "config", "policies"),
        "macs/planner.py": ("runtime", "records"),
        "macs": (
            "megatron",
            "deepspeed",
            "megatron_macs",
            "deepspeed_macs",
            "vllm_macs",
            "vllm",
            "macs_tools",
        ),
    }
    for place, names in above.items():
        paths = [ROOT / place] if place.endswith(".py") else sources(place)
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert not set((node.module or "").split(".")) & set(names), (path, node.module)


@pytest.mark.parametrize("room", ["macs", "megatron_macs", "deepspeed_macs", "vllm_macs"])
def test_former_names_do_not_come_back(room):
    for path in sources(room):
        text = path.read_text()
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        names |= {
            node.name
            for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }
        assert not names & set(FORMER), path
        assert [phrase for phrase in PHRASES if re.search(phrase, text)] == [], path
