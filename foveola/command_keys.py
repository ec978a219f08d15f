"""The keys of commands that are no fields of a configuration, as `--help` lists them."""

from foveola.config import KeyInfo

DEVICE = KeyInfo("device", "text or null", None, "cpu, cuda, cuda:1; null = a GPU if there is one")
EVALUATE_KEYS = [
    KeyInfo(
        "model",
        "text",
        "(needed)",
        "what to measure: a run or encoder folder, RUN?step=400, RUN?step=best, RUN?which=student, a file of "
        "weights, timm:NAME, hf:NAME; or untrained:ANY",
    ),
    KeyInfo(
        "train",
        "text or null",
        None,
        "labelled data to learn from, as a data string, where the protocol does",
    ),
    KeyInfo(
        "test",
        "text",
        "(needed)",
        "data to measure on, as a data string; several, joined by commas, have a result each",
    ),
    KeyInfo(
        "out",
        "text or null",
        None,
        "folder for results/<protocol>.json; null = that of the run, RUN/untrained for untrained:RUN",
    ),
    KeyInfo(
        "cache",
        "text or null",
        None,
        "folder that keeps features; null = that of FOVEOLA_CACHE, or temporary",
    ),
    DEVICE,
    KeyInfo("overlap", "refuse|drop|allow", "refuse", "test images that train holds as well, byte for byte"),
]
PACK = [
    KeyInfo("data", "text", "(needed)", "images, as a data string"),
    KeyInfo("out", "text", "(needed)", "new folder for the shards; it appears when all of them are written"),
]
ANALYZE = [
    KeyInfo("model", "text", "(needed)", "encoders, each as for evaluate, joined by commas"),
    KeyInfo("data", "text", "(needed)", "images, as a data string; labels and objects are not used"),
    KeyInfo("out", "text", "(needed)", "folder for attention.json, attention.csv and charts"),
    DEVICE,
]
VISUALIZE = [
    KeyInfo(
        "model", "text", "(needed)", "encoders, each as for evaluate, joined by commas; each has a column"
    ),
    KeyInfo("data", "text", "(needed)", "images, as a data string; not for positions"),
    KeyInfo("out", "text", "figures", "folder for KIND.png, or a file that ends in .png"),
    DEVICE,
]
TRAIN = KeyInfo(
    "train",
    "text or null",
    None,
    "images among which neighbours are searched, as a data string; null = the train split of data",
)
EXPORT = [
    KeyInfo(
        "out",
        "text",
        "(needed)",
        "new folder, or file that ends in .onnx, .pt2, .safetensors or .pth; a folder gets a model card",
    ),
    KeyInfo(
        "format",
        "timm|hf|onnx|program|safetensors|torch or null",
        None,
        "library that is to load it; program: of torch.export; safetensors, torch: for "
        "foveola.load; null = by the suffix of out; timm for a folder",
    ),
    KeyInfo(
        "head",
        "true|false",
        True,
        "export the head of a fine-tuned encoder as well; timm and hf leave it out, and warn unless false",
    ),
    KeyInfo("objects", "true|false", False, "onnx, program: masks of objects as a second input"),
    KeyInfo(
        "licence", "text or null", None, "licence of the weights, for the model card, such as apache-2.0"
    ),
]
CHECK_KEYS = [
    KeyInfo("out", "text or null", None, "folder for check.json and check.html; null = nothing is written"),
    KeyInfo("images", "int >= 1", 512, "how many images are read, evenly spread over the data set"),
]
DEMO = [
    KeyInfo("out", "text", "runs/demo", "folder of the runs out/seed-0, ..., of demo.png and of report.html"),
    KeyInfo("seeds", "int >= 1", 1, "how many runs to average; each starts from another seed"),
    KeyInfo(
        "processes",
        "int >= 1 or null",
        None,
        "processes that share each batch in training; null: two on a CPU of two cores or more, else one",
    ),
]
FINETUNE_KEYS = [
    KeyInfo(
        "test",
        "text or null",
        None,
        "annotated data on which the protocol of the task measures every tenth of the run, as a data string",
    ),
]
AUTO_KEYS = [
    KeyInfo("data", "text", "(needed)", "images to train on, as a data string"),
    KeyInfo(
        "budget",
        "text",
        "1 hour",
        "time on this machine ('2 hours', '30 min'), of all GPUs together ('1 GPU-day'), or '5000 steps'",
    ),
    KeyInfo(
        "init",
        "text",
        "(planned)",
        "weights to start from; none = from nothing; not given = public ones that are on this machine",
    ),
]
EMBED = [
    KeyInfo("model", "text", "(needed)", "encoder: a run or encoder folder, or weights, as for evaluate"),
    KeyInfo("data", "text", "(needed)", "images, as a data string, with the objects that it has"),
    KeyInfo("out", "text", "(needed)", "file to write: it ends in .parquet, .npz or .zarr"),
    DEVICE,
]
SEARCH = [
    KeyInfo("index", "text", "(needed)", "a file that foveola embed wrote"),
    KeyInfo("query", "text", "(needed)", "images, joined by commas, or a data string"),
    KeyInfo(
        "box",
        "[float, float, float, float] or null",
        None,
        "x0,y0,x1,y1 in pixels: the object of the query to search for",
    ),
    KeyInfo("top", "int >= 1", 10, "rows to find for each query"),
    KeyInfo("model", "text or null", None, "encoder of the index; null = the one that the index names"),
    KeyInfo("method", "exact|hnsw", "exact", "hnsw: by a graph, for more than a million rows"),
    KeyInfo(
        "out", "text or null", None, "file to write as well: the result (.json), or a sheet of images (.png)"
    ),
    KeyInfo(
        "data",
        "text or null",
        None,
        "for out=FILE.png: images of the index, as a data string; null = those that it names",
    ),
    DEVICE,
]
EXPLORE = [
    KeyInfo("data", "text or null", None, "images, as a data string; null = those that features name"),
    KeyInfo(
        "host", "text", "127.0.0.1", "address to listen on; 0.0.0.0 = for other machines too, unencrypted"
    ),
    KeyInfo("port", "int or null", None, "port to listen on; null = any free one"),
    KeyInfo("cache", "text or null", None, "folder that keeps features; null = RUN/explore, or the cache"),
    DEVICE,
]
MASKS = [
    KeyInfo("data", "text", "(needed)", "images, as a data string (docs/data.md)"),
    KeyInfo("model", "text", "(needed)", "what finds the objects; which models there are depends on KIND"),
    KeyInfo("out", "text", "(needed)", "folder for objects.json and its contact sheet"),
    DEVICE,
]
MASKS_CHECK = [
    KeyInfo(
        "annotations", "text", "(needed)", "file of objects in COCO's format, as `foveola masks` writes it"
    ),
    KeyInfo("data", "text", "(needed)", "images with the true objects, as a data string (docs/data.md)"),
    KeyInfo(
        "out", "text or null", None, "folder for results/masks_check.json; null = that of the annotations"
    ),
]
