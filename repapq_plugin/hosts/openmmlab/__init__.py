"""RepAPQ in mmdet, mmyolo, mmpretrain and mmseg: importing this package registers everything by name.

All names go into mmengine's root registries, where every toolbox's scope finds them without a
prefix. A config opts in with::

    custom_imports = dict(imports=['repapq_plugin.hosts.openmmlab'], allow_failed_imports=False)
    test_cfg = dict(type='RepAPQTestLoop', quantizer=dict(preset='w6a6'))

or, where nothing in the config may be touched, by naming a runner, which mmengine imports by itself::

    runner_type = 'repapq_plugin.hosts.openmmlab.RepAPQRunner'
    repapq = dict(quantizer=dict(preset='w6a6'))
"""

from repapq_plugin.errors import HostError

try:
    import mmengine as _mmengine  # noqa: F401
except ImportError as error:
    raise HostError(
        "The OpenMMLab host needs mmengine and one of its toolboxes: pip install 'repapq-plugin[openmmlab]'"
    ) from error

from repapq_plugin.hosts.openmmlab.hooks import QPRFusionHook
from repapq_plugin.hosts.openmmlab.loops import RepAPQTestLoop
from repapq_plugin.hosts.openmmlab.network import TensorPath, serve_with
from repapq_plugin.hosts.openmmlab.registration import register
from repapq_plugin.hosts.openmmlab.runner import RepAPQRunner

register()

__all__ = ["QPRFusionHook", "RepAPQRunner", "RepAPQTestLoop", "TensorPath", "register", "serve_with"]
