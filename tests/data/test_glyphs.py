"""Rendered letters: the mechanism on the fonts that come with matplotlib, the whole set where the Noto fonts are."""

from __future__ import annotations

import os

import matplotlib
import numpy as np
import pytest

from research.data import glyphs as module
from research.data.__main__ import main
from research.data.glyphs import Glyphs, glyphs, part_of, rendered

DEJAVU = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
FACES = [os.path.join(DEJAVU, f"{name}.ttf") for name in ("DejaVuSans", "DejaVuSerif", "DejaVuSans-Bold")]
FONTS = {"Latin": FACES, "Greek": FACES[:1]}


@pytest.fixture(scope="module")
def held():
    return rendered(FONTS)


def test_a_class_is_a_letter_of_a_script_drawn_by_twenty(held):
    assert held.images.shape == (60, 20, 28, 28) and held.images.dtype == np.uint8
    assert held.scripts == ("Greek",) * 30 + ("Latin",) * 30
    assert {"Α", "Β", "Γ"} < set(held.characters[:30]) and held.characters[30:33] == ("A", "B", "C")
    ink = (held.images > 128).reshape(60 * 20, -1).sum(1)
    assert ink.min() > 10 and ink.max() < 28 * 28 / 2  # a letter, neither nothing nor all


def test_letters_do_not_come_twice(held):
    """No small letter whose capital is there, none with an accent, none that looks like one before."""
    latin = held.characters[30:]
    assert "a" not in latin and "À" not in latin and len(set(latin)) == 30
    looks = {image.tobytes() for image in held.images[:, 0]}
    assert len(looks) == 60


def test_drawings_of_a_letter_differ_and_resemble_one_another_more_than_others(held):
    x = held.images[30:40].astype(float).reshape(10, 20, -1)
    assert len({image.tobytes() for image in held.images[30]}) == 20
    centred = x - x.mean((0, 1))
    unit = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    likeness = np.einsum("apx,bqx->ab", unit, unit)
    assert (likeness.argmax(1) == np.arange(10)).all()


def test_a_drawing_depends_on_script_letter_and_drawer_alone(held):
    again = rendered({"Latin": FACES})
    np.testing.assert_array_equal(again.images, held.images[30:])
    np.testing.assert_array_equal(rendered(FONTS).images, held.images)


def test_typefaces_come_in_turn():
    """With a second one, every other drawing changes."""
    one, two = (rendered({"Latin": faces}).images for faces in (FACES[:1], FACES[:2]))
    same = (one == two).reshape(30, 20, -1).all(-1)
    assert same[:, ::2].all() and not same[:, 1::2].any()


def test_scripts_are_in_one_part_each(held):
    parts = {name: held.part(name) for name in ("train", "validation", "test")}
    assert sum(len(part.scripts) for part in parts.values()) == 60
    for name, part in parts.items():
        assert all(part_of(script) == name for script in part.scripts) and len(part.images) == len(part.scripts)
    assert {part_of(f"script {i}") for i in range(50)} == {"train", "validation", "test"}
    assert part_of("Latin") == "test" and part_of("Georgian") == "validation" and part_of("Hebrew") == "train"


def test_fonts_are_found_by_name_and_faces_of_one_script_come_together(tmp_path):
    for name in ("NotoSans-Regular", "NotoSansAdlam-Bold", "NotoSansAdlamUnjoined-Regular", "NotoSansAdlam-Italic", "Other"):
        (tmp_path / f"{name}.ttf").write_bytes(b"")
    found = module._noto(str(tmp_path))
    assert {script: [os.path.basename(f) for f in files] for script, files in found.items()} == {
        **dict.fromkeys(("Latin", "Greek", "Cyrillic"), ["NotoSans-Regular.ttf"]),
        "Adlam": ["NotoSansAdlam-Bold.ttf", "NotoSansAdlamUnjoined-Regular.ttf"],
    }


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A folder with fonts of few scripts, by the names that Noto's have, and a place for what is rendered."""
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name, file in zip(("NotoSans-Regular", "NotoSerif-Regular"), FACES):
        (fonts / f"{name}.ttf").symlink_to(file)
    monkeypatch.setenv("GNOMON_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module, "SCRIPTS", 3)
    return str(fonts)


def test_what_is_rendered_is_kept_and_checked(few, tmp_path, monkeypatch):
    first = glyphs(few)
    (kept,) = (tmp_path / "data" / "glyphs").iterdir()
    monkeypatch.setattr(module, "rendered", lambda fonts: pytest.fail("rendered again"))
    again = glyphs(few)
    np.testing.assert_array_equal(again.images, first.images)
    assert again[1:] == first[1:]
    with np.load(kept) as archive:
        changed = {**archive, "images": archive["images"] // 2}
    np.savez(kept, **changed)
    monkeypatch.setattr(module, "rendered", lambda fonts: first)
    np.testing.assert_array_equal(glyphs(few).images, first.images)  # rendered, since what was kept is something else
    kept.write_bytes(kept.read_bytes()[:1000])
    assert glyphs(few) is first


def test_other_fonts_are_other_images(few, tmp_path):
    glyphs(few)
    (tmp_path / "fonts" / "NotoSans-Regular.ttf").unlink()
    glyphs(few + "/")
    assert len(list((tmp_path / "data" / "glyphs").iterdir())) == 2


def test_where_there_are_none_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError) as error:
        glyphs(str(tmp_path))
    expected = (
        f"no Noto fonts of 50 scripts in {tmp_path}; install fonts-noto-core (Debian, Ubuntu), or run: gnomon data noto-fonts"
    )
    assert str(error.value) == expected
    with pytest.raises(ValueError, match="fonts of Greek: none holds 14 letters of its script"):
        rendered({"Greek": [os.path.join(DEJAVU, "cmb10.ttf")]})
    monkeypatch.setattr(module, "unpacked", lambda *_: (_ for _ in ()).throw(OSError("no apt-get here")))
    monkeypatch.setattr(module, "_places", lambda folder: [str(tmp_path)])
    assert main(["noto-fonts", "--to", str(tmp_path / "fonts")]) == 2
    assert "Noto fonts could not be fetched: no apt-get here" in capsys.readouterr().err


def test_what_is_fetched_is_put_where_it_is_found(few, tmp_path, monkeypatch, capsys):
    def unpacked(package, size, working, say):
        top = os.path.join(working, "unpacked", module.INSIDE)
        os.makedirs(top)
        os.symlink(FACES[0], os.path.join(top, "NotoSans-Regular.ttf"))
        return os.path.join(working, "unpacked")

    monkeypatch.setattr(module, "unpacked", unpacked)
    monkeypatch.setattr(module, "FOLDERS", ())
    for said in (f"Noto fonts are in {tmp_path}/data/noto-fonts\n",) * 2:
        assert main(["noto-fonts"]) == 0 and capsys.readouterr().out == said
    assert set(glyphs().scripts) == {"Cyrillic", "Greek", "Latin"}


@pytest.mark.slow
def test_all_scripts_where_the_fonts_are():
    try:
        held = glyphs()
    except ValueError as error:
        pytest.skip(str(error))
    assert isinstance(held, Glyphs) and len(set(held.scripts)) >= 100 and len(held.images) >= 3000
    assert all(len(set(held.part(name).scripts)) >= 8 for name in ("train", "validation", "test"))
