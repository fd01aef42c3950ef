"""Detects the encoding of a text file, in one pass over its bytes before any row is parsed.

UTF-8 and UTF-16 are certain and are read directly. Any other encoding is a guess: the message shows a line
decoded with it, and the user decides. The same pass refuses binary and truncated files and endless lines.
"""

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from charset_normalizer import from_bytes

from lora_search.errors import DataError

CHUNK = 2**20
LONGEST_LINE = 64 * 2**20  # bytes; a longer line is a file without line breaks
SAMPLE = 2**16
SHOWN = 60
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)
BROKEN_LINES = 0.2  # largest share of broken lines, among non-ASCII ones, in a file that counts as UTF-8
CODE_PAGES = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "cp932", "euc_jp", "gb18030", "big5",
    "euc_kr", "koi8_r", "mac_roman", "cp850", "cp437",
]  # fmt: skip
LATIN = ("cp1252", "cp1250", "mac_roman", "cp850", "cp1257", "cp1254", "cp437")
USUAL_LETTERS = set(
    "åäöæøéèêëàâáãçñüßíìîïóòôõúùûýÿœşğıąćęłńśźżěščřžůőűţșțăāēīūģķļņėįųÅÄÖÜÉØÆÓŁ€“”„‘’–—…«»§°·•©®™½"
)


@dataclass(frozen=True)
class DataFile:
    """A file of rows with the name to show, since a download is stored under another one."""

    path: Path
    name: str
    key: str  # the setting that named it
    suffix: str  # the end of its name that gives its kind, e.g. .jsonl.gz

    @property
    def kind(self) -> str:
        """Return the suffix without .gz."""
        return self.suffix.removesuffix(".gz")

    def error(self, rule: str) -> DataError:
        """Return an error about the file."""
        return DataError(f"{self.key}: {self.name} {rule}")


@dataclass(frozen=True)
class Checked:
    """The digest and the encoding of a file that is text throughout."""

    digest: str
    encoding: str


def open_bytes(file: DataFile) -> IO[bytes]:
    """Return the file's bytes, decompressed if it is gzipped."""
    return gzip.open(file.path) if file.suffix.endswith(".gz") else file.path.open("rb")  # type: ignore[return-value]


def unpacked_head(file: DataFile) -> bytes:
    """Return the first decompressed bytes of a gzipped file."""
    try:
        with open_bytes(file) as unpacked:
            return unpacked.read(64)
    except DAMAGE as error:
        raise _damaged(file, error) from None


def digest_of(path: Path) -> str:
    """Return the digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_text(file: DataFile, wanted: str, *, by_line: bool) -> Checked:
    """Read the file once; raise DataError if it is binary, truncated, or has an endless line."""
    digest, broken = hashlib.sha256(), ""
    decoder: codecs.IncrementalDecoder | None = None
    encoding, length = wanted, 0
    try:
        for chunk in _chunks(file):
            digest.update(chunk)
            if decoder is None:
                encoding = _unicode(chunk) if wanted == "auto" else wanted
                if b"\0" in chunk[:SAMPLE] and not encoding.startswith(
                    ("utf-16", "utf-32", "utf_16", "utf_32")
                ):
                    raise file.error("is binary, not text. Give a file of text rows.")
                decoder = codecs.getincrementaldecoder(encoding)()
            last = chunk.rfind(b"\n")
            length = len(chunk) - last - 1 if last >= 0 else length + len(chunk)
            if by_line and length > LONGEST_LINE:
                most = LONGEST_LINE // 2**20
                raise file.error(f"has a line of more than {most} MiB. Write one row per line.")
            if not broken:
                broken = _fault(decoder, chunk)
        broken = broken or (_fault(decoder, b"", final=True) if decoder else "")
    except DAMAGE as error:
        raise _damaged(file, error) from None
    if broken:
        _refuse(file, encoding, wanted)
    return Checked(digest.hexdigest(), encoding)


def _damaged(file: DataFile, error: BaseException) -> DataError:
    why = "ends in the middle" if isinstance(error, EOFError) else f"is broken ({error})"
    return file.error(f"{why}. Get the file again.")


def _chunks(file: DataFile) -> Iterator[bytes]:
    with open_bytes(file) as unpacked:
        while chunk := unpacked.read(CHUNK):
            yield chunk


def _fault(decoder: codecs.IncrementalDecoder, chunk: bytes, *, final: bool = False) -> str:
    try:
        decoder.decode(chunk, final)
    except UnicodeError as error:
        return str(error)
    return ""


def _unicode(start: bytes) -> str:
    """Return the Unicode encoding of a file's start, with or without a byte order mark."""
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
    for mark, name in marks.items():
        if start.startswith(mark):
            return name
    head = start[:64]
    blanks = [place % 2 for place, byte in enumerate(head) if byte == 0]
    if len(blanks) < len(head) // 4 or not blanks or len(set(blanks)) > 1:
        return "utf-8-sig"
    return "utf-16-le" if blanks[0] else "utf-16-be"


def _refuse(file: DataFile, encoding: str, wanted: str) -> None:
    """Raise DataError if the whole file has another encoding; UTF-8 with some broken lines passes."""
    if wanted != "auto" or encoding != "utf-8-sig":
        raise file.error(f"is not {encoding} throughout. Set data.encoding to its encoding.")
    sample, share = _odd_lines(file)
    if share <= BROKEN_LINES:
        return
    guess = _guess(sample)
    if guess is None:
        raise file.error("is not UTF-8. Set data.encoding to its encoding, or save it as UTF-8.")
    line = next(line for line in sample.splitlines() if not line.isascii()).decode(guess, "replace").strip()
    shown = line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
    raise file.error(
        f"is not UTF-8. It looks like {guess}, with which a line reads {shown!r}. "
        f"If that is right, set data.encoding={guess}; else set the right one, or save the file as UTF-8."
    )


def _odd_lines(file: DataFile) -> tuple[bytes, float]:
    """Return some lines that are not UTF-8, and their share of the lines that are not ASCII."""
    odd, broken, kept = 0, 0, bytearray()
    with open_bytes(file) as unpacked:
        while line := unpacked.readline(SAMPLE):
            if line.isascii():
                continue
            odd += 1
            try:
                line.decode()
            except UnicodeDecodeError:
                broken += 1
                kept += line.rstrip(b"\r\n") + b"\n" if len(kept) < SAMPLE else b""
    return bytes(kept), broken / max(odd, 1)


def _guess(sample: bytes) -> str | None:
    """Return the most likely code page: common letters decide between Latin ones, the library otherwise."""
    latin = max(LATIN, key=lambda name: _plausible(sample, name))
    found = [match.encoding for match in from_bytes(sample, cp_isolation=CODE_PAGES)]
    is_sparse = sum(byte > 127 for byte in sample) < 0.15 * len(sample)  # as in languages with Latin script
    if is_sparse and _plausible(sample, latin) > 0.9 or not found or found[0] in LATIN:
        return latin if _plausible(sample, latin) > 0.5 else next(iter(found), None)
    return found[0]


def _plausible(sample: bytes, encoding: str) -> float:
    """Return the share of common letters and signs among the characters that are not ASCII."""
    odd = [c for c in sample.decode(encoding, "replace") if not c.isascii()]
    return sum(c in USUAL_LETTERS for c in odd) / max(len(odd), 1)
