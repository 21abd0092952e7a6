"""ConAdv in a script of Hugging Face Accelerate: the four marked lines.

    accelerate launch examples/accelerate_loop.py

Accelerate starts the processes, deals out the data and writes checkpoints. The model is not
prepared by it: TrainStep sums gradients over the processes itself, while the attack runs, and has
its own mixed precision (``precision``).
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conadv import FGSM, Comm, Concurrent, PixelSpace, TrainStep, WindowedLoader, split_batchnorm


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


def main(epochs: int = 8, limit: int = 1000, folder: str | None = None) -> float:
    torch.manual_seed(0)
    accelerator = Accelerator()
    digits = load_digits()
    space = PixelSpace(mean=(0.31,), std=(0.38,))
    x = space.normalize(torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1))
    y = torch.tensor(digits.target)

    model = split_batchnorm(network(), "adv").to(accelerator.device)  # 1: an adversarial route
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    data = TensorDataset(x[:limit], y[:limit])
    loader = accelerator.prepare(DataLoader(data, 100, shuffle=True, drop_last=True))
    method = Concurrent(FGSM(eps=0.1, space=space), staleness=1)
    comm = Comm.from_process_group(accelerator.device)
    step = TrainStep(model, optimizer, method, comm=comm)  # 2
    accelerator.register_for_checkpointing(model, optimizer)  # alike in all processes

    pairs = WindowedLoader(loader, step.ahead, epochs)  # 3: see one batch ahead
    for _ in range(epochs):
        for batch, future in pairs:
            record = step(batch, future)  # 4: gradient, attack, update
        accelerator.print(f"loss {record.loss:.3f}, staleness {record.staleness}")
    if folder is not None:
        accelerator.save_state(folder)
        name = f"conadv_{accelerator.process_index}.pt"  # the images that wait in this process
        torch.save(step.state_dict(), f"{folder}/{name}")

    found = model.eval()(x[1000:].to(accelerator.device)).argmax(1).cpu()
    accuracy = (found == y[1000:]).float().mean().item()
    accelerator.print(f"test accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
