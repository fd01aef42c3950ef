"""What is measured: models with random weights, random rows, trials. Large for a GPU, tiny for a CPU."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama import modeling_llama

from lora_search.data.rows import Example, Splits
from lora_search.model.loading import Base
from lora_search.ops.attention import NAME
from lora_search.settings.overlay import trial_settings
from lora_search.settings.schema import ALL_LINEAR, DataConfig, EngineConfig, ModelConfig, SweepConfig
from lora_search.trial import TrialSettings

RANKS = (8, 16, 32)
LORA_R, LORA_BATCH = 16, 8  # of one trial alone, and of what it is compared with
Q_AND_V = ("q_proj", "v_proj")
ALL_LAYERS = (ALL_LINEAR,)
SEED = 0

LLAMA_1B = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_70B = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One size of all that is measured."""

    device: torch.device
    dtype: torch.dtype
    small: dict[str, int]  # the model of many small trials
    large: dict[str, int]  # the model that fills the device by itself
    small_row: int  # mean tokens of a row
    large_row: int
    num_rows: int  # more than any measurement trains on
    num_trials: int  # packed, of the small model
    tokens_per_pass: int  # the most tokens of a pass of the small model
    cube: int  # side of the matrices whose product gives the device's rate
    window_seconds: float
    large_micro_batches: tuple[int, ...]  # rows per forward that others are tried with
    small_micro_batches: tuple[int, ...]
    rival_steps: int


def gpu() -> Scale:
    return Scale(
        device=torch.device("cuda"), dtype=torch.bfloat16, small=LLAMA_1B, large=LLAMA_8B, small_row=100,
        large_row=500, num_rows=8192, num_trials=32, tokens_per_pass=16384, cube=8192, window_seconds=1.5,
        large_micro_batches=(2, 4, 8), small_micro_batches=(4, 8), rival_steps=8,
    )  # fmt: skip


def tiny() -> Scale:
    return Scale(
        device=torch.device("cpu"), dtype=torch.float32, small=LLAMA_TINY, large=LLAMA_TINY, small_row=12,
        large_row=24, num_rows=4096, num_trials=4, tokens_per_pass=512, cube=256, window_seconds=0.05,
        large_micro_batches=(4,), small_micro_batches=(8,), rival_steps=3,
    )  # fmt: skip


def random_model(
    shape: dict[str, int], scale: Scale, dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """Return a frozen model with random weights, made on the device: the same for the same shape."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with scale.device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.requires_grad_(False).eval()


def random_base(shape: dict[str, int], scale: Scale, dtype: torch.dtype | None = None) -> Base:
    dtype = dtype or scale.dtype
    return Base(random_model(shape, scale, dtype, NAME), "random", scale.device, dtype)


def restore_rotary() -> None:
    """Give transformers its own rotary embedding back, which packed models replace in its module."""
    rotary = modeling_llama.apply_rotary_pos_emb
    if isinstance(rotary, partial):
        modeling_llama.apply_rotary_pos_emb = rotary.args[0]


def random_splits(num_train: int, mean_row: int, vocabulary: int, num_validation: int = 8) -> Splits:
    """Return rows of 0.5 to 1.5 times the mean length, of which two fifths are the prompt."""
    rng = np.random.default_rng(SEED)

    def example() -> Example:
        length = int(rng.integers(mean_row // 2, mean_row * 3 // 2 + 1))
        return Example(tuple(rng.integers(3, vocabulary, length).tolist()), max(1, length * 2 // 5))

    train, validation = (tuple(example() for _ in range(count)) for count in (num_train, num_validation))
    return Splits(train, validation, (), mean_row * 3 // 2, "random", {})


def sweep_config(
    slots: int | str, tokens_per_pass: int | str, is_recomputed: bool = False, batch_size: int = LORA_BATCH
) -> SweepConfig:
    """Return the settings of a sweep: one epoch, one rung, which no measurement of speed reaches."""
    engine = EngineConfig(
        slots=slots, tokens_per_pass=tokens_per_pass, gradient_checkpointing=is_recomputed or "auto"
    )
    config = SweepConfig(
        model=ModelConfig(path="random"), data=DataConfig(path="random"), engine=engine, seed=SEED
    )
    config.train = replace(config.train, epochs=1, evals_per_epoch=1, batch_size=batch_size)
    return config


def trials(
    count: int, targets: tuple[str, ...], batch_size: int, dropout: float = 0.05, lr: float = 2e-4
) -> list[TrialSettings]:
    """Return so many trials of ranks 8, 16 and 32 in turn, alpha 2r."""
    plain = trial_settings(sweep_config(1, 1024, batch_size=batch_size), {})
    return [
        replace(plain, r=r, alpha=2.0 * r, target_modules=targets, dropout=dropout, lr=lr)
        for r in (RANKS[i % len(RANKS)] for i in range(count))
    ]


def one_trial(targets: tuple[str, ...], batch_size: int) -> TrialSettings:
    return replace(trials(1, targets, batch_size)[0], r=LORA_R, alpha=2.0 * LORA_R)
