"""What each group of a Muon holds of its settings."""

import dataclasses

from moonfx.optim.settings import ADAMW, FOLLOWED, GROUP_KEYS, MUON, SETTINGS, Settings, is_muons


def test_a_group_holds_its_own_copy_of_the_settings() -> None:
    settings = Settings(momentum=0.9, coefficients=[[2.0, -1.5, 0.5]])
    one, other = settings.of_group(), settings.of_group()
    assert one == other
    assert set(one) == set(SETTINGS)
    one["coefficients"][0][0] = 7.0
    assert other["coefficients"] == settings.coefficients == [[2.0, -1.5, 0.5]]


def test_two_settings_share_no_coefficients() -> None:
    Settings().coefficients[0][0] = 7.0
    assert Settings().coefficients[0][0] == 3.4445
    assert len(Settings().coefficients) == 5


def test_a_group_of_a_muon_is_told_by_all_its_words() -> None:
    assert set(SETTINGS) <= {f.name for f in dataclasses.fields(Settings)}
    group = {**Settings().of_group(), FOLLOWED: None, "lr": 0.1}
    assert is_muons(group)
    for key in GROUP_KEYS:
        assert not is_muons({k: v for k, v in group.items() if k != key})
    assert MUON != ADAMW
