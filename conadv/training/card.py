"""The model card of an export: what the weights are, and where they come from (Mitchell et al., arXiv 1810.03993).

Markdown with the YAML header that model hubs read (huggingface.co/docs/hub/model-cards). Every value may come from
somebody else's run: text is escaped, a YAML writer makes the header, and code stands in a fence of its own length.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from conadv.config.schema import Config, dump_yaml, replace, resolve, scaled_lr
from conadv.errors import printable
from conadv.methods import METHODS
from conadv.models import family
from conadv.models.make import arguments
from conadv.training.record import read_lines
from conadv.training.run_dir import RunDir

HUB_DATASETS = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""The hub's names of data that torchvision downloads; a folder of the user's has none."""
_AUXILIARY = ("inception_v3", "googlenet", "torchvision:inception_v3", "torchvision:googlenet")
"""Networks that conadv builds without their auxiliary logits."""
SPLITS = {
    "test": "test images",
    "validation": "images held out of training",
    "train": "training images, without augmentation",
    "robust": "test images under PGD",
}


def model_card(run: RunDir, state: dict[str, Any]) -> str:
    """The card for the weights of the checkpoint ``state`` of ``run``, as text.

    Accuracies are those that the record has for just this step, of images that the run names by their split; a split
    that was not evaluated then is not there. Raises ConadvError for a record that cannot be read.
    """
    config = resolve(run.open())
    lines = read_lines(run.record) if run.record.is_file() else []
    found = _accuracies(lines, int(state["step"]))
    parts = [
        f"---\n{yaml.safe_dump(_metadata(config, found), sort_keys=False, allow_unicode=True)}---\n",
        f"# {escape(config.model.name)}, trained with {escape(config.method)}\n",
        _bullets(_what(config, state, _header(lines))),
        "## Accuracy\n\n" + _results(config, found),
        "## Use\n\n" + _use(config, state),
        "## Training\n\n" + _bullets(_training(config, state, lines)),
        f"The command, with this file and your `--data` where the data is a folder:\n\n{_command(config)}",
    ]
    return "\n".join(parts)


def escape(value: object) -> str:
    """Text of one line that Markdown shows as it is: no markup, table cell, link or HTML begins in it."""
    text = printable(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_|\[\]~#$:@])", r"\\\1", text)
    return re.sub(r"(?<=\w)\\_(?=\w)", "_", text)


def fenced(text: str, language: str) -> str:
    """A code block that nothing inside of ``text`` can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _accuracies(lines: list[dict[str, Any]], step: int) -> dict[str, dict[str, Any]]:
    """The last evaluation of each split at ``step``."""
    evals = (line for line in lines if line["type"] == "eval" and line["step"] == step)
    good = {
        str(line.get("split")): line
        for line in evals
        if isinstance(line.get("accuracy"), (int, float))
    }
    return {split: good[split] for split in SPLITS if split in good}


def _metadata(config: Config, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    name, source = printable(config.model.name), config.data.source
    about: dict[str, Any] = {
        "library_name": "timm" if family(name) == "timm" else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": list(
            dict.fromkeys(["image-classification", "conadv", "large-batch", config.method])
        ),
        "metrics": ["accuracy"],
    }
    if config.data.download and source in HUB_DATASETS:
        about["datasets"] = [HUB_DATASETS[source]]
    if "test" in found:
        metric = {"type": "accuracy", "value": float(found["test"]["accuracy"]), "name": "accuracy"}
        dataset = {"name": source, "type": about.get("datasets", [source])[0], "split": "test"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        about["model-index"] = [{"name": f"{name} {config.method}", "results": [result]}]
    return about


def _bullets(rows: list[str]) -> str:
    return "".join(f"* {row}\n" for row in rows)


def _what(config: Config, state: dict[str, Any], header: dict[str, Any]) -> list[str]:
    names = [escape(name) for name in state["class_names"]]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    ended = header.get("steps") == state["step"]
    size = state.get("image_size", config.data.image_size)
    return [
        f"Network: {escape(config.model.name)} {escape(' '.join(config.model.args))}".rstrip(),
        f"Input: {state['channels']} channel(s), "
        + (f"{size} x {size} pixels" if size else "the data's own size"),
        f"Classes ({len(names)}): {shown}",
        f"Weights: the clean batch-norm route after {state['step']} updates{_after(config, ended)}, "
        "in `model.safetensors`",
        "Licence: none is stated, neither of these weights nor of the images. Add yours.",
    ]


def _header(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return next((line for line in reversed(lines) if line["type"] == "header"), {})


def _after(config: Config, ended: bool) -> str:
    """What has been done to the weights beside the updates; statistics are made anew after the last one only."""
    done = "" if config.ema.decay is None else f", averaged with decay {config.ema.decay:g}"
    if config.eval.precise_bn_images is not None and ended:
        done += f", with batch-norm statistics of {config.eval.precise_bn_images} images"
    return done


def _results(config: Config, found: dict[str, dict[str, Any]]) -> str:
    if not found:
        return "The record has no evaluation of these weights. `conadv eval RUN` makes one.\n"
    rows = ["| images | accuracy, % | loss | how many |", "| --- | --- | --- | --- |"]
    for split, line in found.items():
        what = SPLITS[split] + (_attack(config) if split == "robust" else "")
        loss = line.get("loss")
        shown = f"{loss:.4f}" if isinstance(loss, (int, float)) else "-"
        rows.append(
            f"| {what} | {100 * line['accuracy']:.2f} | {shown} | {escape(line.get('images', '-'))} |"
        )
    return "\n".join(rows) + "\n"


def _attack(config: Config) -> str:
    eps = config.eval.robust_eps if config.eval.robust_eps is not None else config.attack.eps
    return f", {config.eval.robust_steps} steps, {config.attack.norm}, eps {eps:g} of [0, 1] pixels"


def _use(config: Config, state: dict[str, Any]) -> str:
    mean, std = list(config.data.mean), list(config.data.std)
    code = f"""\
import torch
from safetensors.torch import load_file
{_constructor(config, int(state["channels"]), len(state["class_names"]))}
model.load_state_dict(load_file("model.safetensors"), strict=True)
model.eval()
mean, std = torch.tensor({mean}).view(-1, 1, 1), torch.tensor({std}).view(-1, 1, 1)
# logits = model((pixels - mean) / std), pixels in [0, 1], (N, C, H, W)"""
    return fenced(code, "python")


def _constructor(config: Config, channels: int, classes: int) -> str:
    """Lines that make ``model``: the network's own constructor where it has one outside of conadv."""
    name = config.model.name
    if family(name) == "timm":
        call = f"timm.create_model({name.removeprefix('timm:')!r}, in_chans={channels}, num_classes={classes}"
        return f"import timm\n\nmodel = {call}{_options(config)})"
    if family(name) == "torchvision" and name not in _AUXILIARY:
        call = (
            f"get_model({name.removeprefix('torchvision:')!r}, weights=None, num_classes={classes}"
        )
        return f"from torchvision.models import get_model\n\nmodel = {call}{_options(config)})"
    lines = "from conadv.models.make import build_model\n"
    if family(name) == "own":
        lines += "from conadv.models.own import trust\n"
        lines += f"\ntrust({name!r})  # this is the author's own code"
    given = {"width": config.model.width, "args": config.model.args}
    more = "".join(f", {key}={value!r}" for key, value in given.items() if value)
    return f"{lines}\nmodel = build_model({name!r}, {channels}, {classes}{more})"


def _options(config: Config) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments(config.model.args).items())


