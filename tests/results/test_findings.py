"""Sentences about the result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lora_search.results.findings import over_default
from lora_search.results.record import StudyRecord
from tests.rows import BEST


@pytest.mark.parametrize("given", [{"q_proj": 8}, {"q_proj": 8, "v_proj": 4}])
def test_settings_as_given_are_recognised_in_a_searched_mapping(
    given: dict[str, int], tmp_path: Path
) -> None:
    best = replace(BEST, params={"lora.rank_pattern": '{"q_proj": 8}'})
    attributes = {"settings": json.dumps({"lora": {"rank_pattern": given}})}

    said = over_default(StudyRecord([best], attributes, tmp_path), best)

    name = f"the settings as they were given, trial {best.number}"
    assert said == ([f"The best are {name}: the search found none better."] if len(given) == 1 else [])
