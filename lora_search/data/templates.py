"""Renders a row as the exact text that the model sees: prompt and completion, with the end token.

No template may silently lose or change a text. If it only trims white space, the prompt is as at inference,
the answer stays as given, and both are counted. Any other change is a ConfigError that quotes the difference.
Costs two renderings per row.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from lora_search.data.dates import dated
from lora_search.data.rows import Pair
from lora_search.data.thinking import (
    EMPTY,
    ENDS,
    has_thinking,
    opened_thinking,
    opening_of,
    thinking_of,
    without_thinking,
)
from lora_search.errors import ConfigError
from lora_search.failures import first_line
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

Message = dict[str, str]  # {"role": "user", "content": "Why?"}

# Exceptions that a template, which is a program, may raise.
FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
USE_INST = "Use template=inst, or fix the tokenizer's chat_template."
SKIP = "leave such rows out with data.on_bad_row=skip"
SHOWN = 24  # characters on each side of a difference
MARK = "70319482650{:04d}31"  # digits have no capitals, no white space, nothing to escape


def render(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return prompt and completion as text with special tokens."""
    return Renderer(template, tokenizer).pair(row)


@dataclass(frozen=True)
class Frame:
    """The text of a template around the messages, with a mark in the place of each."""

    prompt: str
    whole: str
    marks: tuple[str, ...]

    @property
    def said(self) -> str:
        """Return what the template writes as an answer."""
        return self.whole[len(self.prompt) - len(opened_thinking(self.prompt, self.whole)) :]

    def fill(self, text: str, contents: Sequence[str]) -> str:
        for mark, content in zip(self.marks, contents, strict=True):
            text = text.replace(mark, content)
        return text


