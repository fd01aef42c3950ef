"""lora_search: a hyperparameter sweep orchestrator for LoRA fine-tuning, many trials over one frozen base."""

__version__ = "0.1.0"
