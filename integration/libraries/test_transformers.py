"""Networks of transformers, from small configurations."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import (
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.models.d_fine.modeling_d_fine import DFineRepVggBlock
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d, RTDetrRepVggBlock
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import RTDetrV2RepVggBlock

from integration.libraries.contract import LearningContract, LibraryContract
from integration.libraries.networks import NOT_CALLED, Network

DETECTOR = dict(
    d_model=32,
    encoder_hidden_dim=32,
    encoder_in_channels=[32, 48, 64],
    decoder_in_channels=[32, 32, 32],
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_queries=84,  # every position of the three maps
    num_denoising=0,
    num_labels=4,
)
RESNET = RTDetrResNetConfig(
    embedding_size=16,
    hidden_sizes=[16, 32, 48, 64],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)
HGNET = HGNetV2Config(
    stem_channels=[3, 8, 16],
    stage_in_channels=[16, 16, 32, 48],
    stage_mid_channels=[8, 8, 16, 16],
    stage_out_channels=[16, 32, 48, 64],
    stage_num_blocks=[1, 1, 1, 1],
    stage_numb_of_layers=[2, 2, 2, 2],
    hidden_sizes=[16, 32, 48, 64],
    use_learnable_affine_block=True,
    out_features=["stage2", "stage3", "stage4"],
)


def boxes(network: nn.Module, images: Tensor) -> object:
    found = network(pixel_values=images)
    return found.logits, found.pred_boxes


def logits(network: nn.Module, images: Tensor) -> object:
    return network(pixel_values=images).logits


def rt_detr() -> nn.Module:
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=RESNET, **DETECTOR))


def rt_detr_v2() -> nn.Module:
    config = RTDetrV2Config(backbone_config=RESNET, freeze_backbone_batch_norms=False, **DETECTOR)
    return RTDetrV2ForObjectDetection(config)


def d_fine() -> nn.Module:
    return DFineForObjectDetection(DFineConfig(backbone_config=HGNET, freeze_backbone_batch_norms=False, **DETECTOR))


def mobilenet_v2() -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=4))


# The decoder calls heads of its own, which share their weights with these.
HEADS = {"class_embed.*": NOT_CALLED, "bbox_embed.*": NOT_CALLED}

MOBILENET_V2 = Network(mobilenet_v2, logits)


class TestTransformers(LibraryContract):
    networks = {
        "rt_detr": Network(
            rt_detr, boxes, blocks=(RTDetrRepVggBlock,), norms=(RTDetrFrozenBatchNorm2d,), unordered=True
        ),
        "rt_detr_v2": Network(rt_detr_v2, boxes, blocks=(RTDetrV2RepVggBlock,), unordered=True, stays_float=HEADS),
        "d_fine": Network(
            d_fine,
            boxes,
            blocks=(DFineRepVggBlock,),
            unordered=True,
            stays_float={
                **HEADS,
                # At inference the last layer of the decoder answers.
                "model.decoder.lqe_layers.0.*": NOT_CALLED,
                "model.decoder.class_embed.0": NOT_CALLED,
            },
        ),
        "mobilenet_v2": MOBILENET_V2,
    }


class TestLearnedTransformers(LearningContract):
    networks = {"mobilenet_v2": MOBILENET_V2}
