"""Removes passwords and keys from every text that is printed, stored or sent.

`redact` finds them by their place (the password of a URL, `password=`, `?token=`). Secrets that `remember`
has found in a setting it removes everywhere, in every spelling. Linear in the length of the text.
"""

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus, urlsplit

HIDDEN = "***"
Span = tuple[int, int]

ANYWHERE = 8  # a secret of at least this many characters is also removed from inside words
SHORTEST = 3  # a shorter one only from its own place: half of all words contain it
NAMES = (
    r"passw(?:or)?d|passphrase|(?:(?<![a-z])|(?<=%[0-9a-f]{2}))(?:pwd|(?<!per_)pass)|secret|token|credentials?|signature"
    r"|(?:api|access|account|secret|private)[_-]?key|(?<=[?&])(?:key|sig|code|auth)"
)
VALUE = (
    r"'[^'\n]{0,200}'|\"[^\"\n]{0,200}\"|\{[^}\n]{0,200}\}|%(?:25)*7B.{0,200}?%(?:25)*7D"
    r"|(?!\.\.\.)(?:(?!%(?:25)*(?:26|3B|20))[^&;\s'\"])+"
)
# name=value, also percent-encoded (odbc_connect=...PWD%3D...%3B) and as in JSON ("password": "value")
NAMED = re.compile(rf"(?i)(?:{NAMES})(?:['\"]?\s?(?:=|%(?:25)*3D)\s?|['\"]\s?:\s?)({VALUE})")
SPECIAL_TOKEN = re.compile(
    r"(?i)(?:pad|eos|bos|unk|mask|sep|cls|special|control|end|stop)_?$"
)  # a tokenizer's
SHAPED = re.compile(
    r"\b(?:hf|ghp|gho|github_pat|glpat|sk|xox[bp])[_-][A-Za-z0-9_-]{16,}"
)  # keys of well-known sites
HEADER = re.compile(r"(?i)authorization['\"]?\s?[:=]\s?['\"]?(?:(?:bearer|basic|token)\s+)?([^\s'\",]+)")
LOOSE = re.compile(r"(?<=[\w.%+-]):([^\s'\"@/:]+)@(?=[\w.\[-])")  # user:password@host of a URL that is none
ENCODED = re.compile(r"(?i)%3A%2F%2F(?:(?!%3A)[^\s&]){0,200}%3A((?:(?!%40)[^\s&]){1,200})%40")
RUN = re.compile(r"[^\s\"'<>`]*")
HOST = re.compile(r"[\w.\[\]-]+(?::\d+)?(?:[/?]|$)")
WORDS = ("postgres", "postgresql", "psycopg", "mysql", "pymysql", "sqlite", "password", "localhost", "study")
VARIABLES = re.compile(r"(?i)(?:password|passwd|secret|token|api_?key|access_?key)$")  # of the environment

# Global on purpose: a library's message that quotes a password may come from anywhere.
_known: set[str] = set()


def redact(text: str) -> str:
    """Return the text without passwords and keys; it keeps host, database and the words around them."""
    spans = sorted(_spans(text))
    parts, end = [], 0
    for start, stop in spans:
        if start >= end:
            parts += [text[end:start], HIDDEN]
        end = max(end, stop)
    shown = "".join([*parts, text[end:]])
    return _pattern(frozenset(_known)).sub(HIDDEN, shown) if _known else shown


def remember(text: str) -> None:
    """Register the secrets in a setting, a URL or an argument: `redact` removes them from every text."""
    readings = dict.fromkeys([text, unquote(text), unquote_plus(text), unquote(unquote(text))])
    found = {reading[start:stop] for reading in readings for start, stop in _spans(reading)}
    for reading in readings:
        found |= set(_of_url(reading))
    public = _public_words(text)
    for secret in found:
        remember_secret(secret.strip("'\"").removeprefix("{").removesuffix("}"), public)


def remember_secret(secret: str, public: Iterable[str] = ()) -> None:
    """Register one secret, unless hiding it everywhere would hide ordinary words or numbers."""
    plain = unquote(secret)
    is_number = plain.isdigit() and len(plain) < 6
    is_word = any(plain in word for word in (*WORDS, *public))
    if len(plain) >= SHORTEST and not is_number and not is_word and HIDDEN not in plain:
        _known.update(_spellings(secret))


