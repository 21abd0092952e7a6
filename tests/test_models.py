"""Networks by name: where they come from, what they get, and what a config may not do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import get_model

from conadv import ConadvError, route, split_batchnorm, strip
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.resolve import resolve
from conadv.config.schema import ModelConfig, OptimConfig, replace
from conadv.models import FAMILIES, family, own
from conadv.models.make import arguments, build_model
from conadv.models.own import trust
from conadv.models.small import SmallResNet
from conadv.models.trial import check_model
from conadv.nn.split_batchnorm import routes_of
from conadv.training.build import NO_BATCH_NORM, build, overview
from conadv.training.loop import train

from .helpers import same, state, tiny_resnet


def make(name: str, *args: str, channels: int = 3, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, channels, classes, args=args)


def _own_in_mynets(num_classes: int, in_channels: int, width: int = 4) -> nn.Module:
    return SmallResNet(8, width, in_channels, num_classes)


FAMILY_CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "resnet8": ((), 1, 8),
    "resnet20": ((), 3, 32),
    "resnet18": (("zero_init_residual=true",), 3, 32),
    "torchvision:mobilenet_v3_small": ((), 3, 32),
    "timm:test_resnet": ((), 1, 32),
    "timm:test_vit": (("img_size=32", "drop_rate=0.25"), 3, 32),
    "mynets:make": (("width=6",), 1, 8),
}


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_networks_of_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: channels, classes or arguments are not handed on, or the initialisation draws from
    # another stream.
    args, channels, size = FAMILY_CASES[name]
    if family(name) == "timm":
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setitem(own._trusted, "mynets:make", _own_in_mynets)
    model = make(name, *args, channels=channels, classes=7)
    check_model(model, channels, size, 7)
    assert same(state(make(name, *args, channels=channels, classes=7)), state(model))
    with pytest.raises(ConadvError, match=r"shape \(2, 7\) for 2 images, where 2 x 5"):
        check_model(model, channels, size, 5)
    assert {family(case) for case in FAMILY_CASES} == set(FAMILIES)


def test_small_networks_are_those_of_the_paper() -> None:
    assert sum(p.numel() for p in make("resnet20", classes=10).parameters()) == 272_474
    assert build_model("resnet8", 3, 10, width=4).fc.in_features == 16
    for name, settings in (("resnet18", {"width": 4}), ("resnet8", {"args": ("drop_rate=0.1",)})):
        with pytest.raises(ConadvError, match=rf"has no effect on '{name}'"):
            build_model(name, 3, 10, **settings)
    with pytest.raises(ConadvError, match="takes 3 channels"):
        make("resnet18", channels=1)
    torch.manual_seed(0)
    plain = state(get_model("resnet18", num_classes=5))
    assert same(state(make("torchvision:resnet18")), plain)
    assert same(state(make("resnet18")), plain)


def test_timm_names_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(
        ConadvError, match=r"Unknown timm model 'efficientnet_b0x'\. Did you mean 'efficientnet_b0'"
    ):
        make("timm:efficientnet_b0x")
    with pytest.raises(ConadvError, match="Did you mean 'resnet50'"):
        make("timm:resnet50.a1_in1k")  # a tag of weights, which are never loaded
    with pytest.raises(ConadvError, match="Did you mean 'timm:resnet50d'"):
        make("resnet50d")
    with pytest.raises(ConadvError, match="Unknown timm model"):
        make("timm:hf-hub:someone/model")  # timm itself would download it
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConadvError, match=r"pip install '\.\[timm\]' in conadv's checkout"):
        make("timm:resnet50")
    with pytest.raises(ConadvError, match="Did you mean 'resnet50'"):
        make("resnet50d")  # no hint at what is not there


ARGS = {
    "not NAME=VALUE": ("drop_rate", "1=2", "=2", "{a: 1}"),
    r"'x\\\\x1b\[2J\\\\n' is not NAME=VALUE": ("x\x1b[2J\n",),
    "loads no weights": ("weights=DEFAULT", "pretrained=true", "checkpoint_path=x.pth"),
    "cannot be built with": ("frobnicate=1", "class=1", "x=nan", f"groups={2**80}", "x=!!python/x"),
}


@pytest.mark.parametrize("message", ARGS)
def test_arguments_that_make_no_sense(message: str) -> None:
    # Red when: _TAKEN loses a name (a config could then load a pickle through checkpoint_path).
    for arg in ARGS[message]:
        with pytest.raises(ConadvError, match=message):
            make("resnet18", arg)
    with pytest.raises(ConadvError, match="given twice"):
        make("resnet18", "groups=1", "groups=2")


def test_arguments_keep_what_they_say() -> None:
    # Red when: true and 1 become text, or a lone bracket an error.
    wanted = {"a": True, "b": 1, "c": 0.5, "d": "", "e": "[", "f": "x y", "g": "null"}
    found = arguments(("a=true", "b=1", "c=0.5", "d=", "e=[", "f=x y", "g=null"))
    assert found == wanted
    assert [type(value) for value in found.values()] == [type(value) for value in wanted.values()]


# ---- module:function

FACTORY = """
from pathlib import Path
from torch import nn
Path("ran").touch()
def make(num_classes, in_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3), nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
def timm_style(*, num_classes=10, in_chans=3): return make(num_classes, in_chans)
def any_way(**kwargs): return make(kwargs["num_classes"], 1)
def no_classes(): return make(10, 1)
def nothing(num_classes): return None
def fails(num_classes, width=1):
    return [0][num_classes * width]
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)
    def forward(self, x): return self.fc(x.flatten(1))
value = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module that leaves a file behind when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own, "_trusted", {})
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    (tmp_path / "mynets.py").write_text(FACTORY)
    return tmp_path


def test_a_name_alone_runs_nothing(folder: Path) -> None:
    # Red when: build_own imports the module itself.
    with pytest.raises(ConadvError, match=r"a config alone may not do.*--model mynets:make"):
        make("mynets:make")
    assert not (folder / "ran").exists()
    trust("mynets:make")
    assert (folder / "ran").exists()
    with pytest.raises(ConadvError, match="a config alone may not do"):
        make("mynets:timm_style")  # trust is for one function


def test_a_function_gets_what_it_takes(folder: Path) -> None:
    # Red when: in_chans is not looked for, or args are dropped.
    for name in ("make", "timm_style", "any_way", "Net"):
        trust(f"mynets:{name}")
        assert make(f"mynets:{name}", channels=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 5)
    assert make("mynets:make", "width=6")[0].out_channels == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mynets:missing", "no function 'missing'"),
        ("mynets:value", "no function 'value'"),
        ("nowhere.nets:make", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("mynets:make()", "neither timm:NAME"),
        ("../mynets:make", "neither timm:NAME"),
        ("broken:make", "cannot be imported: SyntaxError"),
        ("dividing:make", r"ZeroDivisionError: division by zero \(dividing.py, line 2\)"),
    ],
)
def test_what_cannot_be_trusted(folder: Path, name: str, message: str) -> None:
    # Red when: trust lets what a module raises through (the program calls it a bug of its own).
    (folder / "broken.py").write_text("def make(:")
    (folder / "dividing.py").write_text("\n1 / 0")
    with pytest.raises(ConadvError, match=message):
        trust(name)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("no_classes", (), "cannot make a model: TypeError: .*argument 'num_classes'"),
        ("make", ("depth=6",), "TypeError: .*unexpected keyword argument 'depth'"),
        ("fails", (), r"IndexError: list index out of range \(mynets.py, line 14\)"),
        ("fails", ("width=x",), r"TypeError: .*\(mynets.py, line 14\)"),
        ("nothing", (), "returned a NoneType"),
    ],
)
def test_a_function_that_fails_shows_its_own_error(
    folder: Path, name: str, args: tuple[str, ...], message: str
) -> None:
    # Red when: build_own lets what the function raises through.
    trust(f"mynets:{name}")
    with pytest.raises(ConadvError, match=message):
        make(f"mynets:{name}", *args)


