"""From a row to the exact text the model sees: prompt and completion, the end token included.

No template may lose or change a text in silence. Where it only trims, the prompt is what inference will give,
the answer stays as given, and both are counted. Whatever else it changes is a ConfigError that quotes the
difference. Costs two renderings a row.
"""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_search.data.dates import dated
from lora_search.data.rows import Pair
from lora_search.errors import ConfigError
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

Message = dict[str, str]  # {"role": "user", "content": "Why?"}

# What a template may raise by itself: it is a program, of anybody.
FAULTS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
USE_INST = "Use template=inst, or mend the tokenizer's chat_template."
SHOWN = 24  # characters on each side of a difference
MARK = "70319482650{:04d}31"  # digits have no capitals, no white space, nothing to escape


def render(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return prompt and completion as text, special tokens written out."""
    return Renderer(template, tokenizer).pair(row)


@dataclass(frozen=True)
class Frame:
    """What a template writes around messages of given roles, with a mark where each text goes."""

    prompt: str
    whole: str
    marks: tuple[str, ...]

    def fill(self, text: str, contents: Sequence[str]) -> str:
        for mark, content in zip(self.marks, contents, strict=True):
            text = text.replace(mark, content)
        return text


class Renderer:
    """Writes rows as the model sees them; ``counts`` says what the template did to white space, and where it
    puts text of its own before answers."""

    def __init__(self, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.counts: Counter[str] = Counter()
        self._frames: dict[tuple[str, ...], Frame] = {}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.specials = (*tokenizer.all_special_tokens, *added)

    def pair(self, row: Row) -> Pair:
        """Return a question with its answer as text, special tokens written out."""
        if self.template.name == "inst":
            return self._inst(row)
        messages = [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.response}]
        return self.chat(messages, row.source)

    def chat(self, messages: Sequence[Message], source: str) -> Pair:
        """Return a conversation by the tokenizer's template: its last message is the completion.

        The system prompt of the settings comes first, where the conversation brings none.
        """
        if not self.tokenizer.chat_template:
            rule = "needs a tokenizer with a chat template"
            raise ConfigError("template.name", "chat", rule, "Use template=inst.")
        system = self.template.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        prompt = self._apply(messages[:-1], add_generation_prompt=True)
        whole = self._apply(messages, add_generation_prompt=False)
        frame = self._frame(messages, f"{source}: the model would see {_both_ends(whole)!r}")
        self._check_prompt(frame, prompt, messages[:-1], source)
        self._check_beginning(prompt, whole, f"{source}: ")
        return Pair(prompt, self._completion(frame, whole[len(prompt) :], messages[-1]["content"], source))

    def _frame(self, messages: Sequence[Message], seen: str) -> Frame:
        """Return the frame, rendered once. Raises ConfigError where a text has no place in it."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            marks = tuple(MARK.format(i) for i in range(len(roles)))
            marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            prompt = self._apply(marked[:-1], add_generation_prompt=True)
            whole = self._apply(marked, add_generation_prompt=False)
            self._check_frame(prompt, whole, marked, seen)
            self._frames[roles] = Frame(prompt, whole, marks)
        return self._frames[roles]

    def _check_frame(self, prompt: str, whole: str, marked: Sequence[Message], seen: str) -> None:
        for message in marked[:-1]:
            if message["content"] not in prompt:
                raise self._fault(message["role"], f"leaves the {message['role']} message out ({seen})")
        turns = [prompt.index(message["content"]) for message in marked[:-1] if message["role"] != "system"]
        if turns != sorted(turns):
            raise self._fault("user", f"puts the messages in another order ({seen})")
        self._check_beginning(prompt, whole, "")
        if marked[-1]["content"] not in whole[len(prompt) :]:
            raise self._fault("assistant", f"leaves the answer out ({seen})")

    def _check_beginning(self, prompt: str, whole: str, source: str) -> None:
        """Raise ConfigError unless the whole begins with what the model is asked with at inference."""
        if not whole.startswith(prompt):
            place = _difference(prompt, whole, "when asked", "when answered")
            rule = "needs a template in which the answer follows the generation prompt"
            raise ConfigError("template.name", "chat", f"{rule} ({source}{place})", USE_INST)

    def _check_prompt(self, frame: Frame, prompt: str, messages: Sequence[Message], source: str) -> None:
        """Raise ConfigError unless every text is in the prompt; count those that inference trims as well."""
        expected = frame.fill(frame.prompt, [*(message["content"] for message in messages), ""])
        if prompt == expected:
            return
        end = 0  # of the last message: each comes after the one before it, but for the system prompt
        for message in messages:
            role, text = message["role"], message["content"]
            start = 0 if role == "system" else end
            if (place := prompt.find(text, start)) < 0:
                text = text.strip()
                place = prompt.find(text, start)
                self.counts[f"{role} texts whose outer white space the template trims"] += 1
            if place < 0:
                difference = _difference(expected, prompt, "given", "the model would see")
                raise self._fault(role, f"changes the {role} message ({source}: {difference})")
            end = end if role == "system" else place + len(text)

    def _completion(self, frame: Frame, seen: str, answer: str, source: str) -> str:
        """Return the answer as given, with what the template writes before it, and an end token."""
        before, _, after = frame.whole[len(frame.prompt) :].rpartition(frame.marks[-1])
        if seen != before + answer + after:
            is_around = seen.startswith(before) and seen.endswith(after)
            if is_around and seen[len(before) : len(seen) - len(after)].strip() == answer.strip():
                self.counts["answers that keep the outer white space that the template trims"] += 1
            elif (place := seen.rfind(answer)) >= 0:  # it brings its own thinking, say
                before, after = seen[:place], seen[place + len(answer) :]
            else:
                difference = _difference(before + answer, seen, "given", "the model would see")
                raise self._fault("assistant", f"changes the answer ({source}: {difference})")
        if before.strip():
            self.counts[f"answers that follow {before!r}, which the template inserts"] += 1
        return before + answer + self.ended(after.rstrip())

    def _fault(self, role: str, what: str) -> ConfigError:
        """Return the error for a template that does not let a text through."""
        rule = f"the tokenizer's chat template {what}"
        if role == "system" and self.template.system_prompt is not None:
            value = textwrap.shorten(self.template.system_prompt, 60)
            return ConfigError("template.system_prompt", value, rule, f"{USE_INST} Or set it to null.")
        return ConfigError("template.name", "chat", rule, USE_INST)

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Render the tokenizer's template, with its own objections as a ConfigError."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=dated_template(self.tokenizer),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except FAULTS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            rule = f"the model's template refuses: {reason}"
            if self.template.system_prompt is None:
                raise ConfigError("template.name", "chat", rule, "Use template=inst.") from None
            key, remedy = "template.system_prompt", "Set template.system_prompt=null."
            raise ConfigError(key, self.template.system_prompt, rule, remedy) from None
        return str(text)

    def ended(self, tail: str) -> str:
        """Return what follows an answer with an end token: some templates leave it to the generation loop."""
        return tail if tail.endswith(self.specials) else tail + self._end_token()

    def _end_token(self) -> str:
        if not self.tokenizer.eos_token:
            name, rule = self.tokenizer.name_or_path, "its tokenizer must have an end token (eos_token)"
            raise ConfigError("model.path", name, rule)
        return str(self.tokenizer.eos_token)

    def _inst(self, row: Row) -> Pair:
        bos = first_token(self.tokenizer)
        system = f"{self.template.system_prompt}\n\n" if self.template.system_prompt else ""
        return Pair(f"{bos}[INST] {system}{row.question} [/INST]", f" {row.response}{self._end_token()}")


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's own chat template; one that writes the date writes the fixed one."""
    return dated(tokenizer.get_chat_template())


def first_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer begins every text with; empty where there is none."""
    first_ids = tokenizer("a")["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first_ids == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts_with_bos else ""


def _both_ends(text: str) -> str:
    """Return the text, or its beginning and its end."""
    return text if len(text) <= 4 * SHOWN else f"{text[: 2 * SHOWN]} ... {text[-2 * SHOWN :]}"


def _difference(given: str, seen: str, given_name: str, seen_name: str) -> str:
    """Return the place where two texts part, quoted from both."""
    pairs = zip(given, seen, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(seen)))
    start = max(0, place - SHOWN)
    return f"{given_name}: {given[start : place + SHOWN]!r}, {seen_name}: {seen[start : place + SHOWN]!r}"
