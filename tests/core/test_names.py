"""Names given by a person."""

from collections.abc import Mapping, Sequence

import pytest

from research.core.names import call_checked, choose, nearest


def test_nearest_finds_the_likeliest_name_whatever_its_case():
    assert nearest("transfomer", ["mlp", "transformer", "vit"]) == "transformer"
    assert nearest("ViT", ["mlp", "vit"]) == "vit"


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zzzz", ["mlp", "transformer"]) is None
    assert nearest("anything", []) is None


def test_choose_refuses_in_one_line_with_given_allowed_and_nearest():
    table = {"vit": 1, "transformer": 2}
    assert choose(table, "vit", "model.kind") == 1
    with pytest.raises(ValueError) as error:
        choose(table, "transfomer", "model.kind")
    message = str(error.value)
    assert message == "model.kind='transfomer' is unknown; allowed: transformer, vit; nearest: 'transformer'"


def _factory(*, width, heads, bias=False):
    return width, heads, bias


def test_call_checked_calls_with_what_was_given():
    assert call_checked(_factory, {"width": 4, "heads": 2}, "model") == (4, 2, False)


def test_call_checked_names_an_unknown_keyword_and_the_nearest():
    with pytest.raises(ValueError, match=r"^model\.widht is unknown; allowed in model: width, heads, bias; nearest: 'width'$"):
        call_checked(_factory, {"widht": 4, "heads": 2}, "model")


def test_call_checked_names_every_missing_keyword():
    with pytest.raises(ValueError, match=r"^model lacks model\.width, model\.heads; given: none$"):
        call_checked(_factory, {}, "model")


def test_an_error_inside_the_factory_is_not_taken_for_a_wrong_keyword():
    def broken(*, width):
        raise TypeError("inside")

    with pytest.raises(TypeError, match="inside"):
        call_checked(broken, {"width": 1}, "model")


def _varied(*, vary: Mapping[str, Sequence[float]]):
    return vary


@pytest.mark.parametrize("vary", [[1.0, 2.0], 3, {"rate": 0.5}, {"rate": ["low", "high"]}])
def test_a_section_of_another_form_is_refused_with_the_form_that_is_wanted(vary):
    with pytest.raises(ValueError) as error:
        call_checked(_varied, {"vary": vary}, "learner.population")
    said = f"learner.population.vary={vary!r} is of the wrong type; allowed: Mapping[str, Sequence[float]]"
    assert str(error.value) == said
    assert call_checked(_varied, {"vary": {"rate": (1, 0.5)}}, "learner.population") == {"rate": (1, 0.5)}
