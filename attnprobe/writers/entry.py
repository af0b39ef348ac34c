"""One value of a TensorBoard summary: its data and, once per file, what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

from attnprobe.writers.heatmap import png
from attnprobe.writers.strict_json import dumps

_DATA_CLASS = {"scalars": DATA_CLASS_SCALAR, "images": DATA_CLASS_BLOB_SEQUENCE}


@dataclass(frozen=True)
class Entry:
    """One value of a summary.

    Attributes:
        tag: its name in the file.
        plugin: the tab that shows it.
        payload: the keyword of ``Summary.Value`` that holds the data.
        describe: what it means, in Markdown; a call, since it is needed once per file only.
        title: its name there, the tag itself by default.
        content: the plugin's own metadata.
    """

    tag: str
    plugin: str
    payload: Mapping[str, Any]
    describe: Callable[[], str]
    title: str = ""
    content: Mapping[str, Any] = field(default_factory=dict)

    def value(self, *, with_metadata: bool) -> Any:
        """The ``Summary.Value``. TensorBoard keeps the first metadata that it meets of a tag and ignores the rest."""
        if not with_metadata:
            return Summary.Value(tag=self.tag, **self.payload)
        content = dumps(self.content).encode() if self.content else b""
        metadata = SummaryMetadata(
            plugin_data=SummaryMetadata.PluginData(plugin_name=self.plugin, content=content),
            display_name=self.title or self.tag,
            summary_description=self.describe(),
            # The fast loader drops title and description of whatever does not say its class.
            data_class=_DATA_CLASS.get(self.plugin, DATA_CLASS_TENSOR),
        )
        return Summary.Value(tag=self.tag, metadata=metadata, **self.payload)


def scalar(value: float) -> dict[str, Any]:
    # The old field: event readers find it as a scalar, and TensorBoard reads both.
    return {"simple_value": value}


def floats(values: Any) -> dict[str, Any]:
    array = np.asarray(values, dtype="<f4")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape])
    return {"tensor": TensorProto(dtype=DT_FLOAT, tensor_shape=shape, tensor_content=array.tobytes())}


def string(text: str) -> dict[str, Any]:
    return {"tensor": TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[text.encode()])}


def image(pixels: Any) -> dict[str, Any]:
    height, width, channels = pixels.shape
    encoded = png(pixels)
    return {"image": Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=encoded)}
