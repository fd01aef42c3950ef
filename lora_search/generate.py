"""`python -m lora_search.generate study.name=NAME "question" ...`: answers of base and trials, side by side.

questions=FILE.jsonl answers=FILE.jsonl answers a whole file. The base is loaded once. Imports torch.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.output.streams import greet

if __name__ == "__main__":  # the imports below take a second or more
    greet("generate")

# isort: split

from lora_search.command_line import chosen_trial, open_study, run, study_parser, take, whole_number
from lora_search.errors import ConfigError, DataError, InputError
from lora_search.files.atomic import write_file
from lora_search.output.shared_files import bring_files
from lora_search.output.terminal import Progress

if TYPE_CHECKING:
    from lora_search.service.plain_peft import Answerer

OWN = {"trials": "", "questions": "", "answers": "", "max_new_tokens": "200", "batch_size": "8"}
KEYS = ("question", "instruction", "prompt")  # that may have the question in a line of questions=FILE


def main() -> int:
    """Answer the questions of the command line; return the exit code."""
    own = (
        "All arguments that are not key=value are questions. Own keys: trials=3,5 (default: the best), "
        "questions=FILE.jsonl, answers=FILE.jsonl, max_new_tokens=200, batch_size=8."
    )
    return run(generate, study_parser("generate", f"Answer questions with base and trials, greedily. {own}"))


def generate(arguments: argparse.Namespace, progress: Progress) -> None:
    """Answer the questions on the screen, or those of a file into a file."""
    own = take(arguments, OWN)
    questions = take_questions(arguments, own)
    limits = {key: whole_number(key, own[key]) for key in ("max_new_tokens", "batch_size")}
    study = open_study(arguments)
    config, record = study.config, study.record
    numbers = [chosen_trial("trials", text, record).number for text in own["trials"].split(",")]
    bring_files(config, record, progress, numbers)

    from lora_search.service.plain_peft import Answerer

    answerer = Answerer(config, record.folder, numbers, limits["max_new_tokens"])
    if own["answers"]:
        answer_file(answerer, questions, numbers, limits["batch_size"], Path(own["answers"]), progress)
    else:
        answer_here(answerer, questions, numbers, progress)


def take_questions(arguments: argparse.Namespace, own: Mapping[str, str]) -> list[str]:
    """Return the questions of command line and file; leave the keys in the overrides. Raises InputError."""
    is_key = re.compile(r"~?\+{0,2}[A-Za-z_][\w.@/]*=")
    questions = [text for text in arguments.overrides if not is_key.match(text)]
    arguments.overrides = [text for text in arguments.overrides if is_key.match(text)]
    if own["questions"]:
        if not own["answers"]:
            raise ConfigError("answers", "", "must name the file to write", "Add answers=FILE.jsonl.")
        questions += read_questions(Path(own["questions"]))
    if not questions:
        raise InputError('generate: no question. Write it in quotes: "What is ...?", or give questions=FILE.')
    return questions


def answer_here(
    answerer: "Answerer", questions: Sequence[str], trials: Sequence[int], progress: Progress
) -> None:
    """Stream the answers to the terminal, the base's first."""
    for question in questions:
        progress.console.print(f"\n{question}", markup=False, style="bold", soft_wrap=True)
        for trial in (None, *trials):
            progress.console.print(f"\n[{name_of(trial)}]", markup=False, style="dim")
            answerer.stream(question, trial)


def answer_file(
    answerer: "Answerer",
    questions: Sequence[str],
    trials: Sequence[int],
    batch_size: int,
    to: Path,
    progress: Progress,
) -> None:
    """Write a JSON line per question: question, base, trial N."""
    lines = [{"question": question} for question in questions]
    for trial in (None, *trials):
        for line, text in zip(lines, answerer.answer_all(questions, trial, batch_size), strict=True):
            line[name_of(trial)] = text
        progress.event(f"{name_of(trial)}: {len(questions)} answers")
    write_file(to, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
    progress.event(f"wrote {to}")


def name_of(trial: int | None) -> str:
    """Return "base", or e.g. "trial 5"."""
    return "base" if trial is None else f"trial {trial}"


def read_questions(path: Path) -> list[str]:
    """Return the questions of a JSONL file. Raises DataError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"questions: {path} cannot be read: {error}.") from None
    found = {number: question_in(line) for number, line in enumerate(lines, start=1) if line.strip()}
    for number, question in found.items():
        if not question:
            remedy = 'Write {"question": "..."}.'
            raise DataError(f"questions: line {number} of {path} has no question. {remedy}")
    return list(found.values())


def question_in(line: str) -> str:
    """Return the question in a line of JSON; "" if there is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return ""
    texts = [row.get(key) for key in KEYS] if isinstance(row, dict) else [row]
    return next((text for text in texts if isinstance(text, str) and text.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
