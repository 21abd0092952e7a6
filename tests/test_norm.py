"""Split batch norm: the route rule, lossless strip, norm-plus-activation layers, frozen
statistics.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from conadv import ConadvError, frozen_stats, route, split_batchnorm, strip
from conadv.nn.split_batchnorm import SplitBatchNorm, routes_of

from .helpers import images, same, state, tiny_resnet

LAYERS = {
    "1d": (nn.BatchNorm1d, (6, 4)),
    "1d-length": (nn.BatchNorm1d, (6, 4, 5)),
    "2d": (nn.BatchNorm2d, (6, 4, 3, 3)),
    "3d": (nn.BatchNorm3d, (6, 4, 2, 3, 3)),
    "no-affine": (lambda c: nn.BatchNorm2d(c, affine=False), (6, 4, 3, 3)),
    "no-running-stats": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), (6, 4, 3, 3)),
    "cumulative": (lambda c: nn.BatchNorm2d(c, momentum=None), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_each_route_is_a_layer_of_its_own(kind: str, training: bool) -> None:
    # Red when: forward uses routes["adv"] for the clean segment, or the segments are swapped.
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    clean, adv = make(4), make(4)
    for layer in (clean, adv):
        for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
            nn.init.uniform_(tensor, 0.5, 1.5)
        layer.train(training)
    split = nn.Sequential(copy.deepcopy(clean))
    split_batchnorm(split, "adv")
    split[0].routes["adv"].load_state_dict(adv.state_dict())
    split.train(training)
    for _ in range(2):
        x, z = torch.randn(shape), torch.randn(shape) + 1
        with route(split, {"clean": 6, "adv": 6}):
            both = split(torch.cat([x, z]))
        assert torch.equal(both, torch.cat([clean(x), adv(z)]))
    with route(split, "adv"):
        assert torch.equal(split(x), adv(x))
    assert torch.equal(split(x), clean(x))
    assert same(state(split[0].routes["adv"]), state(adv))
    assert same({k: v for k, v in state(split[0]).items() if "routes" not in k}, state(clean))


def test_route_rule_innermost_block_wins_and_is_restored_after_an_error() -> None:
    # Red when: the route is not restored in a finally, or an inner block restores the clean route.
    model = tiny_resnet("aug", "adv").eval()
    layer = model.bn1
    x, _ = images()
    seen = []
    for name in ("aug", "adv"):
        layer.routes[name].register_forward_hook(lambda *_, name=name: seen.append(name))
    with route(model, "aug"):
        with route(model, "adv"):
            model(x)
        model(x)
    assert seen == ["adv", "aug"]
    with pytest.raises(RuntimeError), route(model, "adv"):
        raise RuntimeError
    model(x)
    assert seen == ["adv", "aug"]


def test_clean_keys_stay_and_strip_is_lossless() -> None:
    # Red when: strip leaves the routes, or a route shares tensors with the clean layer.
    plain = tiny_resnet()
    before = state(plain)
    model = split_batchnorm(copy.deepcopy(plain), "adv", "aug")
    assert before.keys() <= model.state_dict().keys()
    assert all(".routes." in name for name in model.state_dict().keys() - before.keys())
    x, _ = images()
    plain.eval()
    assert torch.equal(model.eval()(x), plain(x))
    for name, value in model.state_dict().items():
        if ".routes." in name:
            value.add_(1)  # the routes' weights must not reach the clean route
    assert same(state(strip(model)), before)
    assert torch.equal(model(x), plain(x))
    assert not any(isinstance(m, SplitBatchNorm) for m in model.modules())
    assert type(model.bn1) is nn.BatchNorm2d


def test_stripped_torchvision_weights_load_strictly() -> None:
    model = split_batchnorm(get_model("resnet18", num_classes=10), "adv")
    get_model("resnet18", num_classes=10).load_state_dict(strip(model).state_dict(), strict=True)


def test_norm_plus_activation_layers_keep_their_activation() -> None:
    # Red when: a route is built as a plain BatchNorm2d from the layer's num_features.
    timm_norm = pytest.importorskip("timm.layers", reason="timm is not installed")
    layer = timm_norm.BatchNormAct2d(4, act_layer=nn.PReLU).train()
    model = split_batchnorm(nn.Sequential(copy.deepcopy(layer)), "adv")
    x = torch.randn(6, 4, 3, 3)
    with route(model, "adv"):
        assert torch.equal(model(x), layer(x))
    assert (model(x) != layer.forward(x).clamp(min=0)).any()
    names = [n for n, _ in model.named_parameters()]
    assert names == [
        "0.weight",
        "0.bias",
        "0.act.weight",
        "0.routes.adv.weight",
        "0.routes.adv.bias",
    ]  # PReLU shared
    assert model[0].routes["adv"].act is model[0].act


def test_sync_batchnorm_and_the_order_of_conversion() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet())
    split_batchnorm(model, "adv")
    assert isinstance(model.bn1, nn.SyncBatchNorm)
    assert isinstance(model.bn1.routes["adv"], nn.SyncBatchNorm)
    x, _ = images()
    plain = tiny_resnet().eval()
    assert torch.equal(model.eval()(x), plain(x))
    wrong = tiny_resnet("adv")
    with route(wrong, "adv"):  # remembers where the routing was
        wrong(x)
    wrong = nn.SyncBatchNorm.convert_sync_batchnorm(wrong)
    with pytest.raises(ConadvError, match="Convert first"):
        split_batchnorm(wrong, "aug")
    with pytest.raises(ConadvError, match="no route"), route(wrong, "adv"):
        pass


def test_frozen_stats_touches_nothing_and_uses_the_batch() -> None:
    # Red when: frozen_stats does nothing (buffers move), or switches to eval mode (output changes).
    model = tiny_resnet("adv")
    x, _ = images()
    reference = copy.deepcopy(model)
    before, modes = state(model), [m.training for m in model.modules()]
    with frozen_stats(model), route(model, "adv"):
        out = model(x)
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    with route(reference, "adv"):
        assert torch.equal(out, reference(x))
    assert not same(state(reference), before)
    model(x)
    assert model.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_their_own_routing(how: str) -> None:
    # Red when: __reduce_ex__ is removed (pickle), the copy shares _Routing with the original, or
    # its layers do not.
    model = tiny_resnet("adv")
    for name, value in model.state_dict().items():
        if ".routes." in name:
            value.add_(1)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert same(state(twin), state(model))
    x, _ = images()
    with route(model, "adv"):
        out, clean = model(x), twin(x)
    with route(twin, "adv"):
        assert torch.equal(twin(x), out)
    assert not torch.equal(clean, out)
    assert twin.bn1._routing is twin.blocks[0].bn1._routing is not model.bn1._routing


def test_layers_that_fold_patches_into_the_batch() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x.flatten(0, 1))

    model = split_batchnorm(Patches(), "adv")
    x = torch.randn(4, 5, 3)
    with route(model, {"clean": 1, "adv": 3}):
        out = model(x)
    assert out[:5].mean(0).abs().max() < 1e-6
    assert out[5:].mean(0).abs().max() < 1e-6
    with (
        pytest.raises(ConadvError, match="add up to 3 images"),
        route(model, {"clean": 1, "adv": 2}),
    ):
        model(torch.randn(4, 5, 3))


def test_errors() -> None:
    model = tiny_resnet("adv")
    x, _ = images()
    for spec in ("aug", {"clean": 4, "aug": 4}):
        with pytest.raises(ConadvError, match="no route 'aug'"), route(model, spec):
            model(x)
    with pytest.raises(ConadvError, match="Call split_batchnorm"), route(tiny_resnet(), "adv"):
        model(x)
    with pytest.raises(ConadvError, match="already has"):
        split_batchnorm(model, "adv")
    with pytest.raises(ConadvError, match="other than 'clean'"):
        split_batchnorm(model, "clean")
    with pytest.raises(ConadvError, match="lazy"):
        split_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()), "adv")
    wrapper = nn.Sequential(model)
    with route(wrapper, "adv"):
        wrapper(x)
    strip(model)
    for outer in (model, wrapper):  # the wrapper remembers the routing
        with pytest.raises(ConadvError, match="no route"), route(outer, "adv"):
            outer(x)
    with route(split_batchnorm(model, "adv"), "adv"):
        model(x)


def test_routes_can_be_added_and_models_without_batchnorm_take_any_route() -> None:
    model = split_batchnorm(tiny_resnet("adv"), "aug")
    assert routes_of(model) == ("adv", "aug")
    assert not split_batchnorm(tiny_resnet().eval(), "adv").bn1.routes["adv"].training
    plain = nn.Linear(2, 2)
    with route(split_batchnorm(plain, "adv"), "adv"):
        plain(torch.zeros(1, 2))
