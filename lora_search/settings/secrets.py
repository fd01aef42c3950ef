"""Passwords in URLs and texts: what must never be printed, stored or sent."""

import re


def redact(url: str) -> str:
    """Return the URL without its password."""
    without = re.sub(r"(://[^/@]*?:).*@", r"\1***@", url)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd)=)[^&\s]*", r"\1***", without)
