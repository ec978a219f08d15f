"""Recipes: bases and overrides, the published settings in numbers, durations and schedules of a run."""

import dataclasses
from dataclasses import replace
from typing import Any

import pytest

from foveola.config import (
    ConfigError,
    UserError,
    build,
    describe,
    dump_yaml,
    merge,
    parse_overrides,
    read_yaml,
    to_dict,
)
from foveola.schedules import Progress
from foveola.training import durations
from foveola.training.durations import period, plan, schedules
from foveola.training.finetune import with_test
from foveola.training.recipe import RunConfig, nested, recipes, resolve, run_config

IMAGENET = 1_281_167  # images

# Released settings, by the facts of the papers and of the official arguments.
COMMON = {
    "batch_size": 1024,
    "model.patch_size": 16,
    "model.drop_path": 0.1,
    "views.global_size": 224,
    "views.global_count": 2,
    "views.local_size": 96,
    "views.local_count": 10,
    "views.ratio": [3 / 4, 4 / 3],
    "views.flip": 0.5,
    "views.color.jitter": 0.8,
    "views.color.brightness": 0.4,
    "views.color.contrast": 0.4,
    "views.color.saturation": 0.2,
    "views.color.hue": 0.1,
    "views.color.grayscale": 0.2,
    "views.color.blur": [1.0, 0.1, 0.5],
    "views.color.blur_sigma": [0.1, 2.0],
    "views.color.solarize": [0.0, 0.2, 0.0],
    "method.heads.main.hidden": 2048,
    "method.heads.main.bottleneck": 256,
    "method.heads.main.layers": 3,
    "method.token.weight": 1.0,
    "method.token.target.kind": "centering",
    "method.token.target.student_temperature": 0.1,
    "method.token.target.momentum": 0.9,
    "method.token.target.temperature.start": 0.04,
    "method.token.target.temperature.value": 0.07,
    "method.token.target.temperature.warmup": "30 epochs",
    "method.token.target.temperature.per_epoch": True,
    "method.image": None,
    "method.spread": None,
    "method.momentum.value": 0.996,
    "method.momentum.end": 1.0,
    "method.momentum.shape": "cosine",
    "optimizer.lr.start": 0.0,
    "optimizer.lr.value": 5e-4,
    "optimizer.lr.warmup": "10 epochs",
    "optimizer.lr.shape": "cosine",
    "optimizer.lr_rule": "linear",
    "optimizer.weight_decay.value": 0.04,
    "optimizer.weight_decay.end": 0.4,
    "optimizer.weight_decay.shape": "cosine",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.clip_each": "parameter",
    "optimizer.freeze_last_layer": "1 epochs",
    "precision": "fp32",
}
WIDE = {"views.global_scale": [0.25, 1.0], "views.local_scale": [0.05, 0.25]}
IBOT = {
    "views.masking.shape": "block",
    "views.masking.probability": 0.5,
    "views.masking.ratio": [0.1, 0.5],
    "views.masking.local": False,
    "method.heads.main.prototypes": 8192,
    "method.token.head": "main",
    "method.patch.head": "main",  # shared
    "method.patch.weight": 1.0,
    "method.patch.target.kind": "centering",
    "method.patch.target.student_temperature": 0.1,
    "method.patch.target.momentum": 0.9,
    "method.patch.target.temperature.start": 0.04,
    "method.patch.target.temperature.value": 0.07,
    "method.patch.target.temperature.warmup": "30 epochs",
    "method.patch.target.temperature.per_epoch": True,
}
IBOT_S = WIDE | {
    "duration": "800 epochs",
    "model.size": "small",
    "method.heads.main.norm_last_layer": False,
    "optimizer.lr.end": 1e-6,
    "optimizer.clip": 3.0,
}
IBOT_B = {
    "duration": "400 epochs",
    "model.size": "base",
    "views.global_scale": [0.32, 1.0],
    "views.local_scale": [0.05, 0.32],
    "method.heads.main.norm_last_layer": True,
    "method.token.target.temperature.warmup": "50 epochs",
    "method.patch.target.temperature.warmup": "50 epochs",
    "optimizer.lr.value": 7.5e-4,
    "optimizer.lr.end": 2e-6,
    "optimizer.clip": 0.3,
    "optimizer.freeze_last_layer": "3 epochs",
}
IBOT_L = WIDE | {
    "duration": "250 epochs",
    "model.size": "large",
    "model.drop_path": 0.2,
    "method.heads.main.norm_last_layer": True,
    "optimizer.lr.end": 2e-4,
    "optimizer.weight_decay.end": 0.48,
    "optimizer.clip": 0.3,
    "optimizer.freeze_last_layer": "3 epochs",
}
COCO = {"duration": "300 epochs", "batch_size": 256, "optimizer.lr.end": 1e-5, "optimizer.clip": None}
OBJECTS = {
    "views.objects.aware": True,
    "views.objects.attention": True,
    "views.objects.candidates": 20,
    "views.objects.aware_local": False,
    "views.objects.attention_local": False,
    "views.objects.image_token": False,
    "loader.choose": "area",
    "loader.objects_per_image": 1,
}
NO_OBJECTS = {"views.objects": None}
CAPI = {  # Table 6, and Table 8 for sizes
    "batch_size": 16384,
    "duration": "500k steps",
    "precision": "bf16",
    "model.size": "large",
    "model.patch_size": 14,
    "model.class_token": False,
    "model.registers": 16,
    "model.norm": "rms",
    "model.final_norm_affine": False,
    "model.bias": False,
    "model.positions": "rope",
    "model.rope": "axial",
    "model.init": "xavier",
    "model.drop_path": 0.2,
    "model.drop_path_rule": "constant",
    "model.drop_path_subset": True,
    "model.layer_scale": None,
    "views.global_size": 224,
    "views.global_count": 1,
    "views.global_scale": [0.6, 1.0],
    "views.flip": 0.5,
    "views.color.jitter": 0.0,
    "views.local_count": 0,
    "views.dropping.shape": "inverse_block",
    "views.dropping.ratio": 0.65,
    "views.dropping.roll": True,
    "views.dropping.predict": 0.05,
    "method.predictor.kind": "cross",
    "method.predictor.depth": None,
    "method.targets": "clusters",
    "method.head": "linear",
    "method.clustering.prototypes": 16384,
    "method.clustering.balance": "position",
    "method.clustering.temperature": 0.06,
    "method.clustering.student_temperature": 0.12,
    "method.clustering.iterations": 3,
    "method.momentum": None,
    "optimizer.lr.value": 1e-3,
    "optimizer.lr.warmup": "10 %",
    "optimizer.lr.truncate": 0.8,
    "optimizer.lr.end": 0.0,
    "optimizer.lr_rule": "none",
    "optimizer.weight_decay.value": 0.1,
    "optimizer.weight_decay.end": None,
    "optimizer.weight_decay.shape": "constant",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.clip": None,
    "optimizer.patch_embed_lr": 0.2,
    "optimizer.norm_decay": 0.1,
    "optimizer.parts.clustering.lr": 0.5,
    "optimizer.parts.clustering.weight_decay": 0.01,
}
TARGET_DINOV2 = {
    "kind": "centering",
    "student_temperature": 0.1,
    "momentum": 0.9,
    "temperature.start": 0.04,
    "temperature.value": 0.07,
    "temperature.warmup": "37500 steps",  # 30 "epochs" of 1,250
    "temperature.per_epoch": False,
}
DINOV2 = COMMON | {  # the defaults of its code: the short run of ViT-L/16
    "duration": "125k steps",
    "batch_size": 2048,
    "precision": "bf16",
    "model.layer_scale": 1e-5,
    "model.drop_path": 0.3,
    "model.drop_path_rule": "constant",
    "model.drop_path_subset": True,
    "model.registers": 0,
    "model.mlp": "gelu",
    "views.global_scale": [0.32, 1.0],
    "views.local_scale": [0.05, 0.32],
    "views.local_count": 8,
    "views.color.blur": [0.0, 0.9, 0.5],  # as released
    "views.masking.shape": "block",
    "views.masking.probability": 0.5,
    "views.masking.ratio": [0.1, 0.5],
    "views.masking.local": False,
    "views.masking.stratified": True,
    "views.masking.smallest_block": 4,
    "views.masking.largest_block": 0.5,  # 98 of 196
    "method.heads.main.prototypes": 65536,
    "method.heads.main.norm_last_layer": False,
    "method.token.head": "main",
    "method.patch.head": "main",  # shared, as for ImageNet-1k
    "method.patch.center": "masked",
    "method.patch.weight": 1.0,
    "method.spread.weight": 0.1,
    "method.momentum.value": 0.992,
    "optimizer.lr.value": 4e-3,
    "optimizer.lr.end": 1e-6,
    "optimizer.lr.warmup": "12500 steps",
    "optimizer.lr_rule": "sqrt",
    "optimizer.clip": 3.0,
    "optimizer.clip_each": "module",
    "optimizer.layer_decay": 0.9,
    "optimizer.patch_embed_lr": 0.2,
    "optimizer.norm_decay": 0.0,
    "optimizer.freeze_last_layer": "1250 steps",
}
DINOV2 |= {f"method.{term}.target.{k}": v for term in ("token", "patch") for k, v in TARGET_DINOV2.items()}
del DINOV2["method.spread"]
POSFIELD = DINOV2 | {  # Table 6; where it is silent, as DINOv2
    "duration": "100 epochs",
    "batch_size": 512,
    "model.positions": "field",
    "model.field_size": [50, 50],
    "model.field_interpolation": "linear",
    "model.drop_path": 0.1,
    "model.drop_path_rule": "linear",
    "views.placement.around": "views",
    "views.placement.distribution": "beta",
    "views.placement.beta": [2, 5],
    "views.placement.area": [0.2, 1.0],
    "views.masking.probability": 1.0,  # of the half whose contents are masked
    "views.position_masking.shape": "cross",
    "views.position_masking.ratio": [0.1, 0.5],
    "views.position_masking.share": 0.5,
    "method.patch.head": "patches",
    "method.position.head": "positions",
    "method.position.weight": 1.0,
    "method.position.target.kind": "centering",
    "optimizer.lr.value": 2e-3,
    "optimizer.lr.warmup": "10 epochs",
    "optimizer.layer_decay": 1.0,
    "optimizer.patch_embed_lr": 1.0,
    "optimizer.freeze_last_layer": "1 epochs",
}
POSFIELD |= {
    f"method.heads.{head}.{name}": value
    for head in ("main", "patches", "positions")
    for name, value in {
        "prototypes": 65536,
        "norm_last_layer": True,
        "hidden": 2048,
        "bottleneck": 256,
    }.items()
}
POSFIELD |= {
    f"method.{term}.target.temperature.{name}": value
    for term in ("token", "patch", "position")
    for name, value in {"value": 0.04, "start": None, "warmup": "0 steps", "shape": "constant"}.items()
}
NO_COLOR = {
    "views.color.jitter": 0.0,
    "views.color.grayscale": 0.0,
    "views.color.blur": [0.0, 0.0, 0.0],
    "views.color.solarize": [0.0, 0.0, 0.0],
}
MAE = NO_COLOR | {  # Table 8 of the appendix, and the official commands
    "batch_size": 4096,
    "duration": "1600 epochs",
    "model.patch_size": 16,
    "model.class_token": True,
    "model.registers": 0,
    "model.positions": "sincos",
    "model.init": "xavier",
    "model.drop_path": 0.0,
    "model.norm": "layer",
    "model.bias": True,
    "views.global_size": 224,
    "views.global_count": 1,
    "views.global_scale": [0.2, 1.0],
    "views.flip": 0.5,
    "views.local_count": 0,
    "views.blocks": None,
    "views.dropping.shape": "random",
    "views.dropping.ratio": 0.75,
    "views.dropping.predict": 1.0,
    "method.decoder.kind": "self",
    "method.decoder.width": 512,
    "method.decoder.depth": 8,
    "method.decoder.heads": 16,
    "method.decoder.drop_path": 0.0,
    "method.normalise": True,
    "method.loss": "squared",
    "optimizer.lr.value": 1.5e-4,
    "optimizer.lr.start": 0.0,
    "optimizer.lr.end": 0.0,
    "optimizer.lr.warmup": "40 epochs",
    "optimizer.lr.shape": "cosine",
    "optimizer.lr_rule": "linear",
    "optimizer.weight_decay.value": 0.05,
    "optimizer.weight_decay.end": None,
    "optimizer.weight_decay.shape": "constant",
    "optimizer.betas": [0.9, 0.95],
    "optimizer.clip": None,
    "optimizer.layer_decay": 1.0,
    "optimizer.patch_embed_lr": 1.0,
}
IJEPA = NO_COLOR | {  # the released configurations
    "batch_size": 2048,
    "duration": "600 epochs",
    "precision": "bf16",
    "model.patch_size": 16,
    "model.class_token": False,
    "model.registers": 0,
    "model.positions": "sincos",
    "model.init": "normal",
    "model.drop_path": 0.0,
    "views.global_size": 224,
    "views.global_count": 1,
    "views.global_scale": [0.3, 1.0],
    "views.flip": 0.0,
    "views.local_count": 0,
    "views.dropping": None,
    "views.blocks.targets": 4,
    "views.blocks.target_scale": [0.15, 0.2],
    "views.blocks.target_aspect": [0.75, 1.5],
    "views.blocks.context_scale": [0.85, 1.0],
    "views.blocks.min_context": 10,
    "views.blocks.published": False,
    "method.predictor.kind": "self",
    "method.predictor.width": 384,
    "method.predictor.depth": 12,
    "method.predictor.heads": 16,  # those of the encoder
    "method.predictor.drop_path": 0.0,
    "method.loss": "huber",
    "method.momentum.value": 0.996,
    "method.momentum.end": 1.0,
    "method.momentum.shape": "linear",
    "optimizer.lr.value": 1e-3,
    "optimizer.lr.start": 2e-4,
    "optimizer.lr.end": 1e-6,
    "optimizer.lr.warmup": "40 epochs",
    "optimizer.lr.shape": "cosine",
    "optimizer.lr_rule": "none",
    "optimizer.weight_decay.value": 0.04,
    "optimizer.weight_decay.end": 0.4,
    "optimizer.weight_decay.shape": "cosine",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.clip": None,
}
IJEPA_B = {"model.size": "base", "method.predictor.depth": 6, "method.predictor.heads": 12}
SEGMENTER = {  # posfield's B.3 in MMSegmentation: rates and floors of its sweep, crops and windows of CrIBo
    "duration": "160000 steps",
    "batch_size": 16,
    "method.name": "segmentation",
    "method.decoder.kind": "linear",
    "method.decoder.batch_norm": False,
    "method.look.mode": "slide",
    "method.look.size": 512,
    "method.look.window": 512,
    "method.look.stride": 480,
    "method.look.scales": [1.0],
    "views.global_size": 512,
    "views.flip": 0.5,
    "views.rescale.range": [0.5, 2.0],
    "views.rescale.side": "short",
    "views.rescale.max_class_share": 0.75,
    "views.color.jitter": 0.5,
    "views.color.jitter_each": True,
    "views.color.lightness": 32 / 256,
    "views.color.brightness": 0.5,
    "views.color.saturation": 0.5,
    "views.color.hue": 18 / 180,
    "optimizer.kind": "adamw",
    "optimizer.lr.value": 3e-5,
    "optimizer.lr.end": 3e-6,
    "optimizer.lr.warmup": "1500 steps",
    "optimizer.lr.shape": "poly",
    "optimizer.lr.power": 0.9,
    "optimizer.weight_decay.value": 1e-2,
    "model.drop_path": 0.1,
}
LINEAR = SEGMENTER | {  # DINOv2's linear segmentation, on whole patches of 14
    "duration": "40000 steps",
    "method.decoder.batch_norm": True,
    "method.look.size": 518,
    "method.look.window": 518,
    "method.look.stride": 345,
    "views.global_size": 518,
    "optimizer.lr.value": 1e-3,
    "optimizer.lr.end": 0.0,
    "optimizer.lr.power": 1.0,
    "optimizer.weight_decay.value": 1e-4,
    "model.drop_path": 0.0,
    "freeze": {"encoder": "all"},
}
FINETUNED = {  # MAE's fine-tuning (Table 9 and its released commands); rates are lr * batch / 256
    "batch_size": 1024,
    "method.name": "classification",
    "method.reads": "average",
    "method.augment.randaugment": 2,
    "method.augment.magnitude": 9.0,
    "method.augment.magnitude_std": 0.5,
    "method.augment.erasing": 0.25,
    "method.augment.mixup": 0.8,
    "method.augment.cutmix": 1.0,
    "method.augment.smoothing": 0.1,
    "views.global_size": 224,
    "views.global_scale": [0.08, 1.0],
    "optimizer.kind": "adamw",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.lr.value": 5e-4,
    "optimizer.lr.end": 1e-6,
    "optimizer.lr.warmup": "5 epochs",
    "optimizer.lr.shape": "cosine",
    "optimizer.weight_decay.value": 0.05,
    "optimizer.clip": None,
}
VITDET = {  # B.2 of the position field paper; what it does not state is ViTDet's
    "duration": "22128 steps",
    "batch_size": 64,
    "method.name": "detection",
    "views.global_size": 1024,
    "views.rescale.range": [0.1, 2.0],
    "views.rescale.side": "long",
    "optimizer.lr.warmup": "250 steps",
    "optimizer.lr.shape": "steps",
    "optimizer.weight_decay.value": 0.1,
    "optimizer.layer_decay": 0.7,
    "model.drop_path": 0.1,
    "model.window": None,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "classify-vits16-in1k": FINETUNED | {"model.size": "small", "duration": "100 epochs"},  # not published
    "classify-vitb16-in1k": FINETUNED
    | {
        "model.size": "base",
        "duration": "100 epochs",
        "optimizer.layer_decay": 0.65,
        "model.drop_path": 0.1,
    },
    "classify-vitl16-in1k": FINETUNED
    | {
        "model.size": "large",
        "duration": "50 epochs",
        "optimizer.layer_decay": 0.75,
        "model.drop_path": 0.2,
        "optimizer.lr.value": 1e-3,
    },
    "vitdet-vits16-coco": VITDET | {"model.size": "small", "optimizer.lr.value": 1e-4},
    "vitdet-vitb16-coco": VITDET | {"model.size": "base", "optimizer.lr.value": 3e-4},
    "segment-vits16-ade20k": SEGMENTER | {"model.size": "small"},
    "segment-vitb16-ade20k": SEGMENTER | {"model.size": "base"},
    "segment-linear-vits14-ade20k": LINEAR | {"model.size": "small"},
    "segment-linear-vitb14-ade20k": LINEAR | {"model.size": "base"},
    "dino-vits16-in1k": COMMON
    | WIDE
    | NO_OBJECTS
    | {
        "duration": "800 epochs",
        "model.size": "small",
        "views.masking": None,
        "method.patch": None,
        "method.heads.main.prototypes": 65536,
        "method.heads.main.norm_last_layer": False,
        "optimizer.lr.end": 1e-5,
        "optimizer.clip": None,
    },
    "ibot-vits16-in1k": COMMON | IBOT | IBOT_S | NO_OBJECTS,
    "ibot-vitb16-in1k": COMMON | IBOT | IBOT_B | NO_OBJECTS,
    "ibot-vitl16-in1k": COMMON | IBOT | IBOT_L | NO_OBJECTS,
    "odis-vits16-in1k": COMMON | IBOT | IBOT_S | OBJECTS,
    "odis-vitb16-in1k": COMMON | IBOT | IBOT_B | OBJECTS,
    "odis-vitl16-in1k": COMMON | IBOT | IBOT_L | OBJECTS,
    "ibot-vits16-coco": COMMON | IBOT | IBOT_S | COCO | NO_OBJECTS,
    "odis-vits16-coco": COMMON | IBOT | IBOT_S | COCO | OBJECTS,
    "dinov2-vits16-in1k": DINOV2 | NO_OBJECTS | {"model.size": "small"},
    "dinov2-vitb16-in1k": DINOV2 | NO_OBJECTS | {"model.size": "base"},
    "dinov2-vitl16-in1k": DINOV2 | NO_OBJECTS | {"model.size": "large"},
    "odis-dinov2-vits16-in1k": DINOV2 | OBJECTS | {"model.size": "small"},
    "posfield-vits16-in1k": POSFIELD | NO_OBJECTS | {"model.size": "small"},
    "posfield-vitb16-in1k": POSFIELD | NO_OBJECTS | {"model.size": "base"},
    "mae-vits16-in1k": MAE | {"model.size": "small", "duration": "800 epochs"},  # not published
    "mae-vitb16-in1k": MAE | {"model.size": "base"},
    "mae-vitl16-in1k": MAE | {"model.size": "large", "duration": "800 epochs"},
    "mae-vith14-in1k": MAE | {"model.size": "huge", "model.patch_size": 14},
    "ijepa-vitb16-in1k": IJEPA | IJEPA_B,
    "ijepa-vitl16-in1k": IJEPA | {"model.size": "large"},
    "ijepa-vith14-in1k": IJEPA | {"model.size": "huge", "model.patch_size": 14, "duration": "300 epochs"},
    "capi-vitl14-in22k": CAPI,
    "capi-vitl14-in1k": CAPI,
    "capi-vitl14-lvd": CAPI,
    "capi-vitb14": CAPI | {"model.size": "base"},
    "capi-vits14": CAPI | {"model.size": "small", "optimizer.lr.value": 2e-3},
    "capi-vitl16-in22k": CAPI
    | {"model.patch_size": 16, "duration": "100k steps", "optimizer.lr.value": 2e-3},
}
# The temperature's warm-up of ViT-L is not known; the learning rates are lr * batch / 256.
UNKNOWN = {"ibot-vitl16-in1k", "odis-vitl16-in1k"}
PEAKS = {
    "dino-vits16-in1k": 2e-3,
    "ibot-vitb16-in1k": 3e-3,
    "ibot-vitl16-in1k": 2e-3,
    "odis-vits16-in1k": 2e-3,
    "odis-vits16-coco": 5e-4,
    "dinov2-vitl16-in1k": 4e-3 * 2**0.5,
    "posfield-vits16-in1k": 2e-3 / 2**0.5,
    "mae-vitb16-in1k": 2.4e-3,
    "classify-vitb16-in1k": 2e-3,
    "vitdet-vitb16-coco": 3e-4,
    "ijepa-vith14-in1k": 1e-3,
}


