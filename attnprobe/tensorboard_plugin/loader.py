"""TensorBoard's way in: the entry point in the group ``tensorboard_plugins``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tensorboard.plugins.base_plugin import TBContext, TBLoader

if TYPE_CHECKING:
    from attnprobe.tensorboard_plugin.plugin import AttentionPlugin

NAME = "attnprobe"


class AttentionLoader(TBLoader):  # type: ignore[misc]  # TensorBoard has no types
    def fix_flags(self, flags: Any) -> None:
        """Have TensorBoard itself keep one probe: the tab reads all of them from the files, and only what it shows."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(NAME, 1)

    def load(self, context: TBContext) -> AttentionPlugin | None:
        """The plugin; None, with a line in TensorBoard's log, where it cannot work."""
        try:
            from attnprobe.tensorboard_plugin.plugin import AttentionPlugin

            return AttentionPlugin(context)
        except Exception:
            logging.getLogger("tensorboard").warning("attnprobe: the Attention tab cannot be shown", exc_info=True)
            return None
