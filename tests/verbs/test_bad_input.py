"""What is given wrongly costs one line and exit code 2, before anything compiles, and leaves no folder behind."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest

from research.__main__ import main

MNIST1D = "configs/papers/mnist1d/config.py:smoke"
MAML, CAVIA = (f"configs/papers/{name}_sine/config.py:smoke" for name in ("maml", "cavia"))
LEARNED = "configs/papers/learned_optimizer/config.py:smoke"
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
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"a text " * 5000))
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
    "parameters and mesh": (LM, ["--config.mesh.fsdp=3", "--config.stream.batch=6"], "state params/embed/table (256, 64)"),
    "microbatches": (
        LM,
        ["--config.estimate.wrap=['accumulated']"],
        "lacks estimate.accumulated.n",
    ),
    "a mesh too large": (LM, ["--config.mesh.data=64"], "devices"),
    "length and context": (LM, ["--config.stream.length=4096"], "exceeds model.context"),
    "a word that is no option": (LM, ["--confg.train.steps=3"], "not understood"),
    "a seed of the data": ("configs/papers/mnist1d/config.py:smoke", ["--config.data.seed=-1"], "data.seed=-1"),
    "no seeds": (LM, ["--seeds", "0"], "--seeds 0"),
    "a word for a number of seeds": (LM, ["--seeds", "x"], "--seeds"),
    "seeds of seeds": (MNIST1D, ["--seeds", "2"], "its members are seeds already"),
    "no steps": (LM, ["--config.train.steps=0"], "train.steps=0"),
    "an endless number": (LM, ["--config.train.steps=1e400"], "a whole number is wanted"),
    "no steps in a call": (LM, ["--config.train.steps_per_call=0"], "steps_per_call=0"),
    "never logged": (LM, ["--config.train.log_every=0"], "log_every=0"),
    "a period of no calls": (LM, ["--config.train.steps_per_call=3"], "is not a multiple of steps_per_call=3"),
    "a negative period": (LM, ["--config.evaluate.every=-1"], "evaluate"),
    "a best that is not measured": (LM, ["--config.checkpoint.best=val/bits_per_byt"], "nearest: 'val/bits_per_byte'"),
    "a stop by what is measured once": (
        LM,
        ["--config.early_stopping.patience=2", "--config.early_stopping.metric=val/nll"],
        "measured once, at the end",
    ),
    "too long a sample": (LM, ["--config.sample.tokens=9999"], "exceed the context"),
    "an unknown mask": (LM, ["--config.model.attention.mask=['full()', 'windw(3, 0)']"], "nearest: 'window'"),
    "a mask that would run something": (LM, ["--config.model.attention.mask=['__import__(0)']"], "__import__ is unknown"),
    "a mask that is no list": (LM, ["--config.model.attention.mask=full()"], "a list is wanted"),
    "an unknown implementation": (LM, ["--config.model.attention.implementation=xlla"], "nearest: 'xla'"),
    "attention by an older name": (LM, ["--config.model.attention=blockwise"], "is a section; its keys: model.attention."),
    "a negative base": (LM, ["--config.model.rope_base=-1"], "model.rope_base=-1"),
    "a way up the inner loss": (MAML, ["--config.inner.learning_rate=-0.1"], "inner.learning_rate=-0.1 must be at least 0"),
    "a way up the outer loss": (MAML, ["--config.learning_rate=-0.1"], "learning_rate=-0.1 must be at least 0"),
    "a way up the context's loss": (
        CAVIA,
        ["--config.inner.learning_rate=-1.0"],
        "inner.learning_rate=-1.0 must be at least 0",
    ),
    "no tasks to test on": (MAML, ["--config.test_tasks=0"], "test_tasks=0; allowed: 1 or more"),
    "no seeds to race on": (LEARNED, ["--config.race.seeds=0"], "race.seeds=0; allowed: 1 or more"),
    "no rates to race against": (LEARNED, ["--config.race.slowest=0.0"], "race.slowest=0.0; allowed: above 0"),
    "one wrapper twice": (LM, ["--config.learner.wrap=['skip_nonfinite','skip_nonfinite']"], "twice"),
    "a rename that says nothing": (
        LM,
        ["--config.warm_start.workdir=x", "--config.warm_start.rename=['a']"],
        "warm_start.rename: 'a'",
    ),
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


FILES = {
    "a mistyped section": ("config.modle.layers = 6", "modle"),
    "a text for a number": ("config.train.steps = '4'", "mine.py:7"),
    "an error of its own": ("1 / 0", "mine.py:7: ZeroDivisionError"),
    "a wrapper's mistyped keys": ("config.learner.averag = {'decay': 0.9}", "nearest: 'average'"),
    "a rule for no axis": ("config.rules.embd = ['fsdp']", "nearest: 'embed'"),
    "a checkpoint's mistyped key": ("config.checkpoint.evry = 3", "nearest: 'every'"),
    "no list of wrappers": ("del config.transforms['wrap']", "lacks transforms.wrap"),
    "wrappers that are no list": (
        "config.estimate = {'name': 'exact', 'wrap': 'accumulated'}",
        "estimate.wrap='accumulated' is no list; allowed: a list of accumulated,",
    ),
    "no groups to watch": ("del config.learner['watch']", "lacks learner.watch"),
    "no task": ("del config['task']", "lacks task.name"),
    "a wrong type in a section of its own": (
        "config.learner.wrap, config.learner.average = ['average'], {'decay': 'x'}",
        "learner.average.decay='x'",
    ),
    "half a microbatch": (
        "config.estimate = {'name': 'exact', 'wrap': ['accumulated'], 'accumulated': {'n': 4.0}}",
        "estimate.accumulated.n=4.0",
    ),
    "no teacher": ("config.transforms.wrap = ['distill']", "transforms.distill"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_config_file_that_cannot_be_is_one_line(case, tmp_path, capfd):
    line, says = FILES[case]
    source = f"""
from configs.lm import stdlib


def get_config(arg=""):
    config = stdlib.get_config("smoke")
    {line}
    return config
"""
    (tmp_path / "mine.py").write_text(source)
    told = refused(capfd, ["train", "--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")])
    assert says in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names, more, says",
    [
        (["nothing.txt"], [], "nothing.txt"),
        (["*.md"], [], "matches no file"),
        (["empty.txt"], [], "empty"),
        (["packed.txt.gz"], [], "unpack it"),
        (["short.txt"], [], "leaves nothing for validation"),
        (["rows.jsonl"], ["--config.data.field=text"], "rows.jsonl"),
        (["other.jsonl"], ["--config.data.field=text"], "texts"),
        (["latin.txt"], ["--config.data.tokenizer=TOKENIZER"], "latin.txt"),
    ],
    ids=["missing", "no match", "empty", "packed", "short", "no JSON", "no field", "no UTF-8"],
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
