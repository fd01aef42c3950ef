"""The same training as people script it: TRL's SFTTrainer with PEFT, and a plain loop, one trial at a time.

No gradient checkpointing, bfloat16, rows grouped by length, micro-batches with accumulation up to the same
effective batch: the best of a few sizes counts. Rates are of useful tokens, the first steps left out.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from lora_search.data.rows import Example
from lora_search.model.tiny import make_tiny_tokenizer
from tests.benchmarks.gpu.packed import Figures, large_splits, small_splits
from tests.benchmarks.gpu.shapes import LORA_BATCH, LORA_R, Q_AND_V, Scale, random_model
from tests.benchmarks.gpu.speed import release_memory, synchronize

LEFT_OUT = 2  # steps at the start
Train = Callable[[Scale, "Case", int], float]  # micro-batch -> tokens per second


class Case:
    """One model with its rows and adapters."""

    def __init__(self, scale: Scale, name: str) -> None:
        is_large = name == "large"
        self.name, self.shape = name, scale.large if is_large else scale.small
        self.micro_batches = scale.large_micro_batches if is_large else scale.small_micro_batches
        splits = large_splits(scale) if is_large else small_splits(scale)
        self.rows = splits.train[: LORA_BATCH * (LEFT_OUT + scale.rival_steps)]
        targets: Any = "all-linear" if is_large else list(Q_AND_V)
        self.lora = LoraConfig(
            r=LORA_R, lora_alpha=2 * LORA_R, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"
        )


def rival(scale: Scale, kind: str, name: str) -> Figures:
    """Return the best rate over the micro-batch sizes that fit."""
    train: Train = {"trl": with_trl, "plain": with_plain_peft}[kind]
    case, rates = Case(scale, name), {}
    for micro_batch in case.micro_batches:
        release_memory(scale.device)
        try:
            rates[micro_batch] = train(scale, case, micro_batch)
        except torch.OutOfMemoryError:
            continue
    if not rates:
        raise RuntimeError(f"out of memory with every micro-batch of {case.micro_batches} rows")
    best = max(rates, key=lambda size: rates[size])
    tried = ", ".join(f"{size} rows {rates[size]:.0f}" if size in rates else f"{size} rows out of memory"
                      for size in case.micro_batches)  # fmt: skip
    return {f"{kind}.{name}": (rates[best], f"best of micro-batches: {tried} tokens/s")}


def steady(times: Sequence[float], tokens: Sequence[int]) -> float:
    """Return tokens per second after the first steps, from the ends of all steps and their tokens."""
    return sum(tokens[LEFT_OUT:]) / (times[-1] - times[LEFT_OUT - 1])


class Ends(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimizer step is over, on the device too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())


def with_trl(scale: Scale, case: Case, micro_batch: int) -> float:
    from datasets import Dataset  # here, so that the plain loop does without
    from trl import SFTTrainer

    ends, counts = Ends(scale.device), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=random_model(case.shape, scale, scale.dtype), callbacks=[ends], peft_config=case.lora,
            args=_trl_arguments(folder, scale.device.type == "cuda", micro_batch),
            train_dataset=Dataset.from_list([_record(row) for row in case.rows]),
            processing_class=make_tiny_tokenizer(),
        )  # fmt: skip
        collate = trainer.data_collator

        def counted(features: list[dict[str, Any]]) -> Any:
            counts.append(sum(len(feature["input_ids"]) for feature in features))
            return collate(features)

        trainer.data_collator = counted
        trainer.train()
    accumulated = LORA_BATCH // micro_batch
    steps = [sum(counts[i : i + accumulated]) for i in range(0, len(counts), accumulated)]
    return steady(ends.times, steps[: len(ends.times)])


def _trl_arguments(folder: str, is_gpu: bool, micro_batch: int) -> Any:
    from trl import SFTConfig

    by_length: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in SFTConfig.__dataclass_fields__:  # its name in older transformers
        by_length = {"group_by_length": True}
    return SFTConfig(
        output_dir=folder, use_cpu=not is_gpu, max_length=4096, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=LORA_BATCH // micro_batch, num_train_epochs=1, learning_rate=2e-4,
        completion_only_loss=True, gradient_checkpointing=False, bf16=is_gpu, fp16=False,
        save_strategy="no", logging_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=is_gpu, **by_length,
    )  # fmt: skip


def _record(row: Example) -> dict[str, list[int]]:
    length = len(row.input_ids)
    is_completion = [int(i >= row.num_prompt_tokens) for i in range(length)]
    return {"input_ids": list(row.input_ids), "completion_mask": is_completion}


def with_plain_peft(scale: Scale, case: Case, micro_batch: int) -> float:
    """The loop anyone would write: padded micro-batches of rows of like length, the loss by transformers."""
    model = get_peft_model(random_model(case.shape, scale, scale.dtype), case.lora).train()
    is_gpu = scale.device.type == "cuda"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=is_gpu)
    rows = sorted(case.rows, key=lambda row: len(row.input_ids))
    times, tokens = [], []
    for start in range(0, len(rows), LORA_BATCH):
        batch = rows[start : start + LORA_BATCH]
        micro_batches = [batch[i : i + micro_batch] for i in range(0, len(batch), micro_batch)]
        for part in micro_batches:
            with torch.autocast(scale.device.type, torch.bfloat16, enabled=is_gpu):
                loss = model(**_padded(part, scale.device), use_cache=False).loss / len(micro_batches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(scale.device)
        times.append(time.perf_counter())
        tokens.append(sum(len(row.input_ids) for row in batch))
    return steady(times, tokens)


def _padded(rows: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest).long()
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length, prompt = len(row.input_ids), row.num_prompt_tokens
        ids[i, :length], mask[i, :length] = torch.tensor(row.input_ids), 1
        labels[i, prompt:length] = torch.tensor(row.input_ids[prompt:])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
