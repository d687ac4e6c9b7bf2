"""Make a shipped checkpoint and its description from a training run.

    python -m integration.train.export_checkpoint repvgg_fashion \
        --checkpoint WORK_DIR/epoch_8.pth --train-log WORK_DIR/RUN/vis_data/RUN.json \
        --test-metrics TEST_DIR/RUN/RUN.json --train-command "python ... train.py ..." --test-command "..."

writes ``integration/assets/repvgg_fashion.pth`` (``state_dict`` and ``meta`` alone, float32, loadable with
``weights_only=True``) and ``integration/assets/repvgg_fashion.json``. With ``--half-kernels`` the kernels are stored
in float16 to halve the file: a float32 model takes them by ``load_state_dict`` and runs in float32. Where the run
kept an exponential moving average, the toolbox's own hook has already put the averaged weights under ``state_dict``.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from integration.fashion.items import CLASSES

ASSETS = Path(__file__).resolve().parent.parent / "assets"
LOG_KEYS = (
    "epoch",
    "step",
    "lr",
    "loss",
    "loss_cls",
    "loss_bbox",
    "loss_mask",
    "decode.acc_seg",
    "accuracy/top1",
    "coco/bbox_mAP",
    "coco/bbox_mAP_50",
    "coco/segm_mAP",
    "coco/segm_mAP_50",
    "mIoU",
    "aAcc",
)
DISTRIBUTIONS = (
    "torch",
    "numpy",
    "onedl-mmengine",
    "onedl-mmcv",
    "onedl-mmdetection",
    "onedl-mmpretrain",
    "onedl-mmsegmentation",
    "visaion4mmyolo",
)


def plain_checkpoint(path: Path, half_kernels: bool = False) -> dict[str, Any]:
    """Weights (float32, integers as they are) and a plain ``meta`` of a training checkpoint.

    ``half_kernels`` rounds kernels (tensors of rank 2 and more) to float16; norms and biases stay float32.

    The file is read as a pickle: use it only on checkpoints of your own.
    """
    trained = torch.load(path, map_location="cpu", weights_only=False)
    weights = {}
    for key, value in trained["state_dict"].items():
        kernel = torch.float16 if half_kernels and value.dim() >= 2 else torch.float32
        weights[key] = value.to(kernel if value.is_floating_point() else value.dtype).clone().contiguous()
        if not torch.isfinite(weights[key]).all():
            raise SystemExit(f"{path}: {key} is not finite as {weights[key].dtype}; train again or keep float32")
    meta = trained.get("meta", {})
    return {
        "state_dict": weights,
        "meta": {
            # A segmentor has one class more, the background.
            "dataset_meta": {"classes": list(meta.get("dataset_meta", {}).get("classes", CLASSES))},
            "epoch": int(meta.get("epoch", 0)),
            "iter": int(meta.get("iter", 0)),
            "seed": meta.get("seed"),
            "half_kernels": half_kernels,
            "averaged": "ema_state_dict" in trained,
        },
    }


def read_log(path: Path, every: int) -> list[dict[str, float]]:
    """Validation entries and every ``every``-th training entry of mmengine's JSON-lines log, few digits."""
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    training = [entry for entry in entries if "loss" in entry]
    kept = {id(entry) for entry in training[every - 1 :: every]}
    return [
        {key: float(f"{entry[key]:.4g}") if key != "step" else entry[key] for key in LOG_KEYS if key in entry}
        for entry in entries
        if "loss" not in entry or id(entry) in kept
    ]


def versions() -> dict[str, str]:
    """Python and the installed distributions that a training uses."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Write the checkpoint and its description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="stem of the files to write, such as repvgg_fashion")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint that the training wrote")
    parser.add_argument("--train-log", type=Path, help="vis_data/*.json of the training")
    parser.add_argument("--test-metrics", type=Path, help="JSON file of metrics that the test tool wrote")
    parser.add_argument("--train-command", default="", help="the exact command of the training")
    parser.add_argument("--test-command", default="", help="the exact command of the test")
    parser.add_argument("--remark", default="", help="what a reader of the description must know beside it")
    parser.add_argument("--half-kernels", action="store_true", help="store kernels in float16")
    parser.add_argument("--every", type=int, default=4, help="keep one of so many training entries of the log")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write to")
    args = parser.parse_args()
    if args.every < 1:
        parser.error(f"--every {args.every}: give 1 or more")

    checkpoint = plain_checkpoint(args.checkpoint, args.half_kernels)
    target = args.out / f"{args.name}.pth"
    draft = target.with_suffix(".pth.part")
    torch.save(checkpoint, draft)
    draft.replace(target)

    meta = checkpoint["meta"]
    description = {
        "model": args.name,
        "config": f"mm_configs/fashion/{args.name}.py",
        "train_command": args.train_command,
        "test_command": args.test_command,
        "seed": meta["seed"],
        "epochs": meta["epoch"],
        "iterations": meta["iter"],
        "averaged_weights": meta["averaged"],
        "kernels": "float16" if args.half_kernels else "float32",
        "parameters": sum(value.numel() for key, value in checkpoint["state_dict"].items() if not _is_statistic(key)),
        "versions": versions(),
        "test": json.loads(args.test_metrics.read_text().splitlines()[-1]) if args.test_metrics else None,
        **({"remark": args.remark} if args.remark else {}),
        "log": read_log(args.train_log, args.every) if args.train_log else [],
    }
    text = json.dumps(description, indent=1)
    (args.out / f"{args.name}.json").write_text(text + "\n")


def _is_statistic(key: str) -> bool:
    return key.endswith(("running_mean", "running_var", "num_batches_tracked"))


if __name__ == "__main__":
    main()
