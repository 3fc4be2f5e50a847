"""What is given wrongly costs one line and exit code 2, before anything compiles, and leaves no folder behind."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest

from research.__main__ import main

LM, TEXT, FASHION = "configs/lm/stdlib.py:smoke", "configs/lm/text.py:smoke", "configs/vision/fashion_mnist.py:smoke"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def data(tmp_path):
    """A folder of files, most of them broken."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("too short")
    (folder / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 2000)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "other.jsonl").write_text(json.dumps({"texts": "a" * 5000}) + "\n")
    images, labels = np.zeros((20, 4, 4), np.uint8), np.zeros(20, np.uint8)
    (folder / "images.gz").write_bytes(gzip.compress(idx(images)))
    (folder / "cut").write_bytes(idx(images)[:-7])
    (folder / "labels").write_bytes(idx(labels))
    return folder


def paths(data, *names):
    return f"--config.data.paths={[str(data / name) for name in names]!r}"


def idx_config(tmp_path, images, labels):
    """A config outside the project, on IDX files."""
    file = tmp_path / "mine.py"
    given = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    source = f"""

from configs.vision.fashion_mnist import get_config as base
def get_config(arg=""):
    config = base("smoke")
    config.data = {{"name": "idx", **{ {k: str(v) for k, v in given.items()}!r} }}
    config.stream.validation = 0
    return config
"""
    file.write_text(source)
    return str(file)


CASES = {
    "an unknown key": (LM, ["--config.model.widht=64"], "nearest: 'model.width'"),
    "a wrong type": (LM, ["--config.train.steps=many"], "a whole number is wanted"),
    "a section": (LM, ["--config.model=3"], "is a section"),
    "an unknown argument": (LM + "e", [], "nearest: 'smoke'"),
    "a missing config": ("configs/lm/stdlibb.py", [], "nearest: 'configs/lm/stdlib.py'"),
    "an unknown model": (LM, ["--config.model.name=transfomer"], "nearest: 'transformer'"),
    "an unknown optimizer": (LM, ["--config.optimizer.name=muom"], "nearest: 'muon'"),
    "an unknown task": (LM, ["--config.task.name=languge_model"], "nearest: 'language_model'"),
    "an unknown transform": (LM, ["--config.transforms.wrap=['augmnt']"], "nearest: 'augment'"),
    "width and heads": (LM, ["--config.model.heads=5"], "model.heads=5"),
    "batch and mesh": (LM, ["--config.stream.batch=6", "--config.mesh.data=4"], "is not divisible by mesh data=4"),
    "microbatches": (
        LM,
        ["--config.estimate.wrap=['accumulated']"],
        "lacks estimate.accumulated.n",
    ),
    "a mesh too large": (LM, ["--config.mesh.data=64"], "devices"),
    "length and context": (LM, ["--config.stream.length=4096"], "exceeds model.context"),
    "a word that is no option": (LM, ["--confg.train.steps=3"], "not understood"),
    "no seeds": (LM, ["--seeds", "0"], "--seeds 0"),
}


def refused(capfd, arguments) -> str:
    """The one line that a command ends with, code 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in out, err
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_cannot_be_is_one_line(case, tmp_path, capfd):
    config, overrides, says = CASES[case]
    line = refused(capfd, ["train", "--config", config, "--workdir", str(tmp_path / "run"), *overrides])
    assert says in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names, more, says",
    [
        (["nothing.txt"], [], "nothing.txt"),
        (["*.md"], [], "matches no file"),
        (["empty.txt"], [], "empty"),
        (["short.txt"], [], "leaves nothing for validation"),
        (["rows.jsonl"], ["--config.data.field=text"], "rows.jsonl"),
        (["other.jsonl"], ["--config.data.field=text"], "texts"),
        (["latin.txt"], ["--config.data.tokenizer=TOKENIZER"], "latin.txt"),
    ],
    ids=["missing", "no match", "empty", "short", "no JSON", "no field", "no UTF-8"],
)
def test_text_that_cannot_be_read_is_one_line(names, more, says, data, tmp_path, capfd):
    if any("TOKENIZER" in word for word in more):
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "c": 1}, []))
        made.save(str(tmp_path / "tokenizer.json"))
        more = [word.replace("TOKENIZER", str(tmp_path / "tokenizer.json")) for word in more]
    line = refused(capfd, ["train", "--config", TEXT, "--workdir", str(tmp_path / "run"), paths(data, *names), *more])
    assert says in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "images, labels, says",
    [("cut", "labels", "cut"), ("images.gz", "no_such", "no_such"), ("labels", "labels", "images")],
    ids=["truncated", "missing", "labels for images"],
)
def test_images_that_cannot_be_read_are_one_line(images, labels, says, data, tmp_path, capfd):
    config = idx_config(tmp_path, data / images, data / labels)
    line = refused(capfd, ["train", "--config", config, "--workdir", str(tmp_path / "run")])
    assert says in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["evaluate", "--config", LM, "--workdir", "no/such"], "holds no run"),
        (["sample", "--config", LM, "--workdir", "no/such"], "holds no run"),
        (["reproduce", "mnist1"], "nearest: 'mnist1d'"),
        (["bench", "no_such_benchmark"], "allowed: "),
    ],
)
def test_the_other_verbs_refuse_in_one_line_too(arguments, says, capfd):
    assert says in refused(capfd, arguments)


def test_an_unknown_verb_names_the_nearest(capfd):
    assert main(["trian"]) == 2
    assert "nearest: 'train'" in capfd.readouterr().err


def test_every_verb_has_a_help_with_an_example(capfd):
    for verb in ("train", "evaluate", "sample", "reproduce", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0 and f"gnomon {verb} " in capfd.readouterr().out.split("example:")[1]
    assert main([]) == 0 and "gnomon train --config" in capfd.readouterr().out
