"""ConAdv in a PyTorch loop of your own: the five marked lines.

    python examples/own_loop.py

Trains a small network on scikit-learn's 8x8 digits and prints the test accuracy. The loop keeps its
own optimizer and its own schedule; `step.gradient` takes the place of `loss.backward()`, and
`step.prepare` attacks a batch that comes later. For a loop that wants nothing of its own,
`step(batch, future)` does it all.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conadv import FGSM, Concurrent, PixelSpace, TrainStep, split_batchnorm, windows


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).div(16)
    x_NCHW = pixels.unsqueeze(1)  # in [0, 1]
    y_N = torch.tensor(digits.target)
    space = PixelSpace(mean=(0.31,), std=(0.38,))
    data = TensorDataset(space.normalize(x_NCHW), y_N)
    train, test = torch.utils.data.random_split(data, [1000, 797])

    model = split_batchnorm(network(), "adv")  # 1: batch norm gets an adversarial route
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * epochs)
    step = TrainStep(model, optimizer, Concurrent(FGSM(eps=0.1, space=space), staleness=1))  # 2

    loader = DataLoader(train, 100, shuffle=True)
    batches = (batch for _ in range(epochs) for batch in loader)  # epochs join without a gap
    for batch, future in windows(batches, step.ahead):  # 3: see one batch ahead
        step.gradient(batch)  # 4: clean + adversarial loss, backward
        step.prepare(future)  # 5: attack the next batch at these weights
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        step.update()
        schedule.step()

    model.eval()
    x, y = next(iter(DataLoader(test, len(test))))
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
