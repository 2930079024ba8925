"""Image sets: readers, splits, and the toy birds."""
import numpy as np

import datasets


def test_toy_has_three_splits_of_every_species(tmp_path):
    records = datasets.read("toy", tmp_path)
    for split, count in (("train", 60), ("val", 20), ("test", 20)):
        labels = records.labels[records.splits == split]
        assert np.bincount(labels, minlength=20).tolist() == [count] * 20
