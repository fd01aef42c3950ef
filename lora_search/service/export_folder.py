"""A folder ready to serve: adapter and tokenizer, or merged weights. Only merging loads torch."""

import shutil
from pathlib import Path

from lora_search.errors import ConfigError
from lora_search.files.atomic import explained_writing
from lora_search.output.terminal import Progress
from lora_search.settings.schema import SweepConfig


def check_target(to: Path) -> None:
    """Raise ConfigError where the folder holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError("to", str(to), "must be a new or empty folder", "Remove it, or name another.")


def is_true(key: str, text: str) -> bool:
    """Return what a key that is true or false was given. Raises ConfigError."""
    if text not in ("true", "false"):
        raise ConfigError(key, text, "must be true or false")
    return text == "true"


def copy_adapter(adapter: Path, tokenizer: Path, to: Path) -> None:
    """Copy adapter and tokenizer, if an older version wrote the latter."""
    with explained_writing(to):
        for folder in (tokenizer, adapter):
            if folder.is_dir():
                shutil.copytree(folder, to, dirs_exist_ok=True)


def merge_to(
    config: SweepConfig, adapter: Path, tokenizer: Path, to: Path, expected: float, progress: Progress
) -> tuple[float, str]:
    """Write the merged weights; return their perplexity in plain transformers, and their dtype.

    ``expected``: the adapter's own perplexity on the validation rows.
    """
    from lora_search.service.plain_peft import merge
    from lora_search.service.reopen import identity_of, read_again

    if config.model.quantization is not None:
        progress.event("the adapter was trained on the 4-bit base; it is merged into the unquantized base")
    rows, commit = read_again(config).splits.validation, identity_of(config).commit
    to.parent.mkdir(parents=True, exist_ok=True)
    perplexity, dtype = merge(config, commit, adapter, tokenizer, to, rows, expected)
    progress.event(
        f"merged weights in plain transformers, {dtype}: validation perplexity {perplexity:.4f}; "
        f"the adapter's is {expected:.4f}"
    )
    return perplexity, dtype
