"""The loss mask of conversations: finds the assistant's turns as inference would render them.

The loss is on each of the assistant's turns after the first question, with its end token, and on nothing
else. A turn begins at the end of the generation prompt after the preceding turns. If a template renders an
earlier turn differently once others follow (without thinking, say), a mark in its place locates it. Costs two
renderings per turn.
"""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Pair
from lora_search.data.serving import serving_template
from lora_search.data.templates import FAULTS, SKIP, Renderer, dated_template
from lora_search.data.thinking import (
    EMPTY,
    ENDS,
    has_thinking,
    opened_thinking,
    thinking_of,
    without_thinking,
)
from lora_search.errors import ConfigError
from lora_search.failures import first_line
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

MARK = "7031948265000031"  # digits have no capitals, no white space, nothing to escape
GREETING = "messages of the assistant before the first question: read, not learnt"
NO_SYSTEM = "empty system messages, rendered as given"
DROPPED = "answers whose thinking the template leaves out"
Turns = Sequence[dict[str, Any]]


class ConversationRenderer:
    """Renders conversations as the model sees them, with the same template as single questions."""

    def __init__(self, renderer: Renderer, loss_on: str) -> None:
        self.counts, self.specials, self.ended = renderer.counts, renderer.specials, renderer.ended
        self.template, self.loss_on = renderer.template, loss_on
        self.tokenizer = _served(renderer.template, renderer.tokenizer)

    def pair(self, row: Row) -> Pair:
        """Return the text up to the end of the last learnt answer, with the parts that have no loss."""
        turns, learnt = self._turns(row)
        asker = _Asker(self.tokenizer, row, self.specials)
        whole = asker.render(turns)
        opening = asker.opening(turns, whole) if learnt[-1] == len(turns) - 1 else ""
        self._check_texts(turns, whole, row.source, is_last_kept=bool(opening))
        spans = [asker.span(turns, whole, index) for index in learnt]
        _check_tools(
            row, [(turns[i], whole[slice(*span)]) for i, span in zip(learnt, spans, strict=True)], whole
        )
        text, spans = self._after_thinking(turns[-1], opening, whole, spans)
        start = spans[0][0]
        masked = [(a[1] - start, b[0] - start) for a, b in zip(spans, spans[1:], strict=False)]
        completion = text[start:]
        if learnt[-1] == len(turns) - 1:  # a template may omit the end token of the last turn only
            completion = self.ended(completion)
        return Pair(text[:start], completion, tuple(masked))

    def _after_thinking(
        self, turn: dict[str, Any], opening: str, whole: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text up to the end of the last answer, which continues the thinking that its prompt
        opens, and where each answer is."""
        start, end = spans[-1]
        if not opening:
            return whole[:end], spans
        self.counts[EMPTY] += not has_thinking(turn)
        said = thinking_of(turn, opening) + whole[start:end].lstrip()
        start += len(opening)
        return whole[: spans[-1][0]] + opening + said, [*spans[:-1], (start, start + len(said))]

    def _turns(self, row: Row) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the messages, with the system prompt if there is one, and the indices of the learnt ones."""
        turns, system = row.turns, self.template.system_prompt
        if system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        weights = [turn.pop("weight", 1) for turn in turns]
        asked = [turn["role"] for turn in turns].index("user")  # nothing asks for what comes before
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        learnt = [i for i in answers if i > asked and weights[i] > 0]
        self.counts[GREETING] += sum(i < asked for i in answers)
        self.counts[NO_SYSTEM] += turns[0]["role"] == "system" and not turns[0]["content"].strip()
        return turns, learnt[-1:] if self.loss_on == "last_turn" else learnt

    def _check_texts(self, turns: Turns, whole: str, source: str, *, is_last_kept: bool) -> None:
        """Raise ConfigError if the template loses a text; count thinking that it leaves out."""
        place = 0
        for turn in turns:
            role, text = turn["role"], turn["content"].strip()
            if role == "tool" or not text:
                continue
            start = 0 if role == "system" else place
            found = whole.find(text, start)
            if role == "assistant" and ENDS in text:
                answer = without_thinking(text).strip()
                alone = whole.find(answer, start)
                if found < 0 or (answer and alone < found):  # a later turn may hold all of it
                    text, found = answer, alone
                    self.counts[DROPPED] += found >= 0 and not (is_last_kept and turn is turns[-1])
            if found < 0:
                what = f"loses or changes a message of the {role} ({source}: {text[:40]!r})"
                rule = f"the tokenizer's chat template {what}"
                remedy = f"Fix the tokenizer's chat_template, or {SKIP}."
                raise ConfigError("template.name", self.template.name, rule, remedy)
            place = place if role == "system" else found + len(text)
        dropping = turns[:-1] if is_last_kept else turns
        thoughts = [
            turn[key].strip() for turn in dropping for key in ("reasoning_content", "thinking") if key in turn
        ]
        self.counts[DROPPED] += sum(thought not in whole for thought in thoughts)


def _check_tools(row: Row, said: Sequence[tuple[dict[str, Any], str]], whole: str) -> None:
    """Raise ConfigError if the template leaves out tools on offer, or calls that are learnt."""
    offered = [tool.get("function", tool).get("name", "") for tool in row.offered_tools or ()]
    called = [(call["function"]["name"], text) for turn, text in said for call in turn.get("tool_calls", ())]
    lost = [("the tools on offer", name) for name in offered if str(name) not in whole]
    lost += [("the tool calls", name) for name, text in called if name not in text]
    if lost:
        what, name = lost[0]
        rule = f"the tokenizer's chat template leaves out {what} ({row.source}: {name!r})"
        remedy = "Choose a base whose template writes tools; data.columns.tools=null leaves out the list."
        raise ConfigError("template.name", "chat", rule, remedy)


class _Asker:
    """Renders one conversation and its prefixes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: Row, specials: tuple[str, ...]) -> None:
        self.tokenizer, self.source, self.specials = tokenizer, row.source, specials
        self.tools, self.chat_template = row.offered_tools, dated_template(tokenizer)
        self._asked: dict[int, str] = {}

    def render(self, turns: Turns, *, ask: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(turns),
                tools=self.tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except FAULTS as error:
            raise self._fault(f"refuses the conversation: {first_line(error)}") from None
        return str(text)

    def asked(self, turns: Turns, index: int) -> str:
        """Return what the model is asked with before a turn."""
        if index not in self._asked:
            self._asked[index] = self.render(turns[:index], ask=True)
        return self._asked[index]

    def span(self, turns: Turns, whole: str, index: int) -> tuple[int, int]:
        """Return the span of an assistant's turn in the whole text, with its end token."""
        asked = self.asked(turns, index)
        answered = self.render(turns[: index + 1])
        asked = asked.removesuffix(opened_thinking(asked, answered))
        if not answered.startswith(asked):
            raise self._fault("does not continue the generation prompt with the answer")
        said = self._without_tail(answered[len(asked) :])
        if whole.startswith(asked + said):
            return len(asked), len(asked) + len(said)
        return self._marked_span(turns, whole, index, asked)

    def opening(self, turns: Turns, whole: str) -> str:
        """Return the thinking that the last answer's prompt opens and the template leaves out."""
        return opened_thinking(self.asked(turns, len(turns) - 1), whole)

    def _marked_span(self, turns: Turns, whole: str, index: int, asked: str) -> tuple[int, int]:
        marked = [*turns]
        marked[index] = {"role": "assistant", "content": MARK}
        head, mark, tail = self.render(marked).partition(MARK)
        lead, _, end = self.render(marked[: index + 1])[len(asked) :].partition(MARK)
        is_around = whole.startswith(head) and whole.endswith(tail) and len(head) + len(tail) <= len(whole)
        if not mark or not is_around:
            raise self._fault(f"renders message {index + 1} so that its place cannot be found")
        end = self._without_tail(end)
        start = len(head) - (len(lead) if head.endswith(lead) else 0)
        return start, len(whole) - len(tail) + (len(end) if tail.startswith(end) else 0)

    def _without_tail(self, said: str) -> str:
        """Return a turn without the line break that templates add after its end token."""
        short = said.rstrip()
        return short if short.endswith(self.specials) else said

    def _fault(self, what: str) -> ConfigError:
        rule = f"the tokenizer's chat template {what} ({self.source})"
        remedy = "Leave such rows out (data.on_bad_row=skip), or choose a base whose template renders them."
        return ConfigError("template.name", "chat", rule, remedy)


def _served(template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the template for conversations."""
    if template.name == "chat" and tokenizer.chat_template:
        return tokenizer
    served = copy.copy(tokenizer)
    served.chat_template = serving_template(template, tokenizer)
    return served
