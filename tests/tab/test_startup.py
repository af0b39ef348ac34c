"""What the Attention tab costs whoever only starts TensorBoard, and what happens where it cannot work."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.plugins.base_plugin import TBContext

from attnprobe.tensorboard_plugin.loader import AttentionLoader

#: What TensorBoard does at every start: its own imports are not counted.
START = """
import argparse, json, sys, time
from importlib.metadata import EntryPoint
import tensorboard.default, tensorboard.program
from tensorboard.plugins.base_plugin import TBContext

before = set(sys.modules)
began = time.process_time()
point = EntryPoint("attnprobe", "attnprobe.tensorboard_plugin.loader:AttentionLoader", "tensorboard_plugins")
loader = point.load()()
flags = argparse.Namespace(samples_per_plugin={}, logdir_spec="")
loader.define_flags(argparse.ArgumentParser())
loader.fix_flags(flags)
plugin = loader.load(TBContext(logdir=sys.argv[1], flags=flags))
routes = sorted(plugin.get_plugin_apps())
active = plugin.is_active()
took = time.process_time() - began
heavy = "IPython jax lightning matplotlib pandas pytorch_lightning scipy sklearn tensorflow torch transformers".split()
loaded = sorted(set(heavy) & (set(sys.modules) - before))
print(json.dumps([took, loaded, flags.samples_per_plugin, routes, active, plugin.plugin_name]))
"""


def test_a_start_of_tensorboard_loads_no_framework_and_is_quick(tmp_path: Path) -> None:
    found = []
    for _ in range(3):  # the quickest: other processes evict what this one reads
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", START, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        took, loaded, samples, routes, active, name = json.loads(done.stdout.splitlines()[-1])
        assert loaded == []
        assert samples == {"attnprobe": 1}
        assert routes == ["/frames", "/head", "/map", "/range", "/runs", "/static/*", "/usage"]
        assert active is False
        assert name == "attnprobe"
        found.append(took)
    print(f"\nAttention tab: {1000 * min(found):.0f} ms of a start of TensorBoard")
    assert min(found) < 0.3


def test_the_entry_point_is_declared() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points.tensorboard_plugins]\nattnprobe = "attnprobe.tensorboard_plugin.loader:' in text


@pytest.mark.parametrize("broken", ["attnprobe.tensorboard_plugin.plugin", "attnprobe.logs.events"])
def test_a_plugin_that_cannot_be_imported_is_left_out_with_a_warning(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in [*sys.modules]:
        if name.startswith("attnprobe.tensorboard_plugin.") and not name.endswith("loader"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, broken, None)
    with caplog.at_level(logging.WARNING, "tensorboard"):
        assert AttentionLoader().load(TBContext(logdir=str(tmp_path))) is None
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("tensorboard", "WARNING")
    assert record.getMessage() == "attnprobe: the Attention tab cannot be shown"
    assert "import of " + broken in caplog.text or "ImportError" in caplog.text


def test_a_plugin_that_cannot_be_made_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    context: Any = SimpleNamespace(logdir=object(), flags=None)
    assert AttentionLoader().load(context) is None
    assert "the Attention tab cannot be shown" in caplog.text


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({}, {"attnprobe": 1}),
        ({"images": 5}, {"images": 5, "attnprobe": 1}),
        ({"attnprobe": 0, "scalars": 9}, {"attnprobe": 0, "scalars": 9}),
        (None, None),
        ("images=5", "images=5"),
    ],
)
def test_the_users_own_samples_are_left_alone(given: object, left: object) -> None:
    flags = argparse.Namespace(samples_per_plugin=given)
    AttentionLoader().fix_flags(flags)
    assert flags == argparse.Namespace(samples_per_plugin=left)


def test_flags_without_samples(tmp_path: Path) -> None:
    loader, flags = AttentionLoader(), argparse.Namespace()
    loader.fix_flags(flags)
    assert flags == argparse.Namespace()
    plugin = loader.load(TBContext(logdir=str(tmp_path), flags=None))
    assert plugin is not None
    assert not plugin.is_active()
