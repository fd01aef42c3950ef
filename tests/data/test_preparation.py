"""Rows become examples: which split, which tokens, how long, in which order."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_search.data.order import epoch_order
from lora_search.data.preparation import prepare, write_pairs
from lora_search.data.rows import Splits
from lora_search.data.splitting import split
from lora_search.errors import ConfigError, DataError
from lora_search.model.tiny import make_tiny_tokenizer
from lora_search.reading.load import load_rows
from lora_search.reading.rows import Loaded, Row
from lora_search.settings.schema import DataConfig, SweepConfig, TemplateConfig, TrainConfig

NAMES = ("train", "validation", "test")


def make_rows(num_rows: int) -> list[Row]:
    return [Row(f"Question {i}?", "", f"Answer {i}.", f"faq.jsonl:{i + 1}") for i in range(num_rows)]


ROWS = make_rows(60)


def settings(**data: object) -> SweepConfig:
    return SweepConfig(data=DataConfig(**data))  # type: ignore[arg-type]


def prepared(
    folder: Path,
    rows: list[Row],
    config: SweepConfig | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Splits:
    splits = prepare(config or settings(), Loaded(rows), tokenizer or make_tiny_tokenizer())
    write_pairs(splits, folder)
    return splits


def written(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that, like Llama 2's and Mistral's, puts a blank before every text and BOS before all."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁[INST]", "▁Why?", "▁[/INST]", "▁So."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def test_a_row_keeps_its_split_and_its_place_when_others_are_added() -> None:
    few, many = split(ROWS, DataConfig(), 3), split(make_rows(300), DataConfig(), 3)

    assert {name: [row for row in many[name] if row in ROWS] for name in NAMES} == few


@pytest.mark.parametrize("seed", range(5))
def test_the_split_and_the_hash_do_not_depend_on_the_order_of_the_file(tmp_path: Path, seed: int) -> None:
    shuffled = random.Random(seed).sample(ROWS, len(ROWS))

    assert prepared(tmp_path / "a", ROWS) == prepared(tmp_path / "b", shuffled)


def test_another_seed_gives_another_split() -> None:
    assert split(ROWS, DataConfig(), 0)["train"] != split(ROWS, DataConfig(), 1)["train"]


def test_the_order_within_a_split_is_not_the_order_of_the_text() -> None:
    train = [row.instruction for row in split(ROWS, DataConfig(), 0)["train"]]

    assert train != sorted(train)


def test_the_split_has_the_sizes_asked_for() -> None:
    config = DataConfig(validation_fraction=0.2, test_fraction=0.1)

    sizes = {name: len(part) for name, part in split(make_rows(5000), config, 0).items()}

    # three standard deviations of a binomial share of 5000 rows are 0.017 and 0.013
    assert sizes["validation"] / 5000 == pytest.approx(0.2, abs=0.017)
    assert sizes["test"] / 5000 == pytest.approx(0.1, abs=0.013)


@pytest.mark.parametrize("seed", range(8))
def test_answers_to_one_question_never_stand_on_both_sides(tmp_path: Path, seed: int) -> None:
    asked_again = [
        replace(row, instruction=f" {row.instruction.upper()}  ", response="Other.") for row in ROWS
    ]
    config = replace(settings(), seed=seed)

    splits = prepared(tmp_path, [*ROWS, *asked_again], config)

    questions = [{pair["prompt"].upper() for pair in written(tmp_path, name)} for name in NAMES]
    questions = [{" ".join(q.split()).replace(" ?", "?") for q in side} for side in questions]
    assert questions[0] & questions[1] == questions[0] & questions[2] == questions[1] & questions[2] == set()
    assert splits.counts["further answers kept beside their question"] == 60


def test_the_same_question_about_another_context_is_another_question(tmp_path: Path) -> None:
    rows = [replace(ROWS[0], context=f"Context {i}") for i in range(100)]

    splits = prepared(tmp_path, rows)

    assert min(len(splits.train), len(splits.validation), len(splits.test)) > 0
    assert "further answers kept beside their question" not in splits.counts


def test_exact_duplicates_go_whatever_their_white_space(tmp_path: Path) -> None:
    again = [
        replace(row, instruction=row.instruction.replace(" ", "\n "), source="other") for row in ROWS[:5]
    ]

    splits = prepared(tmp_path, [*ROWS, *again])

    assert splits.counts["exact duplicates removed"] == 5
    assert replace(splits, counts={}) == replace(prepared(tmp_path, ROWS), counts={})


def test_rows_that_differ_in_capitals_are_no_duplicates(tmp_path: Path) -> None:
    splits = prepared(tmp_path, [*ROWS, replace(ROWS[0], response="ANSWER 0.")])

    assert "exact duplicates removed" not in splits.counts


def test_the_hash_changes_with_any_row(tmp_path: Path) -> None:
    changed = [replace(ROWS[0], response="Answer zero."), *ROWS[1:]]
    hashes = {prepared(tmp_path, rows).data_hash for rows in (ROWS, changed, ROWS[1:])}

    assert len(hashes) == 3
    assert {len(value) for value in hashes} == {64}


def test_the_loss_is_on_all_tokens_of_training_rows_only() -> None:
    rows = make_rows(40)
    config, whole = (
        replace(settings(), train=TrainConfig(loss_on=loss_on))
        for loss_on in ("all_assistant_turns", "all_tokens")
    )

    usual, wide = (prepare(c, Loaded(rows), make_tiny_tokenizer()) for c in (config, whole))

    assert [row.learnt for row in wide.train] == [((1, len(row.input_ids)),) for row in usual.train]
    assert [row.input_ids for row in wide.train] == [row.input_ids for row in usual.train]
    assert list(wide.validation) == list(usual.validation)
    assert list(wide.test) == list(usual.test)


def test_caps_take_the_first_rows_of_the_order_and_count_the_others(tmp_path: Path) -> None:
    whole = prepared(tmp_path, ROWS)

    capped = prepared(tmp_path, ROWS, settings(max_train_examples=10, max_validation_examples=2))

    assert (capped.train, capped.validation) == (whole.train[:10], whole.validation[:2])
    assert capped.counts["train left out by cap"] == len(whole.train) - 10
    assert capped.counts["validation left out by cap"] == len(whole.validation) - 2
    assert capped.test == whole.test


@pytest.mark.parametrize(("fraction", "side"), [(0.001, "validation"), (0.899, "train")])
def test_an_empty_side_is_refused_with_what_to_change(tmp_path: Path, fraction: float, side: str) -> None:
    config = replace(settings(validation_fraction=fraction), seed=1)

    with pytest.raises(
        DataError, match=f"of 3 different rows none falls to {side} .*data.validation_fraction"
    ):
        prepared(tmp_path, ROWS[:3], config)


@pytest.mark.parametrize(
    ("num_groups", "said"),
    [
        (1, "52 different rows in 1 group none .* give rows of more groups, or group by another column"),
        (3, "52 different rows in 3 groups none .* give rows of more groups, raise .*, or try another seed"),
    ],
)
def test_an_empty_side_of_grouped_rows_asks_for_groups(tmp_path: Path, num_groups: int, said: str) -> None:
    rows = [replace(row, group=f"page {i % num_groups}") for i, row in enumerate(ROWS[:52])]

    with pytest.raises(DataError, match=f"^data.group_by: of {said}"):
        prepared(tmp_path, rows, settings(group_by="page", validation_fraction=0.001))


def test_the_files_hold_what_the_tokens_say(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()

    splits = prepared(tmp_path, ROWS, tokenizer=tokenizer)

    for name, examples in zip(NAMES, (splits.train, splits.validation, splits.test), strict=True):
        cuts = [(e.input_ids[: e.num_prompt_tokens], e.input_ids[e.num_prompt_tokens :]) for e in examples]
        decoded = [{"prompt": tokenizer.decode(p), "completion": tokenizer.decode(c)} for p, c in cuts]
        assert written(tmp_path, name) == decoded
        assert {e.input_ids[-1] for e in examples} == {tokenizer.eos_token_id}


def test_prompt_tokens_are_those_that_the_model_is_asked_with(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    rows = [replace(row, instruction=f"{row.instruction} Ünïcode") for row in ROWS]

    example = prepared(tmp_path, rows, tokenizer=tokenizer).train[0]

    asked = tokenizer(written(tmp_path, "train")[0]["prompt"], add_special_tokens=False)["input_ids"]
    assert list(example.input_ids[: example.num_prompt_tokens]) == asked


def test_no_blank_is_added_before_the_answer_and_bos_stands_once(tmp_path: Path) -> None:
    tokenizer, template = make_sentencepiece_like(), TemplateConfig(name="inst")
    rows = [
        Row("Why?", "", "So.", "a"),
        Row("Why? Why?", "", "So.", "b"),
        Row("Why? Why? Why?", "", "So.", "c"),
    ]
    config = replace(settings(validation_fraction=0.4), template=template, seed=2)

    example = prepared(tmp_path, rows, config, tokenizer).train[0]

    ids = list(example.input_ids)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(ids[-3:]) == ["▁[/INST]", "▁So.", "</s>"]
    assert example.num_prompt_tokens == len(ids) - 2


def test_a_chosen_length_cuts_rows_at_the_end_and_counts_them(tmp_path: Path) -> None:
    whole = prepared(tmp_path / "whole", ROWS)
    rows = [*ROWS, *(replace(row, response="Long. " * 50, source="long") for row in ROWS)]

    cut = prepared(tmp_path / "cut", rows, settings(max_length=64))

    assert max(len(e.input_ids) for e in cut.train) == cut.max_length == 64
    assert cut.counts["train truncated"] == len(whole.train)

    assert {e.input_ids[: e.num_prompt_tokens] for e in cut.train} == {
        e.input_ids[: e.num_prompt_tokens] for e in whole.train
    }


def test_truncated_rows_are_written_as_the_model_sees_them(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    rows = [replace(row, response="Long. " * 50) for row in ROWS]

    splits = prepared(tmp_path, rows, settings(max_length=64), tokenizer)

    pairs, examples = written(tmp_path, "train"), splits.train
    shown = [tokenizer(p["prompt"] + p["completion"], add_special_tokens=False)["input_ids"] for p in pairs]
    assert [tokenizer.decode(ids) for ids in shown] == [tokenizer.decode(e.input_ids) for e in examples]
    assert not any("<|im_end|>" in pair["completion"] for pair in pairs)


def test_a_chosen_length_without_room_for_an_answer_refuses_naming_the_row(tmp_path: Path) -> None:
    rows = [*ROWS, Row("Q" * 400, "", "A", "faq.jsonl:61")]

    with pytest.raises(
        DataError, match=r"1 rows have no room for an answer in 64 tokens:\n  faq.jsonl:61: 4\d\d"
    ):
        prepared(tmp_path, rows, settings(max_length=64))


def test_a_chosen_length_without_room_for_an_answer_may_skip_the_row(tmp_path: Path) -> None:
    rows = [*ROWS, Row("Q" * 400, "", "A", "faq.jsonl:61")]

    splits = prepared(tmp_path, rows, settings(max_length=64, on_bad_row="skip"))

    assert sum(n for key, n in splits.counts.items() if "prompt fills max_length" in key) == 1
    assert sum(len(written(tmp_path, name)) for name in NAMES) == 60


def test_a_length_that_no_prompt_fits_is_refused_even_when_rows_may_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"60 rows have no room .*\n(.*\n)+Raise data.max_length above \d\d\.$"
    ):
        prepared(tmp_path, ROWS, settings(max_length=8, on_bad_row="skip"))


def test_auto_length_is_the_percentile_of_the_training_rows(tmp_path: Path) -> None:
    splits = prepared(tmp_path, ROWS, settings(max_length_percentile=100))

    longest = max(len(example.input_ids) for example in splits.train)
    assert splits.max_length == -(-longest // 8) * 8
    assert not any("truncated" in key for key in splits.counts)


@pytest.mark.parametrize(("choices", "chosen"), [([128, 96], 96), ([32, 128], 128), ([32, 40], 40)])
def test_auto_length_takes_the_smallest_choice_that_is_enough(
    tmp_path: Path, choices: list[int], chosen: int
) -> None:
    rows = [replace(row, response="So. " * 15) for row in ROWS]

    splits = prepared(tmp_path, rows, settings(max_length_choices=choices))

    assert splits.counts["tokens in a training row: 99 % up to"] in range(73, 97)  # of a byte-level tokenizer
    assert splits.max_length == chosen
    assert splits.counts.get("train truncated", 0) == (len(splits.train) if chosen == 40 else 0)


def test_a_chosen_length_beyond_the_models_limit_is_refused(tmp_path: Path) -> None:
    rows = [replace(row, response="Long. " * 400) for row in ROWS]

    with pytest.raises(ConfigError, match=r"data.max_length_choices: must be at most 512.*got 1024"):
        prepared(tmp_path, rows, settings(max_length_choices=[512, 1024]))


def test_auto_length_never_stops_the_sweep_for_a_long_prompt(tmp_path: Path) -> None:
    rows = [*make_rows(300), Row("Q" * 400, "", "A", "faq.jsonl:301")]

    splits = prepared(tmp_path, rows)

    assert splits.max_length <= 64
    assert sum(n for key, n in splits.counts.items() if "prompt fills max_length" in key) == 1


def test_auto_length_stays_within_the_models_limit(tmp_path: Path) -> None:
    rows = [replace(row, response="Long. " * 400) for row in ROWS]

    assert prepared(tmp_path, rows).max_length == 512


def test_a_length_beyond_the_models_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length: must be at most 512.*got 4096"):
        prepared(tmp_path, ROWS, settings(max_length=4096))


def test_counts_carry_what_was_read_and_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "faq.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": r.instruction, "response": r.response}) + "\n" for r in ROWS)
    )
    config = settings(path=str(path))

    splits = prepare(config, load_rows(config.data), make_tiny_tokenizer())

    assert splits.counts["rows read"] == 60
    assert splits.counts["train"] + splits.counts["validation"] + splits.counts["test"] == 60
    assert splits.counts["train"] == len(splits.train)


def test_every_epoch_has_its_own_order_for_all_trials() -> None:
    orders = [epoch_order(20, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]

    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == epoch_order(20, 1, 0)


def test_the_order_of_an_epoch_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, 0, 0) == [2, 4, 3, 6, 5, 0, 1, 7]
