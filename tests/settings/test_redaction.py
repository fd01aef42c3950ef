"""`redact` hides the secret and nothing else, wherever a URL or a parameter holds one."""
# ruff: noqa: E501 (a table has long rows)

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_search.settings.secrets import WORDS, redact, remember

S = "s3cr3tx"
HOLES = [  # text -> what is left of it
    (f"postgresql+psycopg://user@server:{S}@host/db", "postgresql+psycopg://user@server:***@host/db"),
    (f"postgresql://us/er:{S}@host/db gone. Write @ as %40.", "postgresql://us/er:***@host/db gone. Write @ as %40."),
    (f"mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D{S}%3BEncrypt%3Dyes",
     "mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D***%3BEncrypt%3Dyes"),
    (f"mssql://host/db?odbc_connect=DRIVER=x;PWD={S};Encrypt=yes", "mssql://host/db?odbc_connect=DRIVER=x;PWD=***;Encrypt=yes"),
    (f"https://host/x.jsonl?token={S}&page=2", "https://host/x.jsonl?token=***&page=2"),
    (f"postgresql://host/db?options=-c password={S}&x=1", "postgresql://host/db?options=-c password=***&x=1"),
    (f"postgresql://host/db?options=-c%20password%3D{S}&x=1", "postgresql://host/db?options=-c%20password%3D***&x=1"),
    (f"data.path=https://bob:{S}@h/x: does not exist.", "data.path=https://bob:***@h/x: does not exist."),
    (f"postgresql://u:p@{S}@host/db", "postgresql://u:***@host/db"),
    (f"postgresql://u:pa/{S}@host/db", "postgresql://u:***@host/db"),
    (f"postgresql://h/db?sslpassword={S}&passfile=/me/.pgpass", "postgresql://h/db?sslpassword=***&passfile=/me/.pgpass"),
    (f"s3://AKIA:{S}/+aaa@bucket/path", "s3://AKIA:***@bucket/path"),
    (f"s3://bucket/x?secret_access_key={S}&region=eu", "s3://bucket/x?secret_access_key=***&region=eu"),
    (f"https://{S}@github.com/x/y", "https://***@github.com/x/y"),
    (f"postgresql:/u:{S}@h", "postgresql:/u:***@h"),
    (f"{{'password': '{S}', 'host': 'h'}}", "{'password': ***, 'host': 'h'}"),
    (f"redis://:{S}@host:6379/0", "redis://:***@host:6379/0"),
    (f"postgresql%2Bpsycopg%3A%2F%2Fu%3A{S}%40host", "postgresql%2Bpsycopg%3A%2F%2Fu%3A***%40host"),
    (f"mysql://u:{S}@h1/d,mysql://u:{S}@h2/d", "mysql://u:***@h1/d,mysql://u:***@h2/d"),
    (f"https://bob:{S}@h/@scope/pkg@1.0", "https://bob:***@h/@scope/pkg@1.0"),
]  # fmt: skip
OPEN = [
    "https://host:8080/path?mail=a@b.c",
    "postgresql://host:5432/db cannot be used: no such host. Write @ as %40, or ask me@there.org.",
    "postgresql://me@host/db",
    "postgresql://[::1]:5432/d",
    "eos_token='</s>' pad_token=<pad> engine.tokens_per_pass=12 max_tokens=3",
    "optim.lr: must be between 0 and 1, got 2.",
]


@pytest.mark.parametrize(("text", "shown"), HOLES)
def test_the_secret_goes_and_host_and_remedy_stay(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize("text", OPEN)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_remembered_password_is_hidden_in_every_spelling_a_message_may_have() -> None:
    remember("postgresql+psycopg://user@server:my p'ss%40wörd@host/db")

    said = "my p'ss@wörd, my%20p%27ss%40w%C3%B6rd, my+p%27ss%40w%C3%B6rd, \"my p'ss@w\\u00f6rd\""
    assert redact(said) == '***, ***, ***, "***"'


def test_a_password_that_begins_with_a_slash_is_remembered_too() -> None:
    remember("postgresql://user:/0000000@host.example/db")

    assert redact("cannot connect with /0000000") == "cannot connect with ***"


def test_a_password_that_is_an_ordinary_word_does_not_hide_that_word_elsewhere() -> None:
    remember("postgresql://postgres:postgres@localhost/postgres")

    shown = redact("postgresql://postgres:postgres@localhost/postgres: postgres is down")
    assert shown == "postgresql://postgres:***@localhost/postgres: postgres is down"


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=8, max_size=30))
def test_no_password_survives_once_its_url_was_remembered(password: str) -> None:
    assume(not any(password in word for word in WORDS))  # "localhos": hiding it would hide ordinary words
    url = f"postgresql://user:{password.replace('%', '%25').replace('@', '%40')}@host.example/db"
    remember(url)

    assert password.strip("'\"{}") not in redact(f"cannot connect with {password} to {url}") or (
        password in "postgresql://user:***@host.example/db cannot connect with to"
    )


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.text(max_size=300))
def test_no_text_is_too_strange(text: str) -> None:
    redact(text)
    remember(text)


@pytest.mark.parametrize(
    "part", ["a", ":", "://", "@", "x:y@", "password=", "%3A%2F%2F", "token='", "://a:@/a"]
)
def test_hostile_text_costs_no_more_than_its_length(part: str) -> None:
    begin = time.process_time()
    redact(part * (200_000 // len(part)))

    assert time.process_time() - begin < 5
