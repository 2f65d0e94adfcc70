"""The config of a training run: what it takes, and how it names a fault."""

from __future__ import annotations

import pytest

from stpath_runtime.errors import InputError
from stpath_train.config import as_yaml, differences, example, read_config

SMALL = "data: {store: store}\nrun: {out: run, epochs: 3}\n"


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_example_is_a_config_with_the_published_choices(tmp_path):
    config = read_config(written(tmp_path, example()))
    assert config.masking.model_dump() == {
        "ratio": (10, 1),
        "whole": 0.9,
        "genes_lost": 0.5,
        "highly_variable": 0.8,
        "technology_dropped": 0.8,
    }
    assert config.data.spots == (64, 1024)
    assert config.optimizer.learning_rate == 5e-4
    assert config.optimizer.clip == 1
    assert config.run.batch == 2
    minimal = read_config(written(tmp_path, SMALL))
    assert differences(minimal, config) == []


def test_paths_are_relative_to_the_config_and_the_config_comes_back_as_written(tmp_path):
    config = read_config(written(tmp_path, SMALL + "model: {checkpoint: stfm.pth}\n"))
    assert config.data.store == tmp_path / "store"
    assert config.run.out == tmp_path / "run"
    assert config.model.checkpoint == tmp_path / "stfm.pth"
    (tmp_path / "again.yaml").write_text(as_yaml(config))
    assert differences(read_config(tmp_path / "again.yaml"), config) == []


def test_a_run_that_goes_on_may_be_longer_but_not_of_another_seed(tmp_path):
    config = read_config(written(tmp_path, SMALL))
    longer = read_config(written(tmp_path, SMALL.replace("epochs: 3", "epochs: 5, seed: 2")))
    assert differences(config, longer) == ["run.seed 0, now 2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {store: s}\nrun: {out: r, epochs: 3, epocs: 5}",
            r"run.epocs: 5: no such field .did you mean run.epochs",
        ),
        ("data: {store: s}\nrun: {out: r, epochs: 3}\noptimiser: {clip: 1}", r"did you mean optimizer\?"),
        ("data: {store: s}\nrun: {out: r, epochs: 0}", "run.epochs: 0 should be greater than or equal to 1"),
        ("data: {store: s}\nrun: {out: r, epochs: 3}\nmasking: {whole: 1.5}", "masking.whole: 1.5 should be less than"),
        ("data: {store: s, spots: [9, 5]}\nrun: {out: r, epochs: 3}", "data.spots: the least .9. is above the most"),
        ("data: {store: s}\nrun: {out: r, epochs: 3, precision: fp8}", "run.precision: 'fp8' should be 'fp32' or"),
        ("data: {store: s}\nrun: {out: r}", "run.epochs: is missing"),
        ("data: {store: s}\nrun: {out: r, epochs: 3}\nmodel: {attention: knn}", "model.neighbors: attention knn needs"),
        ("data: {store: s}\nrun: {out: r, epochs: 3}\nmodel: {d_model: 9}", "model.d_model: 9 does not divide by 4"),
        ("data: {store: s}\nrun: {out: r, epochs: 3, early_stopping: 2}", "run.early_stopping: needs slides"),
        ("data: {store: s}\nrun: {out: r, out: b, epochs: 3}", "'out' appears twice"),
        ("data: [", "not YAML"),
        ("- 1", "should be a section of named fields"),
        ("", "should be a section of named fields"),
        ("data: {store: !!python/object:os.system x}", "not YAML"),
    ],
)
def test_faults_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as fault:
        read_config(written(tmp_path, text))
    assert "\n" not in str(fault.value)


def test_a_missing_config_says_how_to_get_one(tmp_path):
    with pytest.raises(InputError, match="--example prints one"):
        read_config(tmp_path / "nowhere.yaml")
