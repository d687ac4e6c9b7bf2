"""Writing an `Origin` into files of every kind that is exported or saved, and reading it from them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repapq_plugin.core.files import atomically, unwritable
from repapq_plugin.core.origin import KEY, Origin
from repapq_plugin.errors import ExportError, ResultError

if TYPE_CHECKING:
    import onnx

ENTRY = f"{KEY}_origin.json"
"""What a file of `torch.save`, which is an archive, keeps its origin under, in the one folder that it has."""


def read_origin(path: Path) -> Origin | None:
    """Return how a file was made; ``None`` if it does not say.

    Args:
        path: ``.onnx``, ``.xml``, ``.safetensors``, or a ``.pth`` that NNCF's host saved.

    Raises:
        ResultError: The file is missing or damaged, or of a kind that is not known.
    """
    if path.suffix not in READERS:
        raise ResultError(f"{path.name} is not a file that says how it was made; known are {', '.join(READERS)}.")
    if not path.is_file():
        raise ResultError(f"There is no file {path}.")
    try:
        text = READERS[path.suffix](path)
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise ResultError(f"{path} cannot be read: {error}.") from error
    return None if text is None else Origin.from_text(text, path.name)


def write_origin(path: Path, origin: Origin) -> None:
    """Put how a file was made into the file; an earlier note of the kind is replaced.

    Args:
        path: A file of a kind that `read_origin` knows; others are left alone.
        origin: How it was made.

    Raises:
        ExportError: The file cannot be written.
    """
    write = WRITERS.get(path.suffix)
    if write is None:
        return
    try:
        with atomically(path) as partial:
            write(path, partial, origin.to_text())
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def set_properties(model: onnx.ModelProto, text: str) -> None:
    """Put an origin's text into the properties of an ONNX model, in place; other properties stay."""
    kept = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != KEY]
    del model.metadata_props[:]
    for key, value in (*kept, (KEY, text)):
        model.metadata_props.add(key=key, value=value)


def _from_onnx(path: Path) -> str | None:
    for entry in _load(path).metadata_props:
        if entry.key == KEY:
            return str(entry.value)
    return None


def _into_onnx(path: Path, partial: Path, text: str) -> None:
    model = _load(path)
    set_properties(model, text)
    partial.write_bytes(model.SerializeToString())


def _load(path: Path) -> onnx.ModelProto:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ExportError("ONNX files need the onnx package: pip install 'repapq-plugin[export]'") from error
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _from_ir(path: Path) -> str | None:
    found = ElementTree.parse(path).getroot().find(f"./rt_info/{KEY}")
    return None if found is None else found.get("value")


def _into_ir(path: Path, partial: Path, text: str) -> None:
    tree = ElementTree.parse(path)
    root = tree.getroot()
    info = root.find("./rt_info")
    if info is None:
        info = ElementTree.SubElement(root, "rt_info")
    found = info.find(KEY)
    if found is None:
        found = ElementTree.SubElement(info, KEY)
    found.set("value", text)
    tree.write(partial, encoding="utf-8", xml_declaration=True)


def _from_safetensors(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        header: Mapping[str, str] = file.metadata() or {}
    return header.get(KEY)


def _into_safetensors(path: Path, partial: Path, text: str) -> None:
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, partial, metadata={**header, KEY: text})


def _from_archive(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        entry = _entry(archive)
        return archive.read(entry).decode() if entry in archive.namelist() else None


def _into_archive(path: Path, partial: Path, text: str) -> None:
    shutil.copyfile(path, partial)
    with zipfile.ZipFile(partial, "a") as archive:
        entry = _entry(archive)
        if entry in archive.namelist():
            raise OSError("it says already how it was made")
        archive.writestr(entry, text)


def _entry(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    return f"{names[0].partition('/')[0]}/{ENTRY}" if names else ENTRY


READERS: Mapping[str, Callable[[Path], str | None]] = {
    ".onnx": _from_onnx,
    ".xml": _from_ir,
    ".safetensors": _from_safetensors,
    ".pth": _from_archive,
}
"""What reads an origin, by the suffix of the file."""

WRITERS: Mapping[str, Callable[[Path, Path, str], None]] = {
    ".onnx": _into_onnx,
    ".xml": _into_ir,
    ".safetensors": _into_safetensors,
    ".pth": _into_archive,
}
"""What writes a copy of a file with an origin in it, by the suffix."""
