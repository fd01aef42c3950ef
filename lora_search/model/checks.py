"""Checks that the files of a base are complete and of the right kind, by their headers.

A ModelError names the file, within milliseconds, before gigabytes are read or hashed.
"""

import json
import math
import mmap
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lora_search.errors import ModelError

DAMAGED = "The file is damaged or truncated: download it again."
INDEXES = ("model.safetensors", "pytorch_model.bin")  # in transformers' order of search
LARGEST_JSON = 64 * 2**20
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
BEGINNINGS = {  # first bytes of a file -> kind
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull gets it)",
    b"GGUF": "a GGUF file (name it .gguf, and give the file itself)",
    b"PK\x03\x04": "a zip archive, as PyTorch writes",
    b"\x89HDF": "a HDF5 file, as TensorFlow writes",
    b"<": "a web page",
}
KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
STRING, ARRAY = 8, 9
MOST_LAYERS = 1000  # Llama 3.1 405B has 126
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF type -> bytes


def check_regular(path: Path) -> None:
    """Raise ModelError unless it is a regular file."""
    mode = path.stat().st_mode
    kind = next((name for is_kind, name in KINDS if is_kind(mode)), None)
    if kind is not None:
        raise ModelError(f"model.path: {path} is {kind}. Give a model folder, a .gguf file or a hub id.")


def check_folder(folder: Path) -> None:
    """Raise ModelError if a file of a model folder is missing, truncated or of the wrong kind."""
    for name in ("config.json", "adapter_config.json", "tokenizer.json"):
        path = folder / name
        if path.exists():
            check_regular(path)
            if path.stat().st_size > LARGEST_JSON:
                size = path.stat().st_size
                raise ModelError(f"model.path: {path} has {size:,} bytes, too many for {name}. {DAMAGED}")
    if (folder / "config.json").is_file():
        _check_config(folder / "config.json")
    for path in _weight_files(folder):
        check_regular(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        else:
            _check_pickle(path)


def _check_config(path: Path) -> None:
    """Raise ModelError for what is no configuration, or would take minutes to build without its weights."""
    with suppress(ValueError):  # of no JSON; transformers says it
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ModelError(f"model.path: {path} is no JSON object. {DAMAGED}")
        for part in (config, config.get("text_config")):
            layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise ModelError(
                    f"model.path: {path} asks for {layers:,} layers, more than {MOST_LAYERS:,}. {DAMAGED}"
                )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read; ModelError if one of an index is missing."""
    for name in INDEXES:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.exists():
            return [whole]
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"model.path: {index} names no files of weights. {DAMAGED}") from None
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"model.path: {index.parent} lacks {len(missing)} of the {len(names)} files that "
            f"{index.name} names: {shown}. Download them as well."
        )
    return [index.parent / name for name in names]


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or start[8:9] != b"{" or length > LARGEST_HEADER:
            raise _not(path, start, "no safetensors file")
        file.seek(8)
        header = file.read(length)
    try:
        ends = [t["data_offsets"][1] for name, t in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _not(path, start, "no safetensors file") from None
    _check_size(path, size, 8 + length + max(ends, default=0))


def _check_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(32)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise _not(path, start, "no PyTorch file")


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise ModelError(
            f"model.path: {path} has {size:,} bytes, but its header says {expected:,}. {DAMAGED}"
        )


def _not(path: Path, start: bytes, what: str) -> ModelError:
    """Return the error for a file whose content does not match its name."""
    kinds = [kind for beginning, kind in BEGINNINGS.items() if start.lstrip().startswith(beginning)]
    if kinds:
        return ModelError(f"model.path: {path} is {kinds[0]}. Download the file itself.")
    return ModelError(f"model.path: {path} is {what if start else 'empty'}. {DAMAGED}")


def check_gguf(path: Path) -> None:
    """Raise ModelError unless it is a complete GGUF file with a complete model."""
    if not path.exists():
        raise ModelError(f"model.path: {path} does not exist. Give a .gguf file, a model folder or a hub id.")
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(32)
        if not start.startswith(b"GGUF"):
            raise _not(path, start, "no GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            try:
                facts, expected = _read_gguf(view)
            except (struct.error, KeyError, ValueError, OverflowError, RecursionError):
                raise ModelError(f"model.path: {path} has a header that cannot be read. {DAMAGED}") from None
    kind, parts = facts.get(b"general.type", "model"), facts.get(b"split.count", 1)
    if kind != "model":
        raise ModelError(f"model.path: {path} is not a model ({kind}). Give the .gguf file of a whole model.")
    if parts not in (0, 1):
        remedy = "Join them: llama-gguf-split --merge"
        raise ModelError(f"model.path: {path} is one of {parts} parts of a model. {remedy}.")
    if path.stat().st_size < expected:  # some writers pad the end
        _check_size(path, path.stat().st_size, expected)


def _read_gguf(view: mmap.mmap) -> tuple[dict[bytes, str | int], int]:
    """Return the values of the relevant keys, and the end of the last tensor."""
    num_tensors, num_keys = struct.unpack_from("<QQ", view, 8)
    place, facts = 24, dict[bytes, str | int]()
    for _ in range(num_keys):
        key, place = _string(view, place)
        (kind,) = struct.unpack_from("<I", view, place)
        if key == b"general.type":
            facts[key] = _string(view, place + 4)[0].decode(errors="replace")
        elif key in (b"general.alignment", b"split.count"):
            facts[key] = int.from_bytes(view[place + 4 : place + 4 + SCALARS[kind]], "little")
        place = _after(view, place + 4, kind)
    ends = [0]
    for _ in range(num_tensors):
        end, place = _tensor(view, place)
        ends.append(end)
    alignment = int(facts.get(b"general.alignment", 32)) or 32
    return facts, math.ceil(place / alignment) * alignment + max(ends)


def _string(view: mmap.mmap, place: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", view, place)
    end = place + 8 + length
    if end > len(view):
        raise ValueError(length)
    return view[place + 8 : end], end


def _after(view: mmap.mmap, place: int, kind: int) -> int:
    """Return the end of a value of this kind."""
    if kind == STRING:
        (length,) = struct.unpack_from("<Q", view, place)
        return place + 8 + int(length)
    if kind != ARRAY:
        return place + SCALARS[kind]
    item, count = struct.unpack_from("<IQ", view, place)
    place += 12
    if item in SCALARS:
        return place + int(count) * SCALARS[item]
    for _ in range(count):
        place = _after(view, place, item)
    return place


def _tensor(view: mmap.mmap, place: int) -> tuple[int, int]:
    """Return the end of a tensor's data, relative to the start of all data, and the end of its entry."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # slow to import, used only here

    _, place = _string(view, place)
    (num_dims,) = struct.unpack_from("<I", view, place)
    *shape, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", view, place + 4)
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return offset + math.prod(shape) // block * num_bytes, place + 16 + 8 * num_dims


def check_unexpected(path: str, unexpected: Iterable[str]) -> None:
    """Raise ModelError, with names, if a checkpoint has weights that are not part of its model."""
    names = sorted(unexpected)
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ModelError(
            f"model.path: {path} has {len(names)} weights that its config.json does not: {shown}. "
            "Give weights and configuration of the same model."
        )
