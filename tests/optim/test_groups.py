"""Groups of parameters by path."""

import jax.numpy as jnp
import pytest

from research.core.tree import joined
from research.optim.groups import Group, assign, groups

PARAMS = {
    "embed": {"table": jnp.ones((8, 4))},
    "blocks": {"0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "1": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
}


def assigned(extra=(), **configs):
    return {joined(path): v for path, v in assign(PARAMS, (*groups(configs), *extra)).items()}


def test_the_first_group_by_name_that_matches_wins():
    found = assigned(b={"match": "kernel", "weight_decay": 0.2}, a={"match": r"0/kernel", "weight_decay": 0.1})
    assert found["blocks/0/kernel"].weight_decay == "weight_decay_a"
    assert found["blocks/1/kernel"].weight_decay == "weight_decay_b"
    assert found["blocks/1/bias"].weight_decay == "weight_decay"


def test_a_sequence_keeps_its_own_order():
    given = [{"name": "z", "match": "kernel", "factor": 2.0}, {"name": "a", "match": "blocks", "factor": 3.0}]
    found = {joined(path): v.factor for path, v in assign(PARAMS, groups(given)).items()}
    assert found["blocks/0/kernel"] == 2.0 and found["blocks/0/bias"] == 3.0
    with pytest.raises(ValueError, match="groups: 'a' is given twice"):
        groups([{"name": "a", "match": "kernel", "factor": 2.0}, {"name": "a", "match": "bias", "factor": 2.0}])
    with pytest.raises(ValueError, match="groups: '' is no name"):
        groups([{"match": "kernel", "factor": 2.0}])


def test_a_group_leaves_what_it_does_not_set_to_later_groups():
    found = assigned(a={"match": "bias", "weight_decay": 0.0}, b={"match": "blocks/0", "learning_rate": 1e-3, "factor": 0.5})
    assert found["blocks/0/bias"] == ("learning_rate_b", 0.5, "weight_decay_a")
    assert found["blocks/1/bias"] == ("learning_rate", 1.0, "weight_decay_a")
    assert found["embed/table"] == ("learning_rate", 1.0, "weight_decay")


def test_patterns_are_searched_in_the_joined_path():
    found = assigned(a={"match": r"^embed/table$", "factor": 2.0})
    assert [path for path, v in found.items() if v.factor == 2.0] == ["embed/table"]


def test_an_optimizers_own_group_may_be_empty():
    none = Group("adam", lambda path, leaf: False, None, 1e-3)
    assert set(assigned(extra=(none,)).values()) == {("learning_rate", 1.0, "weight_decay")}


@pytest.mark.parametrize(
    "configs, message",
    [
        ({"a": {"match": "emebd", "factor": 2.0}}, "groups.match='emebd' matches no parameter; nearest: 'embed/table'"),
        ({"a": {"match": r"(^|/)kernal$", "factor": 2.0}}, r"matches no parameter; nearest: .*kernel'"),
        ({"a": {"match": "zzzz", "factor": 2.0}}, "matches no parameter; allowed: paths such as 'blocks/0/bias'"),
        (
            {"a": {"match": "", "factor": 2.0}, "b": {"match": "bias", "factor": 3.0}},
            "'bias' sets nothing: the earlier group 'a'",
        ),
        ({"a": {"match": "b("}}, "sets nothing; allowed: learning_rate, factor, weight_decay"),
        ({"a": {"match": "b(", "factor": 1.0}}, r"groups.match='b\(' is no regular expression"),
        ({"a": {"match": "bias", "lr": 1.0}}, r"groups.a.lr is unknown; allowed in groups.a: match"),
        ({"a": {"factor": 1.0}}, r"groups.a lacks groups.a.match"),
        ({"a/b": {"match": "bias", "factor": 1.0}}, "groups: 'a/b' is no name; allowed: letters"),
    ],
)
def test_a_group_that_cannot_be_is_refused_in_one_line(configs, message):
    with pytest.raises(ValueError, match=message) as error:
        assigned(**configs)
    assert "\n" not in str(error.value)
