"""From a row to the exact text the model sees: prompt and completion. Loss is on the completion, end token
included."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lora_search.config import TemplateConfig
from lora_search.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One question with its answer, and where it came from ("faq.jsonl:17")."""

    instruction: str
    context: str
    response: str
    source: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n\n{self.context}" if self.context else self.instruction


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


def render(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return prompt and completion as text, special tokens written out."""
    return _chat(row, template, tokenizer) if template.name == "chat" else _inst(row, template, tokenizer)


def _chat(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    if not tokenizer.chat_template:
        raise ConfigError(
            "template.name", "chat", "needs a tokenizer with a chat template", "Use template=inst."
        )
    messages = [{"role": "user", "content": row.question}]
    if template.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answer = {"role": "assistant", "content": row.response}
    whole = str(tokenizer.apply_chat_template([*messages, answer], tokenize=False))
    if not whole.startswith(prompt):
        rule = "needs a template in which the answer follows the generation prompt"
        raise ConfigError("template.name", "chat", rule, "Use template=inst.")
    return Pair(prompt, whole[len(prompt) :].rstrip("\n"))


def _inst(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    if bos == eos or not getattr(tokenizer, "add_bos_token", bos != eos):
        bos = ""
    system = f"{template.system_prompt}\n\n" if template.system_prompt else ""
    return Pair(f"{bos}[INST] {system}{row.question} [/INST]", f" {row.response}{eos}")
