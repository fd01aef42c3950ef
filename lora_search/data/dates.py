"""Replaces today's date in chat templates by a fixed day: a sweep may run for days, an adapter for years."""

import datetime
import json
import re
import string

DAY = datetime.datetime(2024, 7, 26)  # the default in Llama 3.1's own template
CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\)""")
FLAGS = "-_0^#EO"  # %-d is a day without its zero
DIRECTIVES = {
    flag + letter: DAY.strftime(f"%{flag}{letter}")
    for flag in ("", *FLAGS)
    for letter in string.ascii_letters
}
# For formats that a template composes. A macro, because templates get plain data and no functions.
STRFTIME_NOW = (
    "{% macro strftime_now(format) %}{% set directives = "
    + json.dumps({name: text for name, text in DIRECTIVES.items() if "%" not in text})
    + " %}{% for part in format.split('%%') %}{{ '' if loop.first else '%' }}"
    "{% for piece in part.split('%') %}{% if loop.first %}{{ piece }}{% else %}"
    "{% set end = 2 if piece[:1] in '" + FLAGS + "' else 1 %}{% if piece[:end] not in directives %}"
    "{{ raise_exception('unknown date format ' + format) }}{% endif %}"
    "{{ directives[piece[:end]] + piece[end:] }}{% endif %}{% endfor %}{% endfor %}{% endmacro %}"
)


def dated(template: str) -> str:
    """Return the template with the fixed day instead of today, in any format."""
    written = CALL.sub(lambda call: json.dumps(DAY.strftime(call["format"]), ensure_ascii=False), template)
    return STRFTIME_NOW + written if re.search(r"strftime_now\s*\(", written) else written
