"""Test how train.py reads its recipe and its flags, and which values follow from others."""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import Trainer, TrainingArguments

from configuration_hierarchical import DEFAULT_ENCODER_REVISION, MULTI_LABEL, SINGLE_LABEL
from hierarchical_clinicalbert.data.arguments import DataArguments
from hierarchical_clinicalbert.errors import InputError
from hierarchical_clinicalbert.evaluation.forms import form_of
from hierarchical_clinicalbert.training.arguments import (
    HierarchicalTrainingArguments,
    ModelArguments,
    fit_to_data,
    parse,
)
from taxonomy_hierarchical import Taxonomy


def recipe(folder: Path, **flags) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(flags))
    return str(folder / "recipe.yaml")


def test_the_help_shows_each_flag_once_in_groups_and_those_of_transformers_on_request(capsys):
    helped = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse([flag])
        helped[flag] = capsys.readouterr().out
    flags = re.findall(r"^  (--\w+)", helped["--help"], re.MULTILINE)
    assert len(flags) == len({*flags})
    own = {name for part in (ModelArguments, DataArguments) for name in part.__dataclass_fields__}
    assert {f"--{name}" for name in own} <= {*flags}
    assert len(helped["--help"].splitlines()) <= 110
    groups = re.findall(r"(?s)\n(\w+):\n(.*?)(?=\n\n|$)", helped["--help"])
    assert [name for name, _ in groups] == [
        "options",
        "data",
        "model",
        "heads",
        "training",
        "publishing",
    ]
    for name, flag in (
        ("model", "lora_r"),
        ("heads", "pooling"),
        ("training", "teacher"),
        ("publishing", "hub_model_id"),
    ):
        assert f"--{flag} " in dict(groups)[name]
    every = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    ours = HierarchicalTrainingArguments.__dataclass_fields__.values()
    without_effect = {
        "logging_nan_inf_filter",
        *(field.name for field in ours if field.metadata.get("fixed")),
    }
    assert every - without_effect <= {
        *re.findall(r"^  --(\w+)", helped["--help-all"], re.MULTILINE)
    }


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path):
    path = recipe(
        tmp_path,
        learning_rate="2e-4",
        focal_gamma=3,
        label_column=["a", "b"],
        bf16=False,
        taxonomy=None,
    )
    _, data, training = parse([path, "--focal_gamma", "0.5"])
    assert (training.learning_rate, training.focal_gamma, training.bf16) == (2e-4, 0.5, False)
    assert data.label_column == ["a", "b"]
    assert data.taxonomy is None
    assert data.max_length is None


def test_the_command_line_replaces_where_the_recipe_takes_its_data_from(tmp_path):
    path = recipe(
        tmp_path, dataset_name="someone/corpus", dataset_revision="main", class_names={1: "a"}
    )
    data = parse([path, "--train_file", "mine.csv"])[1]
    assert (data.dataset_name, data.dataset_revision, data.train_file) == (None, None, "mine.csv")
    assert data.class_names == '{"1": "a"}'
    path = recipe(tmp_path, train_file="a.csv", test_file="b.csv")
    data = parse([path, "--test_file=c.csv"])[1]
    assert (data.train_file, data.test_file) == ("a.csv", "c.csv")


def test_defaults_depend_on_other_flags():
    def model(*words: str):
        return parse([*words]).model

    assert model().model_revision == DEFAULT_ENCODER_REVISION
    assert model("--model_name_or_path", "someone/encoder").model_revision is None
    # the evaluation strategy does not set --do_eval, as it does in transformers
    assert parse([]).training.do_eval is None
    assert parse(["--do_eval", "false"]).training.do_eval is False


@pytest.mark.parametrize(("flag", "expected"), [("true", "bf16"), ("false", "no")])
def test_flags_decide_the_precision_and_not_the_launcher(tmp_path, monkeypatch, flag, expected):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    plain = [
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--output_dir",
        str(tmp_path),
    ]
    training = parse(["--bf16", flag, *plain]).training
    assert Trainer(torch.nn.Linear(1, 1), training).accelerator.mixed_precision == expected


def test_names_and_codes_of_a_recipe_are_texts_as_they_were_written(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "class_names: {1.1: typhoid, 1.10: cholera, 007: nose, no: absent, 1:20: late, 8: "
        "2020-01-01}\n"
        "label_column: [1_0, 012]\ntext_column: no\nlr_scheduler_kwargs: {min_lr: 1e-5, "
        "name: x}\nload_best_model_at_end: false\n"
    )
    _, data, training = parse([str(path)])
    names = {
        "1.1": "typhoid",
        "1.10": "cholera",
        "007": "nose",
        "no": "absent",
        "1:20": "late",
        "8": "2020-01-01",
    }
    assert json.loads(data.class_names) == names
    assert (data.label_column, data.text_column) == (["1_0", "012"], "no")
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5, "name": "x"}
    assert training.load_best_model_at_end is False
    path.write_text("num_train_epochs: 3\nnum-train-epochs: 9\n")
    with pytest.raises(
        InputError, match="unknown key 'num-train-epochs'; did you mean num_train_epochs"
    ):
        parse([str(path)])


def test_whether_a_greater_metric_is_better_follows_from_its_name():
    for name, greater in (("macro_f1", True), ("log_loss", False), ("eval_ece", False)):
        assert parse(["--metric_for_best_model", name]).training.greater_is_better is greater, name
    assert parse(
        ["--metric_for_best_model", "ece", "--greater_is_better", "true"]
    ).training.greater_is_better


@pytest.mark.parametrize(
    ("problem_type", "name", "one", "other", "measured"),  # labels of two validation texts
    [
        (SINGLE_LABEL, "macro_f1", ["b"], ["d"], False),
        (SINGLE_LABEL, "eval_macro_f1", ["b"], ["c"], True),
        (SINGLE_LABEL, "level_2_accuracy", ["a"], ["b"], False),
        (SINGLE_LABEL, "level_2_accuracy", ["a"], ["d"], True),
        (MULTI_LABEL, "macro_f1", ["a"], [], True),
        (MULTI_LABEL, "mean_average_precision", [], [], False),
        (MULTI_LABEL, "level_3_micro_f1", ["a"], ["d"], False),
        (MULTI_LABEL, "accuracy", ["a"], ["e"], False),
    ],
)
def test_a_metric_that_the_validation_rows_cannot_give_selects_no_checkpoint(
    problem_type, name, one, other, measured
):
    taxonomy = Taxonomy(["a", {"b": ["c", {"d": ["e", "f"]}]}])
    nodes = [sorted(map(taxonomy.id, labels)) for labels in (one, other)]
    splits = {split: {"labels": nodes} for split in ("train", "validation")}
    given = (
        parse(["--metric_for_best_model", name]).training,
        splits,
        form_of(taxonomy, problem_type),
    )
    message = f"{name} is not measured on these validation rows; it is one of "
    with nullcontext() if measured else pytest.raises(InputError, match=message):
        fit_to_data(*given)
    # else the Trainer would look for it in each evaluation
    unselected = dataclasses.replace(given[0], load_best_model_at_end=False)
    fitted = fit_to_data(unselected, *given[1:])
    assert (fitted.metric_for_best_model, fitted.greater_is_better) == (None, None)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_recipe_of_the_repository_parses(path):
    assert parse([str(path)]).training.output_dir.startswith("results")