def _training(config: Config, state: dict[str, Any], lines: list[dict[str, Any]]) -> list[str]:
    header = _header(lines)
    rows = [
        f"Recipe: {escape(config.recipe)}; data: {config.data.source}, augmentation {config.data.augment}"
        + _mixed(config),
        f"Method: {config.method} ({METHODS[config.method].summary})" + _method(config),
        f"Optimizer: {config.optim.name}, peak learning rate {scaled_lr(config.optim, config.global_batch_size):g}, "
        f"warm-up {config.schedule.warmup_epochs:g} epochs, {config.schedule.decay} decay",
        f"Batch: {config.global_batch_size} clean images per update, {config.micro_batch_size} per batch norm; "
        + _length(config),
        f"Seed {config.seed}, {config.precision}",
    ]
    for title, facts in (("Versions", header.get("versions")), ("Machine", header.get("machine"))):
        if isinstance(facts, dict):
            rows.append(
                f"{title}: " + ", ".join(f"{escape(k)} {escape(v)}" for k, v in facts.items())
            )
    return rows


def _mixed(config: Config) -> str:
    """What else is done to images and labels."""
    data, said = config.data, ""
    if data.aug_view:
        said += f", third view {data.aug_view}"
    for name, value in (
        ("mixup", data.mixup),
        ("cutmix", data.cutmix),
        ("label smoothing", config.label_smoothing),
    ):
        said += f", {name} {value:g}" if value else ""
    return said


def _length(config: Config) -> str:
    return f"{config.steps} updates" if config.steps is not None else f"{config.epochs:g} epochs"


def _method(config: Config) -> str:
    facts = [f"staleness {config.staleness}" if config.method == "conadv" else ""]
    facts.append("look-ahead" if config.lookahead else "")
    row = METHODS[config.method]
    facts.append(
        f"batch norm of adversarial images: {config.adv_route}"
        if "adv_route" in row.settings and config.adv_route != "own"
        else ""
    )
    facts.append(f"eps {config.attack.eps:g} of [0, 1] pixels" if "eps" in row.attack else "")
    return "".join(f"; {fact}" for fact in facts if fact)


def _command(config: Config) -> str:
    """The file that repeats the run, without the folder that the data lay in."""
    text = dump_yaml(replace(config, data__dir=None))
    return fenced("conadv train --config config.yaml", "sh") + "\n" + fenced(text, "yaml")
