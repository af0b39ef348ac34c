"""The built package holds everything, and works from a directory of its own."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    shutil.copytree(ROOT / "attnprobe", source / "attnprobe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "attnprobe").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    missing = {str(path.relative_to(ROOT)) for path in files} - inside
    assert not missing
    assert "attnprobe/py.typed" in inside
    assert {f"attnprobe/tensorboard_plugin/static/{name}" for name in ("index.js", "style.css")} <= inside
    assert "attnprobe/tensorboard_plugin/static/vendor/LICENSE-uPlot.txt" in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_the_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "import attnprobe, attnprobe.probe; print(attnprobe.__file__)"
    environment = {"PYTHONPATH": str(unpacked), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(unpacked / "attnprobe" / "__init__.py")
