"""What the tables of data sets hold is read, whatever wrote them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpath_runtime.errors import InputError
from stpath_train.sources import read_counts, read_spots


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_counts_in_csv_of_any_separator_with_spots_of_any_name(separator, tmp_path):
    lines = ["spot,A,B,A", "NA,1,0,2", "nan,0,3,0", "None,4,0,0", "1,0,0,5"]
    (tmp_path / "c.csv").write_text("\n".join(lines).replace(",", separator))
    adata = read_counts(tmp_path / "c.csv")
    assert list(adata.obs_names) == ["NA", "nan", "None", "1"]
    assert list(adata.var_names) == ["A", "B", "A"]
    np.testing.assert_array_equal(adata.X.toarray(), [[1, 0, 2], [0, 3, 0], [4, 0, 0], [0, 0, 5]])
    (tmp_path / "o.csv").write_text("\n".join(["spot,region", "NA,x", "1,y"]).replace(",", separator))
    assert list(read_spots(tmp_path / "o.csv", ["1", "NA"])["region"]) == ["y", "x"]


def test_counts_in_csv_as_spreadsheets_write_them(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('spot,"A\nof one",B,,\nx,1,2,,\ny,3,4,,\n,,,,\n')
    adata = read_counts(path)
    assert (list(adata.obs_names), list(adata.var_names)) == (["x", "y"], ["A\nof one", "B"])
    np.testing.assert_array_equal(adata.X.toarray(), [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spot,A\nx,1,2,3\n", "2 names in its first line, 4 columns below"),
        ("spot,A,B,C\nx,1\n", "4 names in its first line, 2 columns below"),
        ("spot,A,\nx,1,2\n", "a column of counts has no gene's name"),
        ("spot;A\nx;1,5\n", "could not convert string to float"),
        ("spot,A\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_counts_in_csv_that_are_none(text, message, tmp_path):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_counts(tmp_path / "c.csv")
    (tmp_path / "c.csv").write_text(text, encoding="utf-16")
    with pytest.raises(InputError, match="cannot be read"):
        read_counts(tmp_path / "c.csv")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["TP53", "ERBB2", "a gene", "7"]), min_size=1, max_size=6),
    st.integers(1, 1300),
    st.booleans(),
)
def test_counts_of_a_csv_are_read_whole(tmp_path_factory, names, spots, first_is_named):
    """Whatever its number of rows, of genes that appear twice, and with or without R's name of the first column."""
    path = tmp_path_factory.mktemp("csv") / "x_count.csv"
    counts = np.random.default_rng(spots).poisson(1, (spots, len(names)))
    frame = pd.DataFrame(counts, [f"{i}" for i in range(spots)], names)
    text = frame.to_csv()
    path.write_text(text if first_is_named else text.removeprefix(","))
    found = read_counts(path)
    np.testing.assert_array_equal(found.X.toarray(), counts)
    assert (list(found.obs_names), list(found.var_names)) == (list(frame.index), names)
