"""How a setting's rule is checked: one ConfigError that names the key as it is typed."""

from lora_search.errors import ConfigError


def require(holds: bool, key: str, value: object, rule: str, remedy: str = "") -> None:
    """Raise a ConfigError unless the rule holds. NaN and infinity break every comparison, so they never
    pass."""
    if not holds:
        raise ConfigError(key, value, rule, remedy)


def require_range(key: str, value: float, least: float, most: float, remedy: str = "") -> None:
    """Raise a ConfigError unless ``least <= value <= most``; without a remedy it names both ends."""
    rule = f"must be at least {least:,}" if not value >= least else f"must be at most {most:,}"
    require(least <= value <= most, key, value, rule, remedy or f"Give a number from {least:,} to {most:,}")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, value, f"must be one of {', '.join(choices)}")