# -- what is shipped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    config = resolve(name)
    values = {info.path: info.value for info in describe(config)}
    expected = {
        path: value
        for path, value in PUBLISHED[name].items()
        if not (name in UNKNOWN and path.endswith("temperature.warmup"))
    }
    assert {path: values.get(path) for path in expected} == expected
    assert config.data is None  # the user's own


PUBLISHED_ON = ("in1k", "coco", "ade20k", "in22k", "lvd", "capi-vitb14", "capi-vits14")


def test_every_published_recipe_is_in_the_table():
    assert {name for name in recipes() if name.endswith(PUBLISHED_ON)} == PUBLISHED.keys()


@pytest.mark.parametrize(("name", "peak"), PEAKS.items())
def test_peaks_of_the_learning_rate(name, peak):
    config = resolve(name)
    assert config.optimizer.peak(config.batch_size) == pytest.approx(peak)


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_resolve_fit_their_data_and_survive_saving(name, tmp_path):
    config = resolve(name)
    assert config.recipe == name
    about = recipes()[name]
    assert all((about.method, about.model, about.data, about.aim))
    assert not about.budget
    assert config.about == recipes()[name]
    images = {
        "in1k": IMAGENET,
        "coco": 118_287,
        "tinyimagenet": 24_000,
        "in22k": 14_000_000,
        "lvd": 142_000_000,
        "vitb14": 142_000_000,
        "vits14": 142_000_000,
    }.get(name.split("-")[-1], 5000)
    progress = plan(config, images)
    assert not any(schedule.shortened(progress) for _, schedule in schedules(config))
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert run_config(read_yaml(tmp_path / "config.yaml")) == config
    assert resolve(tmp_path / "config.yaml") == config


