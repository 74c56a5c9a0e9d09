"""LayerPolicy and how a layer finds its own."""

from typing import Any

import pytest

from moonfx.policy import LayerPolicy, Policies, check_block_topk_sinks

DEFAULT, OTHER = LayerPolicy(128, 8, 1), LayerPolicy(64, 4, 0)
LAYERS = [f"model.layers.{i}.self_attn" for i in range(12)]
NAMES = {name: name for name in LAYERS}


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ((0, 8, 1), ValueError, "block must be at least 1 token, got 0"),
        ((-4, 8, 1), ValueError, "block must be at least 1 token, got -4"),
        ((128, 0, 0), ValueError, "topk must be at least 1 block"),
        ((128, 1, 1), ValueError, "topk=1 needs sinks=0"),
        ((128, 4, 4), ValueError, "topk=4 takes 0 to 3"),
        ((128, 4, -1), ValueError, "sinks must be at least 0"),
        ((128.0, 4, 1), TypeError, "block must be an int, got 128.0 (float)"),
        ((128, "4", 1), TypeError, "topk must be an int, got '4' (str)"),
        ((128, 4, True), TypeError, "sinks must be an int, got True (bool)"),
    ],
)
def test_a_bad_setting_is_one_clear_error(
    setting: tuple[Any, Any, Any], error: type[Exception], message: str
) -> None:
    for make in (check_block_topk_sinks, LayerPolicy):
        with pytest.raises(error) as caught:
            make(*setting)
        assert message in str(caught.value)


@pytest.mark.parametrize("setting", [(1, 1, 0), (4096, 12, 1), (128, 4, 3)])
def test_the_limits_themselves_are_allowed(setting: tuple[int, int, int]) -> None:
    policy = LayerPolicy(*setting)
    assert str(policy) == "/".join(map(str, setting))
    assert tuple(policy.to_dict().values()) == setting


@pytest.mark.parametrize(
    ("layers", "layer", "index", "expected"),
    [
        ({}, LAYERS[3], 3, DEFAULT),
        ({3: OTHER}, LAYERS[3], 3, OTHER),
        ({3: None}, LAYERS[3], 3, None),
        ({3: OTHER}, LAYERS[4], 4, DEFAULT),
        ({LAYERS[3]: OTHER}, LAYERS[3], 3, OTHER),
        ({"model.layers.3": OTHER}, LAYERS[3], 3, OTHER),
        ({"model.layers.1": OTHER}, LAYERS[11], 11, DEFAULT),  # a name, not a prefix of a string
        ({"model": OTHER, LAYERS[3]: None}, LAYERS[3], 3, None),  # the longest name
        ({"": OTHER}, LAYERS[3], 3, OTHER),  # the root is around every layer
        ({r"re:\.3\.": OTHER}, LAYERS[3], 3, OTHER),
        ({r"re:\.3\.": OTHER, 3: None}, LAYERS[3], 3, OTHER),  # a pattern before an index
        ({r"re:\.3\.": None, LAYERS[3]: OTHER}, LAYERS[3], 3, OTHER),  # a name before a pattern
        ({"re:attn": OTHER, r"re:\.3\.": None}, LAYERS[3], 3, OTHER),  # the first pattern
    ],
)
def test_the_first_that_fits_wins(
    layers: dict[str | int, LayerPolicy | None],
    layer: str,
    index: int,
    expected: LayerPolicy | None,
) -> None:
    assert Policies(DEFAULT, layers).find(layer, index) == expected


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([OTHER], TypeError, "layers must be a mapping {module name"),
        ({1: 64}, TypeError, "layers[1] must be a moonfx.LayerPolicy or None"),
        ({-1: None}, ValueError, "an attention index must be at least 0"),
        ({1.5: None}, TypeError, "must be a module name"),
        ({True: None}, TypeError, "must be a module name"),
        ({"re:(": None}, ValueError, "is not a regular expression"),
    ],
)
def test_a_bad_key_or_value_of_layers_is_one_clear_error(
    layers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        Policies(DEFAULT, layers)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)]
)
def test_dense_last_must_be_a_count(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="dense_last"):
        Policies(DEFAULT, dense_last=given)


@pytest.mark.parametrize("flag", ["causal_only", "recompute_routing"])
@pytest.mark.parametrize("given", [0, None, "False"])
def test_a_flag_must_be_one(flag: str, given: Any) -> None:
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
        Policies(DEFAULT, **{flag: given})


def test_an_unknown_name_is_an_error_that_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no module of that name.*model\.layers\.3\.self_attn"):
        Policies(DEFAULT, {"model.layers.3.attn": None}).check_names(
            {name: name for name in LAYERS}
        )
    with pytest.raises(ValueError, match="matches no module"):
        Policies(DEFAULT, {"re:mamba": None}).check_names(NAMES)
    Policies(DEFAULT, {LAYERS[0]: None, "re:attn": None, 99: None}).check_names(
        {name: name for name in LAYERS}
    )


def test_keys_that_fit_no_attention_are_named() -> None:
    layers = {"model.norm": None, r"re:\.99\.": None, 40: None, LAYERS[1]: None, 2: None}
    assert Policies(DEFAULT, layers).unused(LAYERS) == ["'model.norm'", r"'re:\.99\.'", "40"]


def test_policies_that_differ_are_written_differently() -> None:
    """The text is part of the compiled artifact's cache key."""
    texts = {
        str(Policies(*given))
        for given in [
            (DEFAULT,),
            (OTHER,),
            (DEFAULT, {3: OTHER}),
            (DEFAULT, {3: None}),
            (DEFAULT, {LAYERS[3]: OTHER}),
            (DEFAULT, {"re:3": OTHER}),
            (DEFAULT, None, 2),
            (DEFAULT, None, 0, False),
        ]
    }
    assert len(texts) == 8
