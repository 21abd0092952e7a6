"""Split batch norm on torchvision's and timm's networks: runs each, writes zoo.json and the table of docs/models.md.

    python benchmarks/zoo.py --out results/models        # about ten minutes on one core, 8 GB of memory
    python benchmarks/zoo.py --out results/models --table-only

``check`` is what one row means; tests/test_zoo.py runs it on the same cases (the big ones without their forward pass).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv.models.make import build_model
from conadv.models.trial import check_model
from conadv.nn.split_batchnorm import (
    CLEAN,
    SplitBatchNorm,
    check_routes,
    route,
    split_batchnorm,
    strip,
)
from conadv.optim.groups import MODEL_RULES, parameter_groups

CLASSES, IMAGES = 5, 3
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
SIZES = {
    "inception_v3": 75,
    "vit_h_14": 28,
    "maxvit_t": 224,
}  # others: 32, and 64 where images are halved often
ARGS = {"vit_h_14": ("image_size=28",), "maxvit_t": ()}

# One small network of each timm family (a module of timm.models), with the size that it takes.
TIMM = {
    "byoanet": ("halonet_h1", 256),
    "byobnet": ("mobileone_s1", 32),
    "convmixer": ("convmixer_768_32", 32),
    "cpubone": ("cpubone_nano", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "densenet": ("densenet121", 32),
    "dla": ("dla46x_c", 32),
    "dpn": ("dpn48b", 32),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("efficientnet_b0", 32),
    "efficientvim": ("efficientvim_m1", 224),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "ghostnet": ("ghostnet_050", 32),
    "hardcorenas": ("hardcorenas_b", 32),
    "hgnet": ("hgnetv2_b0", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 75),
    "inception_v3": ("inception_v3", 75),
    "inception_v4": ("inception_v4", 75),
    "lcnetv2": ("lcnetv2_small", 32),
    "levit": ("levit_128s", 224),
    "lowformer": ("lowformer_b0", 64),
    "maxxvit": ("coatnet_pico_rw_224", 224),
    "mobilenetv3": ("lcnet_035", 32),
    "mobilevit": ("mobilevit_xxs", 64),
    "nasnet": ("nasnetalarge", 96),
    "nextvit": ("nextvit_small", 64),
    "pnasnet": ("pnasnet5large", 96),
    "regnet": ("regnetx_002", 32),
    "repghost": ("repghostnet_050", 32),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 32),
    "resnest": ("resnest14d", 32),
    "resnet": ("resnet10t", 32),
    "resnetv2": ("resnetv2_18", 32),
    "rexnet": ("rexnet_100", 32),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "shvit": ("shvit_s1", 128),
    "sknet": ("skresnet18", 32),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 224),
    "tiny_vit": ("tiny_vit_5m_224", 224),
    "tresnet": ("tresnet_m", 64),
    "vgg": ("vgg11_bn", 32),
    "visformer": ("visformer_tiny", 224),
    "volo": ("volo_d1_224", 224),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 96),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 224),
    # without batch norm
    "cait": ("cait_xxs24_224", 224),
    "convnext": ("convnext_atto_rms", 32),
    "deit": ("deit3_small_patch16_224", 224),
    "edgenext": ("edgenext_xx_small", 64),
    "mambaout": ("test_mambaout", 64),
    "mlp_mixer": ("gmlp_ti16_224", 224),
    "nfnet": ("nf_ecaresnet26", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224),
    "vision_transformer": ("vit_tiny_patch16_224", 224),
}
SMALLER = {  # what these accept for smaller images
    "levit_128s": "img_size=64",
    "swiftformer_xs": "img_size=64",
    "xcit_nano_12_p8_224": "img_size=32",
    "cait_xxs24_224": "img_size=32",
    "deit3_small_patch16_224": "img_size=32",
    "gmlp_ti16_224": "img_size=32",
    "vit_tiny_patch16_224": "img_size=32",
    "swin_tiny_patch4_window7_224": "img_size=56",
}


@dataclass(frozen=True)
class Case:
    """One network: its name for --model, model.args, the size of its images."""

    name: str
    family: str
    image_size: int
    args: tuple[str, ...] = ()


@dataclass
class Row:
    """What a case came to, in seconds of the processor. ``forward``: whether it also ran, not only its structure."""

    name: str
    family: str
    image_size: int
    parameters: int
    batch_norms: int
    kinds: list[str]
    forward: bool
    seconds: float
    problem: str = ""


def cases() -> list[Case]:
    """All of torchvision's classifiers and the timm families above."""
    import torchvision.models as zoo

    made = [
        Case(f"torchvision:{name}", "torchvision", *_size(name))
        for name in zoo.list_models(module=zoo)
    ]
    for family, (name, size) in TIMM.items():
        args = (SMALLER[name],) if name in SMALLER else ()
        made.append(
            Case(f"timm:{name}", family, int(args[0].partition("=")[2]) if args else size, args)
        )
    return made


