"""The model card of an export: what the weights are, and where they come from (Mitchell et al.,
arXiv 1810.03993).

Markdown with the YAML header that model hubs read (huggingface.co/docs/hub/model-cards). Every
value may come from somebody else's run: the template escapes every value it prints, a YAML writer
makes the header, and code stands in a fence of its own length.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve, scaled_lr
from conadv.config.schema import Config, replace
from conadv.errors import printable
from conadv.methods import METHODS
from conadv.models import family
from conadv.models.make import arguments
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""The hub's names of data that torchvision downloads; a folder of the user's has none."""
_AUXILIARY = ("inception_v3", "googlenet")  # conadv builds them without their auxiliary logits
SPLITS = {
    "test": "test images",
    "validation": "images held out of training",
    "train": "training images, without augmentation",
    "robust": "test images under PGD",
}


class Raw(str):
    """Text that the template prints as it is: it was made safe here."""


def model_card(run: RunDir, state: dict[str, Any]) -> str:
    """The card for the weights of the checkpoint ``state`` of ``run``, as text.

    Accuracies are those that the record has for just this step, of images that the run names by
    their split; a split that was not evaluated then is not there. Raises ConadvError for a record
    that cannot be read.
    """
    config = resolve(run.open())
    lines = read_lines(run.record) if run.record.is_file() else []
    header: dict[str, Any] = next(
        (line for line in reversed(lines) if line["type"] == "header"), {}
    )
    evaluations = _evaluations(lines, int(state["step"]))
    size = state.get("image_size", config.data.image_size)
    # batch-norm statistics are recalibrated after the last step only
    ended = header.get("steps") == state["step"]
    eps = config.eval.robust_eps
    # the data may lie elsewhere for the reader
    settings = fenced(dump_yaml(replace(config, data__dir=None)), "yaml")
    template = _ENVIRONMENT.get_template("model_card.md.j2")
    return template.render(
        metadata=Raw(
            yaml.safe_dump(_metadata(config, evaluations), sort_keys=False, allow_unicode=True)
        ),
        config=config,
        state=state,
        header={"versions": None, "machine": None, **header},
        pixels=f"{size} x {size} pixels" if size else "the data's own size",
        recalibrated=ended and config.eval.precise_bn_images is not None,
        evaluations=evaluations,
        splits=SPLITS,
        robust_eps=config.attack.eps if eps is None else eps,
        code=fenced(_code(config, state), "python"),
        mixed={
            "mixup": config.data.mixup,
            "cutmix": config.data.cutmix,
            "label smoothing": config.label_smoothing,
        },
        method=METHODS[config.method],
        lr=scaled_lr(config.optim, config.global_batch_size),
        command=fenced("conadv train --config config.yaml", "sh"),
        settings=settings,
    )


def escape(value: object) -> str:
    """Text of one line that Markdown shows as it is: no markup, table cell, link or HTML begins in
    it.
    """
    if isinstance(value, Raw):
        return value
    text = printable(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_|\[\]~#$:@])", r"\\\1", text)
    return re.sub(r"(?<=\w)\\_(?=\w)", "_", text)


_ENVIRONMENT = Environment(
    loader=PackageLoader("conadv.training", "."),
    finalize=escape,  # applied to every printed value
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)


def fenced(text: str, language: str) -> Raw:
    """A code block that nothing inside of ``text`` can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text.rstrip()}\n{fence}\n")


def _evaluations(lines: list[dict[str, Any]], step: int) -> dict[str, dict[str, Any]]:
    """The last evaluation of each split at ``step``."""
    evals = (line for line in lines if line["type"] == "eval" and line["step"] == step)
    found = {str(line.get("split")): line for line in evals if line.get("accuracy") is not None}
    return {split: found[split] for split in SPLITS if split in found}


def _metadata(config: Config, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    name, source = printable(config.model.name), config.data.source
    tags = ["image-classification", "conadv", "large-batch", config.method]
    about: dict[str, Any] = {
        "library_name": "timm" if family(name) == "timm" else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys(tags)),
        "metrics": ["accuracy"],
    }
    if config.data.download and source in HUB_DATASETS:
        about["datasets"] = [HUB_DATASETS[source]]
    if "test" in evaluations:
        accuracy = float(evaluations["test"]["accuracy"])
        metric = {"type": "accuracy", "value": accuracy, "name": "accuracy"}
        dataset = {"name": source, "type": about.get("datasets", [source])[0], "split": "test"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        about["model-index"] = [{"name": f"{name} {config.method}", "results": [result]}]
    return about


def _code(config: Config, state: dict[str, Any]) -> str:
    mean, std = list(config.data.mean), list(config.data.std)
    return f"""\
import torch
from safetensors.torch import load_file
{_constructor(config, int(state["channels"]), len(state["class_names"]))}
model.load_state_dict(load_file("model.safetensors"), strict=True)
model.eval()
mean, std = torch.tensor({mean}).view(-1, 1, 1), torch.tensor({std}).view(-1, 1, 1)
# logits = model((pixels - mean) / std), pixels in [0, 1], (N, C, H, W)"""


def _constructor(config: Config, channels: int, classes: int) -> str:
    """Lines that make ``model``, by the network's own constructor where it is not conadv's."""
    name, kind = config.model.name, family(config.model.name)
    short = name.removeprefix(f"{kind}:")
    options = "".join(f", {key}={value!r}" for key, value in arguments(config.model.args).items())
    if kind == "timm":
        call = f"timm.create_model({short!r}, in_chans={channels}, num_classes={classes}{options})"
        return f"import timm\n\nmodel = {call}"
    if kind == "torchvision" and short not in _AUXILIARY:
        call = f"get_model({short!r}, weights=None, num_classes={classes}{options})"
        return f"from torchvision.models import get_model\n\nmodel = {call}"
    lines = "from conadv.models.make import build_model\n"
    if kind == "own":
        lines += "from conadv.models.own import trust\n"
        lines += f"\ntrust({name!r})  # this is the author's own code"
    given = {"width": config.model.width, "args": config.model.args}
    more = "".join(f", {key}={value!r}" for key, value in given.items() if value)
    return f"{lines}\nmodel = build_model({name!r}, {channels}, {classes}{more})"
