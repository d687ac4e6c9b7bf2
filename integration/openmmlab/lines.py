"""The least that mmengine's runner trains, with all that such a runner saves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from repapq_plugin.hosts.openmmlab import RepAPQRunner


@MODELS.register_module()
class LineModel(BaseModel):  # type: ignore[misc]
    """The least that mmengine trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs: Tensor, data_samples: object = None, mode: str = "tensor", **_: object) -> object:
        out = self.layer(torch.stack(list(inputs)) if isinstance(inputs, list) else inputs)
        return {"loss": out.square().mean()} if mode == "loss" else out


@DATASETS.register_module()
class LineData(BaseDataset):  # type: ignore[misc]
    """Two samples; what is known of the classes holds NumPy values, as data sets' palettes do."""

    METAINFO = {"classes": ("a", "b"), "palette": np.arange(6).reshape(2, 3), "scale": np.float32(0.5)}

    def load_data_list(self) -> list[dict[str, object]]:
        return [{"inputs": torch.ones(2) * index} for index in range(2)]


def training(folder: Path, scheduler: str, epochs: int = 1, resumed_from: Path | None = None) -> Runner:
    """A training by mmengine's own runner, or what ours makes of it, with all that such a runner saves."""
    runner = RepAPQRunner(
        LineModel(),
        str(folder),
        train_dataloader={
            "batch_size": 1,
            "num_workers": 0,
            "dataset": {"type": "LineData", "metainfo": {"more": ConfigDict(a=[1])}},
            "sampler": {"type": "DefaultSampler", "shuffle": True},
        },
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}},
        param_scheduler=[
            {"type": scheduler, "by_epoch": False, **SCHEDULERS[scheduler]},
            {"type": "LinearLR", "start_factor": 0.5, "by_epoch": False, "end": 2},
        ],
        custom_hooks=[{"type": "EMAHook"}],
        load_from=resumed_from and str(resumed_from),
        resume=resumed_from is not None,
        experiment_name=folder.name,
        log_level="WARNING",
    )
    runner.train()
    return runner


SCHEDULERS: dict[str, dict[str, object]] = {
    "OneCycleLR": {"eta_max": 0.2, "total_steps": 9},
    "CosineRestartLR": {"periods": [2, 4], "restart_weights": [1, 0.5], "eta_min": 0.01},
    "MultiStepLR": {"milestones": [1]},
}