def test_methods_differ_in_what_makes_them():
    """At equal budget: the recipes of a family differ in views and terms alone."""
    for size in ("tiny", "vits8"):
        dino, ibot, odis = (to_dict(resolve(f"{m}-{size}-tinyimagenet")) for m in ("dino", "ibot", "odis"))
        assert ibot | {k: odis[k] for k in ("recipe", "about", "views")} == odis
        assert ibot["views"] | {"objects": odis["views"]["objects"]} == odis["views"]
        assert ibot | {k: dino[k] for k in ("recipe", "about", "views", "method")} == dino
        assert ibot["method"] | {"patch": None} == dino["method"]
        assert ibot["views"] | {"masking": None} == dino["views"]


def test_dinov2_is_ibot_with_its_own_terms_and_schedules_and_odis_adds_objects_alone():
    for small in ("tiny-tinyimagenet", "vits16-in1k"):
        plain, objects = (to_dict(resolve(f"{m}-{small}")) for m in ("dinov2", "odis-dinov2"))
        assert plain | {k: objects[k] for k in ("recipe", "about", "views", "loader")} == objects
        assert plain["views"] | {"objects": objects["views"]["objects"]} == objects["views"]
    ibot, dinov2 = (to_dict(resolve(f"{m}-tiny-tinyimagenet")) for m in ("ibot", "dinov2"))
    changed = {name for name in ibot if ibot[name] != dinov2[name]}
    assert changed == {"recipe", "about", "views", "method", "optimizer"}
    for same in ("duration", "batch_size", "loader", "transform"):  # equal budget
        assert ibot[same] == dinov2[same]
    assert ibot["optimizer"]["lr"] == dinov2["optimizer"]["lr"]
    assert ibot["views"] | {"masking": dinov2["views"]["masking"]} == dinov2["views"]
    assert dinov2["method"]["token"]["head"] != dinov2["method"]["patch"]["head"]


