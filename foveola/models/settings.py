"""Settings of an encoder that its fingerprint tells: what changes its numbers."""

from typing import Any

from foveola.config import to_dict
from foveola.models.shape import ViTConfig
from foveola.models.transform import TransformConfig

# Keys without which earlier fingerprints were made.
LATER = {
    "model": ("window", "global_blocks", "relative_bias", "final_norm", "patch_norm", "channels"),
    "transform": ("range", "channels", "pages", "show"),
}


def telling_settings(config: Any) -> dict[str, Any]:
    """Return the settings of an `EncoderConfig` but those that say where weights come from, and later keys
    where they have their usual values.
    """
    settings = {name: value for name, value in to_dict(config).items() if name not in ("origin", "step")}
    for group, usual in (("model", to_dict(ViTConfig())), ("transform", to_dict(TransformConfig()))):
        idle = {name for name in LATER[group] if settings[group][name] == usual[name]}
        settings[group] = {name: v for name, v in settings[group].items() if name not in idle}
    return settings
