"""Registers the Fashion data sets with the OpenMMLab toolboxes that are installed.

A toolbox that is missing is passed over: the data sets of the others work without it.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__: list[str] = []

if find_spec("mmpretrain") is not None:
    from integration.fashion.item_dataset import FashionItemsDataset

    __all__ += ["FashionItemsDataset"]

if find_spec("mmdet") is not None and find_spec("mmyolo") is not None:
    from integration.fashion.scene_dataset import FashionScenesDataset

    __all__ += ["FashionScenesDataset"]

if find_spec("mmseg") is not None:
    from integration.fashion.segmentation_dataset import FashionSegmentationDataset

    __all__ += ["FashionSegmentationDataset"]
