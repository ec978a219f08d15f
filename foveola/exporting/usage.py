"""How an exported encoder is used, in a few lines of Python."""

from typing import Any

from foveola.models.encoder import Encoder

MORE_FACTS = 'opened.get_modelmeta().custom_metadata_map  # "resized", "sizes", "classes", ...'

EIGHT_BITS = "the range of the encoder (transform.range of its config) as 0 to 255, scaled by you"


def how_to_load(format: str, path: str, encoder: Encoder, about: dict[str, Any]) -> str:
    """Return lines of Python that load what is at `path`; `about` is what its file says of itself."""
    side, channels = encoder.config.transform.crop, len(encoder.config.transform.mean)
    name = repr(path)
    ranged = encoder.config.transform.value_ranges is not None
    # Their transforms know images of 8 bits alone.
    scaled = f"\n# image: {EIGHT_BITS}" if ranged else ""
    if format == "timm":
        start = f'import timm\n\nmodel = timm.create_model("local-dir:" + {name}, pretrained=True).eval()\n'
        if channels != 3:
            within = f"in [0, 1]{' of their range' * ranged}"
            return (
                f"{start}features = model(images)          # [B, {encoder.config.model.shape[0]}]\n"
                f"# images: [B, {channels}, {side}, {side}] {within}, less mean, over std of its\n"
                "# pretrained_cfg, since transforms of timm know RGB alone"
            )
        return (
            f"{start}"
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            f"features = model(transform(image)[None])       # [1, {encoder.config.model.shape[0]}]{scaled}"
        )
    if format == "hf":
        laid = "" if channels == 3 else ', input_data_format="channels_last"'
        array = "" if channels == 3 else f"\n# image: an array [H, W, {channels}], 0 to 255"
        token = "[:, 0]" if encoder.config.model.class_token else ".mean(dim=1)"
        return (
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            f"model = AutoModel.from_pretrained({name})\n"
            f"processor = AutoImageProcessor.from_pretrained({name})\n"
            f'tokens = model(**processor(image{laid}, return_tensors="pt")).last_hidden_state\n'
            f"features = tokens{token}          # not pooler_output, which is untrained{array}{scaled}"
        )
    if format in ("onnx", "program"):
        return _program(format, name, about, f"[B, {channels}, {side}, {side}]")
    return f"import foveola\n\nencoder = foveola.load({name})\n" + (
        "answers = encoder.predict(image)" if encoder.head is not None else "features = encoder.embed(image)"
    )


def _program(format: str, name: str, about: dict[str, Any], shape: str) -> str:
    gives = ", ".join(about["gives"])
    others = [each for each in ("masks", "extent") if each in about]
    comments = [
        f"# {each}: {about[each]}" for each in ("images", "resized", "sizes", *others) if each in about
    ]
    comments += [f"# {each}: {shape_}" for each, shape_ in about["gives"].items()]
    if format == "onnx":
        asked = ", ".join(f'"{each}": {each}' for each in ("images", *others))
        lines = [
            "import onnxruntime",
            "",
            f"opened = onnxruntime.InferenceSession({name})",
            f"{gives}{',' if len(about['gives']) == 1 else ''} = opened.run(None, {{{asked}}})",
            MORE_FACTS,
        ]
    else:
        lines = [
            *(["import torchvision"] if "needs" in about else []),
            "import torch",
            "",
            f"run = torch.export.load({name}).module()",
            f"found = run({', '.join(('images', *others))})          # a dict of {gives}",
        ]
    return "\n".join([*lines, *comments])
