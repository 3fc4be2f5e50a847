"""Episodes: ways classes, shots and queries apart, a function of seed and number alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from research.core.batches import open_at
from research.data.episodes import classes_from_folders, classes_of, episodes

# Example i of class c is the number 100 c + i, so that what is drawn can be read off.
Y = np.tile(np.arange(7), 9)
X = np.stack([100 * Y + np.arange(63) // 7] * 2, 1).astype(np.float32)
CLASSES = classes_of(X, Y)
SIZES = {"ways": 3, "shots": 2, "queries": 4}


def batches(batch=4, seed=0, **changed):
    return episodes(CLASSES, batch, seed=seed, scale=1.0, **{**SIZES, **changed})


def same(a, b):
    for part in ("support", "query"):
        for name in a[part]:
            np.testing.assert_array_equal(a[part][name], b[part][name])


def test_an_episode_has_so_many_classes_and_examples_and_none_twice():
    batch = next(batches().open())
    support, query = batch["support"], batch["query"]
    assert support["inputs"].shape == (4, 6, 2) and query["inputs"].shape == (4, 12, 2)
    assert support["inputs"].dtype == np.float32 and support["targets"].dtype == np.int32
    assert support["targets"].tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert query["targets"].tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 4 and (query["mask"] == 1).all()
    for i in range(4):
        shown, asked = support["inputs"][i, :, 0], query["inputs"][i, :, 0]
        classes = shown[::2] // 100
        assert len(set(classes)) == 3
        np.testing.assert_array_equal(shown // 100, np.repeat(classes, 2))
        np.testing.assert_array_equal(asked // 100, np.repeat(classes, 4))
        assert len({*shown, *asked}) == 18


def test_they_depend_on_seed_and_number_alone():
    first, again, other = batches().open(), batches().open(), batches(seed=1).open()
    one, two = next(first), next(first)
    same(one, next(again))
    assert not np.array_equal(one["query"]["inputs"], next(other)["query"]["inputs"])
    assert not np.array_equal(one["query"]["inputs"], two["query"]["inputs"])
    single = batches(batch=1)
    for number in (0, 3, 4, 7):
        whole = (one, two)[number // 4]
        same(next(open_at(single, number)), {p: {k: v[number % 4][None] for k, v in whole[p].items()} for p in whole})


def test_all_classes_and_examples_are_drawn_about_equally():
    seen = np.concatenate([next(open_at(batches(batch=50), i))["query"]["inputs"][..., 0].ravel() for i in range(6)])
    counts = np.unique(seen // 100, return_counts=True)[1]
    # 300 episodes, each class in 3 / 7 of them: 128.6 with a deviation of 8.6, times 4 queries; 5 deviations
    assert len(counts) == 7 and abs(counts / 4 - 300 * 3 / 7).max() < 43
    assert len(np.unique(seen)) == 63


def test_a_position_is_where_it_goes_on():
    source = batches()
    ahead = source.open()
    for _ in range(3):
        next(ahead)
    expected = next(open_at(source, 3))
    same(next(open_at(source, 3, ahead.get_state())), expected)
    same(next(ahead), expected)


def test_cut_by_rows_each_process_makes_its_own():
    whole = next(open_at(batches(), 2))
    for start, stop in ((0, 1), (1, 4)):
        part = batches().rows(start, stop)
        same(next(open_at(part, 2)), {p: {k: v[start:stop] for k, v in whole[p].items()} for p in whole})
        assert part.fingerprint == batches().fingerprint
    with pytest.raises(ValueError, match="rows: given 2 to 5, allowed: some of 0 to 4"):
        batches().rows(2, 5)


def test_a_length_ends_them_and_the_fingerprint_tells_them_apart():
    assert len(list(batches(length=12).open())) == 3
    names = {batches().fingerprint, batches(seed=1).fingerprint, batches(shots=1).fingerprint, batches(length=4).fingerprint}
    other = episodes(classes_of(X + 1, Y), 4, seed=0, scale=1.0, **SIZES).fingerprint
    assert len(names | {other}) == 5


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: batches(ways=8), "episodes: ways=8; allowed: at most 7, the number of classes"),
        (lambda: batches(shots=6), "episodes: shots=6 and queries=4; allowed: together at most 9, as many as class '0' has"),
        (lambda: batches(queries=0), "episodes: queries=0; allowed: 1 or more"),
        (lambda: batches(batch=0), "episodes: batch=0; allowed: 1 or more"),
        (lambda: batches(length=6), "episodes: length=6 is no multiple of batch=4"),
        (lambda: classes_of(X, Y, [1, 9]), "classes: no example of 9; there are 0, 1, 2, 3, 4, 5, 6"),
        (lambda: classes_of(X, Y[:5]), "classes: x (63, 2) and y (5,); one label an example is wanted"),
        (lambda: classes_from_folders("nowhere/at/all", size=28), "class folders: no such file: 'nowhere/at/all'"),
        (lambda: classes_from_folders(".", size=0), "size: given 0, allowed 1 and more"),
        (lambda: classes_from_folders(".", size=28, channels=2), "channels: given 2, allowed 1, 3, 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_some_classes_only_in_their_order():
    some = classes_of(X, Y, [5, 2])
    assert some.names == ("5", "2") and (X[some.rows[0], 0] // 100 == 5).all()


def test_class_folders_at_any_depth_as_omniglot_has_them(tmp_path):
    """Black ink on white, 1 bit, 105 x 105: white becomes 0, ink 255, each pixel the mean of what it covers."""
    for name in ("Greek/character01", "Greek/character02", "Latin/character01"):
        (tmp_path / name).mkdir(parents=True)
        for drawer in range(2):
            image = np.full((105, 105), 255, np.uint8)
            image[: 15 * (drawer + 1)] = 0
            Image.fromarray(image).convert("1").save(tmp_path / name / f"{drawer}.png")
    found = classes_from_folders(str(tmp_path), size=7, ink=True)
    assert found.names == ("Greek/character01", "Greek/character02", "Latin/character01")
    assert found.x.shape == (6, 7, 7, 1) and [r.tolist() for r in found.rows] == [[0, 1], [2, 3], [4, 5]]
    assert found.x[0, :, 0, 0].tolist() == [255, 0, 0, 0, 0, 0, 0] and found.x[1, :, 0, 0].tolist() == [255, 255, 0, 0, 0, 0, 0]
    coloured = classes_from_folders(str(tmp_path), size=7, channels=3)
    assert coloured.x.shape == (6, 7, 7, 3) and coloured.x[0, 0, 0].tolist() == [0, 0, 0]
    (tmp_path / "Greek" / "character01" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="0.png' cannot be read: cannot identify image file"):
        classes_from_folders(str(tmp_path), size=7)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images; <class>/<image>.png is wanted, at any depth"):
        classes_from_folders(str(tmp_path / "empty"), size=7)