def _size(name: str) -> tuple[int, tuple[str, ...]]:
    if name in SIZES:
        return SIZES[name], ARGS.get(name, ())
    if name.startswith("vit_"):
        return 32, ("image_size=32",)
    return (
        64 if name.startswith(("alexnet", "squeezenet", "densenet", "googlenet", "swin")) else 32
    ), ()


def build(case: Case) -> nn.Module:
    """The plain network for 3-channel images and CLASSES classes; the same weights each time."""
    torch.manual_seed(0)
    return build_model(case.name, 3, CLASSES, args=case.args)


def check(case: Case, forward: bool = True) -> Row:
    """Split, run by route, strip, load back strictly. Raises AssertionError or ConadvError where anything is off."""
    begin = time.process_time()
    with _uninitialised(not forward):
        model = build(case)
    with _uninitialised(True):
        fresh = build(case)
    names = list(model.state_dict())
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if forward:
        check_model(model, 3, case.image_size, CLASSES)
        _check_forward(model, case.image_size)
    else:
        split_batchnorm(model, "adv")
    check_routes(model, ["adv"])
    _check_own_tensors(model)
    parameter_groups(model, weight_decay=0.1, rules=MODEL_RULES)
    extra = set(model.state_dict()) - set(names)
    assert all(".routes.adv." in name for name in extra)
    assert bool(extra) == bool(layers)
    strip(model)
    assert list(model.state_dict()) == names, "strip must leave the plain model's names"
    fresh.load_state_dict(model.state_dict(), strict=True, assign=not forward)
    if forward:
        x, _ = _images(case.image_size)
        assert torch.equal(_logits(fresh.eval(), x), _logits(model.eval(), x))
    parameters = sum(p.numel() for p in model.parameters())
    kinds = sorted({type(layer).__name__ for layer in layers})
    return Row(
        case.name,
        case.family,
        case.image_size,
        parameters,
        len(layers),
        kinds,
        forward,
        time.process_time() - begin,
    )


@contextmanager
def _uninitialised(skip: bool) -> Iterator[None]:
    """Networks built inside have memory but no values, where ``skip``: filling it is most of the time."""
    if not skip:
        yield
        return
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        yield


def _check_forward(model: nn.Module, size: int) -> None:
    """Split the plain ``model`` and run it by both routes in train and in eval mode."""
    x, z = _images(size)
    plain = _logits(model.eval(), x)
    split_batchnorm(model, "adv")
    assert torch.equal(_logits(model, x), plain), "the clean route is the plain model"
    assert torch.equal(_logits(model, x, "adv"), plain), (
        "a new route is a copy of the clean one, activation and all"
    )
    has_routes = any(".routes." in name for name, _ in model.named_parameters())
    before = {name: value.clone() for name, value in model.named_buffers()}
    _backward(model.train(), x, z)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            assert not torch.equal(value, before[name]), f"each route tracks its own images: {name}"
    if not has_routes:
        return
    clean, adv = _logits(model.eval(), x), _logits(model, x, "adv")
    with torch.no_grad():
        for layer in _split_layers(model):
            for p in layer.routes["adv"].parameters(recurse=False):
                p.mul_(0.5).add_(0.1)
    assert torch.equal(_logits(model, x), clean), (
        "the adversarial route must not reach the clean one"
    )
    assert not torch.equal(_logits(model, x, "adv"), adv), "the adversarial route must be in use"
    with torch.no_grad(), route(model, {CLEAN: IMAGES, "adv": IMAGES}):
        assert model(torch.cat([x, z])).shape == (2 * IMAGES, CLASSES)


