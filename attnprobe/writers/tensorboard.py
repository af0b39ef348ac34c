"""Reports in TensorBoard: one event per probe."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from attnprobe.errors import ConfigurationError
from attnprobe.writers import summaries
from attnprobe.writers.base import positive, writable_directory
from attnprobe.writers.projector import write_values
from attnprobe.writers.text import markdown

if TYPE_CHECKING:
    from attnprobe.report import StepReport
    from attnprobe.writers.entry import Entry


class TensorBoardWriter:
    """Writes every probe as one event: all heads for the Attention tab, about fifty scalars, texts and pictures.

    With a directory the event file is made at the first report, so that the ranks that write nothing leave no file.
    A background thread puts an event on disk within milliseconds: a killed process leaves every earlier probe.

    Args:
        target: a log directory, or a ``SummaryWriter`` to share, which is then left open.
        maps_every: pictures are drawn for the first report that carries maps and for every n-th after it.
        projector_every: likewise for the value vectors in the Projector tab, about half a megabyte a head.
        overview_every: the picture of all heads' entropy is drawn for the first probe and for every n-th after it.

    Raises:
        WriterError: the directory cannot be written.
        ConfigurationError: ``target`` is neither.
    """

    def __init__(
        self,
        target: str | PathLike[str] | SummaryWriter,
        *,
        maps_every: int = 1,
        projector_every: int = 10,
        overview_every: int = 10,
    ) -> None:
        self.maps_every = positive("maps_every", maps_every)
        self.projector_every = positive("projector_every", projector_every)
        self.overview_every = positive("overview_every", overview_every)
        self._writer: Any = None
        self._directory = ""
        if isinstance(target, str | PathLike):
            path = fspath(target)
            # Object stores have no directories that could be checked.
            self._directory = path if "://" in path else str(writable_directory(path))
        elif hasattr(target, "file_writer") and hasattr(target, "add_embedding"):
            self._writer = target
        else:
            raise ConfigurationError(
                f"TensorBoardWriter needs a log directory or a torch.utils.tensorboard.SummaryWriter, "
                f"got {type(target).__name__}"
            )
        self._probes = 0
        self._with_maps = 0
        self._file: Any = None
        self._described: set[str] = set()
        self._last: dict[str, Any] = {}

    @property
    def log_dir(self) -> str:
        return self._directory or str(self._writer.get_logdir())

    def write(self, report: StepReport) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(self._directory)
        file = self._writer.file_writer or self._writer._get_file_writer()
        if file is not self._file:  # a SummaryWriter that was closed goes on in a new file
            self._file, self._described, self._last = file, set(), {}
        entries = list(self._entries(report))
        values = [entry.value(with_metadata=entry.tag not in self._described) for entry in entries]
        local = "://" not in self.log_dir
        if local:  # elsewhere a flush may upload the whole file: that is left to the SummaryWriter's timer
            # Before, not after: it finds the earlier probes written already, and waits for nothing.
            file.flush()
        file.add_summary(Summary(value=values), report.step)
        self._described.update(entry.tag for entry in entries)
        if local and report.valid and self._with_maps % self.projector_every == 0:
            for picture in report.maps:
                write_values(self._writer, picture, report.step)
        self._probes += report.valid
        self._with_maps += bool(report.valid and report.maps)

    def close(self) -> None:
        """Close the event file, unless it is shared; a later report opens a new one."""
        if self._writer is not None and self._directory:
            self._writer.close()

    def _entries(self, report: StepReport) -> Iterator[Entry]:
        if report.valid:
            if self._changed("layout", (report.layers, report.heads)):
                yield summaries.layout(report)
            yield summaries.alarms(report)
            yield from summaries.heads(report)
            yield from summaries.scalars(report)
            if self._probes % self.overview_every == 0:
                yield from summaries.overview(report)
            if self._with_maps % self.maps_every == 0:
                for picture in report.maps:
                    yield from summaries.head_map(picture)
        else:
            reason = f"step {report.step}: {markdown(report.invalid)}"
            yield summaries.text("not_measured", [reason], "Why nothing was measured at this step.")
            if report.alarms:  # a batch without a finite loss may raise one and be the run's last
                yield summaries.alarms(report)
        if new := summaries.alarm_lines(report):
            yield summaries.text("alarm_messages", new, "Alarms that are new at this step.")
        for name, texts in (("warnings", report.warnings), ("notes", report.notes)):
            if self._changed(name, texts) and texts:
                lines = [f"{name.removesuffix('s')}: {markdown(line)}" for line in texts]
                yield summaries.text(name, lines, f"The probe's {name}, where they change.")

    def _changed(self, name: str, now: Any) -> bool:
        changed = bool(self._last.get(name) != now)
        self._last[name] = now
        return changed
