"""Settings that name layers: how they are given, searched, recorded and refused."""

import pytest

from lora_search.engine.build import Room
from lora_search.errors import ConfigError
from lora_search.settings.composition import compose
from lora_search.settings.overlay import trial_settings
from lora_search.settings.recorded import recorded_config
from lora_search.settings.schema import LoraConfig, StudyConfig, SweepConfig, as_dict
from lora_search.settings.space import parse_space


def test_patterns_are_given_searched_and_counted_in_the_room() -> None:
    config = SweepConfig(
        lora=LoraConfig(r=8, alpha="2r", rank_pattern={"q_proj": 32}),
        space={"lora": {"rank_pattern": "choice({q_proj:32}, {q_proj:64,v_proj:4})", "r": "choice(4, 8)"}},
    )
    space = parse_space(config)
    second = space.distributions["lora.rank_pattern"].choices[1]  # type: ignore[attr-defined]

    settings = trial_settings(config, {"lora.rank_pattern": second, "lora.r": 4})

    assert settings.rank_pattern == (("q_proj", 64), ("v_proj", 4))
    assert settings.alpha_pattern == (("q_proj", 128.0), ("v_proj", 8.0))  # alpha stays twice the rank
    assert Room.of_space(config, space).max_rank == 64
    assert Room.of_space(config, space).patterns == ("q_proj", "v_proj")
    assert space.default_params(config) == {"lora.rank_pattern": '{"q_proj": 32}', "lora.r": 8}


def test_trained_tokens_are_given_searched_and_counted_in_the_room() -> None:
    config = compose("smoke", ["lora.trainable_token_indices=choice([7],[7,9],[])"])
    space = parse_space(config)
    choices = space.distributions["lora.trainable_token_indices"].choices  # type: ignore[attr-defined]

    found = [trial_settings(config, {"lora.trainable_token_indices": choice}) for choice in choices]

    assert [settings.trainable_token_indices for settings in found] == [(7,), (7, 9), ()]
    assert Room.of_space(config, space).tokens == (((7,), False), ((7, 9), False), ((), False))
    assert trial_settings(compose("smoke", ["lora.trainable_token_indices=[7,9]"]), {}) == found[1]


def test_copies_of_modules_are_searched_and_counted_in_the_room() -> None:
    both = ("embed_tokens", "lm_head")
    config = compose("smoke", ["lora.modules_to_save=choice([],[lm_head],[lm_head,embed_tokens])"])
    space = parse_space(config)
    choices = space.distributions["lora.modules_to_save"].choices  # type: ignore[attr-defined]

    found = [trial_settings(config, {"lora.modules_to_save": choice}) for choice in choices]

    assert [settings.modules_to_save for settings in found] == [(), ("lm_head",), both]
    assert Room.of_space(config, space).saved == ((), ("lm_head",), both)
    assert "modules_to_save" not in found[0].record()  # digests stay as they were


@pytest.mark.wrong_input
def test_a_trial_trains_some_tokens_or_whole_modules() -> None:
    with pytest.raises(ConfigError, match="^lora.modules_to_save: cannot be set with lora.trainable_token_"):
        LoraConfig(modules_to_save=["lm_head"], trainable_token_indices=[7])


def test_biases_are_searched_and_counted_in_the_room() -> None:
    config = compose("smoke", ["lora.bias=choice(none,lora_only)", "lora.target_modules=[q_proj]"])
    space = parse_space(config)

    found = [trial_settings(config, {"lora.bias": choice}) for choice in ("none", "lora_only")]

    assert [settings.trains_biases for settings in found] == [False, True]
    assert Room.of_space(config, space).biased == (("q_proj",),)
    assert "bias" not in found[0].record()  # digests stay as they were


@pytest.mark.parametrize(
    ("lora", "targets"),
    [
        ({"layers_to_transform": 3}, ("q_proj", "v_proj", "layers:3")),
        ({"layers_to_transform": [3, 1], "target_modules": "all-linear"}, ("all-linear", "layers:1,3")),
        ({"target_modules": r".*\.[qk]_proj"}, (r"re:.*\.[qk]_proj",)),
        ({"target_modules": r"[a-z0-9_.]*[qv]_proj"}, (r"re:[a-z0-9_.]*[qv]_proj",)),
    ],
)
def test_targets_as_a_trial_has_them(lora: dict[str, object], targets: tuple[str, ...]) -> None:
    assert trial_settings(SweepConfig(lora=LoraConfig(**lora)), {}).target_modules == targets  # type: ignore[arg-type]


