"""Checks of a setting's rule. Each raises a ConfigError that names the key as the user types it."""

from lora_search.errors import ConfigError


def require(holds: bool, key: str, value: object, rule: str, remedy: str = "") -> None:
    """Raise a ConfigError unless the rule holds. Write rules as comparisons that NaN fails."""
    if not holds:
        raise ConfigError(key, value, rule, remedy)


def require_range(key: str, value: float, least: float, most: float, remedy: str = "") -> None:
    """Raise a ConfigError unless ``least <= value <= most``; without a remedy it names both ends."""
    rule = f"must be at least {least:,}" if not value >= least else f"must be at most {most:,}"
    require(least <= value <= most, key, value, rule, remedy or f"Give a number from {least:,} to {most:,}")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")


def require_devices(count: int, num_gpus: int, whose: str, seen: str = "torch sees") -> None:
    """Raise a ConfigError if a worker cannot have that many GPUs; one device may be the CPU."""
    rule = f"must be at most {num_gpus}, {whose}" if num_gpus else f"needs GPUs, and {seen} none"
    remedy = "Lower it; a base that is too large for one device may fit with model.quantization=nf4"
    require(count <= max(num_gpus, 1), "engine.devices_per_worker", count, rule, remedy)
