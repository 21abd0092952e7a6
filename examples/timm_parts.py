"""ConAdv with the parts of timm's train.py: data loader, mixup, loss, optimizer and scheduler.

    python examples/timm_parts.py

Where timm's script has `loss_fn(model(input), target)`, `loss.backward()` and `optimizer.step()`,
there is one call of the step. Mixed labels are probabilities: both views and the attack take them.
"""

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from conadv import FGSM, Concurrent, Numerics, PixelSpace, TrainStep, split_batchnorm, windows

MEAN, STD = (0.31,) * 3, (0.38,) * 3


class Digits(torch.utils.data.Dataset):  # as photographs; create_loader sets ``transform``
    def __init__(self, first: int, last: int) -> None:
        digits = load_digits()
        pixels = (digits.images[first:last] * 15.9).astype("uint8")
        self.images = [Image.fromarray(image).convert("RGB") for image in pixels]
        self.labels, self.transform = digits.target[first:last].tolist(), None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        return self.transform(self.images[i]), self.labels[i]


def main(epochs: int = 2, limit: int = 1000) -> float:
    torch.manual_seed(0)
    common = {"input_size": (3, 32, 32), "batch_size": 50, "mean": MEAN, "std": STD}
    common |= {"use_prefetcher": False, "num_workers": 0}
    train = create_loader(Digits(0, limit), is_training=True, hflip=0.0, scale=(0.8, 1.0), **common)
    test = create_loader(Digits(1000, 1797), is_training=False, **common)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=10)

    model = timm.create_model("test_efficientnet", num_classes=10)
    model = split_batchnorm(model, "adv")  # before the optimizer
    optimizer = create_optimizer_v2(model, opt="lamb", lr=0.02, weight_decay=0.02)
    counted = {"step_on_epochs": False, "updates_per_epoch": len(train)}
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, **counted)
    attack = FGSM(eps=8 / 255, space=PixelSpace(MEAN, STD))
    method, loss = Concurrent(attack, staleness=1), SoftTargetCrossEntropy()
    step = TrainStep(model, optimizer, method, loss=loss, numerics=Numerics(clip_norm=1.0))
    batches = (mixup(x, y) for _ in range(epochs) for x, y in train)
    for number, (batch, future) in enumerate(windows(batches, step.ahead)):
        record = step(batch, future)
        scheduler.step_update(number + 1)
    accuracy = sum((model.eval()(x).argmax(1) == y).sum().item() for x, y in test) / len(
        test.dataset
    )
    print(f"loss {record.loss:.3f}, test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
