"""Augmentation of training batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.types import Spec
from research.transforms import augment, augmentations
from research.transforms._example import small_classifier

KEY = jax.random.key(0)
IMAGES = jnp.arange(1, 1 + 64 * 6 * 5 * 2, dtype=jnp.float32).reshape(64, 6, 5, 2)


def applied(fn, images=IMAGES, key=KEY):
    batch = {"inputs": images, "targets": jnp.arange(len(images))}
    out = fn(key, batch)
    assert out["targets"] is batch["targets"] and out["inputs"].shape == images.shape and out["inputs"].dtype == images.dtype
    return np.asarray(out["inputs"])


def shifted(image, dy, dx):
    """image[y + dy, x + dx], 0 outside."""
    out = np.zeros_like(image)
    h, w = image.shape[:2]
    ys, xs = (slice(max(0, -d), min(n, n - d)) for d, n in ((dy, h), (dx, w)))
    out[ys, xs] = image[ys.start + dy : ys.stop + dy, xs.start + dx : xs.stop + dx]
    return out


def test_a_crop_is_a_shift_by_a_uniform_offset_of_each_image():
    offsets = []
    for image, moved in zip(np.asarray(IMAGES), applied(augmentations.random_crop(2)), strict=True):
        found = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if (shifted(image, dy, dx) == moved).all()]
        assert len(found) == 1
        offsets += found
    for axis in (0, 1):
        assert set(np.array(offsets)[:, axis]) == {-2, -1, 0, 1, 2}
    assert len(set(offsets)) > 15


def test_a_flip_mirrors_about_half_of_the_images():
    flipped = [
        (moved == image[:, ::-1]).all()
        for image, moved in zip(np.asarray(IMAGES), applied(augmentations.horizontal_flip()), strict=True)
    ]
    kept = [
        (moved == image).all()
        for image, moved in zip(np.asarray(IMAGES), applied(augmentations.horizontal_flip()), strict=True)
    ]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 16 < sum(flipped) < 48
    np.testing.assert_array_equal(applied(augmentations.horizontal_flip(1.0)), IMAGES[:, :, ::-1])
    np.testing.assert_array_equal(applied(augmentations.horizontal_flip(0.0)), IMAGES)


def test_cutout_clears_one_square_of_each_image():
    out = applied(augmentations.cutout(3))
    holes = (out == 0).all(-1)
    np.testing.assert_array_equal(out, np.where(holes[..., None], 0, IMAGES))
    for hole in holes:
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert 2 <= len(rows) <= 3 and 2 <= len(columns) <= 3  # cut at the edges
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and hole.sum() == len(rows) * len(columns)
    assert len({hole.tobytes() for hole in holes}) > 20


def test_images_keep_their_dtype():
    for fn in (augmentations.random_crop(1), augmentations.horizontal_flip(), augmentations.cutout(2)):
        applied(fn, IMAGES.astype(jnp.uint8))


def test_augmentations_are_functions_of_the_key_alone_and_chains_draw_apart():
    fn = augmentations.chained(augmentations.added_noise(1.0), augmentations.added_noise(1.0))
    np.testing.assert_array_equal(applied(fn), applied(fn))
    assert (applied(fn) != applied(fn, key=jax.random.key(1))).any()
    np.testing.assert_allclose((applied(fn) - np.asarray(IMAGES)).std(), 2**0.5, rtol=0.05)  # 2 were both draws the same


def test_crop_and_flip_leaves_out_what_is_not_asked_for():
    np.testing.assert_array_equal(applied(augmentations.crop_and_flip(0, False)), IMAGES)
    assert {bytes(x) for x in applied(augmentations.crop_and_flip(0, True))} <= {
        bytes(x) for f in (1, -1) for x in np.asarray(IMAGES)[:, :, ::f]
    }
    assert (applied(augmentations.crop_and_flip(2, True)) != np.asarray(IMAGES)).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: augmentations.random_crop(0), "random_crop: padding=0; allowed: 1 or more"),
        (lambda: augmentations.horizontal_flip(1.5), "horizontal_flip: probability=1.5; allowed: from 0 to 1"),
        (lambda: augmentations.cutout(0), "cutout: size=0; allowed"),
        (lambda: augmentations.added_noise(-1.0), "added_noise: scale=-1.0; allowed"),
        (lambda: applied(augmentations.random_crop(1), IMAGES[0]), r"random_crop: inputs \(6, 5, 2\); expected images"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TASK = small_classifier()
VARIABLES = TASK.init(KEY)
BATCH = {
    "inputs": jax.random.normal(KEY, (8, 3)),
    "targets": jnp.arange(8) % 3,
    "mask": jnp.ones(8),
}


def test_the_loss_sees_the_augmented_batch_and_methods_do_not():
    doubled = augment(TASK, lambda key, batch: {**batch, "inputs": 2 * batch["inputs"]})
    direct = TASK.loss(VARIABLES, {**BATCH, "inputs": 2 * BATCH["inputs"]}, KEY)
    np.testing.assert_allclose(doubled.loss(VARIABLES, BATCH, KEY)[0], direct[0], rtol=1e-6)
    assert doubled.methods is TASK.methods and doubled.init is TASK.init


def test_the_augmentation_and_the_loss_draw_apart():
    seen = {}
    spy = TASK._replace(loss=lambda v, b, key: seen.update(loss=jax.random.key_data(key)) or TASK.loss(v, b, key))

    def fn(key, batch):
        seen["fn"] = jax.random.key_data(key)
        return batch

    augment(spy, fn).loss(VARIABLES, BATCH, KEY)
    assert len({bytes(np.asarray(k)) for k in (*seen.values(), jax.random.key_data(KEY))}) == 3


def test_raw_batches_may_have_specs_of_their_own():
    raw = {**TASK.batch, "inputs": Spec((8, 3), jnp.uint8, ("batch", "features"))}
    task = augment(TASK, lambda key, b: {**b, "inputs": b["inputs"].astype(jnp.float32) / 255}, raw)
    assert task.batch == raw
    scaled = {**BATCH, "inputs": jnp.arange(24, dtype=jnp.uint8).reshape(8, 3)}
    expected = TASK.loss(VARIABLES, {**BATCH, "inputs": scaled["inputs"] / jnp.float32(255)}, KEY)[0]
    np.testing.assert_allclose(task.loss(VARIABLES, scaled, KEY)[0], expected, rtol=1e-6)


def test_an_augmentation_that_changes_the_batchs_form_is_told_at_once():
    with pytest.raises(ValueError, match=r"augment: fn\(key, batch\): inputs: expected float32\[8,3\], got float32\[8,2\]"):
        augment(TASK, lambda key, b: {**b, "inputs": b["inputs"][:, :2]})
    with pytest.raises(ValueError, match=r"mask: expected float32\[8\], got nothing"):
        augment(TASK, lambda key, b: {k: x for k, x in b.items() if k != "mask"})
