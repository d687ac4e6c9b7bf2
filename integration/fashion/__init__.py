"""Fashion-MNIST as single items (classification) and as scenes (detection, segmentation).

Importing the package registers its data sets with whichever OpenMMLab toolboxes are installed, so that one
line in a config, ``custom_imports = dict(imports=['integration.fashion'])``, makes them available by name.
"""

from integration.fashion import datasets
from integration.fashion.items import CLASSES, Items, load_items
from integration.fashion.scenes import Scene, make_scene, write_coco

__all__ = ["CLASSES", "Items", "Scene", "datasets", "load_items", "make_scene", "write_coco"]