def test_a_local_file_does_not_take_the_place_of_an_installed_module(folder: Path) -> None:
    # Red when: trust puts the current folder first in sys.path.
    (folder / "colorsys.py").write_text("def make(num_classes): 1 / 0")
    sys.modules.pop("colorsys", None)
    with pytest.raises(ConadvError, match="no function 'make'"):
        trust("colorsys:make")


TRAIN = (
    "--steps 2 --schedule.warmup-epochs 0 --quiet --eval.robust-images 0 --method conadv".split()
)


def test_the_command_line_trusts_what_was_typed_in_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: _train trusts the config's name, or eval and export do without --model.
    run = ["train", "digits", *TRAIN, "--out", "run", "--global-batch-size", "64"]
    assert main([*run, "--model", "mynets:make"]) == 0
    again = ["train", "--config", "run/config.yaml", "--out", "again", "--quiet"]
    quick = "--images 8 --eigenvalues 0 --probes 0 --keskar-steps 1 --robust-images 0"
    analyze = ["analyze", "run", *quick.split()]
    for command in (again, ["eval", "run"], ["export", "run"], analyze):
        (folder / "ran").unlink(missing_ok=True)
        sys.modules.pop("mynets", None)
        own._trusted.clear()
        assert main(command) == 2
        assert "a config alone may not do" in capsys.readouterr().err
        assert not (folder / "ran").exists()
        assert main([*command, "--model", "mynets:make"]) == 0
    plain = build_model("mynets:make", 1, 10)
    plain.load_state_dict(load_file(folder / "run" / "model.safetensors"), strict=True)


LAYERS = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, num_classes)
    def forward(self, x): return self.out(self.second(self.first(x.flatten(1)).relu()).relu())
