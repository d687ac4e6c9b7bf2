"""Training with MimicNorm in the toolboxes: ``norm_cfg=dict(type='MimicNorm')`` and this hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.hooks import model_of
from repapq_plugin.mimicnorm import WeightMean, finish
from repapq_plugin.mimicnorm.convert import replace_batch_norms
from repapq_plugin.mimicnorm.initialise import initialise_weights
from repapq_plugin.mimicnorm.recipe import RecipeLike, find_recipe
from repapq_plugin.mimicnorm.structure import layers_with_norms

LAST_LAYERS = ("head.fc", "decode_head.conv_seg")
"""Where the last layer is in mmpretrain's and mmsegmentation's models."""


class MimicNormHook(Hook):  # type: ignore[misc]
    """Gives a model built with MimicNorm its branch scalars and its last norm, and subtracts filter means as it learns.

    A classifier's last norm follows its last linear layer, a segmentor's its last convolution. A detector has no
    single last layer: its prediction layers start from biases that say how rare objects are, and boxes need their
    scale, so nothing may normalise behind them. Name the layers whose outputs the prediction layers read
    (``last=['neck.out_convs.0.conv', ...]``): there the last norms bound what the weights before them can grow to.

    It has to know the model before an averaged copy is made, so it goes first, and its scalars join the first
    parameter group of the optimizer. In distributed training it wraps the model anew, so that scalars are synchronized
    as well, and all processes start from the weights of the first.

    Args:
        last: Module paths of the layers that a last norm follows; default: the one of `LAST_LAYERS` that is there.
        initialise: Draw new weights for the layers in front of norms when a training starts afresh; frozen layers
            and parts with an ``init_cfg`` of type ``Pretrained`` keep theirs.
        example_shape: Channels, height and width of a random image that shows how the network is put together.
        convert: Replace the batch norms that are left, too: no ``norm_cfg`` is needed then, and modules are reached
            that make their norms without asking it (mmyolo's RepVGG blocks).
        recipe: ``"default"``, ``"authors"``, or the choices that differ: ``dict(start="he")``, see `Recipe`. Weight
            decay and momentum are left to the config's optimizer.

    Raises:
        ConfigError: There is no such recipe.
    """

    priority = "VERY_HIGH"

    def __init__(
        self,
        last: str | Sequence[str] | None = None,
        initialise: bool = True,
        example_shape: Sequence[int] = (3, 64, 64),
        convert: bool = False,
        recipe: RecipeLike = "default",
    ) -> None:
        self.recipe = find_recipe(recipe)
        self.last, self.initialise, self.example_shape, self.convert = last, initialise, tuple(example_shape), convert
        self._weight_mean: WeightMean | None = None
        self._loaded = False

    def before_run(self, runner: Runner) -> None:
        """Finish the model, once.

        Raises:
            HostError: No last layer is where `LAST_LAYERS` says, and none is named.
            ConfigError: See `finish`.
        """
        if self._weight_mean is not None:
            return
        model = model_of(runner)
        model.train(model.training)  # toolboxes freeze stages then
        known = set(model.parameters())
        device = next(model.parameters()).device
        example = torch.randn(2, *self.example_shape, device=device, generator=torch.Generator(device).manual_seed(0))
        last = self._last_of(model)
        if self.convert:
            replace_batch_norms(model, example, forward_fn=run_images)
        done = finish(model, example, forward_fn=run_images, last=last, initialise=False, recipe=self.recipe)
        now = set(model.parameters())
        optimizer = getattr(getattr(runner, "optim_wrapper", None), "optimizer", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter in now]
            added = [parameter for parameter in model.parameters() if parameter not in known]
            optimizer.param_groups[0]["params"].extend(added)
        if is_model_wrapper(runner.model):
            # A wrapper synchronizes what it saw when it was made, and the scalars are newer.
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)
        self._example = example
        self._weight_mean = WeightMean(model, self.recipe)
        runner.logger.info(
            f"MimicNorm: {len(done.residual)} branches end in a scalar, a last norm follows {', '.join(done.last)}, "
            f"{len(self._weight_mean.layers)} layers keep filter means of zero."
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, object]) -> None:
        """Note that there are weights to go on from."""
        self._loaded = True

    def before_train(self, runner: Runner) -> None:
        """Draw weights if nothing was loaded, and subtract the means."""
        if self.initialise and not self._loaded:
            model = model_of(runner)
            pretrained = {part for module in model.modules() if _pretrained(module) for part in module.modules()}
            # Layers without a norm are a head's last ones, whose weights and biases the toolbox chose.
            layers = [
                layer
                for layer in layers_with_norms(model, lambda: run_images(model, self._example))
                if layer.weight.requires_grad and layer not in pretrained
            ]
            initialise_weights(model, layers, run_images, self._example, self.recipe)
            for tensor in model.state_dict().values():
                broadcast(tensor)  # every process drew its own
        self._apply()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None
    ) -> None:
        """Subtract the means again."""
        self._apply()

    def _apply(self) -> None:
        if self._weight_mean is not None:
            self._weight_mean.apply()

    def _last_of(self, model: nn.Module) -> str | Sequence[str]:
        if self.last is not None:
            return self.last
        modules = dict(model.named_modules())
        found = [name for name in LAST_LAYERS if name in modules]
        if not found:
            raise HostError(
                f"{type(model).__name__} has none of {', '.join(LAST_LAYERS)}: say behind which layers the last norms "
                "of MimicNorm stand, dict(type='MimicNormHook', last=['module.path', ...])."
            )
        return found[0]


def _pretrained(module: nn.Module) -> bool:
    chosen = getattr(module, "init_cfg", None) or []
    return any(one.get("type") == "Pretrained" for one in ([chosen] if isinstance(chosen, dict) else chosen))


def run_images(model: nn.Module, images: torch.Tensor) -> object:
    """Run preprocessed images, ``(N, C, H, W)``, up to the raw outputs of a toolbox model."""
    if not hasattr(model, "roi_head"):
        return model(images, mode="tensor")
    # The second stage wants to know the size of the images that the first one's boxes lie in.
    from mmdet.structures import DetDataSample

    size = tuple(images.shape[-2:])
    known = {"img_shape": size, "ori_shape": size, "pad_shape": size, "scale_factor": (1.0, 1.0)}
    return model(images, [DetDataSample(metainfo=known) for _ in images], mode="tensor")