def test_an_epoch_of_dinov2_is_1250_steps_whatever_the_data():
    config = resolve("dinov2-vitl16-in1k")
    for images in (IMAGENET, 50_000):
        progress = plan(config, images)
        assert progress.total_steps == 100 * 1250
        peak = config.optimizer.lr.at(dataclasses.replace(progress, step=12_499))
        assert peak == config.optimizer.lr.value
        temperature = config.method.token.target.temperature
        for step, value in (
            (0, 0.04),
            (18_750, 0.04 + 0.03 * 18_750 / 37_499),
            (37_499, 0.07),
            (99_999, 0.07),
        ):
            assert temperature.at(dataclasses.replace(progress, step=step)) == pytest.approx(value)
        momentum = config.method.momentum
        assert momentum.at(progress) == pytest.approx(0.992)
        assert momentum.at(dataclasses.replace(progress, step=62_500)) == pytest.approx(0.996)


# -- bases and overrides -------------------------------------------------------------------------------------


def test_a_base_is_changed_key_by_key(tmp_path):
    (tmp_path / "grand.yaml").write_text(
        "seed: 1\nmethod: {patch: null}\nabout: {method: A, model: B}\nmodel: {width: 32, heads: 2}\n"
    )
    (tmp_path / "parent.yaml").write_text("base: grand.yaml\nabout: {model: C}\nmodel: {depth: 3}\n")
    (tmp_path / "child.yaml").write_text("base: parent.yaml\nseed: 5\nmodel: {width: 64}\n")
    config = resolve(tmp_path / "child.yaml", ["model.heads=4"])
    assert (config.recipe, config.seed) == ("child", 5)
    assert config.model.shape == (64, 3, 4)
    assert (config.about.method, config.about.model) == ("A", "C")
    (tmp_path / "own.yaml").write_text("base: ibot-vits16-in1k\nrecipe: mine\nduration: 3 epochs\n")
    mine = resolve(tmp_path / "own.yaml")
    assert (mine.recipe, mine.duration) == ("mine", "3 epochs")
    assert mine.method == resolve("ibot-vits16-in1k").method


