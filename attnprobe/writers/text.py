"""Text that came from outside (module names, messages), made safe to show."""

from __future__ import annotations

import re

# Everything that Markdown or HTML could read as markup. Underscores inside a word are not markup, and stay readable.
_MARKUP = re.compile(r"[^\w\s.,:;/()%='-]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    """``text`` on one line, without control, bidirectional or invisible characters: those are shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plural(count: int, what: str) -> str:
    """``1 head``, ``2 heads``."""
    return f"{count} {what}{'s' * (count != 1)}"


def markdown(text: str) -> str:
    """``text`` as one line of Markdown that shows exactly these characters, wherever it stands within a line."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", printable(text))
