"""What each group of a Muon holds of its settings."""

import dataclasses

from moonfx.optim.settings import ADAMW, GROUP_KEYS, MUON, PARAMETER_KEYS, Settings


def test_a_group_holds_its_own_copy_of_the_settings() -> None:
    settings = Settings(momentum=0.9, coefficients=[[2.0, -1.5, 0.5]])
    one, other = settings.of_group(), settings.of_group()
    assert one == other
    assert set(one) == set(GROUP_KEYS)
    one["coefficients"][0][0] = 7.0
    assert other["coefficients"] == settings.coefficients == [[2.0, -1.5, 0.5]]


def test_two_settings_share_no_coefficients() -> None:
    Settings().coefficients[0][0] = 7.0
    assert Settings().coefficients[0][0] == 3.4445
    assert len(Settings().coefficients) == 5


def test_the_words_of_a_group_are_settings_and_those_of_a_parameter_are_not() -> None:
    fields = {f.name for f in dataclasses.fields(Settings)}
    assert fields >= set(GROUP_KEYS)
    assert not fields & set(PARAMETER_KEYS)
    assert MUON != ADAMW
