"""A template that writes the date writes one fixed day, in any format, whatever the clock says."""

import pytest

from lora_search.data.dates import dated
from lora_search.data.templates import render
from lora_search.errors import ConfigError
from lora_search.model.tiny import CHATML, make_tiny_tokenizer
from lora_search.reading.rows import Row
from lora_search.settings.schema import TemplateConfig

ROW = Row("Why?", "", "So.", "faq.jsonl:1")
FORMATS = [
    ("%d %b %Y", "26 Jul 2024"),
    ("%Y-%m-%d", "2024-07-26"),
    ("%A, %-d %B %Y, %H:%M", "Friday, 26 July 2024, 00:00"),
    ("%e.%-m.%y: 100 %%d", "26.7.24: 100 %d"),
    ("%%%d%%", "%26%"),
    ("today", "today"),
    ("", ""),
]
WAYS = [
    "{{ strftime_now('FORMAT') }}",
    '{{- strftime_now( "FORMAT" ) -}}',
    "{% set form = 'FORMAT' %}{{ strftime_now(form) }}",
    "{% if strftime_now is defined %}{% set today = strftime_now('FORMAT') %}{% endif %}{{ today }}",
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('FORMAT') %}{%- endif %}"
    "{{- date_string }}",
    "{% macro day() %}{{ strftime_now('FORMAT') }}{% endmacro %}{{ day() }}",
]


def prompt_of(template: str) -> str:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = f"{template}|{CHATML}"
    return render(ROW, TemplateConfig(), tokenizer).prompt


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("form", "date"), FORMATS)
def test_every_format_gives_the_same_day(form: str, date: str, way: str) -> None:
    assert prompt_of(way.replace("FORMAT", form)).startswith(f"{date}|<|im_start|>user\nWhy?")


@pytest.mark.parametrize("form", ["%10d", "%", "100 %"])
def test_a_format_that_cannot_be_honoured_is_refused(form: str) -> None:
    with pytest.raises(ConfigError, match=f"template.name: .*unknown date format {form}"):
        prompt_of(f"{{% set form = '{form}' %}}{{{{ strftime_now(form) }}}}")


def test_a_template_without_a_date_stays_as_it_is() -> None:
    assert dated(CHATML) == CHATML
