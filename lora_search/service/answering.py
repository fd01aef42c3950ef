"""The answers of base and finished trials to the first validation rows, scored by the study's metric.

Generated greedily over the packed base, several trials at once; kept beside each adapter as answers.jsonl. A
trial that was scored with these settings is not scored again. Imports torch.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_search.data.serving import end_tokens
from lora_search.engine.engine import Engine
from lora_search.engine.generation import generate
from lora_search.errors import DatabaseError, MetricError
from lora_search.files.atomic import write_file
from lora_search.model.loading import load_tokenizer, pin_model, resolve_model
from lora_search.output.shared_files import bring_results
from lora_search.service.answer_metrics import Answer, named, score_answers
from lora_search.service.reopen import identity_of
from lora_search.service.scoring import Finished, adapter_of
from lora_search.settings.schema import SweepConfig
from lora_search.study.answer_metric import Setup, Standing, read_standing, store_score, store_standing
from lora_search.study.view import StudyView
from lora_search.trial import TrialRow

ANSWERS = "answers.jsonl"  # in a trial's folder, and in the study's for the base


def score_answers_once(study: Finished) -> None:
    """Score the base and every complete trial whose adapter is here or at artifacts.uri, unless that was done
    with the same settings. A metric that fails is one line, and the sweep concludes without it. Raises what
    ``after_pass`` does."""
    if study.config.metric.name == "none":
        return
    try:
        _score(study)
    except (MetricError, DatabaseError) as error:
        study.progress.event(f"no score of the answers: {error}")


def _score(study: Finished) -> None:
    engine, config, folder = study.engine, study.config, study.folder
    view, setup = StudyView(config.study), Setup.of(config.metric)
    before = read_standing(view.attributes())
    is_known = before is not None and before.setup == setup
    complete = [row for row in view.rows() if row.state == "COMPLETE"]
    if is_known and all(row.metric is not None for row in complete):
        return
    bring_results(complete, folder, engine.keeper.artifacts, [row.number for row in complete])
    rows = [row for row in complete if adapter_of(row, folder).is_dir()]
    if not rows or (is_known and all(row.metric is not None for row in rows)):
        return
    lacking = [row for row in rows if not (is_known and has_answers(row, folder))]
    asker = Asker(study)
    if before is None or not is_known:
        (scores,) = asker.score([None], [folder / ANSWERS])
        before = Standing(setup=setup, num_rows=len(scores), base=float(np.mean(scores)), behind={})
        store_standing(config.study, before)
    for chunk in _together(engine, view, lacking):
        for row, scores in zip(chunk, asker.score_trials(view, chunk, folder), strict=True):
            store_score(config.study, row.number, setup, float(np.mean(scores)), row.best_rung or 0)
    found = {row.number: read_scores(folder / "trials" / str(row.number)) for row in rows}
    scored = [(row.metric.score, -row.number) for row in StudyView(config.study).rows() if row.metric]
    score, best = max(scored)
    if -best in found:  # else it is on another disk, and so is who is how far behind it
        store_standing(config.study, replace(before, behind=behind_best(found)))
    study.progress.event(
        f"{named(config.metric)} of the answers to {before.num_rows} validation rows: "
        f"trial {-best} {score:.1f}, base {before.base:.1f}"
    )


def _together(engine: Engine, view: StudyView, rows: Sequence[TrialRow]) -> Iterator[list[TrialRow]]:
    """Yield the rows in parts whose adapters fit into the slots, and into their memory."""
    most = math.inf if engine.queue.most_bytes is None else engine.queue.most_bytes
    part, left = list[TrialRow](), most
    for row in rows:
        settings = view.settings_of(row.number)
        num_bytes = engine.bank.bytes_of(settings, engine.resolve_targets(settings.target_modules))
        if part and (len(part) == len(engine.slots) or num_bytes > left):
            yield part
            part, left = [], most
        left -= num_bytes
        part.append(row)
    if part:
        yield part


class Asker:
    """The engine with the questions of the validation rows."""

    def __init__(self, study: Finished) -> None:
        engine, config = study.engine, study.config
        self.engine, self.config, self.after_pass = engine, config, study.after_pass
        self.tokenizer, self.ends = tokenizer_and_ends(engine, config)
        count = min(config.metric.max_rows, len(engine.splits.validation))
        examples = [engine.splits.validation[i] for i in range(count)]
        self.prompts = [list(example.input_ids[: example.num_prompt_tokens]) for example in examples]
        self.references = [reference_of(engine, self.tokenizer, i) for i in range(count)]

    def score_trials(self, view: StudyView, rows: Sequence[TrialRow], folder: Path) -> list[list[float]]:
        """Return the scores of trials that fit into the slots together; their answers go beside them."""
        engine = self.engine
        slots = [
            engine.place(view.settings_of(row.number), adapter_of(row, folder), free=number)
            for number, row in enumerate(rows)
        ]
        try:
            return self.score(slots, [folder / "trials" / str(row.number) / ANSWERS for row in rows])
        finally:
            for slot in slots:
                engine.bank.release(slot)

    def score(self, slots: Sequence[int | None], paths: Sequence[Path]) -> list[list[float]]:
        """Return each slot's score of each row, None is the base; the answers go to the files."""
        limit, tokens = self.config.metric.max_new_tokens, self.engine.tokens_per_pass
        found = generate(self.engine.model, slots, self.prompts, self.ends, limit, tokens, self.after_pass)
        return [self._keep(ids, path) for ids, path in zip(found, paths, strict=True)]

    def _keep(self, found: Sequence[Sequence[int]], path: Path) -> list[float]:
        """Score the answers of one adapter and write them."""
        texts = [decoded(self.tokenizer, ids) for ids in found]
        prompts = [decoded(self.tokenizer, ids) for ids in self.prompts]
        triples = zip(prompts, self.references, texts, strict=True)
        answers = [Answer(prompt, reference, text) for prompt, reference, text in triples]
        scores = score_answers(self.config.metric, answers, self.after_pass)
        lines = [{**asdict(one), "score": score} for one, score in zip(answers, scores, strict=True)]
        write_file(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
        return scores


def tokenizer_and_ends(engine: Engine, config: SweepConfig) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Return the study's tokenizer, and the tokens that end an answer."""
    source = resolve_model(config.model)
    tokenizer = load_tokenizer(source, pin_model(source, config.model, identity_of(config).commit))
    own = engine.model.language_model.generation_config.to_diff_dict()
    return tokenizer, end_tokens(config.template, tokenizer, own)


def reference_of(engine: Engine, tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Return the answer that the validation row has: of a conversation, the first one after the prompt."""
    pair = engine.splits.pairs["validation"][index]
    end = pair.masked[0][0] if pair.masked else len(pair.completion)
    return decoded(tokenizer, tokenizer(pair.completion[:end], add_special_tokens=False)["input_ids"])


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text without the tokens that control the conversation."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def has_answers(row: TrialRow, folder: Path) -> bool:
    """Return whether the answers that gave a trial its score are here."""
    own = folder / "trials" / str(row.number)
    return (
        row.metric is not None and (own / ANSWERS).is_file() and np.mean(read_scores(own)) == row.metric.score
    )


def read_scores(folder: Path) -> list[float]:
    """Return the score of each row, from the answers in a trial's folder."""
    lines = (folder / ANSWERS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["score"] for line in lines]


def behind_best(found: dict[int, list[float]]) -> dict[int, tuple[float, float]]:
    """Return how far each trial is behind the one of the highest mean, with the paired standard error."""
    best = max(found, key=lambda number: (np.mean(found[number]), -number))
    return {number: paired(found[best], scores) for number, scores in found.items() if number != best}


def paired(best: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over the same rows, and its standard error; 0 for a single row."""
    gaps = np.subtract(best, other)
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return float(gaps.mean()), error
