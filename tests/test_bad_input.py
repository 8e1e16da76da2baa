"""What a hostile, hurried or unlucky user gives the commands, one row a case: each is one line that says what and where.

What the readers, the flags, taxonomies and the Hub refuse by themselves has tests of its own. Here whole commands run, in
this process, and nothing may be left behind. ``pytest -rP tests/test_bad_input.py`` prints what each case says.
"""

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, run
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import predict
import push_to_hub
import train
from configuration_hierarchical import HierarchicalConfig, Taxonomy
from modeling_hierarchical import SHIPPED_FILES
from training import InputError
from training.arguments import parse
from training.model import build_model, load_tokenizer

CHECKPOINT = Path(__file__).parent / "checkpoint"
ROWS = "text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
ALIASES = "".join(
    f"{name}: &{name} [{', '.join(f'{{{name}{i}: *{below}}}' for i in range(9))}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, str | bytes] = {
    "good.csv": ROWS,
    "utf16.csv": ROWS.encode("utf-16"),
    "bytes.csv": bytes(range(256)) * 9,
    "one_class.csv": "text,label\n" + "".join(f"text number {i},a\n" for i in range(40)),
    "one_row.csv": "text,label\nA text,a\n",
    "wide.csv": ",".join(f"column{i}" for i in range(3000)) + "\n" + "," * 2999 + "\n",
    "long_header.csv": "x" * 50_000 + ",label\na,b\n",
    "deep.json": "[" * 100_000,
    "digits.json": '[{"text": "a", "label": ' + "9" * 5000 + "}]",
    "digits.jsonl": '{"text": "a", "label": ' + "9" * 5000 + "}\n",
    "mixed.json": json.dumps([{"text": f"text {i}", "label": (1, "1")[i % 2]} for i in range(40)]),
    "damaged.parquet": b"PAR1" + bytes(500) + b"PAR1",
    "bad.yaml": "seed: {",
    "utf16.yaml": "seed: 1\n".encode("utf-16"),
    "key.yaml": "lora_rr: 8\n",
    "number.yaml": "lora_r: many\n",
    "list.yaml": "lora_r: [8, 16]\n",
    "nested.yaml": "level_weights: [[1], 2]\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "code.yaml": 'seed: !!python/object/apply:os.system ["touch ran"]\n',
    "deep.yaml": "seed: " + "[" * 5000,
    "cycle.csv": "parent,child\na,b\nb,a\n,c\n,d\n",
    "orphans.csv": "parent,child\nnowhere,a\nnowhere,\n",
    "ragged.csv": "parent,child\n,a\n,b,c\n",
    "levels.json": '{"a": ' * 99 + '["x", "y"]' + "}" * 99,
    "depths.json": '{"a": ' * 99_999 + '["x", "y"]' + "}" * 99_999,
    "name.json": json.dumps(["a", "b", "n" * 10_240]),
    "surrogate.json": '["a", "b", "\\ud800"]',
    "separator.json": json.dumps(["a", "b", "c\u2028d"]),
    "aliases.yaml": "a: &a [x, y]\n" + ALIASES,
    "recursive.yaml": "a: &a\n  b: *a\nc: \n",
    "list_key.yaml": "? [a, b]\n: c\nd: \n",
    "utf16_tree.yaml": "- a\n- b\n".encode("utf-16"),
    "field.csv": "parent,child\n," + "a" * 200_000 + "\n,b\n",
    "header.jsonl": "\n\n",
    "there.jsonl.parts/.options.json": "[]",
    "folder.csv/inside": "",
}  # fmt: skip

