"""The page's modules as one script: a browser loads no module from a file beside the page."""

from __future__ import annotations

import re
from pathlib import Path

STATIC = Path(__file__).parents[1] / "tensorboard_plugin" / "static"

_IMPORT = re.compile(r'^import \{ (?P<names>[\w, ]+) \} from "\./(?P<file>[\w.]+)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (?P<name>\w+))", re.MULTILINE)


def bundle(entry: str) -> str:
    """``entry`` and all that it imports, each module a function of its own, in an order that works.

    Imports and exports are those of this page: of names in braces, one line each, from files beside it.
    """
    done: dict[str, str] = {}

    def add(name: str) -> None:
        text = (STATIC / name).read_text("utf-8")
        for found in _IMPORT.finditer(text):
            if found["file"] not in done:
                add(found["file"])
        exported = ", ".join(found["name"] for found in _EXPORT.finditer(text))
        text = _EXPORT.sub(
            "", _IMPORT.sub(lambda found: f'const {{ {found["names"]} }} = modules["{found["file"]}"];', text)
        )
        done[name] = f'modules["{name}"] = (() => {{\n{text}\nreturn {{ {exported} }};\n}})();\n'

    add(entry)
    return "const modules = {};\n" + "".join(done.values())
