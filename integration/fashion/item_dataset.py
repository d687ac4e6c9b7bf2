"""Fashion-MNIST for mmpretrain."""

from __future__ import annotations

from typing import Any

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from integration.fashion.items import CLASSES, load_items
from repapq_plugin.errors import ConfigError


@DATASETS.register_module(force=True)
class FashionItemsDataset(BaseDataset):  # type: ignore[misc]
    """Single items, held in memory; the pipeline needs no loading step.

    Every sample starts the pipeline as ``img`` (uint8, shape (28, 28), grey) and ``gt_label``.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; items of different splits never mix.
        source: ``'full'``, ``'subset'`` (the items that ship with the repository) or ``'auto'``.
        count: How many items, from the first on; all if left out.
        root: Folder of the full Fashion-MNIST.
        **kwargs: ``pipeline``, ``test_mode``, ``indices``, ... of mmpretrain's base class.
    """

    METAINFO = {"classes": CLASSES}

    def __init__(
        self,
        split: str,
        source: str = "auto",
        count: int | None = None,
        root: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.split = split
        self.source = source
        self.count = count
        self.root = root
        kwargs.setdefault("ann_file", "")
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict per item: image, label, sizes (height, width) and position in the original file."""
        items = load_items(self.split, self.source, self.root)
        if self.count is not None and not 1 <= self.count <= len(items):
            raise ConfigError(
                f"count={self.count} is not allowed; the {self.split} split ({items.source}) holds {len(items)} items"
            )
        return [
            {
                "img": items.images[n],
                "gt_label": int(items.labels[n]),
                "img_shape": items.images[n].shape,
                "ori_shape": items.images[n].shape,
                "sample_idx": int(items.indices[n]),
            }
            for n in range(len(items) if self.count is None else self.count)
        ]

    def extra_repr(self) -> list[str]:
        """What the printed form says beside mmpretrain's own lines."""
        return [f"Split: \t{self.split}", f"Source: \t{self.source}"]