def test_overrides_in_words_and_in_python_agree():
    words = resolve(
        "demo", ["model.depth=2", "optimizer.lr.value=1e-3", "views.masking={}", "data=folder:/a b"]
    )
    python = resolve(
        "demo",
        {
            "model": {"depth": 2},
            "optimizer.lr.value": 1e-3,
            "views": {"masking": {}},
            "data": "folder:/a b",
        },
    )
    assert words == python
    assert nested({"a.b": {"c.d": 1}, "a": {"e": 2}}) == {"a": {"b": {"c": {"d": 1}}, "e": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere", "unknown recipe 'nowhere'"),
        ("base: gone.yaml", "no configuration file .*gone.yaml"),
        ("base: own.yaml", "own.yaml: its base leads back to .*own.yaml"),
        ("base: ibot-vits16-in1\n", "unknown recipe 'ibot-vits16-in1'; did you mean 'ibot-vits16-in1k'"),
        ("sede: 1", "unknown key 'sede'; did you mean 'seed'"),
        (
            "views: {global_size: 30}",
            "views.global_size=30 is not a multiple of the patch size 16; try 16 or 32",
        ),
        ("transform: {resize: 60, crop: 60}", "transform.crop=60 is not a multiple of the patch size 16"),
        ("batch_size: 0", "batch_size: must be >= 1, got 0"),
        ("precision: fp8", "precision: expected one of fp32, bf16, fp16; got 'fp8'"),
        ("method: {patch: {head: other}}", "patch.head='other' is not among heads: main"),
        ("{", "line 2"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text if "base" in text else f"views: {{masking: {{}}}}\n{text}")
    if text.startswith("views"):
        (tmp_path / "own.yaml").write_text("views: {masking: {}, global_size: 30}")
    with pytest.raises(UserError, match=message) as caught:
        resolve(tmp_path / "own.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr.value=-1", r"^optimizer.lr.value: must be >= 0, got -1.0$"),
        ("optimizer.lr.value=.inf", r"^optimizer.lr.value: expected float, got inf$"),
        ("optimizer.lr.end=-1e-6", r"^optimizer.lr.end: must be >= 0"),
        ("optimizer.weight_decay.end=-0.1", r"^optimizer.weight_decay.end: must be >= 0"),
        ("method.momentum.value=2", r"^method.momentum.value: must be <= 1, got 2.0$"),
        ("method.momentum.value=-1", r"^method.momentum.value: must be >= 0"),
        ("method.token.target.temperature.value=-1", r"^method.token.target.temperature.value: must be > 0"),
        ("method.patch.target.temperature.value=0", r"^method.patch.target.temperature.value: must be > 0"),
        ("method.token.target.temperature.start=null", r"temperature.start: must be > 0, got 0.0$"),
        ("optimizer.parts.x.schedule.value=-1", r"^optimizer.parts.x.schedule.value: must be >= 0"),
        ("method.heads.main.prototypes=1000000000000", r"^method.heads.main.prototypes: must be <= 16777216"),
        ("views.global_size=100000", r"^views.global_size: must be <= 8192, got 100000$"),
        ("model.width=1000000000", r"^model.width: must be <= 65536"),
        ("model.depth=100000000", r"^model.depth: must be <= 1000"),
        (f"seed={2**64}", r"^seed: must be <= 18446744073709551615, got 18446744073709551616$"),
        ("epochs=10", r"^unknown key 'epochs'; write duration='10 epochs'$"),
        ("lr=1e-3", r"^unknown key 'lr'; write optimizer.lr.value=0.001$"),
        ("optimizer.lr=0.001", r"got 0.001; did you mean optimizer.lr.value=0.001\?$"),
        ("duration=100", r"^duration=100 has no unit: write '100 epochs' or '100 steps'$"),
        ("model=base", r"got 'base'; did you mean model.size='base'\?$"),
    ],
)
def test_numbers_and_words_that_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve("ibot-vits16-in1k", [override])
    assert "\n" not in str(caught.value)


