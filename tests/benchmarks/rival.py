"""The same training as people script it: TRL's SFTTrainer with PEFT, one trial alone: prints JSON.

Arguments: dtype, rows per forward. Its best setting here: no gradient checkpointing, rows grouped by length,
and few rows per forward with accumulation up to the same effective batch, so that little is padded.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lora_search.data.preparation import prepare, write_pairs
from lora_search.model.loading import load_tokenizer, resolve_model
from lora_search.reading.load import load_rows
from lora_search.settings.composition import compose
from tests.benchmarks.ours import BATCH, tokens_of

ROWS = 40


class StepTimes(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


def main() -> None:
    dtype, micro_batch = sys.argv[1], int(sys.argv[2])
    overrides = [f"data.max_train_examples={ROWS}", "data.max_validation_examples=32"]
    config = compose("construction_faq", overrides)
    source, folder = resolve_model(config.model), Path(tempfile.mkdtemp())
    splits = prepare(config, load_rows(config.data), load_tokenizer(source, config.model))
    write_pairs(splits, folder)
    train, validation = (
        Dataset.from_list([json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()])
        for name in ("train", "validation")
    )
    arguments = SFTConfig(
        output_dir=str(folder / "out"), use_cpu=not torch.cuda.is_available(), max_length=splits.max_length,
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=BATCH // micro_batch,
        per_device_eval_batch_size=8, num_train_epochs=1, learning_rate=1e-3, completion_only_loss=True,
        gradient_checkpointing=False, train_sampling_strategy="group_by_length", save_strategy="no",
        logging_strategy="no", report_to=[], disable_tqdm=True, bf16=False, fp16=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    steps = StepTimes()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)),
        args=arguments, train_dataset=train, eval_dataset=validation, callbacks=[steps],
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        trainer.evaluate()
        seconds.append(time.perf_counter() - start)
    steady = (len(steps.times) - 1) / len(steps.times) / (steps.times[-1] - steps.times[0])
    print(  # noqa: T201 (its result)
        json.dumps(
            {
                "train": tokens_of(splits) * steady,
                "epoch_seconds": whole,
                "validation": sum(len(row.input_ids) for row in splits.validation) / min(seconds),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
