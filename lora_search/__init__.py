"""lora_search: a hyperparameter sweep orchestrator for LoRA fine-tuning, many trials over one frozen base."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at every import which kernels it lacks

__version__ = "0.2.0"
