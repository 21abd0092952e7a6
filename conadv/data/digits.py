"""scikit-learn's handwritten digits: small, and always there."""

from __future__ import annotations

import numpy as np
import torch

from conadv.data.source import Source, SourceSettings, in_memory


def digits(settings: SourceSettings) -> Source:
    """8x8 grey digits, 898 training and 899 test images, always the same split. Never mirrored."""
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import
    from sklearn.model_selection import train_test_split

    settings.refuse("dir", "download", "on_bad_image")
    values, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(values * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    parts = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    train, test = ((images[part], torch.from_numpy(labels[part]).long()) for part in parts)
    return in_memory(train, test, tuple("0123456789"), settings, flip=False)