class Renderer:
    """Renders rows as the model sees them; ``counts`` has the changes to white space, and the text that the
    template inserts before answers."""

    def __init__(self, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.counts: Counter[str] = Counter()
        self._kept: Frame | None = None
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.specials = (*tokenizer.all_special_tokens, *added)

    def pair(self, row: Row) -> Pair:
        """Return a question with its answer as text, special tokens written out."""
        return self.pairs([row])[0]

    def pairs(self, rows: Sequence[Row]) -> list[Pair]:
        """Return questions with their answers, rendered in one go."""
        if self.template.name == "inst":
            bos = first_token(self.tokenizer)
            return [self._inst(row, bos) for row in rows]
        text = self.template.system_prompt
        system = [] if text is None else [{"role": "system", "content": text}]
        asked = [[*system, {"role": "user", "content": row.question}] for row in rows]
        answers = [{"role": "assistant", "content": row.response} for row in rows]
        chats = [[*turns, answer] for turns, answer in zip(asked, answers, strict=True)]
        prompts = self._apply_all(asked, add_generation_prompt=True)
        wholes = self._apply_all(chats, add_generation_prompt=False)
        sources = [row.source for row in rows]
        return [self._pair(*chat) for chat in zip(chats, prompts, wholes, sources, strict=True)]

    def _pair(self, messages: Sequence[Message], prompt: str, whole: str, source: str) -> Pair:
        frame = self._frame(messages, whole, source)
        self._check_prompt(frame, prompt, messages[:-1], source)
        self._check_beginning(prompt, whole, source)
        answer = messages[-1]["content"]
        opening = opening_of(prompt) if ENDS in answer else opened_thinking(prompt, whole)
        if opening:
            seen = without_thinking(whole[len(prompt) - len(opening) :])
            return Pair(prompt, self._after_thinking(messages[-1], opening, seen, source))
        return Pair(prompt, self._completion(frame, whole[len(prompt) :], answer, source))

    def _frame(self, messages: Sequence[Message], whole: str, source: str) -> Frame:
        """Return the frame, rendered once. Raises ConfigError if a text has no place in it."""
        if self._kept is None:  # all rows have the same roles
            seen = f"{source}: the model would see {_both_ends(whole)!r}"
            marked = [{**message, "content": MARK.format(i)} for i, message in enumerate(messages)]
            prompt = self._apply(marked[:-1], add_generation_prompt=True)
            whole = self._apply(marked, add_generation_prompt=False)
            self._check_frame(prompt, whole, marked, seen)
            self._kept = Frame(prompt, whole, tuple(message["content"] for message in marked))
        return self._kept

    def _check_frame(self, prompt: str, whole: str, marked: Sequence[Message], seen: str) -> None:
        for message in marked[:-1]:
            if message["content"] not in prompt:
                raise self._fault(message["role"], f"leaves the {message['role']} message out ({seen})")
        self._check_beginning(prompt, whole, "")
        if marked[-1]["content"] not in whole:
            raise self._fault("assistant", f"leaves the answer out ({seen})")

    def _check_beginning(self, prompt: str, whole: str, source: str) -> None:
        """Raise ConfigError unless the whole begins with the prompt at inference."""
        if not whole.startswith(prompt) and not opened_thinking(prompt, whole):
            place = _difference(prompt, whole, "when asked", "when answered")
            rule = "needs a template in which the answer follows the generation prompt"
            where = f"{source}: " if source else ""
            raise ConfigError("template.name", "chat", f"{rule} ({where}{place})", USE_INST)

    def _check_prompt(self, frame: Frame, prompt: str, messages: Sequence[Message], source: str) -> None:
        """Raise ConfigError unless every text is in the prompt; count those that inference trims as well."""
        contents = [message["content"] for message in messages]
        expected = frame.fill(frame.prompt, [*contents, ""])
        if prompt == expected:
            return
        for message in messages:
            role, text = message["role"], message["content"]
            if text not in prompt:
                self.counts[f"{role} texts whose outer white space the template trims"] += 1
            if text.strip() not in prompt:
                difference = _difference(expected, prompt, "given", "the model would see")
                raise self._fault(role, f"changes the {role} message ({source}: {difference})", SKIP)

    def _completion(self, frame: Frame, seen: str, answer: str, source: str) -> str:
        """Return the answer as given, with the template's text before it, and an end token."""
        before, _, after = frame.said.rpartition(frame.marks[-1])
        if seen != before + answer + after:
            is_around = seen.startswith(before) and seen.endswith(after)
            if is_around and seen[len(before) : len(seen) - len(after)].strip() == answer.strip():
                self.counts["answers that keep the outer white space that the template trims"] += 1
            elif (place := seen.rfind(answer)) >= 0:  # it contains its own thinking, say
                before, after = seen[:place], seen[place + len(answer) :]
            else:
                difference = _difference(before + answer, seen, "given", "the model would see")
                raise self._fault("assistant", f"changes the answer ({source}: {difference})", SKIP)
        if before.strip():
            self.counts[f"answers that follow {before!r}, which the template inserts"] += 1
        return before + answer + self.ended(after.rstrip())

    def _after_thinking(self, turn: Message, opening: str, seen: str, source: str) -> str:
        """Return the answer as given, after the thinking that the prompt opens."""
        answer = without_thinking(turn["content"])
        place = seen.find(answer.strip())
        if place < 0 or seen[:place].strip():
            difference = _difference(answer, seen, "given", "the model would see")
            raise self._fault("assistant", f"changes the answer ({source}: {difference})", SKIP)
        self.counts[EMPTY] += not has_thinking(turn)
        given = answer.lstrip() if has_thinking(turn) else answer
        after = seen[place + len(answer.strip()) :].rstrip()
        return thinking_of(turn, opening) + given + self.ended(after)

    def _fault(self, role: str, what: str, other: str = "") -> ConfigError:
        """Return the error for a template that changes a text; ``other`` is another remedy."""
        rule = f"the tokenizer's chat template {what}"
        if role == "system" and self.template.system_prompt is not None:
            value = textwrap.shorten(self.template.system_prompt, 60)
            return ConfigError("template.system_prompt", value, rule, f"{USE_INST} Or set it to null.")
        return ConfigError("template.name", "chat", rule, f"{USE_INST} Or {other}." if other else USE_INST)

    def _apply_all(self, chats: Sequence[Sequence[Message]], *, add_generation_prompt: bool) -> list[str]:
        """Render all at once, which saves a third of the time."""
        try:
            return self._rendered(chats, add_generation_prompt)
        except FAULTS:  # of any of them: each by itself says which
            return [self._apply(chat, add_generation_prompt=add_generation_prompt) for chat in chats]

    @cached_property
    def _dated(self) -> str:
        return dated_template(self.tokenizer)

    def _rendered(self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool) -> list[str]:
        if len(chats) > 1 and (texts := self._rendered_at_once(chats, add_generation_prompt)) is not None:
            return texts
        return self._rendered_by_library(chats, add_generation_prompt)

    def _rendered_by_library(
        self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool
    ) -> list[str]:
        texts: list[str] = self.tokenizer.apply_chat_template(
            [list(chat) for chat in chats],
            chat_template=self._dated,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return texts

    def _rendered_at_once(
        self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool
    ) -> list[str] | None:
        """Render with the template that the library compiled, in a third of its time: it converts
        each message and copies its globals for each chat. Return None if it renders the first differently."""
        compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
        if compile_template is None:
            return None
        compiled = compile_template(self._dated)
        shared = {**compiled.globals, "tools": None, "documents": None, **self.tokenizer.special_tokens_map}
        shared["add_generation_prompt"] = add_generation_prompt
        new = partial(compiled.environment.context_class, compiled.environment)
        contexts = (new({**shared, "messages": list(chat)}, compiled.name, compiled.blocks) for chat in chats)
        texts = ["".join(compiled.root_render_func(context)) for context in contexts]
        return texts if texts[:1] == self._rendered_by_library(chats[:1], add_generation_prompt) else None

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render the tokenizer's template, with its own objections as a ConfigError."""
        try:
            (text,) = self._rendered([messages], add_generation_prompt)
        except FAULTS as error:
            rule = f"the model's template refuses: {first_line(error)}"
            if self.template.system_prompt is None:
                raise ConfigError("template.name", "chat", rule, "Use template=inst.") from None
            key, remedy = "template.system_prompt", "Set template.system_prompt=null."
            raise ConfigError(key, self.template.system_prompt, rule, remedy) from None
        return text

    def ended(self, tail: str) -> str:
        """Return the text after an answer, with an end token, which some templates omit."""
        return tail if tail.endswith(self.specials) else tail + self._end_token()

    def _end_token(self) -> str:
        if not self.tokenizer.eos_token:
            name, rule = self.tokenizer.name_or_path, "its tokenizer must have an end token (eos_token)"
            raise ConfigError("model.path", name, rule)
        return str(self.tokenizer.eos_token)

    def _inst(self, row: Row, bos: str) -> Pair:
        system = f"{self.template.system_prompt}\n\n" if self.template.system_prompt else ""
        return Pair(f"{bos}[INST] {system}{row.question} [/INST]", f" {row.response}{self._end_token()}")


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's own chat template, with a fixed date."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "template.name", "chat", "needs a tokenizer with a chat template", "Use template=inst."
        )
    return dated(tokenizer.get_chat_template())


def first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token with which the tokenizer begins every text; "" if there is none."""
    first_ids = tokenizer("a")["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first_ids == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts_with_bos else ""


def _both_ends(text: str) -> str:
    """Return the text, or its beginning and its end."""
    return text if len(text) <= 4 * SHOWN else f"{text[: 2 * SHOWN]} ... {text[-2 * SHOWN :]}"


def _difference(given: str, seen: str, given_name: str, seen_name: str) -> str:
    """Return the place where two texts differ, quoted from both."""
    pairs = zip(given, seen, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(seen)))
    start = max(0, place - SHOWN)
    return f"{given_name}: {given[start : place + SHOWN]!r}, {seen_name}: {seen[start : place + SHOWN]!r}"