def test_a_run_that_was_once_given_a_bare_number_of_steps_still_loads(tmp_path):
    tree = to_dict(resolve("demo")) | {"duration": "7"}
    (tmp_path / "config.yaml").write_text(dump_yaml(tree))
    assert plan(resolve(tmp_path / "config.yaml"), 640).total_steps == 7


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("dino-vits16-in1k", ["views.local_count=0", "views.local_size=32"], "no local views"),
        ("ibot-vits16-in1k", ["loader.objects_per_image=2"], r"objects are not used \(views.objects=null\)"),
        ("ibot-tiny-tinyimagenet", ["method.patch.center=all"], "target.kind=sinkhorn has no centre"),
        ("ibot-tiny-tinyimagenet", ["method.heads.other.hidden=32"], "no term names this head"),
        ("ibot-tiny-tinyimagenet", ["method.token.target.momentum=0.5"], "kind=sinkhorn has no running mean"),
        ("ibot-vits16-in1k", ["optimizer.clip=null", "optimizer.clip_each=all"], "clip=null"),
        ("ibot-vits16-in1k", ["model.rope=capi"], "positions=learned does not rotate"),
        ("capi-vits14", ["method.targets=features", "method.clustering.iterations=2"], "no clusters"),
        ("capi-vits14", ["method.mlp.hidden=8"], "head=linear"),
        ("ibot-vits16-in1k", ["optimizer.lr.warmup=0 steps", "optimizer.lr.start=0.1"], "no warm-up"),
        (
            "demo",
            ["model={size: base, width: 96, depth: 3, heads: 3}"],
            "width, depth and heads are all given",
        ),
    ],
)
def test_a_key_without_effect_is_an_error_with_the_reason(recipe, overrides, message):
    with pytest.raises(ConfigError, match=rf"^[\w.]+ has no effect: .*{message}"):
        resolve(recipe, overrides)
    changes = parse_overrides(overrides)
    assert build(RunConfig, merge(to_dict(resolve(recipe)), changes))  # as a run of before may say


