"""From a row to the exact text the model sees: prompt and completion, the end token included."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lora_search.data.rows import Pair, Row
from lora_search.errors import ConfigError
from lora_search.settings.schema import TemplateConfig

# Templates that write the date get a fixed one, as a sweep may take days: what Llama 3.1 falls back to.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def render(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    """Return prompt and completion as text, special tokens written out."""
    return _chat(row, template, tokenizer) if template.name == "chat" else _inst(row, template, tokenizer)


def _chat(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    if not tokenizer.chat_template:
        rule = "needs a tokenizer with a chat template"
        raise ConfigError("template.name", "chat", rule, "Use template=inst.")
    messages = [{"role": "user", "content": row.question}]
    if template.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    prompt = _apply(messages, template, tokenizer, add_generation_prompt=True)
    answer = {"role": "assistant", "content": row.response}
    whole = _apply([*messages, answer], template, tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        rule = "needs a template in which the answer follows the generation prompt"
        raise ConfigError("template.name", "chat", rule, "Use template=inst.")
    return Pair(prompt, _ended(whole[len(prompt) :].rstrip(), tokenizer))


def _apply(
    messages: list[dict[str, str]],
    template: TemplateConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
) -> str:
    """Render the tokenizer's template, with its own objections as a ConfigError."""
    source = tokenizer.get_chat_template()
    if "strftime_now" in source:
        source = FIXED_DATE + source
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        if template.system_prompt is None:
            raise ConfigError(
                "template.name", "chat", f"the template refuses: {error}", "Use template=inst."
            ) from None
        key, remedy = "template.system_prompt", "Set template.system_prompt=null."
        raise ConfigError(
            key, template.system_prompt, f"the model's template refuses: {error}", remedy
        ) from None
    return str(text)


def _ended(completion: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the completion with an end token: some templates leave it to the generation loop."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    specials = [*tokenizer.all_special_tokens, *added]
    return completion if completion.endswith(tuple(specials)) else completion + _end_token(tokenizer)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.eos_token:
        raise ConfigError(
            "model.path", tokenizer.name_or_path, "its tokenizer must have an end token (eos_token)"
        )
    return str(tokenizer.eos_token)


def _inst(row: Row, template: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> Pair:
    first_ids = tokenizer("a")["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first_ids == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token if starts_with_bos else ""
    system = f"{template.system_prompt}\n\n" if template.system_prompt else ""
    return Pair(f"{bos}[INST] {system}{row.question} [/INST]", f" {row.response}{_end_token(tokenizer)}")
