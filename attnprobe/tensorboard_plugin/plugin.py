"""What TensorBoard's server asks: the page's own files, and answers about the runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tensorboard.backend import http_util
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import wrappers

from attnprobe.errors import AttnProbeError
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import Numbers
from attnprobe.tensorboard_plugin.loader import NAME
from attnprobe.tensorboard_plugin.places import places
from attnprobe.tensorboard_plugin.query import Query, QueryError
from attnprobe.tensorboard_plugin.store import Store
from attnprobe.view import answers
from attnprobe.view.bundle import STATIC
from attnprobe.view.limits import Limits
from attnprobe.writers.strict_json import dumps

KINDS = {".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}
#: Bytes of an answer; the page asks for 2 MB.
MOST = 1 << 26
#: Seconds that TensorBoard's list of tabs waits for a request that is being answered.
WAIT = 1.0

Answer = tuple[bytes, str]


class AttentionPlugin(TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """The Attention tab. It reads local event files itself: see ``logs.event_file``."""

    plugin_name = NAME

    def __init__(self, context: TBContext) -> None:
        self.places, self.problems = places(context.logdir, context.flags)
        self.store = Store(self.places)
        self._limits: WeakKeyDictionary[LoggedRun, dict[str, Limits]] = WeakKeyDictionary()
        # Now, not when asked for: the page of another version would not understand these answers.
        files = [path for path in STATIC.rglob("*") if path.suffix in KINDS]
        self._files = {path.relative_to(STATIC).as_posix(): (path.read_bytes(), KINDS[path.suffix]) for path in files}

    def is_active(self) -> bool:
        if self.store.lock.acquire(timeout=WAIT):
            try:
                self.store.refresh()
            finally:
                self.store.lock.release()
        return bool(self.store.runs)

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/static/index.js", tab_name="Attention")

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        asked: dict[str, Callable[[Query], Answer]] = {
            "/runs": self._runs,
            "/frames": self._frames,
            "/range": self._range,
            "/head": self._head,
            "/map": self._map,
            "/usage": self._usage,
        }
        served = {route: self._served(answer) for route, answer in asked.items()} | {"/static/*": self._static}
        return {route: wrappers.Request.application(serve) for route, serve in served.items()}

    def _served(self, answer: Callable[[Query], Answer]) -> Callable[[Any], Any]:
        def serve(request: Any) -> Any:
            try:
                with self.store.lock:
                    content, kind = answer(Query(request.args))
            except QueryError as error:
                return _refusal(request, error, 400)
            except (AttnProbeError, LookupError, OSError) as error:
                return _refusal(request, error, 404)
            except Exception as error:
                logging.getLogger("tensorboard").exception("attnprobe: %s cannot be answered", request.url)
                return _refusal(request, f"{type(error).__name__}: {error}; see TensorBoard's log", 500)
            return http_util.Respond(request, content, kind)

        return serve

    def _static(self, request: Any) -> Any:
        found = self._files.get(request.path.rpartition("/static/")[2])
        return http_util.Respond(request, *found) if found else _refusal(request, "there is no such file", 404)

    def _runs(self, query: Query) -> Answer:
        self.store.refresh()
        now = {"revision": self.store.revision, "complete": self.store.complete}
        if query.text("known", "") == now["revision"]:
            return _json(now | {"runs": None})
        overview = answers.overview(self.store.runs[name] for name in sorted(self.store.runs))
        for run in overview["runs"]:
            run["revision"] = self.store.revision_of(run["name"])
        problems = [*self.problems, *self.store.problems]
        return _json(overview | now | {"problems": problems, "places": list(map(str, self.places))})

    def _run(self, query: Query) -> LoggedRun:
        name = query.text("run")
        if name not in self.store.runs:
            raise LookupError(f"there is no run {name!r}")
        return self.store.runs[name]

    def _frames(self, query: Query) -> Answer:
        run, start, stop = self._run(query), max(0, query.whole("start")), max(0, query.whole("stop"))
        size = 4 * len(range(len(run))[start:stop]) * len(run.layers) * max(run.heads, default=0)
        if size > MOST:
            raise QueryError(f"probes {start} to {stop} may be {size >> 20} MB; ask for {MOST >> 20} MB at most")
        return _array(answers.frames(run, query.text("name"), start, stop), {})

    def _range(self, query: Query) -> Answer:
        run, name = self._run(query), query.text("name")
        known = self._limits.setdefault(run, {})
        limits = known.get(name) or Limits(name)
        answer = limits.of(run)
        known[name] = limits  # not before: there may be no such statistic
        return _json(answer)

    def _head(self, query: Query) -> Answer:
        run, points = self._run(query), min(max(4, query.whole("points", "1000")), 10_000)
        return _json(answers.curves(run, query.layer(run), query.whole("head"), points))

    def _map(self, query: Query) -> Answer:
        run = self._run(query)
        found = answers.pictures(run, query.layer(run), query.whole("head"), query.number("step"))
        if found is None:
            raise LookupError("no pictures of this head were recorded")
        return _array(found[1], {"step": found[0]})

    def _usage(self, query: Query) -> Answer:
        run = self._run(query)
        found = answers.usage(run, query.layer(run), query.whole("head"))
        if found is None:
            raise LookupError("no usage of this head was recorded")
        return _array(found[1], {"steps": found[0]})


def _refusal(request: Any, why: object, code: int) -> Any:
    # Names of files may be no text.
    return http_util.Respond(request, str(why).encode("utf-8", "replace"), "text/plain", code=code)


def _json(value: Any) -> Answer:
    return dumps(value).encode(), "application/json"


def _array(values: Numbers, header: Mapping[str, Any]) -> Answer:
    """A line of JSON with the shape, then the numbers as little-endian float32."""
    line = dumps({**header, "shape": values.shape}).encode() + b"\n"
    return line + np.ascontiguousarray(values, "<f4").tobytes(), "application/octet-stream"
