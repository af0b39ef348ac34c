"""Imports only go down, and the package costs nothing until it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnprobe

PACKAGE = Path(attnprobe.__file__).parent
#: A part may import its own part and the parts that it lists; everything else is above it.
FLOOR = {"errors", "catalog", "record", "report"}
ALLOWED = {
    "errors": set(),
    "catalog": {"errors", "record"},
    "record": set(),
    # The one edge upwards: a notebook asks a value itself how it looks, and the report passes that on when asked.
    "report": {"errors", "writers"},
    "capture": FLOOR,
    "statistics": FLOOR,
    "alarms": FLOOR,
    "writers": FLOOR,
    "preserve": set(),
    "schedules": FLOOR | {"capture", "collect", "preserve"},
    "reference": FLOOR | {"capture", "statistics", "preserve"},
    "extent": FLOOR | {"statistics"},
    "assemble": FLOOR | {"statistics", "extent"},
    "collect": FLOOR | {"capture", "statistics", "preserve", "reference", "assemble", "extent"},
    "probe": FLOOR | {"capture", "alarms", "writers", "collect", "preserve", "reference", "extent"},
    "geometry": FLOOR | {"capture", "statistics", "preserve", "collect", "probe"},
    "lightning": FLOOR | {"alarms", "writers", "probe", "extent", "schedules"},
    "huggingface": FLOOR | {"alarms", "writers", "probe", "extent", "schedules"},
    "experiments": FLOOR | {"alarms", "writers", "probe", "lightning", "schedules", "geometry"},
    "logs": FLOOR | {"writers"},
    "view": FLOOR | {"writers", "logs", "__init__"},
    "tensorboard_plugin": FLOOR | {"writers", "logs", "view"},
    "run_summary": FLOOR | {"writers", "logs"},
    "calibrate": FLOOR | {"alarms", "logs", "writers"},
    "cli": FLOOR | {"experiments", "logs", "run_summary", "calibrate", "view", "writers"},
    "__init__": FLOOR | {"alarms", "capture", "writers", "probe", "logs"},
}
PUBLIC = {
    "AlarmRule", "Alarm", "AttentionProbe", "AttentionRecord", "ConsoleWriter", "DEFAULT_ALARMS", "JSONLWriter",
    "MemoryWriter", "STATISTICS", "Statistic", "StepReport", "TensorBoardWriter", "Writer", "analyze",
    "register_attention",
}  # fmt: skip


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The parts of attnprobe that a file imports, type checking and lazy imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names = [node.module or ""]
        parts = [name.split(".") for name in names if name.split(".")[0] == "attnprobe"]
        found |= {part[1] if len(part) > 1 else "__init__" for part in parts}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = _part(path)
    assert part in ALLOWED, f"give {part} a place in the table"
    extra = _imports(path) - ALLOWED[part] - {part} - ({"__init__"} if part == "cli" else set())
    assert not extra, f"{part} must not import {sorted(extra)}"


def test_a_module_that_is_not_a_writer_does_no_output() -> None:
    for part in ("capture", "statistics", "alarms"):
        for path in (PACKAGE / part).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not {"print", "open"} & {call.id for call in calls if isinstance(call, ast.Name)}, path


def test_public_names() -> None:
    assert set(attnprobe.__all__) >= PUBLIC
    for name in attnprobe.__all__:
        assert getattr(attnprobe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        attnprobe.nonsense  # noqa: B018


def test_importing_the_package_loads_no_framework() -> None:
    code = (
        "import sys, attnprobe, attnprobe.cli, attnprobe.catalog\n"
        "heavy = 'torch numpy lightning pytorch_lightning tensorboard matplotlib sklearn pandas'.split()\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
