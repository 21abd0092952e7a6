"""ConAdv in a Lightning module, by manual optimization: python examples/lightning_module.py

One process: TrainStep sums gradients over ranks itself, so for several use torchrun with a plain
loop or Accelerate.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from conadv import FGSM, Concurrent, PixelSpace, TrainStep, WindowedLoader, split_batchnorm

SPACE = PixelSpace(mean=(0.31,), std=(0.38,))
METHOD = Concurrent(FGSM(eps=0.1, space=SPACE), staleness=1)


class Digits(L.LightningModule):
    def __init__(self, images: TensorDataset, epochs: int) -> None:
        super().__init__()
        self.images, self.epochs, self.resumed = images, epochs, {}
        self.automatic_optimization = False  # a step has two losses, and an attack beside them
        layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(32 * 64, 10)]
        self.model = split_batchnorm(nn.Sequential(*layers), "adv")

    def train_dataloader(self) -> WindowedLoader:
        # the sampler's order is by epoch
        loader = DataLoader(self.images, 100, sampler=DistributedSampler(self.images, 1, 0))
        start = self.resumed.get("version", 0) // len(loader)
        return WindowedLoader(loader, METHOD.ahead, self.epochs, start=start)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def on_train_start(self) -> None:
        self.engine = TrainStep(self.model, self.optimizers(), METHOD)
        if self.resumed:
            self.engine.load_state_dict(self.resumed)

    def training_step(self, pair: tuple, _: int) -> None:
        self.log("loss", self.engine(*pair).loss, prog_bar=True)  # a batch, and the next

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["conadv"] = self.engine.state_dict()  # the images that wait

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.resumed = checkpoint["conadv"]  # the engine is made later


def main(epochs: int = 3, limit: int = 1000, resume: str | None = None, **options: object) -> None:
    L.seed_everything(0, verbose=False)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x = SPACE.normalize(x.float().div(16).view(-1, 1, 8, 8))
    module = Digits(TensorDataset(x[:limit], y[:limit]), epochs)
    L.Trainer(max_epochs=epochs, devices=1, logger=False, **options).fit(module, ckpt_path=resume)
    right = module.model.eval()(x[1000:].to(module.device)).argmax(1).cpu() == y[1000:]
    print(f"test accuracy {100 * right.float().mean():.1f} %")


if __name__ == "__main__":
    main()