def remember_all(arguments: Iterable[str], environment: Mapping[str, str]) -> None:
    """Register the secrets of a command line and of variables like PGPASSWORD, WANDB_API_KEY, HF_TOKEN."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if "${" in value:
            continue  # `compose` registers the resolved value
        remember(value if key.replace(".", "").replace("_", "").lstrip("+~").isalnum() else argument)
    for name, value in environment.items():
        if VARIABLES.search(name) and len(value) >= ANYWHERE:
            remember_secret(value)


def _spans(text: str) -> Iterator[Span]:
    """Yield the spans of secrets, by their place alone."""
    yield from _url_spans(text)
    for match in NAMED.finditer(text):
        before = text[max(0, match.start() - 10) : match.start()]
        if not (match[0].lower().startswith("token") and SPECIAL_TOKEN.search(before)):
            yield match.span(1)
    for pattern, group in ((HEADER, 1), (LOOSE, 1), (ENCODED, 1), (SHAPED, 0)):
        for match in pattern.finditer(text):
            yield match.span(group)


def _url_spans(text: str) -> Iterator[Span]:
    position = text.find("://")
    while position >= 0:
        following = text.find("://", position + 3)
        run = RUN.match(text, position + 3, len(text) if following < 0 else following)
        assert run is not None  # it also matches nothing
        is_web = text[max(0, position - 5) : position].endswith(("http", "https"))
        span = _userinfo(run[0], is_web=is_web)
        if span is not None:
            yield position + 3 + span[0], position + 3 + span[1]
        position = following


def _of_url(url: str) -> Iterator[str]:
    """Yield the secrets of a text that is one URL; its password may contain spaces and quotes."""
    head, separator, rest = url.strip("'\"").partition("://")
    if not separator:
        return
    span = _userinfo(rest, is_web=head.endswith(("http", "https")))
    if span is not None:
        yield rest[span[0] : span[1]]
    for name, value in parse_qsl(rest.partition("?")[2]):
        if re.search(rf"(?i)(?:{NAMES})$", name):
            yield value


def _userinfo(run: str, *, is_web: bool) -> Span | None:
    """Return the span of the password in the text after `://`. SQLAlchemy allows an @ in a user name, and a /
    gets in by mistake; a password may contain both."""
    slash = run.find("/") if "/" in run else len(run)
    colon, first = run.find(":"), run.find("@")
    if run.startswith("/") or first < 0:
        return None
    if is_web and (colon < 0 or first < colon) and first < slash:
        has_password = 0 <= colon < slash and "@" in run[colon:slash]
        return (colon + 1, run.rfind("@", colon, slash)) if has_password else (0, first)
    at = run.find("@", colon + 1)
    is_port = is_web and re.match(r":\d{1,5}[/?#]", run[colon:])
    if colon < 0 or at < 0 or is_port:
        return None
    while (more := run.find("@", at + 1)) >= 0:
        between = run[at + 1 : more]
        in_path = "/" in between and (is_web or between.endswith("/") or not HOST.match(run, more + 1))
        if in_path or "?" in between or "#" in between:
            break
        at = more
    return colon + 1, at


def _public_words(text: str) -> list[str]:
    """Return the public parts of a URL: a password equal to one of them is not hidden elsewhere."""
    try:
        parts = urlsplit(text)
        words = (parts.scheme, parts.username, parts.hostname, parts.path)
        return [word for word in words if word and "@" not in word]  # a password's / begins no path
    except ValueError:
        return []


def _spellings(secret: str) -> set[str]:
    """Return the secret's spellings in URLs, JSON, HTML and Python."""
    plain = unquote(secret)
    percent = {secret, quote(plain, safe=""), quote(plain), quote_plus(plain), quote(plain, safe=" +")}
    percent |= {quote(text, safe="") for text in percent}
    lower = {re.sub(r"%[0-9A-F]{2}", lambda escape: escape[0].lower(), text) for text in percent}
    other = {
        plain,
        json.dumps(plain)[1:-1],
        html.escape(plain),
        repr(plain)[1:-1],
        plain.replace("'", "'\"'\"'"),
    }
    other.add(plain.replace("'", "\\'"))
    return {text for text in percent | lower | other if len(text) >= SHORTEST}


@lru_cache(maxsize=8)
def _pattern(known: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(_bounded(text) for text in sorted(known, key=lambda t: (-len(t), t))))


def _bounded(text: str) -> str:
    """Return a pattern; it matches a short secret only as a whole word, or after a percent escape."""
    if len(text) >= ANYWHERE:
        return re.escape(text)
    before = r"(?:(?<![A-Za-z0-9])|(?<=%[0-9A-Fa-f]{2}))" if text[0].isalnum() else ""
    after = r"(?![A-Za-z0-9])" if text[-1].isalnum() else ""
    return f"{before}{re.escape(text)}{after}"
