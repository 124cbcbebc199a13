"""A zoo of small third-party models with convolutions, freshly initialised, for tests that want real code.

Every entry is about the smallest configuration that still has the structure of its family: 1-D, 2-D and 3-D, grouped,
depthwise, dilated and transposed convolutions, weight norm, subclasses of the convolutions with a forward of their own,
from speech to segmentation. Nothing is downloaded. The libraries are imported only when a model is built, so this file
imports without them; skip an entry whose `library` is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class ZooModel:
    """One model: what it is, how to build it and what to call it with."""

    name: str  # e.g. "HF Wav2Vec2"
    library: str  # the import name, e.g. "transformers"
    task: str  # "speech", "segmentation", ...
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]  # positional arguments as a tuple, or keyword arguments as a dict


def _entry(library: str, module: str, name: str, task: str, make: Callable[[Any], nn.Module], inputs: Any) -> ZooModel:
    """`make` gets the imported module; `inputs` is a shape, a dict of shapes, or a function that returns the inputs."""

    def draw() -> Inputs:
        if isinstance(inputs, tuple):
            return (torch.randn(inputs),)
        if isinstance(inputs, dict):
            return {key: torch.randn(shape) for key, shape in inputs.items()}
        return inputs()

    return ZooModel(name, library, task, lambda: _settled(make(import_module(module)), draw), draw)


def _settled(model: nn.Module, draw: Callable[[], Inputs]) -> nn.Module:
    """The model with batch norms that have seen some data, as those of a trained model have.

    With the statistics they start with the signal dies out, or grows, over the layers, and a comparison of outputs says
    nothing about the convolutions.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms:
        model.eval()
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train().momentum = None
        draws = [draw() for _ in range(8)]
        with torch.no_grad():
            if isinstance(draws[0], dict):
                model(**{key: torch.cat([one[key] for one in draws]) for key in draws[0]})
            else:
                model(*map(torch.cat, zip(*draws, strict=True)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.train()


def _cv(name: str, task: str, model: str, inputs: Any, **kwargs: Any) -> ZooModel:
    """A model of pytorchcv, by the name it has there."""

    def make(provider: Any) -> nn.Module:
        return provider.get_model(model, **kwargs)

    return _entry("pytorchcv", "pytorchcv.model_provider", f"pytorchcv {name}", task, make, inputs)


def _cv_own(name: str, task: str, file: str, make: Callable[[Any], nn.Module], inputs: Any) -> ZooModel:
    """A model of pytorchcv, narrower than those that have a name there, from the file that has its class."""
    return _entry("pytorchcv", f"pytorchcv.models.{file}", f"pytorchcv {name}", task, make, inputs)


def _monai(name: str, task: str, make: Callable[[Any], nn.Module], inputs: Any) -> ZooModel:
    return _entry("monai", "monai.networks.nets", f"monai {name}", task, make, inputs)


def _hf(name: str, task: str, make: Callable[[Any], nn.Module], inputs: Any) -> ZooModel:
    return _entry("transformers", "transformers", f"HF {name}", task, make, inputs)


def _diffusers(name: str, task: str, make: Callable[[Any], nn.Module], inputs: Any) -> ZooModel:
    return _entry("diffusers", "diffusers", f"diffusers {name}", task, make, inputs)


def _sized(size: int) -> dict[str, Any]:
    return {"in_size": (size, size)}


def _jasper(models: Any) -> nn.Module:
    return models.Jasper(
        channels=[32, 32, 48, 64, 64, 80],
        kernel_sizes=[11, 11, 13, 17, 29, 1],
        bn_eps=1e-3,
        dropout_rates=[0.2] * 6,
        repeat=3,
        use_dw=False,
        use_dr=False,
        from_audio=False,
    )


def _unet(models: Any) -> nn.Module:
    return models.UNet(channels=[[16, 32, 64, 64], [64, 32, 16, 8]], init_block_channels=8, in_size=(64, 64))


def _features(file: str, net: str, **kwargs: Any) -> nn.Sequential:
    """The backbone of the next four: a narrow ResNet, without its pooling."""
    make = getattr(import_module(f"pytorchcv.models.{file}"), net)
    features = make(channels=[[16] * 2, [32] * 2, [64] * 2, [128] * 2], init_block_channels=16, **kwargs).features
    del features[-1]
    return features


def _plain_features() -> nn.Sequential:
    return _features("resnet", "ResNet", bottleneck=False, conv1_stride=True)


def _bisenet(models: Any) -> nn.Module:
    def backbone() -> tuple[nn.Module, list[int]]:
        features = import_module("pytorchcv.models.common").MultiOutputSequential(return_last=False)
        for i, stage in enumerate(_plain_features()):
            stage.do_output = i >= 2
            features.add_module(f"stage{i}", stage)
        return features, [32, 64, 128]

    return models.BiSeNet(backbone, in_size=(64, 64))


def _centernet(models: Any) -> nn.Module:
    return models.CenterNet(_plain_features(), 128, channels=[64, 32, 16], in_size=(64, 64), return_heatmap=True)


def _simplepose(models: Any) -> nn.Module:
    return models.SimplePose(_plain_features(), 128, channels=[64] * 3, in_size=(64, 64), return_heatmap=True)


def _deeplabv3(models: Any) -> nn.Module:
    backbone = _features("resnetd", "ResNetD", bottleneck=True, conv1_stride=True, ordinary_init=False, bends=(3,))
    return models.DeepLabv3(backbone, 128, aux=True, in_size=(64, 64))


_IMAGENET = (1, 3, 224, 224)  # the classifiers of pytorchcv end in a fixed 7x7 pooling

_PYTORCHCV = (
    _cv("resnet", "classification", "resnet20_cifar10", (2, 3, 32, 32)),
    _cv("resnext", "classification", "resnext20_16x4d_cifar10", (1, 3, 32, 32)),
    _cv("seresnet", "classification", "seresnet20_cifar10", (2, 3, 32, 32)),
    _cv("densenet", "classification", "densenet40_k12_cifar10", (1, 3, 32, 32)),
    _cv("mobilenetv3", "classification", "mobilenetv3_small_w7d20", _IMAGENET),
    _cv("shufflenetv2", "classification", "shufflenetv2_wd2", _IMAGENET),
    _cv("squeezenet", "classification", "squeezenet_v1_1", _IMAGENET),
    _cv("ghostnet", "classification", "ghostnet", _IMAGENET),
    _cv("hrnet", "classification", "hrnet_w18_small_v1", _IMAGENET),
    _cv("dla", "classification", "dla46c", _IMAGENET),
    _cv("octresnet", "classification", "octresnet10_ad2", _IMAGENET),
    _cv("fastscnn", "segmentation", "fastscnn_cityscapes", (1, 3, 64, 64), **_sized(64)),
    _cv("enet", "segmentation", "enet_cityscapes", (1, 3, 64, 64), **_sized(64)),
    _cv("lffd", "detection", "lffd20x5s320v2_widerface", (1, 3, 128, 128), **_sized(128)),
    _cv("voca", "speech", "voca8flame", lambda: (torch.randn(2, 1, 16, 29), torch.zeros(2, dtype=torch.long))),
    _cv(
        "quartznet",
        "speech",
        "quartznet5x5_en_ls",
        lambda: (torch.randn(1, 64, 64), torch.tensor([64])),
        from_audio=False,
    ),
    _cv_own("jasper", "speech", "jasper", _jasper, lambda: (torch.randn(1, 64, 64), torch.tensor([64]))),
    _cv_own("unet", "segmentation", "unet", _unet, (1, 3, 64, 64)),
    _cv_own("deeplabv3", "segmentation", "deeplabv3", _deeplabv3, (1, 3, 64, 64)),
    _cv_own("bisenet", "segmentation", "bisenet", _bisenet, (1, 3, 64, 64)),
    _cv_own("centernet", "detection", "centernet", _centernet, (1, 3, 64, 64)),
    _cv_own("simplepose", "pose", "simplepose_coco", _simplepose, (1, 3, 64, 64)),
)


def _dims(dims: int, channels: int = 1, classes: int = 2) -> dict[str, Any]:
    return {"spatial_dims": dims, "in_channels": channels, "out_channels": classes}


_VOLUME = (1, 1, 32, 32, 32)

_MONAI = (
    _monai(
        "BasicUNet", "segmentation", lambda nets: nets.BasicUNet(**_dims(3), features=(8, 8, 16, 16, 32, 8)), _VOLUME
    ),
    _monai(
        "BasicUNetPlusPlus",
        "segmentation",
        lambda nets: nets.BasicUNetPlusPlus(**_dims(2), features=(8, 8, 16, 16, 32, 8)),
        (1, 1, 32, 32),
    ),
    _monai(
        "UNet 2-D",
        "segmentation",
        lambda nets: nets.UNet(**_dims(2), channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
        (1, 1, 32, 32),
    ),
    _monai(
        "UNet 3-D",
        "segmentation",
        lambda nets: nets.UNet(**_dims(3), channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
        (1, 1, 16, 16, 16),
    ),
    _monai("SegResNet", "segmentation", lambda nets: nets.SegResNet(**_dims(3), init_filters=8), (1, 1, 16, 16, 16)),
    _monai("VNet", "segmentation", lambda nets: nets.VNet(**_dims(2)), (1, 1, 32, 32)),
    _monai(
        "DynUNet",
        "segmentation",
        lambda nets: nets.DynUNet(
            **_dims(3),
            kernel_size=[3, 3, [1, 3, 3]],
            strides=[1, 2, [1, 2, 2]],
            upsample_kernel_size=[2, [1, 2, 2]],
            filters=[8, 16, 32],
            res_block=True,
        ),
        (1, 1, 16, 16, 16),
    ),
    _monai(
        "AttentionUnet",
        "segmentation",
        lambda nets: nets.AttentionUnet(**_dims(3), channels=(8, 16, 32), strides=(2, 2)),
        (1, 1, 16, 16, 16),
    ),
    _monai("HighResNet", "segmentation", lambda nets: nets.HighResNet(**_dims(3)), (1, 1, 8, 8, 8)),
    _monai("QuickNAT", "segmentation", lambda nets: nets.Quicknat(num_classes=4, num_filters=16), (1, 1, 32, 32)),
    _monai(
        "FlexibleUNet",
        "segmentation",
        lambda nets: nets.FlexibleUNet(1, 2, "resnet10", decoder_channels=(64, 32, 16, 8, 8)),
        (1, 1, 64, 64),
    ),
    _monai(
        "MedNeXt",
        "segmentation",
        lambda nets: nets.MedNeXt(init_filters=4, kernel_size=3, blocks_down=(1,) * 4, blocks_up=(1,) * 4),
        _VOLUME,
    ),
    _monai(
        "DenseNet121",
        "classification",
        lambda nets: nets.DenseNet121(**_dims(3), init_features=16, growth_rate=8),
        _VOLUME,
    ),
    _monai(
        "ResNet",
        "classification",
        lambda nets: nets.ResNet(
            "basic", [1, 1, 1, 1], [8, 16, 32, 64], n_input_channels=1, num_classes=3, conv1_t_stride=2
        ),
        _VOLUME,
    ),
    _monai(
        "SENet",
        "classification",
        lambda nets: nets.SENet(
            3,
            1,
            "se_resnetxt_bottleneck",
            [1, 1, 1, 1],
            groups=8,
            reduction=4,
            inplanes=16,
            downsample_kernel_size=1,
            input_3x3=False,
            num_classes=3,
        ),
        _VOLUME,
    ),
    _monai(
        "EfficientNetBN",
        "classification",
        lambda nets: nets.EfficientNetBN("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1),
        (1, 1, 64, 64),
    ),
    _monai(
        "AutoEncoder",
        "reconstruction",
        lambda nets: nets.AutoEncoder(**_dims(2), channels=(8, 16), strides=(2, 2), inter_channels=[16, 16]),
        (1, 1, 32, 32),
    ),
    _monai(
        "VarAutoEncoder",
        "reconstruction",
        lambda nets: nets.VarAutoEncoder(
            2, (1, 32, 32), 1, latent_size=8, channels=(8, 16), strides=(2, 2), use_mean_at_inference=True
        ),
        (1, 1, 32, 32),
    ),
    _monai(
        "VQVAE",
        "reconstruction",
        lambda nets: nets.VQVAE(
            **_dims(3),
            channels=(8, 16),
            num_res_layers=1,
            num_res_channels=(8, 16),
            downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            embedding_dim=8,
        ),
        (1, 1, 16, 16, 16),
    ),
    _monai("RegUNet", "registration", lambda nets: nets.RegUNet(3, 2, 8, depth=2), (1, 2, 16, 16, 16)),
    _monai(
        "Discriminator", "adversarial", lambda nets: nets.Discriminator((1, 32, 32), (8, 16), (2, 2)), (2, 1, 32, 32)
    ),
    _monai("Generator", "adversarial", lambda nets: nets.Generator((8,), (16, 8, 8), (8, 8, 1), (2, 2, 1)), (2, 8)),
)

_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES = {**_VIT, "image_size": 32, "patch_size": 8}
_WAV = {
    **_VIT,
    "vocab_size": 32,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_AUDIO = {"input_values": (1, 4000)}


def _pixels(size: int) -> dict[str, tuple[int, ...]]:
    return {"pixel_values": (1, 3, size, size)}


@torch.no_grad()
def _encodec(hf: Any) -> nn.Module:
    """Louder, and with codebooks of frames it has met: they start at zero, which leaves the output without an input."""
    model = hf.EncodecModel(
        hf.EncodecConfig(num_filters=4, hidden_size=32, codebook_size=64, target_bandwidths=[1.5], num_lstm_layers=1)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("weight.original0"):  # the norms of the weights
            parameter.mul_(2.0)
    frames = model.encoder(torch.randn(1, 1, 64 * 320))[0].T
    for layer in model.quantizer.layers:
        layer.codebook.embed.copy_(frames)
        frames = frames - frames.roll(1, 0)
    return model


_TRANSFORMERS = (
    _hf(
        "ResNet",
        "classification",
        lambda hf: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 1])
        ),
        _pixels(32),
    ),
    _hf(
        "RegNet",
        "classification",
        lambda hf: hf.RegNetForImageClassification(
            hf.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)
        ),
        _pixels(32),
    ),
    _hf(
        "BiT",
        "classification",
        lambda hf: hf.BitForImageClassification(
            hf.BitConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4)
        ),
        _pixels(32),
    ),
    _hf(
        "MobileNetV1",
        "classification",
        lambda hf: hf.MobileNetV1ForImageClassification(hf.MobileNetV1Config(depth_multiplier=0.25, min_depth=8)),
        _pixels(64),
    ),
    _hf(
        "MobileNetV2",
        "classification",
        lambda hf: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.35)),
        _pixels(64),
    ),
    _hf(
        "EfficientNet",
        "classification",
        lambda hf: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(
                width_coefficient=0.5, depth_coefficient=0.5, image_size=64, hidden_dim=640, initializer_range=0.2
            )
        ),
        _pixels(64),
    ),
    _hf(
        "ConvNext",
        "classification",
        lambda hf: hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1] * 4)),
        _pixels(64),
    ),
    _hf(
        "MobileViT",
        "classification",
        lambda hf: hf.MobileViTForImageClassification(
            hf.MobileViTConfig(hidden_sizes=[16, 16, 32], neck_hidden_sizes=[8, 8, 16, 16, 32, 32, 64], image_size=64)
        ),
        _pixels(64),
    ),
    _hf("ViT", "classification", lambda hf: hf.ViTForImageClassification(hf.ViTConfig(**_PATCHES)), _pixels(32)),
    _hf("CLIP vision", "embedding", lambda hf: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_PATCHES)), _pixels(32)),
    _hf(
        "Swin",
        "classification",
        lambda hf: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        _pixels(32),
    ),
    _hf(
        "Swin2SR",
        "super-resolution",
        lambda hf: hf.Swin2SRForImageSuperResolution(
            hf.Swin2SRConfig(
                image_size=16,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=4,
                upscale=2,
                initializer_range=0.2,
            )
        ),
        _pixels(16),
    ),
    _hf(
        "SegFormer",
        "segmentation",
        lambda hf: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                depths=[1] * 4, hidden_sizes=[8, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32
            )
        ),
        _pixels(64),
    ),
    _hf(
        "UperNet",
        "segmentation",
        lambda hf: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=hf.ConvNextConfig(
                    hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, out_features=["stage1", "stage2", "stage3", "stage4"]
                ),
                hidden_size=16,
                auxiliary_in_channels=32,
                auxiliary_channels=16,
            )
        ),
        _pixels(64),
    ),
    _hf(
        "Mask2Former",
        "segmentation",
        lambda hf: hf.Mask2FormerForUniversalSegmentation(
            hf.Mask2FormerConfig(
                backbone_config=hf.SwinConfig(
                    image_size=64,
                    embed_dim=8,
                    depths=[1] * 4,
                    num_heads=[2] * 4,
                    window_size=4,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                ),
                feature_size=32,
                mask_feature_size=32,
                hidden_dim=32,
                encoder_feedforward_dim=32,
                encoder_layers=1,
                decoder_layers=2,
                num_attention_heads=2,
                dim_feedforward=32,
                num_queries=5,
            )
        ),
        _pixels(64),
    ),
    _hf(
        "DETR",
        "detection",
        lambda hf: hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=hf.ResNetConfig(
                    embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, out_features=["stage4"]
                ),
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                num_queries=5,
            )
        ),
        _pixels(64),
    ),
    _hf(
        "YOLOS",
        "detection",
        lambda hf: hf.YolosForObjectDetection(
            hf.YolosConfig(**{**_PATCHES, "image_size": [32, 32]}, num_detection_tokens=5)
        ),
        _pixels(32),
    ),
    _hf(
        "DPT",
        "depth",
        lambda hf: hf.DPTForDepthEstimation(
            hf.DPTConfig(
                **{**_PATCHES, "num_hidden_layers": 4},
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 16, 32, 32],
                fusion_hidden_size=16,
                head_in_index=-1,
                initializer_range=0.2,
            )
        ),
        _pixels(32),
    ),
    _hf(
        "GLPN",
        "depth",
        lambda hf: hf.GLPNForDepthEstimation(
            hf.GLPNConfig(
                depths=[1] * 4,
                hidden_sizes=[8, 16, 32, 32],
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=16,
                initializer_range=0.2,
            )
        ),
        _pixels(64),
    ),
    _hf(
        "VideoMAE",
        "video",
        lambda hf: hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**_PATCHES, num_frames=4)),
        {"pixel_values": (1, 4, 3, 32, 32)},
    ),
    _hf(
        "Mamba",
        "text",
        lambda hf: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2)
        ),
        lambda: {"input_ids": torch.randint(1, 64, (1, 12)), "use_cache": False},
    ),
    _hf("Wav2Vec2", "speech", lambda hf: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**_WAV)), _AUDIO),
    _hf("Hubert", "speech", lambda hf: hf.HubertForCTC(hf.HubertConfig(**_WAV)), _AUDIO),
    _hf("WavLM", "speech", lambda hf: hf.WavLMForCTC(hf.WavLMConfig(**_WAV)), _AUDIO),
    _hf(
        "SEW",
        "speech",
        lambda hf: hf.SEWForCTC(hf.SEWConfig(**{**_WAV, "conv_dim": (16,) * 13})),
        _AUDIO,
    ),
    _hf("Data2VecAudio", "speech", lambda hf: hf.Data2VecAudioForCTC(hf.Data2VecAudioConfig(**_WAV)), _AUDIO),
    _hf(
        "Whisper",
        "speech",
        lambda hf: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=32,
                max_target_positions=16,
                vocab_size=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                init_std=0.2,
            )
        ),
        lambda: {"input_features": torch.randn(1, 80, 64), "decoder_input_ids": torch.tensor([[1, 5, 9]])},
    ),
    _hf(
        "VITS",
        "speech synthesis",
        lambda hf: hf.VitsModel(
            hf.VitsConfig(
                vocab_size=32,
                hidden_size=32,
                num_hidden_layers=1,
                ffn_dim=64,
                flow_size=32,
                spectrogram_bins=65,
                upsample_initial_channel=32,
                upsample_rates=[4, 4],
                upsample_kernel_sizes=[8, 8],
                prior_encoder_num_flows=2,
                prior_encoder_num_wavenet_layers=2,
                posterior_encoder_num_wavenet_layers=2,
                duration_predictor_filter_channels=32,
                speaking_rate=8.0,  # a frame per token: their number, which hangs on the values, stays what it is
                noise_scale=0.0,
                noise_scale_duration=0.0,
            )
        ),
        lambda: {"input_ids": torch.randint(1, 32, (1, 12))},
    ),
    _hf(
        "SpeechT5HifiGan",
        "vocoder",
        lambda hf: hf.SpeechT5HifiGan(
            hf.SpeechT5HifiGanConfig(model_in_dim=16, upsample_initial_channel=32, initializer_range=0.2)
        ),
        {"spectrogram": (1, 8, 16)},
    ),
    _hf(
        "UnivNet",
        "vocoder",
        lambda hf: hf.UnivNetModel(
            hf.UnivNetConfig(
                model_in_channels=16,
                model_hidden_channels=8,
                num_mel_bins=20,
                kernel_predictor_hidden_channels=16,
                resblock_stride_sizes=[4, 4, 2],
            )
        ),
        {"input_features": (1, 8, 20), "noise_sequence": (1, 8, 16)},
    ),
    _hf(
        "Encodec",
        "audio codec",
        _encodec,
        {"input_values": (1, 1, 3200)},
    ),
    _hf(
        "DAC",
        "audio codec",
        lambda hf: hf.DacModel(
            hf.DacConfig(
                encoder_hidden_size=8,
                decoder_hidden_size=64,
                downsampling_ratios=[2, 4, 4],
                upsampling_ratios=[4, 4, 2],
                n_codebooks=2,
                codebook_size=32,
            )
        ),
        {"input_values": (1, 1, 1024)},
    ),
)

_BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS = {
    **_BLOCKS,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
_VAE = {
    **_BLOCKS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


def _noised(*shape: int, text: bool = False) -> Callable[[], Inputs]:
    """The sample and the timestep a denoiser takes, and what it is conditioned on."""
    return lambda: (torch.randn(shape), torch.tensor([10]), *([torch.randn(shape[0], 6, 16)] if text else []))


def _controlnet(df: Any) -> nn.Module:
    """With values in the convolutions that start at zero: the outputs would be zero as well."""
    model = df.ControlNetModel(
        **_CROSS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 16),
    )
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


_DIFFUSERS = (
    _diffusers(
        "UNet2D",
        "diffusion",
        lambda df: df.UNet2DModel(
            **_BLOCKS,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        _noised(1, 3, 16, 16),
    ),
    _diffusers(
        "UNet2DCondition",
        "diffusion",
        lambda df: df.UNet2DConditionModel(
            **_CROSS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        _noised(1, 4, 16, 16, text=True),
    ),
    _diffusers(
        "ControlNet",
        "diffusion",
        _controlnet,
        lambda: (torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 6, 16), torch.rand(1, 3, 16, 16)),
    ),
    _diffusers(
        "UNet1D",
        "diffusion",
        lambda df: df.UNet1DModel(
            block_out_channels=(32, 32, 64),
            in_channels=2,
            out_channels=2,
            extra_in_channels=64,
            time_embedding_type="fourier",
        ),
        _noised(1, 2, 64),
    ),
    _diffusers(
        "UNet3DCondition",
        "video diffusion",
        lambda df: df.UNet3DConditionModel(
            **_CROSS,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        _noised(1, 4, 3, 16, 16, text=True),
    ),
    _diffusers(
        "UNetMotion",
        "video diffusion",
        lambda df: df.UNetMotionModel(
            **{k: v for k, v in _CROSS.items() if k != "attention_head_dim"},
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        ),
        lambda: (torch.randn(1, 4, 3, 16, 16), torch.tensor([10]), torch.randn(3, 6, 16)),
    ),
    _diffusers("AutoencoderKL", "image autoencoder", lambda df: df.AutoencoderKL(**_VAE), (1, 3, 32, 32)),
    _diffusers(
        "AutoencoderTiny",
        "image autoencoder",
        lambda df: df.AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        (1, 3, 32, 32),
    ),
    _diffusers(
        "VQModel",
        "image autoencoder",
        lambda df: df.VQModel(**_VAE, latent_channels=3, num_vq_embeddings=32),
        (1, 3, 32, 32),
    ),
    _diffusers(
        "MoVQ",
        "image autoencoder",
        lambda df: df.VQModel(
            **{
                **_VAE,
                "block_out_channels": (32, 32),
                "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
                "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            },
            latent_channels=4,
            num_vq_embeddings=32,
            vq_embed_dim=4,
            norm_type="spatial",
        ),
        (1, 3, 32, 32),
    ),
    _diffusers(
        "AutoencoderKLTemporalDecoder",
        "video autoencoder",
        lambda df: df.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
        ),
        lambda: {"sample": torch.randn(2, 3, 16, 16), "num_frames": 2},
    ),
    _diffusers(
        "AutoencoderKLCogVideoX",
        "video autoencoder",
        lambda df: df.AutoencoderKLCogVideoX(
            block_out_channels=(16, 16, 16, 16), layers_per_block=1, norm_num_groups=8, latent_channels=4
        ),
        (1, 3, 9, 16, 16),
    ),
    _diffusers(
        "AutoencoderKLWan",
        "video autoencoder",
        lambda df: df.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True]
        ),
        (1, 3, 5, 16, 16),
    ),
    _diffusers(
        "AutoencoderOobleck",
        "audio autoencoder",
        lambda df: df.AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
        ),
        (1, 2, 256),
    ),
)


_OPTIONAL = (
    _entry(
        "torchvision",
        "torchvision.models",
        "torchvision MobileNetV2",
        "classification",
        lambda models: models.mobilenet_v2(weights=None, width_mult=0.25),
        (1, 3, 64, 64),
    ),
    _entry(
        "torchvision",
        "torchvision.models.segmentation",
        "torchvision LR-ASPP",
        "segmentation",
        lambda models: models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        (1, 3, 64, 64),
    ),
    _entry(
        "timm",
        "timm",
        "timm ResNet-10-T",
        "classification",
        lambda timm: timm.create_model("resnet10t", pretrained=False),
        (1, 3, 64, 64),
    ),
)


def _imports(library: str) -> bool:
    try:
        import_module(library)
    except (ImportError, RuntimeError, AttributeError):  # a torchvision that does not fit torch is there, and fails
        return False
    return True


ZOO: tuple[ZooModel, ...] = (
    *_PYTORCHCV,
    *_MONAI,
    *_TRANSFORMERS,
    *_DIFFUSERS,
    *(model for model in _OPTIONAL if _imports(model.library)),
)