def _split_layers(model: nn.Module) -> list[SplitBatchNorm]:
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm)]


def _check_own_tensors(model: nn.Module) -> None:
    """A route's parameters and statistics are its own (a child such as a PReLU is shared, by design)."""
    for layer in _split_layers(model):
        tensors = (
            layer.routes["adv"].parameters(recurse=False),
            layer.routes["adv"].buffers(recurse=False),
        )
        clean = layer.parameters(recurse=False), layer.buffers(recurse=False)
        own = {t.data_ptr() for group in tensors for t in group}
        assert own.isdisjoint(t.data_ptr() for group in clean for t in group), (
            "routes share a tensor"
        )


def _backward(model: nn.Module, x: Tensor, z: Tensor) -> None:
    """One training pass per route; every route's parameters and the images must get a finite gradient."""
    x, z = x.clone().requires_grad_(), z.clone().requires_grad_()
    loss = model(x).square().sum()
    with route(model, "adv"):
        loss = loss + model(z).square().sum()
    loss.backward()
    for image in (x, z):
        assert image.grad is not None, "an attack needs the images' gradient"
        assert image.grad.isfinite().all()
    for name, p in model.named_parameters():
        assert ".routes." not in name or p.grad is not None, f"{name} takes no part in its route"


def _images(size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, size, size, generator=g), torch.randn(
        IMAGES, 3, size, size, generator=g
    ) + 1


def _logits(model: nn.Module, x: Tensor, name: str = CLEAN) -> Tensor:
    with torch.no_grad(), route(model, name):
        out: Tensor = model(x)
    return out


# ---- the script


def run_all(only: str) -> list[Row]:
    rows = []
    for case in cases():
        if only not in case.name:
            continue
        try:
            row = check(case)
        except Exception as error:  # one network's trouble is a row, not the end
            traceback.print_exc(limit=-2)
            row = Row(
                case.name,
                case.family,
                case.image_size,
                0,
                0,
                [],
                True,
                0.0,
                f"{type(error).__name__}: {error}",
            )
        print(
            f"{row.name:<45}{row.batch_norms:>5} batch norms {row.seconds:6.1f} s  {row.problem or 'ok'}",
            flush=True,
        )
        rows.append(row)
        gc.collect()  # the next network may need the memory of this one
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: one line per torchvision network and timm family."""
    lines = [
        "| network | million parameters | batch-norm layers | of class | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kinds = ", ".join(row["kinds"]) or "none: routes share normalisation"  # type: ignore[arg-type]
        result = row["problem"] or "ok"
        millions = int(str(row["parameters"])) / 1e6
        lines.append(
            f"| `{row['name']}` | {millions:.1f} | {row['batch_norms'] or '-'} | {kinds} | {result} |"
        )
    return "\n".join(lines)


def write_page(content: dict[str, object], page: Path = PAGE) -> None:
    """Put the table between the markers of docs/models.md."""
    rows: list[dict[str, object]] = content["rows"]  # type: ignore[assignment]
    text = page.read_text(encoding="utf-8")
    head, begin, rest = text.partition("<!-- begin zoo -->\n")
    _, end, tail = rest.partition("<!-- end zoo -->")
    assert (begin, end) == ("<!-- begin zoo -->\n", "<!-- end zoo -->"), page
    with_norm = sum(bool(row["batch_norms"]) for row in rows)
    said = (
        f"{len(rows)} networks, {with_norm} of them with batch norm; torch {content['torch']}, torchvision "
        f"{content['torchvision']}, timm {content['timm']}.\n"
    )
    page.write_text(f"{head}{begin}{table(rows)}\n\n{said}{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/models"))
    parser.add_argument(
        "--only",
        default="",
        help="networks whose name contains this, in place of their rows so far",
    )
    parser.add_argument("--table-only", action="store_true", help="write the page from zoo.json")
    args = parser.parse_args()
    path = args.out / "zoo.json"
    if not args.table_only:
        import timm

        before = (
            {row["name"]: row for row in json.loads(path.read_text())["rows"]} if args.only else {}
        )
        rows = before | {row.name: asdict(row) for row in run_all(args.only)}
        versions = {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        }
        ordered = [rows[case.name] for case in cases() if case.name in rows]
        args.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(versions | {"rows": ordered}, indent=1) + "\n")
    write_page(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
