"""Events are what TensorBoard's own reader finds in them, and a failed write is heard at once."""

from __future__ import annotations

import signal
import struct
import subprocess
import zlib

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from research.core.hooks import is_image
from research.core.images import png
from research.core.tensorboard import TensorBoard


def read(directory):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events


def decoded(data):
    """Pixels of a PNG with filter 0, by its chunks; the checksums are checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert depth == 8 and not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (2, 7, 3), (4, 4, 4)])
def test_png_keeps_every_pixel(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert (decoded(png(image)) == image.reshape(*shape[:2], -1)).all()


@pytest.mark.parametrize(
    "bad", [np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), np.zeros((0, 3), np.uint8), np.zeros(3, np.uint8)]
)
def test_png_refuses_what_is_no_image(bad):
    with pytest.raises(ValueError, match="allowed: uint8"):
        png(bad)
    assert not is_image(bad)


def test_scalars_members_texts_and_images_are_read_back(tmp_path):
    hook = TensorBoard(tmp_path)
    hook.start(0, 10, None)
    image = np.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3).astype(np.uint8)
    hook.log(1, {"loss": np.float32(0.5), "each": np.array([1.0, 2.0, 6.0]), "matrix": np.eye(3)})
    hook.evaluated(2, "val", {"accuracy": 0.75, "sample": "line *one*\nline two", "pictures": image, "one": image[0]})
    events = read(tmp_path)  # not closed: a killed run's events are there too
    found = {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/loss": [(1, 0.5)], "train/each": [(1, 3.0)], "train/each/min": [(1, 1.0)], "train/each/max": [(1, 6.0)],
        "val/accuracy": [(2, 0.75)],
    }  # fmt: skip
    (text,) = events.Tensors("val/sample")
    assert text.tensor_proto.string_val[0].decode() == "    line *one*\n    line two"
    assert events.SummaryMetadata("val/sample").plugin_data.plugin_name == "text"
    assert set(events.Tags()["images"]) == {"val/pictures/0", "val/pictures/1", "val/one"}
    (second,) = events.Images("val/pictures/1")
    assert (second.width, second.height) == (5, 4) and (decoded(second.encoded_image_string) == image[1]).all()


def test_a_run_that_goes_on_makes_tensorboard_forget_what_came_after(tmp_path):
    first = TensorBoard(tmp_path)
    first.start(0, 100, None)
    for step in (10, 20, 30, 40):
        first.log(step, {"loss": 1.0})
    second = TensorBoard(tmp_path)
    second.start(20, 100, None)
    second.log(30, {"loss": 2.0})
    scalars = read(tmp_path).Scalars("train/loss")
    assert [(s.step, s.value) for s in scalars] == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_the_next_stage_is_a_run_of_its_own(tmp_path):
    hook = TensorBoard(tmp_path)
    for stage in (0, 1):
        hook.start(0, 10, None, stage)
        hook.log(1, {"loss": float(stage)})
        hook.close()
    assert [s.value for s in read(tmp_path / "stage-1").Scalars("train/loss")] == [1.0]


@pytest.mark.faults
def test_a_full_disk_raises_at_the_write_and_never_hangs(tmp_path):
    """tensorboardX loses its thread here and then blocks for ever."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    signal.alarm(20)
    try:
        hook = TensorBoard(disk)
        hook.start(0, 10**6, None)
        with pytest.raises(OSError, match="No space left on device: .*tfevents"):
            for step in range(10**5):
                hook.evaluated(step, "val", {"text": "x" * 1000})
        hook.close()
        assert len(read(disk).Tensors("val/text")) > 10  # and the records before it are whole
        with pytest.raises(RuntimeError, match="before `start`"):
            hook.log(1, {"loss": 1.0})
    finally:
        signal.alarm(0)
        subprocess.run(["umount", disk], check=True)