def test_capi_has_no_object_tokens_as_mae_and_ijepa_have_none():
    for recipe in ("capi-tiny-tinyimagenet", "mae-tiny-tinyimagenet", "ijepa-tiny-tinyimagenet"):
        with pytest.raises(ConfigError, match=r"has no object tokens: views.objects.attention=false"):
            resolve(recipe, ["views.objects={aware: true, attention: true}"])
        assert resolve(recipe, ["views.objects={aware: true, attention: false}"]).views.objects is not None


def test_a_size_resets_width_depth_and_heads_of_the_recipe_below(tmp_path):
    assert resolve("odis-tiny-tinyimagenet", ["model.size=base"]).model.shape == (768, 12, 12)
    assert resolve("demo", ["model.size=tiny", "model.depth=2"]).model.shape == (192, 2, 3)
    assert resolve("demo", ["model.depth=2"]).model.shape == (96, 2, 3)
    (tmp_path / "mine.yaml").write_text("base: demo\nmodel: {size: small}\n")
    assert resolve(tmp_path / "mine.yaml").model.shape == (384, 12, 6)
    assert resolve(tmp_path / "mine.yaml", ["model.heads=12"]).model.shape == (384, 12, 12)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.masking.probability=0.0", "method.patch never sees a masked patch: .*probability=0.0"),
        ("views.masking.ratio=[0.0, 0.01]", "at most 0.01 of 64 patches is less than one"),
    ],
)
def test_terms_that_would_stay_zero_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        resolve("ibot-tiny-tinyimagenet", [override])


