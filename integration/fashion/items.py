"""Fashion-MNIST items: from the subset that ships with the repository, or from a full copy.

The 70,000 photographs form three splits that never share an item:

=====  =================================  ======
split  items of the original files        count
=====  =================================  ======
train  training file, 0 to 54,999         55,000
val    training file, 55,000 to 59,999     5,000
test   test file                          10,000
=====  =================================  ======

The subset holds some items of each split with their index in the original file.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from repapq_plugin.errors import ConfigError

CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
SPLITS = ("train", "val", "test")
SOURCES = ("auto", "full", "subset")
ITEM_SIZE = 28
NUM_TRAIN = 55_000
ROOT_VARIABLE = "REPAPQ_FASHION_MNIST"
SUBSET_FILE = Path(__file__).resolve().parent.parent / "assets" / "fashion_items.npz"

_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Items:
    """Items of one split.

    Attributes:
        split: ``'train'``, ``'val'`` or ``'test'``.
        source: ``'full'`` or ``'subset'``.
        images: uint8, shape (N, 28, 28), 0 is the background.
        labels: int64, shape (N,), index into :data:`CLASSES`.
        indices: int64, shape (N,), position in the original file (training file for train and val).
    """

    split: str
    source: str
    images: UInt8Array
    labels: Int64Array
    indices: Int64Array

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """SHA-256 over images, labels and indices, as hexadecimal digits."""
        sha = hashlib.sha256()
        sha.update(np.ascontiguousarray(self.images).tobytes())
        sha.update(self.labels.astype("<i8").tobytes())
        sha.update(self.indices.astype("<i8").tobytes())
        return sha.hexdigest()


def load_items(split: str, source: str = "auto", root: str | Path | None = None) -> Items:
    """Load the items of one split.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``.
        source: ``'full'``, ``'subset'``, or ``'auto'``: the full set where one is found, else the subset.
        root: Folder of the full set; see :func:`find_full`.

    Raises:
        ConfigError: On an unknown split or source, or where ``'full'`` is asked for and cannot be found.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
    if source not in SOURCES:
        raise ConfigError(f"source={source!r} is not known; choose one of {', '.join(SOURCES)}")
    if source == "subset":
        return _load_subset(split)
    folder = find_full(root)
    if folder is not None:
        return _load_full(split, folder)
    if source == "auto":
        return _load_subset(split)
    looked = ", ".join(str(path) for path in _candidates(root))
    raise ConfigError(
        f"source='full': no Fashion-MNIST in {looked}; install Debian's package dataset-fashion-mnist, or "
        f"set {ROOT_VARIABLE} to a folder that holds its four IDX files, or use source='subset'"
    )


def find_full(root: str | Path | None = None) -> Path | None:
    """Find a folder with the four IDX files (gzipped or not); None where there is none.

    Looks into ``root`` if given, else into the folder named by the environment variable
    ``REPAPQ_FASHION_MNIST`` if set, else into ``./data`` and Debian's folder. In each, torchvision's layouts
    ``FashionMNIST/raw`` and ``raw`` count too.
    """
    for folder in _candidates(root):
        if all(_idx_path(folder, stem) is not None for stems in _IDX_FILES.values() for stem in stems):
            return folder
    return None


def _candidates(root: str | Path | None) -> Iterator[Path]:
    named = root if root is not None else os.environ.get(ROOT_VARIABLE)
    bases = [Path(named).expanduser()] if named else [Path("data"), _DEBIAN_FOLDER]
    for base in bases:
        yield base
        yield base / "FashionMNIST" / "raw"
        yield base / "raw"


def _idx_path(folder: Path, stem: str) -> Path | None:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    return None


@lru_cache(maxsize=3)
def _load_full(split: str, folder: Path) -> Items:
    images_stem, labels_stem = _IDX_FILES["t10k" if split == "test" else "train"]
    images = _read_idx(folder, images_stem)
    labels = _read_idx(folder, labels_stem).astype(np.int64)
    if images.shape != (len(labels), ITEM_SIZE, ITEM_SIZE):
        raise ConfigError(
            f"{folder}: {images_stem} holds {images.shape} and {labels_stem} {labels.shape}, expected (N, 28, 28) "
            "and (N,); fetch Fashion-MNIST again"
        )
    part = {"train": slice(0, NUM_TRAIN), "val": slice(NUM_TRAIN, None), "test": slice(None)}[split]
    indices = np.arange(len(labels), dtype=np.int64)
    return Items(split, "full", images[part], labels[part], indices[part])


def _read_idx(folder: Path, stem: str) -> UInt8Array:
    path = _idx_path(folder, stem)
    if path is None:
        raise ConfigError(f"{folder} holds no {stem} or {stem}.gz; fetch Fashion-MNIST again")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    # IDX: two zero bytes, type code (8 = uint8), number of dimensions, then one big-endian int32 per dimension.
    rank = data[3] if len(data) > 4 else 0
    if data[:3] != b"\x00\x00\x08" or rank not in (1, 3):
        raise ConfigError(f"{path} is no IDX file of unsigned bytes; fetch Fashion-MNIST again")
    shape = tuple(int(n) for n in np.frombuffer(data, dtype=">i4", count=rank, offset=4))
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ConfigError(f"{path} holds {values.size} bytes, its header promises {shape}; fetch Fashion-MNIST again")
    return values.reshape(shape)


@lru_cache(maxsize=3)
def _load_subset(split: str) -> Items:
    if not SUBSET_FILE.is_file():
        raise ConfigError(f"source='subset': {SUBSET_FILE} does not exist; restore it from the repository")
    with np.load(SUBSET_FILE, allow_pickle=False) as archive:
        return Items(
            split,
            "subset",
            archive[f"{split}_images"],
            archive[f"{split}_labels"].astype(np.int64),
            archive[f"{split}_indices"].astype(np.int64),
        )
