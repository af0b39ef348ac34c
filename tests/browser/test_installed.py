"""The tab out of the built package, without the source tree."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.tab.server import tensorboard
from benchmarks.tab.synthetic import write_run
from tests.browser.view import View
from tests.test_wheel import wheel as wheel


def test_a_package_installed_elsewhere_shows_the_tab(wheel: Path, tmp_path: Path, tab: Callable[..., View]) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, capture_output=True, check=True)
    where = [sys.executable, "-c", "import attnprobe; print(attnprobe.__file__)"]
    found = subprocess.run(
        where, cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    write_run(tmp_path / "runs" / "a", [4, 2], 3, 10)
    with tensorboard(tmp_path / "runs", path=str(site)) as address:
        view = tab(address)
        assert view.panels() == ["a"]
        assert "10 probes" in view.text(".runs")
