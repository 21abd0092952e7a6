"""ConAdv in a Lightning module, by manual optimization.

    python examples/lightning_module.py

Lightning owns the loop, the optimizer's count of steps, logging and checkpoints; TrainStep is what a training step
does. One process: for several, TrainStep wants the plain model and sums gradients itself, so do not combine it with
Lightning's own distributed strategies; use torchrun with a plain loop or Accelerate.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conadv import FGSM, Concurrent, PixelSpace, TrainStep, WindowedLoader, split_batchnorm

SPACE = PixelSpace(mean=(0.31,), std=(0.38,))
METHOD = Concurrent(FGSM(eps=0.1, space=SPACE), staleness=1)


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step has two losses, and an attack beside them
        layers = (nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 10))
        self.model = split_batchnorm(nn.Sequential(*layers), "adv")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def on_train_start(self) -> None:
        self.engine = TrainStep(self.model, self.optimizers(), METHOD)  # model and optimizer are on their device

    def training_step(self, pair: tuple, _: int) -> None:
        batch, future = pair
        record = self.engine(batch, future)
        self.log("loss", record.loss, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["conadv"] = self.engine.state_dict()  # the adversarial images that wait for the next step


def main(epochs: int = 3, limit: int = 1000, **options: object) -> float:
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    x = SPACE.normalize(torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1))
    y = torch.tensor(digits.target)
    train = WindowedLoader(DataLoader(TensorDataset(x[:limit], y[:limit]), 100, shuffle=True), METHOD.ahead, epochs)
    module = Digits()
    L.Trainer(max_epochs=epochs, devices=1, logger=False, **options).fit(module, train)
    accuracy = (module.model.eval()(x[1000:].to(module.device)).argmax(1).cpu() == y[1000:]).float().mean().item()
    print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
