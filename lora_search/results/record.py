"""What a study has so far, as screen, report, dashboard and W&B show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_search.results.certainty import Certainty, certainty_of
from lora_search.results.confirmation import Confirmation, read_confirmation
from lora_search.results.ranking import base_of, best_of, is_final
from lora_search.study.stored_results import TestScore, read_test_score
from lora_search.trial import TrialRow


@dataclass(frozen=True)
class StudyRecord:
    """A study's trials and attributes, and the folder of its files; all else follows from these."""

    rows: Sequence[TrialRow]
    attributes: Mapping[str, str]
    folder: Path

    @property
    def name(self) -> str:
        return self.attributes.get("study", self.folder.name)

    @cached_property
    def best(self) -> TrialRow | None:
        return best_of(self.rows)

    @cached_property
    def base(self) -> float:
        """The base model's perplexity. Raises StudyError if the study does not have it."""
        return base_of(self.attributes)

    @cached_property
    def certainty(self) -> Certainty:
        return certainty_of(self.rows, self.folder)

    @property
    def places(self) -> int | None:
        """To which decimal place perplexities near the best one can be told apart."""
        return self.certainty.decimals(self.best.perplexity) if self.best and self.best.perplexity else None

    @property
    def is_final(self) -> bool:
        return is_final(self.rows, self.attributes)

    @cached_property
    def test(self) -> TestScore | None:
        return read_test_score(self.attributes)

    @cached_property
    def confirmation(self) -> Confirmation:
        return read_confirmation(self.attributes)