"""


def test_layers_that_changed_places_do_not_get_each_others_momentum(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: the optimizer's state is matched by order alone (the run went on with other losses).
    (folder / "mynets.py").write_text(LAYERS)
    run = ["train", "digits", *TRAIN, "--out", "run", "--global-batch-size", "64"]
    assert main([*run, "--model", "mynets:Net", "--checkpoint.every-epochs", "0.05"]) == 0
    (folder / "run" / "summary.json").unlink()
    swapped = LAYERS.replace("self.first, self.second = ", "self.second, self.first = ")
    for text, code in ((swapped, 2), (LAYERS, 0)):
        (folder / "mynets.py").write_text(text)
        sys.modules.pop("mynets", None)
        importlib.invalidate_caches()
        again = ["train", "--config", "run/config.yaml", "--resume", "--out", "run", "--quiet"]
        assert main([*again, "--model", "mynets:Net"]) == code
    assert "same layers in another order" in capsys.readouterr().err


# ---- before the first step


def test_the_probe_leaves_no_trace() -> None:
    # Red when: frozen_stats or the restoring of the modes is left out.
    model = tiny_resnet("adv").train()
    model.bn1.eval()
    before = state(model)
    check_model(model, 3, 8, 5)
    assert same(state(model), before)
    assert model.training
    assert not model.bn1.training


class Needs(nn.Module):
    """Logits of images, or what ``check`` raises or returns for them."""

    def __init__(self, check: Callable[[torch.Tensor], Any], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.fc, self.check = nn.Linear(2, 5, dtype=dtype), check

    def forward(self, x: torch.Tensor) -> Any:
        said = self.check(x)
        return self.fc(x.mean((2, 3))[:, :1].expand(-1, 2)) if said is None else said


def fail(images: torch.Tensor) -> None:
    raise RuntimeError("no idea")


BFLOAT16 = torch.bfloat16
CHANNELS = r"cannot take 1 x 32 x 32 images: .*It takes 3 channel\(s\), the data has 1"
WEIGHTS = "Its weights are torch.bfloat16: leave them float32, and use --precision"
WRONG: dict[str, tuple[Callable[[], nn.Module], int, str, str]] = {
    "size": (lambda: make("vit_b_32"), 3, r"cannot take 3 x 32 x 32 images.*image_size", "channel"),
    "channels": (lambda: tiny_resnet(), 1, CHANNELS, "image_size"),
    "type": (lambda: tiny_resnet().to(BFLOAT16), 3, WEIGHTS, "image_size"),
    "type, pooled": (lambda: Needs(lambda x: None, BFLOAT16), 3, WEIGHTS, "image_size"),
    "both": (lambda: tiny_resnet().to(BFLOAT16), 1, f"{WEIGHTS}.*takes 3 channel", "image_size"),
    "anything": (lambda: Needs(fail), 3, "no idea. If that is about the size", "channel"),
    "two outputs": (lambda: Needs(lambda x: (x, x)), 3, "returns a tuple in train mode", "size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_network_that_cannot_take_the_images_gets_advice_that_helps(name: str) -> None:
    # Red when: the advice is about the size for every failure.
    build, channels, advice, wrong = WRONG[name]
    with pytest.raises(ConadvError, match=advice) as caught:
        check_model(build(), channels, 32, 5)
    assert wrong not in str(caught.value)


SMALL_IMAGES = {
    "data__image_size": 4,
    "epochs": None,
    "steps": 3,
    "global_batch_size": 4,
    "schedule__warmup_epochs": 0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"micro_batch_size": 1},
            "1 x 4 x 4 images one at a time.*micro_batch_size or attack.share",
        ),
        ({"method": "disadv", "attack__share": 0.25}, "1 x 4 x 4 images one at a time"),
        (
            {"probe__every_epochs": 0.005, "probe__images": 1, "probe__staleness": (1,)},
            "1 x 4 x 4 images one at a time",
        ),
    ],
)
def test_passes_that_the_network_refuses_are_found_before_training(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    # Red when: smallest_pass is 2 (each of these ended with exit code 70 in its step).
    model = ModelConfig(name="resnet8", width=2)
    wanted = resolve(replace(recipes.get("digits"), **{**SMALL_IMAGES, "model": model, **changes}))
    with pytest.raises(ConadvError, match=message):
        train(wanted, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_without_batch_norm_trains_and_says_what_routes_share() -> None:
    # Red when: the overview speaks of batch norm, or the groups leave LayerScale and class tokens
    # without a rule.
    pytest.importorskip("timm", reason="timm is not installed")
    vit = ModelConfig(name="timm:test_vit", args=("img_size=16",))
    changes = {"model": vit, "data__image_size": 16, "optim": OptimConfig(name="lamb", lr=1e-3)}
    short = {"epochs": None, "steps": 2, "global_batch_size": 32, "schedule__warmup_epochs": 0}
    base = replace(recipes.get("digits"), method="conadv", **short)
    run = build(resolve(replace(base, **changes)), torch.device("cpu"))
    shown = list(overview(run))
    assert NO_BATCH_NORM in shown
    assert "batch norm sees" not in shown[0]
    assert routes_of(run.model) == ()
    with route(run.model, "adv"):  # any route is accepted, all are the same
        run.model(torch.zeros(2, 1, 16, 16))
    shown = list(overview(build(resolve(base), torch.device("cpu"))))
    assert NO_BATCH_NORM not in shown
    assert "batch norm sees 32 images per route" in shown[0]


def test_sync_batchnorm_of_timms_layers_keeps_routes_and_activation() -> None:
    # Red when: a route of SyncBatchNormAct is made from num_features alone.
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    model = layers.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4))
    ).eval()
    assert type(model[1]).__name__ == "SyncBatchNormAct"
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    split_batchnorm(model, "adv")
    with route(model, "adv"), torch.no_grad():
        assert torch.equal(model(x), expected)
        assert (model(x) >= 0).all()
    assert type(strip(model)[1]).__name__ == "SyncBatchNormAct"
