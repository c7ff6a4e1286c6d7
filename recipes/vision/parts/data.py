"""Labelled images: a folder, a hub data set, or the digits 5 to 9 from a wheel."""

from pathlib import Path

from datasets import ClassLabel, Dataset, Image, load_dataset

from recipes.parts.classification import Examples, divided, labelled
from recipes.vision.parts.digits import read_digits

ORDER = ("test", "validation", "valid", "val")
NEW = range(5, 10)
DIGITS_SHARE, DIGITS_SEED = 0.4, 20260101


def load_images(source: str | None, label_column: str | None) -> Examples:
    """Load labelled images, in the column `image`, or in `pixel_values` if they need no processing.

    Args:
        source: a folder `train/<class>/<image>` with or without `test` or `validation` beside `train`, or just
            `<class>/<image>`; a hub data set; or None for the digits 5 to 9.
        label_column: column of the labels; None means the only column of classes.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: there is not exactly one column of images, or of labels.
    """
    if source is None:
        parts = read_digits(NEW).train_test_split(DIGITS_SHARE, seed=DIGITS_SEED, stratify_by_column="labels")
        return labelled(parts["train"], parts["test"], "labels", "the digits 5 to 9 of MNIST, 500 of each")
    path = Path(source)
    if path.is_dir():
        data = load_dataset("imagefolder", data_dir=str(path))
    elif path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"Expected a folder of images, got {source}, which does not exist. Correct the path.")
    else:
        data = load_dataset(source)
    train, held_out = divided(data, ORDER)
    image = _only(train, Image, "images", source)
    label = label_column or _only(train, ClassLabel, "classes", source)
    columns = [image, label]
    train, held_out = (
        part.select_columns(columns).rename_columns({image: "image"} if image != "image" else {})
        for part in (train, held_out)
    )
    return labelled(train, held_out, label, path.name)


def _only(examples: Dataset, kind: type, what: str, source: str) -> str:
    """Return the name of the only column of a kind."""
    found = [name for name, feature in examples.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one column of {what} in {source}, got {', '.join(found) or 'none'}. For classes, name it with "
            "--label_column; images lie in a folder as train/<class>/<image>."
        )
    return found[0]
