"""What holds for every writer, whatever it writes to."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_reports import every_kind, full_report

from attnprobe.errors import AttnProbeError, ConfigurationError, WriterError
from attnprobe.writers import ConsoleWriter, JSONLWriter, MemoryWriter, TensorBoardWriter, Writer

WRITERS: dict[str, Callable[[Path], Writer]] = {
    "memory": lambda path: MemoryWriter(),
    "memory with a limit": lambda path: MemoryWriter(limit=2),
    "jsonl": lambda path: JSONLWriter(path / "run.jsonl"),
    "tensorboard": lambda path: TensorBoardWriter(path),
    "tensorboard, everything each time": lambda path: TensorBoardWriter(path, projector_every=1, overview_every=1),
    "console": lambda path: ConsoleWriter(io.StringIO()),
    "console with a table": lambda path: ConsoleWriter(io.StringIO(), table=True),
}


@pytest.fixture(params=WRITERS, ids=str)
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Writer:
    return WRITERS[request.param](tmp_path / "missing" / "parents")


def test_fits_the_protocol(writer: Writer) -> None:
    assert isinstance(writer, Writer)
    writer.close()


def test_takes_every_kind_of_report(writer: Writer) -> None:
    for report in every_kind():
        writer.write(report)
    writer.close()


def test_close_can_be_repeated_and_writing_can_go_on(writer: Writer) -> None:
    writer.close()
    writer.write(full_report(1))
    writer.close()
    writer.close()
    writer.write(full_report(2))
    writer.close()


def test_leaves_the_report_as_it_was(writer: Writer) -> None:
    report, same = full_report(3), full_report(3)
    writer.write(report)
    writer.close()
    for name, values in same.statistics.items():
        assert values.equal(report[name]) or bool((values.isnan() == report[name].isnan()).all())


@pytest.mark.parametrize("kind", ["memory", "jsonl", "tensorboard"])
def test_can_be_sent_to_another_process_before_its_first_report(kind: str, tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(WRITERS[kind](tmp_path)))
    writer.write(full_report())
    writer.close()


@pytest.mark.parametrize("make", [JSONLWriter, TensorBoardWriter])
@pytest.mark.parametrize("beneath", ["", "deeper/run"])
def test_a_file_in_place_of_a_directory_is_named(make: Callable[[Path], Writer], beneath: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WriterError, match=r"notes\.txt is a file; pass another directory") as caught:
        make(tmp_path / "notes.txt" / beneath)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, AttnProbeError)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("make", [JSONLWriter, TensorBoardWriter])
@pytest.mark.parametrize("path", ["/proc/attnprobe/run", "nul\0byte"], ids=["read-only", "not a path"])
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_place_that_cannot_be_written_is_refused_at_once(make: Callable[[str], Writer], path: str) -> None:
    with pytest.raises(WriterError, match=r"cannot write to .*; pass a"):
        make(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: MemoryWriter(limit=0),
        lambda path: ConsoleWriter(every=0),
        lambda path: ConsoleWriter(every=True),
        lambda path: TensorBoardWriter(path, maps_every=-1),
        lambda path: TensorBoardWriter(path, projector_every=1.5),
        lambda path: TensorBoardWriter(17),
    ],
)
def test_options_that_cannot_work_are_refused(make: Callable[[Path], Writer], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        make(tmp_path)


def test_memory_keeps_the_latest() -> None:
    writer = MemoryWriter(limit=2)
    for step in range(5):
        writer.write(full_report(step))
    assert [report.step for report in writer.reports] == [3, 4]


def test_no_writer_pays_for_the_imports_of_another() -> None:
    code = (
        "import sys; from attnprobe.writers import MemoryWriter, JSONLWriter, ConsoleWriter, Writer, read_jsonl;"
        "print([m for m in ('torch', 'numpy', 'tensorboard', 'PIL', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors() -> None:
    import attnprobe.writers

    with pytest.raises(AttributeError, match="no attribute 'CSVWriter'"):
        _ = attnprobe.writers.CSVWriter
    assert set(attnprobe.writers.__all__) <= set(dir(attnprobe.writers))