def test_shortening_a_recipe_by_its_duration_alone():
    """1,500 images: every warm-up that does not fit takes 30 % of the run, the others what they say."""
    for name in ("ibot-vits16-in1k", "dinov2-vits16-in1k", "mae-vits16-in1k", "posfield-vits16-in1k"):
        config = resolve(name, {"duration": "5 epochs", "batch_size": 64, "checkpoint_every": "1 epochs"})
        progress = plan(config, 1500)
        assert progress.total_steps == 115
        told = {path: text for path, s in schedules(config) if (text := s.shortened(progress))}
        assert "optimizer.lr" in told
        assert "longer than the run of 115: it takes 30% of it" in told["optimizer.lr"]
        peak = config.optimizer.lr
        assert peak.at(dataclasses.replace(progress, step=33)) == peak.value  # the last of 34 (0.3 x 115)
        assert peak.at(dataclasses.replace(progress, step=32)) < peak.value


def test_a_run_folder_is_not_a_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(
        ConfigError, match=r"is a run folder; to go on with it: foveola pretrain .*/config.yaml out="
    ):
        resolve(tmp_path)


def test_the_encoder_of_a_run():
    config = resolve("ibot-vits16-in1k")
    made = config.encoder()
    assert (made.transform.resize, made.transform.crop) == (256, 224)
    assert made.model == dataclasses.replace(config.model, drop_path=0.0, channels=3)
    own = resolve("demo", ["transform={resize: 40, crop: 36}", "views.color.mean=[0.5, 0.5, 0.5]"])
    assert (own.encoder().transform.resize, own.encoder().transform.crop) == (40, 36)
    small = resolve("demo", ["transform=null", "views.color.mean=[0.5, 0.5, 0.5]"])
    assert small.encoder().transform.resize == 37
    assert small.encoder().transform.mean == (0.5, 0.5, 0.5)


# -- durations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "total"),
    [
        ("800 epochs", 800 * (IMAGENET // 1024)),
        ("1000 steps", 1000),
        ("1M samples", round(1e6 / 1024)),
    ],
)
def test_the_length_of_a_run(duration, total):
    config = resolve("dino-vits16-in1k", {"duration": duration})
    assert plan(config, IMAGENET) == Progress(0, total, IMAGENET // 1024, 1024)


def test_periods():
    config = resolve("demo", {"checkpoint_every": "10 %", "evaluate_every": "2 epochs", "keep_every": None})
    progress = Progress(0, 500, 70, 64)
    names = ("checkpoint_every", "evaluate_every", "keep_every")
    assert [period(config, name, progress) for name in names] == [50, 140, None]


def test_all_schedules_are_found_with_their_paths():
    paths = [path for path, _ in schedules(resolve("ibot-vits16-in1k"))]
    assert sorted(paths) == [
        "method.momentum",
        "method.patch.target.temperature",
        "method.token.target.temperature",
        "optimizer.lr",
        "optimizer.weight_decay",
    ]
    assert durations.PERIODS == ("checkpoint_every", "keep_every", "evaluate_every")


def test_a_share_of_a_short_run_is_every_step_at_least():
    """A tenth of four steps is each of them; what is no fraction of the run, or none at all, is refused."""
    config = resolve("demo", {"duration": "4 steps", "batch_size": 16})
    for share, steps in (("10 %", 1), ("0.1%", 1), ("25 %", 1), ("50 %", 2)):
        changed = replace(config, checkpoint_every=share)
        assert period(changed, "checkpoint_every", plan(changed, 64)) == steps
    for duration in ("0 %", "0.0 %", "3 samples", "0.01 epochs"):
        with pytest.raises(ConfigError, match=f"checkpoint_every: '{duration}' is less than a step of 16"):
            plan(replace(config, checkpoint_every=duration), 64)


def test_a_mistyped_test_is_told():
    with pytest.raises(ConfigError, match=r"unknown key 'tset'; did you mean 'test'\?"):
        with_test("classify-small", {"data": "folder:/x", "tset": "folder:/y"}, None)
    with pytest.raises(ConfigError, match=r"unknown key 'sed'; did you mean 'seed'\?"):
        resolve("classify-small", with_test("classify-small", {"sed": 3}, None))


def test_auto_does_not_fine_tune():
    with pytest.raises(ConfigError, match=r"auto chooses how to pretrain, .* --dry-run measures its step"):
        with_test("auto", {"data": "folder:/x"}, None)
