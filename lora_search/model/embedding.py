"""The embedding whose rows trials may train: found, and checked to compute what PEFT computes with them."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from lora_search.errors import ModelError
from lora_search.files.peft import TOKEN_ROWS
from lora_search.trial import MODULES, TrialSettings

KEY, MODULES_KEY = "lora.trainable_token_indices", "lora.modules_to_save"


class Embedding:
    """A model's embedding and head. ``is_tied``: they are the same."""

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
        names = {module: name for name, module in model.named_modules()}
        self.names = [names[m] for m in (self.module, self.head)]
        self.is_tied = self.head.weight is self.module.weight

    @property
    def width(self) -> int:
        return self.module.weight.shape[1]

    @property
    def scale(self) -> torch.Tensor | None:
        """The factor that Gemma's embedding itself puts on its rows."""
        scale = getattr(self.module, "embed_scale", None)
        return scale if scale is None or isinstance(scale, torch.Tensor) else torch.tensor(scale)

    def owned(self, settings: TrialSettings) -> dict[int, tuple[str, torch.Tensor]]:
        """Return the base's rows that a trial has copies of, [K, D] or all [V, D], with PEFT's name for them:
        0 the embedding's, 1 the head's."""
        weights = self.module.weight, self.head.weight
        saved = [place for place, name in enumerate(MODULES) if name in settings.modules_to_save]
        ids = list(settings.trainable_token_indices)
        rows = range(1 + settings.trainable_token_head) if ids else ()
        whole = {place: (f"{self.names[place]}.weight", weights[place]) for place in saved}
        return whole | {place: (f"{self.names[place]}.{TOKEN_ROWS}", weights[place][ids]) for place in rows}

    @property
    def is_plain(self) -> bool:
        """Whether it looks up rows and does nothing else but put a factor on them."""
        looks_up = type(self.module).forward is nn.Embedding.forward or self.scale is not None
        return looks_up and self.module.max_norm is None


def check_modules(model: nn.Module, modules: Collection[str]) -> None:
    """Raise ModelError if PEFT's copies of these modules would learn more than their weights."""
    embedding = Embedding(model)
    has_bias = "lm_head" in modules and embedding.head.bias is not None
    if modules and (has_bias or not embedding.is_plain):
        fault = "the head has a bias" if has_bias else "the embedding does more than look up rows"
        raise ModelError(
            f"{MODULES_KEY}: {fault} in this {getattr(model.config, 'model_type', '')} model, and PEFT would "
            "train something else. Leave it out, or choose another base."
        )


def check_tokens(model: nn.Module, ids: Sequence[int], with_head: bool) -> None:
    """Raise ModelError if a token has no row in the embedding, or if trained rows would not give in PEFT what
    they give here."""
    if not ids:
        return
    embedding = Embedding(model)
    module, head = embedding.module, embedding.head
    if max(ids) >= len(module.weight):
        raise ModelError(
            f"{KEY}: the base has no token {max(ids)}: its embedding has {len(module.weight)} rows. "
            "For new tokens resize the base's embedding, save base and tokenizer, and set model.path to them."
        )
    if module.padding_idx in ids:
        raise ModelError(
            f"{KEY}: {module.padding_idx} is the padding token, whose row never learns. Leave it out."
        )
    says_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    is_whole = head.bias is None or not (says_tied or with_head)  # PEFT drops the bias of a wrapped head
    if with_head and embedding.is_tied:
        raise ModelError(
            "lora.trainable_token_head: the base's head is tied to its embedding: its rows are trained with "
            f"{KEY} already. Leave it out."
        )
    if not (embedding.is_plain and says_tied == embedding.is_tied and is_whole):
        kind = getattr(model.config, "model_type", "")
        raise ModelError(
            f"{KEY}: the embedding or head of this {kind} model does more than look up and multiply by rows, "
            "and PEFT would compute something else. Leave the key out, or choose another base."
        )
