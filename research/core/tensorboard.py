"""TensorBoard events, written synchronously through TensorBoard's own record writer.

No thread stands between a run and its events: a write that fails raises where it was made, naming the file.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from research.core import files
from research.core.hooks import Hook, is_image
from research.core.images import png
from research.core.types import Learner


class TensorBoard(Hook):
    """Scalars, texts and images of a run as events below `directory`, one file a start; stage k > 0 in `stage-<k>`, which
    TensorBoard shows as a run of its own.

    By type of value: a number is a scalar; an array of one value a member is its mean, and its least and greatest under
    "<name>/min" and "<name>/max"; a str is a text; uint8 [(n,) height, width, 1 | 3 | 4] are images. Other arrays are left out.
    A run that goes on from `step` tells TensorBoard to forget what came after it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._file: int | None = None
        self._path = self.directory

    def start(self, step: int, steps: int, learner: Learner, stage: int = 0) -> None:
        self.close()
        directory = self.directory / f"stage-{stage}" if stage else self.directory
        directory.mkdir(parents=True, exist_ok=True)
        before = len(list(directory.glob("events.out.tfevents.*")))  # files are read in order of name
        self._path = directory / f"events.out.tfevents.{int(time.time()):010d}.{before:06d}.{socket.gethostname()}"
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # What earlier files say from this step on is void; the step itself was logged before it was saved.
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._all(step, "train", metrics)

    def evaluated(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        self._all(step, prefix, values)

    def _all(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            tag = f"{prefix}/{name}"
            if isinstance(value, str):
                self.text(step, tag, value)
            elif is_image(value):
                self.images(step, tag, value)
            elif np.ndim(value) == 0:
                self.scalar(step, tag, float(value))
            elif np.ndim(value) == 1:
                for end, f in (("", np.mean), ("/min", np.min), ("/max", np.max)):
                    self.scalar(step, tag + end, float(f(value)))

    def scalar(self, step: int, tag: str, value: float) -> None:
        self._summary(step, Summary.Value(tag=tag, simple_value=value))

    def text(self, step: int, tag: str, text: str) -> None:
        """Shown as it is, in a fixed-width face: TensorBoard would read it as Markdown."""
        shown = "\n".join("    " + line for line in text.splitlines())
        tensor = TensorProto(
            dtype=DT_STRING, string_val=[shown.encode()], tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._summary(step, Summary.Value(tag=tag, tensor=tensor, metadata=metadata))

    def images(self, step: int, tag: str, images: np.ndarray) -> None:
        """uint8 [height, width, 1 | 3 | 4], or a stack of them as "<tag>/0", "<tag>/1", …"""
        for i, image in enumerate(images if images.ndim == 4 else [images]):
            height, width, channels = image.shape
            encoded = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png(image))
            self._summary(step, Summary.Value(tag=f"{tag}/{i}" if images.ndim == 4 else tag, image=encoded))

    def _summary(self, step: int, value: Any) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def _write(self, event: Any) -> None:
        if self._file is None:
            raise RuntimeError(f"{self.directory}: TensorBoard was given something to write before `start`")
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        files.append_whole(self._file, record.getvalue(), self._path)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