def test_a_pattern_comes_back_from_the_study() -> None:
    import json

    config = SweepConfig(lora=LoraConfig(rank_pattern={"layers.0.q_proj": 32}, layers_to_transform=[0, 1]))

    again = recorded_config({"settings": json.dumps(as_dict(config))}, StudyConfig())

    assert again.lora == config.lora


def test_settings_of_the_command_line_reach_the_trial() -> None:
    overrides = [
        "lora.rank_pattern={q_proj: 32}", "lora.layers_to_transform=[0,1]", "optim.schedule=wsd",
        "optim.warmup_steps=10", "optim.lora_plus_ratio=16", "train.neftune_alpha=5", "lora.init=gaussian",
    ]  # fmt: skip

    settings = trial_settings(compose("smoke", overrides), {})

    assert settings.rank_pattern == (("q_proj", 32),)
    assert settings.target_modules[-1] == "layers:0,1"
    assert (settings.schedule, settings.warmup_steps, settings.init) == ("wsd", 10, "gaussian")
    assert (settings.lora_plus_ratio, settings.neftune_alpha) == (16, 5)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "q_proj"),
        ("target_modules", "(q_proj"),
        ("target_modules", ""),
        ("layers_to_transform", -1),
        ("layers_to_transform", []),
        ("layers_to_transform", [1, 1]),
        ("layers_to_transform", "last"),
        ("layers_to_transform", True),
        ("rank_pattern", [8]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(": 8}),
        ("alpha_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("trainable_token_indices", 7),
        ("trainable_token_head", True),
        ("trainable_token_indices", [7, 7]),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", ["<|im_end|>"]),
        ("trainable_token_indices", list(range(1025))),
        ("init", "eva"),
        ("bias", "all"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["norm"]),
        ("modules_to_save", ["lm_head", "lm_head"]),
        ("init", "pissa_niter_0"),
    ],
)
def test_what_names_no_layer_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        LoraConfig(**{key: value})  # type: ignore[arg-type]

    assert str(refused.value).startswith(f"lora.{key}: must ")
    assert refused.value.exit_code == 2


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optim.min_lr_ratio=0.1", "optim.schedule=constant"],
            "^optim.min_lr_ratio: has no effect with optim",
        ),
        (
            ["optim.min_lr_ratio=interval(0,0.2)", "optim.schedule=choice(constant,inverse_sqrt)"],
            "schedule=constant, inverse_sqrt, got 'interval.*Leave it out, or set optim.schedule=cosine or",
        ),
        (
            ["optim.decay_ratio=0.3", "optim.schedule=cosine"],
            "^optim.decay_ratio: has no .* set optim.schedule=wsd",
        ),
        (
            ["optim.warmup_ratio=interval(0,0.2)", "optim.warmup_steps=3"],
            "^space.optim.warmup_ratio: has no effect while optim.warmup_steps is set",
        ),
    ],
)
def test_a_setting_that_would_change_no_trial_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_space(compose("smoke", overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.min_lr_ratio=0.1", "optim.schedule=choice(constant,cosine)"],
        ["optim.decay_ratio=interval(0.1,0.3)", "optim.schedule=wsd"],
        ["optim.warmup_ratio=interval(0,0.2)", "optim.warmup_steps=null"],
    ],
)
def test_a_setting_that_changes_some_trial_is_accepted(overrides: list[str]) -> None:
    assert parse_space(compose("smoke", overrides)).distributions


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lora.trainable_token_indices=[99999999]", "must be ids from 0 to 9,999,999, got [99999999]"),
        ("lora.trainable_token_indices=[7,7]", "must be a list of different token ids, got [7, 7]"),
        ("lora.trainable_token_indices=" + str(list(range(1025))), "must be at most 1024 ids"),
        (
            "space.lora.init=choice(true,pissa,olora)",
            "must be of type str, got True. Write kaiming for PEFT's",
        ),
        ("lora.init=true", "must be kaiming, gaussian, olora, pissa or pissa_niter_N"),
        (
            "lora.init=eva",
            "got 'eva'. eva takes a pass over the data with the base for each trial. Use pissa",
        ),
        (
            "lora.init=choice(corda,pissa)",
            "corda takes a pass over the data with the base for each trial. Use",
        ),
        (
            "lora.init=loftq",
            "loftq quantizes the base anew for each trial, and all share one. Use pissa over",
        ),
        ("lora.modules_to_save=[norm]", "as all other modules are shared by the trials, got ['norm']. Write"),
    ],
)
def test_the_bound_that_is_broken_is_named(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_space(compose("smoke", [text]))

    assert told in str(refused.value)
