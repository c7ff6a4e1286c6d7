import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from recipes.vision.parts.data import load_images


@pytest.fixture
def hub(monkeypatch):
    """A data set with coarse and fine classes, as CIFAR-100 has them."""
    features = Features(
        img=ImageFeature(),
        fine_label=ClassLabel(names=["a", "b", "c"]),
        coarse_label=ClassLabel(names=["x", "y"]),
        path=Value("string"),
    )
    rows = [
        {"img": Image.new("RGB", (4, 4)), "fine_label": place % 3, "coarse_label": 0, "path": ""} for place in range(9)
    ]
    data = DatasetDict(train=Dataset.from_list(rows, features), test=Dataset.from_list(rows[:3], features))
    monkeypatch.setattr("recipes.vision.parts.data.load_dataset", lambda name: data)


def test_the_column_of_the_labels_is_named_where_there_are_two(hub):
    examples = load_images("someone/images", "fine_label")
    assert examples.train.column_names == ["image", "labels"]
    assert (len(examples.train), len(examples.held_out), examples.classes) == (9, 3, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"one column of classes in someone/images, got fine_label, coarse_label"):
        load_images("someone/images", None)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load_images(str(tmp_path / "nowhere"), None)
