"""Hub data sets from the library's cache, without a network."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import huggingface_hub
import pytest

from lora_search.errors import DataError
from lora_search.reading.hub import fetch
from lora_search.reading.load import load_rows
from lora_search.settings.schema import DataConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a data set of two splits into an empty cache, as a download leaves it; no network from then on."""
    rows = {"train": [("Why?", "So."), ("When?", "Now.")], "test": [("Who?", "You.")]}
    source = tmp_path / "source"
    source.mkdir()
    for name, pairs in rows.items():
        datasets.Dataset.from_list([{"question": q, "answer": a} for q, a in pairs]).to_parquet(
            source / f"{name}.parquet"
        )
    files = {name: str(source / f"{name}.parquet") for name in rows}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    builder = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    builder.dataset_name, builder.info.dataset_name = "faq", "faq"
    builder.info.config_name = "default"
    folder = tmp_path / "cache" / "org___faq" / "default" / "0.0.0" / COMMIT
    builder.download_and_prepare(str(folder))


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_cached_data_set_is_read_with_its_splits_and_its_commit(revision: str | None) -> None:
    loaded = load_rows(DataConfig(path="org/faq", revision=revision))

    assert [(row.question, row.split) for row in loaded.rows] == [
        ("Why?", "train"), ("When?", "train"), ("Who?", "test"),
    ]  # fmt: skip
    assert loaded.revisions == {"org/faq": COMMIT}
    assert loaded.notes[0] == f"org/faq: read at commit {COMMIT}"


@pytest.mark.usefixtures("cached")
@pytest.mark.wrong_input
@pytest.mark.parametrize("data", [{"path": "org/none"}, {"path": "org/faq", "revision": "f" * 40}])
def test_what_is_not_in_the_cache_is_one_message(data: dict[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"data.path: org/\w+ is neither a file or folder here.*not in the cache"
    ):
        load_rows(DataConfig(**data))  # type: ignore[arg-type]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


def test_a_file_behind_a_url_is_downloaded_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faq.jsonl").write_text('{"question": "How tall?", "answer": "Ten metres."}\n')
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache"))
    handler = partial(QuietHandler, directory=str(tmp_path))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            found = fetch(f"http://127.0.0.1:{server.server_port}/faq.jsonl?token=s3cret", "data.path")
            with pytest.raises(DataError, match=r"data.path: http://.*/none.jsonl cannot be downloaded: "):
                fetch(f"http://127.0.0.1:{server.server_port}/none.jsonl", "data.path")
        finally:
            server.shutdown()
            thread.join()

    assert "Ten metres." in found.read_text()
    kept = [path.read_text() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) >= 2  # the rows, and where they came from
    assert not any("s3cret" in text for text in kept)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    "url",
    [
        "http://bob:s3cret@127.0.0.1:1/x.jsonl",
        "gs://bucket/x.jsonl",
        "s3://bucket/x.jsonl",
        "abc://h/x.jsonl",
    ],
)
def test_a_url_that_cannot_be_read_is_one_message_without_its_password(url: str) -> None:
    with pytest.raises(DataError, match=r"data.path: \w+://.* cannot be downloaded: ") as refused:
        fetch(url, "data.path")

    assert "s3cret" not in str(refused.value)
