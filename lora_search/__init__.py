"""lora_search: a hyperparameter sweep orchestrator for LoRA fine-tuning, many trials over one frozen base."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports missing kernels at every import

__version__ = "0.2.0"