DATA = ("--train_file", "good.csv")
RANDOM = ("--quantization", "none", "--validation_size", "0")
NO_FOLDER = "cannot make the folder /proc/results" if os.geteuid() == 0 else "/proc may not be written to"
TRAIN = [
    (("--train_file", "utf16.csv"), "utf16.csv is not UTF-8 text: save it as UTF-8"),
    (("--train_file", "bytes.csv"), "bytes.csv is not UTF-8 text"),
    (("--train_file", "one_class.csv"), "every row has the label 'a'; at least two are needed"),
    (("--train_file", "one_row.csv"), "every row has the label 'a'; at least two are needed"),
    (("--train_file", "mixed.json"), "every row has the label '1'"),
    (("--train_file", "wide.csv"), "'column19', and 2,980 more"),
    (("--train_file", "long_header.csv"), "give --text_column, one of 'xxxx"),
    (("--train_file", "deep.json"), "deep.json is nested too deeply"),
    (("--train_file", "digits.json"), "digits.json is not JSON: Exceeds the limit"),
    (("--train_file", "digits.jsonl"), "digits.jsonl, line 1, is not JSON: Exceeds the limit"),
    (("--train_file", "damaged.parquet"), "damaged.parquet"),
    (("--train_file", "doubled.parquet"), "doubled.parquet has two columns called 'text'"),
    (("--train_file", "folder.csv"), "cannot read folder.csv: a data file is .csv"),
    (("--data_path", "folder.csv"), "is not a folder saved by `datasets`"),
    (("--dataset_name", "../../etc"), "cannot load --dataset_name ../../etc"),
    (("bad.yaml", *DATA), "the recipe bad.yaml is not YAML"),
    (("utf16.yaml", *DATA), "the recipe utf16.yaml is not UTF-8 text"),
    (("key.yaml", *DATA), "the recipe key.yaml has an unknown key 'lora_rr'; did you mean 'lora_r'?"),
    (("number.yaml", *DATA), "--lora_r: invalid int value: 'many'"),
    (("list.yaml", *DATA), "the recipe list.yaml: lora_r takes one value, not a list of 2"),
    (("nested.yaml", *DATA), "level_weights takes a plain list"),
    (("twice.yaml", *DATA), "'seed' occurs twice"),
    (("code.yaml", *DATA), "could not determine a constructor for the tag"),
    (("deep.yaml", *DATA), "the recipe deep.yaml is nested too deeply"),
    ((*DATA, "--output_dir", ""), "--output_dir needs the name of a folder"),
    (("folder.csv", *DATA), "cannot read the recipe folder.csv: Is a directory"),
    ((*DATA, "--taxonomy", "cycle.csv"), "cycle.csv: the taxonomy has a cycle: a > b > a"),
    ((*DATA, "--taxonomy", "orphans.csv"), "orphans.csv: row 2 of the taxonomy has an empty name"),
    ((*DATA, "--taxonomy", "ragged.csv"), "row 2 of the taxonomy has 3 fields, where the header has 2"),
    ((*DATA, "--taxonomy", "levels.json"), "'a' is at level 17; at most 16 levels are supported"),
    ((*DATA, "--taxonomy", "depths.json"), "depths.json is nested too deeply; at most 16 levels"),
    ((*DATA, "--taxonomy", "name.json"), "has 10,240 characters, at most 500 are supported"),
    ((*DATA, "--taxonomy", "surrogate.json"), r"the name '\ud800' has white space around it or a control character"),
    ((*DATA, "--taxonomy", "separator.json"), "a control character in it"),
    ((*DATA, "--taxonomy", "aliases.yaml"), "the taxonomy has more than 100,000 nodes"),
    ((*DATA, "--taxonomy", "recursive.yaml"), "recursive"),
    ((*DATA, "--taxonomy", "list_key.yaml"), "a name must be text, not ['a', 'b']"),
    ((*DATA, "--taxonomy", "utf16_tree.yaml"), "utf16_tree.yaml is not UTF-8 text"),
    ((*DATA, "--taxonomy", "field.csv"), "field larger than field limit"),
    ((*DATA, "--taxonomy", "folder.csv"), "cannot read the taxonomy folder.csv: Is a directory"),
    ((*DATA, "--label_separator", ""), "the label separator must be a non-empty text"),
    ((*DATA, "--lora_r", "0"), "--lora_r must be at least 1, not 0"),
    ((*DATA, "--head_dropout", "nan"), "--head_dropout must be at least 0 and below 1, not nan"),
    ((*DATA, "--learning_rate", "-1"), "--learning_rate must be more than 0, not -1.0"),
    ((*DATA, "--focal_gamma", "nan"), "--focal_gamma must be at least 0, not nan"),
    ((*DATA, "--level_weights", "1", "inf"), "--level_weights must be non-negative and not all zero"),
    ((*DATA, "--level_weights", "0", "0", "1"), "--level_weights 0.0 0.0 1.0: nothing is left to train, since"),
    ((*DATA, "--remove_unused_columns", "false"), "--remove_unused_columns has no use here"),
    ((*DATA, "--optim_args", "beta2=0.9,fast"), "--optim_args has 'fast': give name=value"),
    ((*DATA, "--debug", "underflow_overflow"), "--debug underflow_overflow fails on an encoder's boolean masks"),
    ((*DATA, "--num_train_epochs", "0"), "--num_train_epochs must be more than 0"),
    ((*DATA, "--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be at least 1"),
    ((*DATA, "--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must be at least 1"),
    ((*DATA, "--seed", "-1"), "--seed must be at least 0 and below 4,294,967,296"),
    ((*DATA, "--train_sampling_strategy", "magic"), "invalid choice: 'magic'"),
    ((*DATA, "--metric_for_best_model", "acuracy"), "--metric_for_best_model acuracy is not measured on these validation rows; it is one of loss, "),
    ((*DATA, "--report_to", "nothing_of_the_kind"), "--report_to nothing_of_the_kind: no such package is installed"),
    ((*DATA, "--metric_for_best_model", "ece_by_chance"), "--metric_for_best_model ece_by_chance is not measured"),
    ((*DATA, "--bf16_full_eval", "true"), "--bf16_full_eval has no use here"),
    ((*DATA, "--dataloader_drop_last", "true"), "--dataloader_drop_last has no use here"),
    ((*DATA, "--max_steps", "0"), "--max_steps must be at least 1, or -1"),
    ((*DATA, "--save_total_limit", "0"), "--save_total_limit must be at least 1"),
    ((*DATA, "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "3"),
     "--load_best_model_at_end needs what is evaluated to be saved: give the same --eval_steps and --save_steps, not 1 and 3"),
    ((*DATA, "--gradient_checkpointing_kwargs", '{"foo": 1}'), "--gradient_checkpointing_kwargs has 'foo'"),
    ((*DATA, *RANDOM, "--lr_scheduler_type", "warmup_stable_decay"), "cannot set up --lr_scheduler_type"),
    ((*DATA, *RANDOM, "--lr_scheduler_kwargs", '{"foo": 2}'), "cannot set up --lr_scheduler_type cosine"),
    ((*DATA, *RANDOM, "--adam_beta1", "2"), "cannot set up the optimizer: Invalid beta parameter"),
    ((*DATA, "--eval_strategy", "no", "--save_strategy", "no"), "give --load_best_model_at_end false too"),
    ((*DATA, "--prediction_loss_only", "true"), "--prediction_loss_only has no use here"),
    ((*DATA, "--accelerator_config", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
    ((*DATA, "--attn_implementation", "magic"), "cannot load the encoder"),
    ((*DATA, "--model_revision", "main"), "--model_revision main does not apply to the folder"),
    ((*DATA, "--output_dir", "good.csv/results"), "good.csv is not a folder"),
    ((*DATA, "--output_dir", "/proc/results"), NO_FOLDER),
    ((*DATA, "--output_dir", "n" * 300), "File name too long"),
    ((*DATA, "--resume_from_checkpoint", "nowhere"), "cannot resume from nowhere: there is no such folder"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def the_limit_of_a_fresh_process():
    csv.field_size_limit(2**17)  # which the Space raises for good, where its tests ran before these


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the cases name."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "label", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "doubled.parquet")
    shutil.copytree(CHECKPOINT / "encoder", tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(main: Callable, *words: object) -> str:
    """The one line that a command refuses with, printed too. It leaves no file behind."""
    before = {path for path in Path().rglob("*") if "__pycache__" not in path.parts}
    with pytest.raises(Exception) as refused:  # noqa: PT011 - what it may be is said below
        main([str(word) for word in words])
    said = train.failure(refused.value) if main is train.main else str(refused.value)
    assert main is train.main or isinstance(refused.value, InputError), repr(refused.value)
    assert said is not None, repr(refused.value)
    assert len(said) < 1500
    assert "\n" not in said
    assert "Traceback" not in said
    left = {path for path in Path().rglob("*") if "__pycache__" not in path.parts} - before
    # of data that were good
    assert {path.name for path in left} <= {"results", "data_report.json", "trained_texts.json"}
    print(said)
    return said


@pytest.mark.parametrize(
    ("words", "message"), TRAIN, ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else ""
)
def test_training(place, words, message):
    recipe = [word for word in words[:1] if not word.startswith("-")]
    assert message in refusal(
        train.main, *recipe, "--model_name_or_path", "encoder", "--output_dir", "results", *words[len(recipe) :]
    )
    assert not (place / "ran").exists()


# ── encoders and checkpoints ─────────────────────────────────────────────────────────────────────────────────────────


def configure(file: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**known, **changes}))

    return change


def encoder(**changes: object) -> Callable[[Path], None]:
    """Changes to the encoder's part of a checkpoint's config.json."""

    def change(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())["text_config"]
        configure("config.json", text_config={**known, **changes})(folder)

    return change


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def remove(*files: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / file).unlink() for file in files]


def cut(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def reshape(file: str) -> Callable[[Path], object]:
    """Has the header of a safetensors file claim a tensor of 10^12 rows."""

    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        next(about for name, about in header.items() if name != "__metadata__")["shape"][0] = 10**12
        lie = json.dumps(header).encode()
        (folder / file).write_bytes(len(lie).to_bytes(8, "little") + lie + data[8 + size :])

    return change


def lose(file: str, tensor: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        del tensors[tensor]
        save_file(tensors, folder / file, {"format": "pt"})

    return change


def more_tokens(folder: Path) -> None:
    known = json.loads((folder / "tokenizer.json").read_text())
    known["model"]["vocab"] |= {f"word{i}": 24 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(known))


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def pickled(folder: Path) -> None:
    remove("model.safetensors")(folder)
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")


def hostile_code(**changes: object) -> Callable[[Path], None]:
    """An encoder whose repository brings code of its own."""

    def change(folder: Path) -> None:
        classes = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
        configure("config.json", auto_map=classes, **changes)(folder)
        configure("tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.Slow", "hostile.Fast"]})(folder)
        (folder / "hostile.py").write_text("import os\nos.mkdir('ran')\n")

    return change


ENCODERS = {
    "config missing": (remove("config.json"), "cannot load the encoder encoder: Unrecognized model"),
    "config torn": (cut("config.json"), "config.json is not a configuration"),
    "config a list": (write("config.json", b"[]"), "config.json is not a configuration"),
    "config nested": (write("config.json", b"[" * 100_000), "config.json is not a configuration: RecursionError"),
    "config of UTF-16": (write("config.json", "{}".encode("utf-16")), "config.json is not a configuration"),
    "of no known type": (configure("config.json", model_type="magic"), "model type `magic`"),
    "of images": (configure("config.json", model_type="vit"), "lacks"),
    "of 10^7 layers": (configure("config.json", num_hidden_layers=10**7), "num_hidden_layers is 10,000,000"),
    "of 10^12 tokens": (configure("config.json", vocab_size=10**12), "vocab_size is 1,000,000,000,000"),
    "of negative width": (configure("config.json", hidden_size=-16), "hidden_size is -16"),
    "of another width": (configure("config.json", hidden_size=32), "have other shapes than its configuration says"),
    "width a text": (configure("config.json", hidden_size="16"), "expected int, got str"),
    "activation unknown": (configure("config.json", hidden_act="magic"), "KeyError: 'magic'"),
    "weights missing": (remove("model.safetensors"), "no file named model.safetensors"),
    "weights torn": (cut("model.safetensors"), "SafetensorError"),
    "weights empty": (write("model.safetensors", b""), "SafetensorError"),
    "weights lying": (reshape("model.safetensors"), "SafetensorError"),
    "weights pickled": (pickled, "which could run code: it is not loaded"),
    "tokenizer missing": (remove("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    "tokenizer torn": (cut("tokenizer.json"), "cannot load the tokenizer of encoder"),
    "tokenizer empty": (write("tokenizer.json", b"{}"), "cannot load the tokenizer of encoder"),
    "tokenizer of another": (more_tokens, "the tokenizer of encoder is another encoder's: it has token 73"),
    "code of its own": (hostile_code(model_type="hostile"), "contains custom code"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_that_is_none(place, name):
    change, message = ENCODERS[name]
    change(place / "encoder")
    assert message in refusal(
        train.main, "--model_name_or_path", "encoder", "--output_dir", "results", *DATA, "--quantization", "none"
    )
    assert not (place / "ran").exists()


def test_code_of_an_encoder_that_transformers_knows_is_not_run(place):
    """Its type is known, so it loads, and what its auto_map names stays where it is: in training and under an adapter."""
    hostile_code()(place / "encoder")
    (arguments, _, _, _) = parse(["--model_name_or_path", "encoder", "--quantization", "none"])
    model = build_model(arguments, Taxonomy(["a", "b"]), seed=0)
    load_tokenizer(arguments, model)
    shutil.copytree(CHECKPOINT / "adapter_form", place / "adapter_form")
    AutoModel.from_pretrained("adapter_form", trust_remote_code=True)
    assert model.has_adapter
    assert not (place / "ran").exists()


HEADS, WHOLE, ADAPTER = "heads.safetensors", "model.safetensors", "adapter/adapter_model.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
DEEP: list = ["x", "y"]
for _ in range(99):
    DEEP = [{"a": DEEP}]
CHECKPOINTS = {
    "config torn": ("adapter_form", cut("config.json"), "not a valid JSON file"),
    "of another kind": ("encoder", lambda folder: None, "it is not a checkpoint of this project"),
    "taxonomy a text": ("adapter_form", configure("config.json", taxonomy="abc"), "a taxonomy is a list or a mapping"),
    "taxonomy of 99 levels": ("adapter_form", configure("config.json", taxonomy=DEEP), "level 17"),
    "taxonomy of 10^5 nodes": (
        "adapter_form", configure("config.json", taxonomy=[f"n{i}" for i in range(100_001)]), "more than 100,000 nodes"),
    "taxonomy of another": (
        "adapter_form", configure("config.json", taxonomy=["a", "b"]), "temperatures must be 1 positive numbers"),
    "10^7 layers": ("whole_form", encoder(num_hidden_layers=10**7), "num_hidden_layers is 10,000,000"),
    "another width": ("whole_form", encoder(hidden_size=32), "have other shapes than its configuration says"),
    "another width, adapter": ("adapter_form", encoder(hidden_size=32), "the heads weight 'weight' has shape (7, 16)"),
    "10^7 words": ("adapter_form", configure("config.json", lexical_vocab_size=9_999_999), "expected (9999999,)"),
    "10^12 words": ("adapter_form", configure("config.json", lexical_vocab_size=10**12), "lexical_vocab_size must be"),
    "words without weight": ("adapter_form", configure("config.json", lexical_weight=None), "from an earlier version"),
    "words that count less than nothing": (
        "whole_form", configure("config.json", lexical_weight=-0.4), "lexical_weight must be a positive number"),
    "adapter elsewhere": ("adapter_form", configure("config.json", adapter_subfolder="../.."), "adapter_subfolder must"),
    "encoder elsewhere": (
        "adapter_form", configure("config.json", encoder_name_or_path="/nowhere"), "the encoder is the folder /nowhere"),
    "encoder not pinned": (
        "adapter_form", configure("config.json", encoder_name_or_path="a/b"), "encoder_revision must be the commit"),
    "heads torn": ("adapter_form", cut(HEADS), "SafetensorError"),
    "heads lying": ("adapter_form", reshape(HEADS), "SafetensorError"),
    "heads lost": ("adapter_form", lose(HEADS, "weight"), "the heads weight 'weight' is missing"),
    "adapter lying": ("adapter_form", reshape(ADAPTER), "SafetensorError"),
    "adapter not LoRA": ("adapter_form", configure(ADAPTER_CONFIG, peft_type=None), "it names no peft_type"),
    "adapter a list": ("adapter_form", write(ADAPTER_CONFIG, b"[]"), "it names no peft_type"),
    "adapter of rank 0": ("adapter_form", configure(ADAPTER_CONFIG, r=0), "adapter_config.json: r, lora_alpha"),
    "weights lost": ("whole_form", lose(WHOLE, "heads.weight"), "lacks 1 weights of a Hierarchical"),
    "weights left over": (
        "whole_form", configure("config.json", lexical_vocab_size=None, lexical_weight=None), "does not fit its config.json"),
    "weights torn": ("whole_form", cut(WHOLE), "SafetensorError"),
    "weights lying": ("whole_form", reshape(WHOLE), "SafetensorError"),
    "tokenizer of another": ("whole_form", more_tokens, "the tokenizer has 73 tokens, the encoder 23: it is another's"),
    "tokenizer without limit": (
        "whole_form", configure("tokenizer_config.json", model_max_length=10**9), "beyond the encoder's 32 positions"),
    "tokenizer missing": (
        "whole_form", remove("tokenizer.json", "tokenizer_config.json"), "cannot load the model checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_is_none(place, name):
    form, change, message = CHECKPOINTS[name]
    shutil.copytree(CHECKPOINT / form, place / "checkpoint")
    change(place / "checkpoint")
    for file in SHIPPED_FILES if form != "encoder" else ():  # the code of today, which a release will ship
        shutil.copy(ROOT / file, place / "checkpoint")
    words = ("--model", "checkpoint", "--input", "good.csv", "--output", "out.jsonl", "--dtype", "fp32")
    assert message in refusal(predict.main, *words)


def test_weights_that_are_no_numbers_are_no_answer(place):
    shutil.copytree(CHECKPOINT / "whole_form", place / "checkpoint")
    tensors = load_file(place / "checkpoint" / WHOLE)
    save_file({**tensors, "heads.weight": tensors["heads.weight"] * float("nan")}, place / "checkpoint" / WHOLE)
    words = ("--model", "checkpoint", "--input", "good.csv", "--output", "out.jsonl", "--dtype", "fp32")
    assert "its weights are damaged" in refusal(predict.main, *words)


PREDICT = [
    (("--input", "utf16.csv"), "utf16.csv is not UTF-8 text: save it as UTF-8"),
    (("--input", "bytes.csv"), "bytes.csv"),
    (("--input", "wide.csv"), "'column19', and 2,980 more"),
    (("--input", "header.jsonl"), "--input header.jsonl has no rows"),
    (("--input", "damaged.parquet"), "cannot read damaged.parquet: Couldn't deserialize"),
    (("--input", "folder.csv"), "--input folder.csv is a folder: give a pattern"),
    (("--output", "good.csv"), "--output good.csv is also an input: give another name"),
    (("--output", "good.csv/out.jsonl"), "--output good.csv: good.csv is not a folder"),
    (("--output", "n" * 250 + ".jsonl"), "the name is too long"),
    (("--output", "there.jsonl"), "there.jsonl.parts/.options.json is damaged: --overwrite starts anew"),
    (("--revision", "main"), "--revision main does not apply to the folder"),
    (("--model", "good.csv"), "cannot load the model good.csv"),
    (("--model", "../../etc"), "cannot load the model ../../etc"),
    (("--coverage", "nan"), "--coverage must be between 0 and 1, not nan"),
]


@pytest.mark.parametrize(
    ("words", "message"), PREDICT, ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else ""
)
def test_prediction(place, words, message):
    shutil.copytree(CHECKPOINT / "whole_form", place / "whole_form")
    given = {"--model": "whole_form", "--input": "good.csv", "--output": "out.jsonl", "--dtype": "fp32"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert message in refusal(predict.main, *(word for pair in given.items() for word in pair))


def test_publishing(place):
    for form in ("adapter_form", "whole_form"):
        shutil.copytree(CHECKPOINT / form, place / form)
        (place / form / "README.md").write_text("# A card\n")
    reshape(WHOLE)(place / "whole_form")
    configure("config.json", adapter_subfolder="../..")(place / "adapter_form")
    for folder, message in (
        ("whole_form", "model.safetensors cannot be read"),
        ("adapter_form", "adapter_subfolder must be the name of a folder"),
        ("encoder", "holds a 'bert' model, not one of ours"),
        ("good.csv", "is not a checkpoint: it has no config.json"),
    ):
        assert message in refusal(push_to_hub.main, "--model", folder, "--repo_id", "../../etc/passwd")


# ── what needs a process of its own ──────────────────────────────────────────────────────────────────────────────────


def test_a_traceback_comes_where_it_is_asked_for(place):
    words = ("--model", "x", "--input", "none.csv", "--output", "out.jsonl")
    done = run(*words, command="predict.py", check=False, cwd=place, settings={"HIERARCHICAL_TRACEBACK": "1"})
    assert done.returncode == 2
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-1] == "predict.py: error: --input none.csv: there is no such file"


def test_a_download_that_breaks_off_is_one_line_without_the_token(place):
    token = "hf_" + "secret" * 5
    with HubServer() as hub:
        hub.add_user("alice", token)
        hub.add_repo("alice/model", CHECKPOINT / "whole_form", private=True)
        for attempt in range(1, 20):
            hub.fail_at(attempt, "GET /cdn/")
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(place / "home"),
            "HF_TOKEN": token,
        }
        words = ("--model", "alice/model", "--input", "good.csv", "--output", "out.jsonl", "--dtype", "fp32")
        done = run(*words, command="predict.py", check=False, cwd=place, settings=settings)
        assert any(request.headers.get("authorization", "").endswith(token) for request in hub.requests)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("predict.py: error: cannot load the model alice/model: ")
    assert "Traceback" not in done.stderr
    assert token not in done.stdout + done.stderr
    assert not list(place.glob("out*"))
    holding = [path for path in place.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert holding == []


def test_a_run_with_hostile_names_keeps_to_its_folder_and_tells_no_token(place):
    """Names of classes become parts of plots, of the card and of tables, but of no path; a token becomes part of nothing."""
    tokens = ("hf_" + "inheritance" * 3, "hf_" + "argument" * 4)
    names = ("../../../escaped", "/etc/escaped", "<script>alert(1)</script>", "=cmd|'/C calc'!A0")
    lines = [f'text number {i},"{names[i % 4]}"\n' for i in range(64)]
    (place / "hostile.csv").write_text("text,label\n" + "".join(lines))
    before = {path for path in place.rglob("*") if path.is_file()}
    done = run(
        "--train_file", "hostile.csv", "--model_name_or_path", "encoder", "--output_dir", "results", "--label_separator", "|||",
        "--hub_token", tokens[1], "--max_steps", 1, "--eval_strategy", "steps", "--eval_steps", 1, "--save_strategy", "steps",
        "--save_steps", 1, "--report_to", "tensorboard", cwd=place, settings={"HF_TOKEN": tokens[0]},
    )  # fmt: skip
    written = {path for path in place.rglob("*") if path.is_file()} - before
    assert {path.relative_to(place).parts[0] for path in written} == {"results"}
    assert not any("escaped" in str(path) for path in [*written, *Path("/etc").glob("escaped*")])
    for path in written:
        assert not any(token.encode() in path.read_bytes() for token in tokens), path
        if path.suffix == ".html":  # in README.md they stand in a fence; tests/test_card.py reads that
            assert "<script>alert" not in path.read_text(encoding="utf-8"), path
    assert not any(token in done.stdout + done.stderr for token in tokens)


def test_a_full_disk_leaves_no_half_of_an_answer(place):
    disk = place / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        (place / "many.csv").write_text("text\n" + "a headache\n" * 3000)
        words = ("--model", CHECKPOINT / "whole_form", "--input", "many.csv", "--output", disk / "out.csv")
        done = run(*words, command="predict.py", check=False, cwd=place)
        assert done.returncode == 2
        said = done.stderr.splitlines()[-1]
        assert said.startswith("predict.py: error: ")
        assert said.endswith("make room; the same command goes on where it was")
        assert "Traceback" not in done.stderr
        assert not (disk / "out.csv").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_absurd_sizes_take_no_memory():
    """In this process: an allocation of what the sizes ask for would end it."""
    for changes in (
        {"text_config": {"vocab_size": 10**15}},
        {"text_config": {"num_hidden_layers": 10**12}},
        {"lexical_vocab_size": 10**15},
    ):
        with pytest.raises(ValueError, match="must be"):
            HierarchicalConfig(**changes)
