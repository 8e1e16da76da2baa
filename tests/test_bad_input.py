"""Check that the commands refuse bad and hostile input in one line, which names the input and the
problem.

Readers, flags, taxonomies and Hub code have unit tests of their own. Here the commands' ``main``
runs in this process, and must leave no files behind. ``pytest -rP tests/test_bad_input.py`` prints
the message of each case.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, complete, copy_checkpoint, free_port, run
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2Model

import predict
import push_to_hub
import train
from hierarchical_clinicalbert.errors import InputError, user_error_message

CHECKPOINT = Path(__file__).parent / "checkpoint"
ROWS = "text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(40))
FILES: dict[str, str] = {
    "good.csv": ROWS,
    "rows.csv": "text,label\na headache,general\n",
    "one_class.csv": "text,label\n" + "".join(f"text number {i},a\n" for i in range(40)),
    "bad.yaml": "seed: {",
    "words.yaml": "just words",
    "key.yaml": "lora_rr: 8\n",
    "list.yaml": "lora_r: [8, 16]\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "code.yaml": 'seed: !!python/object/apply:os.system ["touch ran"]\n',
    "list_key.yaml": "? [a, b]\n: c\nd: \n",
    "null.yaml": "save_total_limit:\n",
    "header.jsonl": "\n\n",
    "folder.csv/inside": "",
    "empty.csv": "",
    "ragged.csv": "text,label\na,b\nc\n",
    "kept.jsonl": "kept\n",
    "parents.csv": "parent,child\n,a\n,b\naa,c\n",
    "equal.yaml": "- a b\n- a\u00a0b\n",
    "project/README.md": "A project of the user.\n",
    "analysis/test_predictions.csv": "row,label\n",
}

DATA = ("--train_file", "good.csv")
RANDOM = ("--quantization", "none", "--validation_size", "0")
# which would be other errors
NOWHERE = ("--train_file", "nowhere.csv", "--model_name_or_path", "no/model")
NOT_OURS = (
    "which a run would overwrite or delete, is not from a run: move it, or give another "
    "--output_dir"
)
NO_FOLDER = (
    "/proc/results (No such file" if os.geteuid() == 0 else "/proc/results (Permission denied"
)
TRAIN = [
    (("--train_file", "one_class.csv"), "a taxonomy needs at least two leaves; this one has 1"),
    (("--train_file", "empty.csv"), "empty.csv is empty"),
    (("--train_file", "ragged.csv"), "ragged.csv, line 3: 1 fields, where the header has 2"),
    (("--data_path", "folder.csv"), "folder.csv: it contains no file of a known format"),
    ((), "no data"),
    (("--data_path", "good.csv", *DATA), "--data_path and --train_file contradict"),
    (
        ("--data_path", "good.csv", "--test_size", "-0.1"),
        "must be shares of the rows with a sum below 1",
    ),
    (
        ("--data_path", "good.csv", "--validation_size", "0.5", "--test_size", "0.5"),
        "with a sum below 1",
    ),
    (("--dataset_name", "../../etc"), "cannot load --dataset_name ../../etc"),
    (("bad.yaml", *DATA), "bad.yaml: expected the node content"),
    (("words.yaml", *DATA), "the recipe words.yaml must be a mapping of flags to values"),
    (("key.yaml", *DATA), "the recipe key.yaml has an unknown key 'lora_rr'; did you mean lora_r?"),
    (("list.yaml", *DATA), "--lora-r: invalid int value: \"['8', '16']\""),
    (("twice.yaml", *DATA), "'seed' occurs twice"),
    (("code.yaml", *DATA), "--seed: invalid int value"),
    ((*DATA, "--focal_gama", "1"), "unknown flag --focal_gama; did you mean --focal_gamma"),
    ((*DATA, "--quantization", "4bit", "--tuning", "full"), "--tuning full"),
    ((*DATA, "--dataset_revision", "main"), "--dataset_revision needs --dataset_name"),
    (
        (*DATA, "--fsdp", "full_shard", "--use_cpu", "true"),
        "FSDP needs GPUs; on CPUs use recipes/accelerate/ddp.yaml",
    ),
    ((*DATA, "--max_length", "2"), "--max_length"),
    (
        (*DATA, "--output_dir", "encoder", "--overwrite_output_dir", "true"),
        "a model that train.py did not write",
    ),
    (
        (*DATA, "--max_steps", "0"),
        "--max_steps must be at least 1; leave it out to train for --num_train_epochs",
    ),
    (("folder.csv", *DATA), "cannot read folder.csv: Is a directory"),
    ((*DATA, "--taxonomy", "list_key.yaml"), "a name must be text, not a list"),
    ((*DATA, "--taxonomy", "parents.csv"), "parent 'aa' has no row of its own; did you mean 'a'?"),
    ((*DATA, "--taxonomy", "equal.yaml"), r"equal.yaml: 'a b' and 'a\xa0b' are equal"),
    ((*DATA, "--text_column", "label"), "cannot be both"),
    (
        (*DATA, "--label_delimiter", ";", "--label_column", "a", "b"),
        "--label_delimiter needs one --label_column",
    ),
    ((*DATA, "--label_separator", ""), "the label separator must be a non-empty text"),
    (
        (*DATA, "--label_smoothing_factor", "nan"),
        "--label_smoothing_factor must be at least 0 and below 1, not nan",
    ),
    ((*DATA, "--learning_rate", "-1"), "--learning_rate must be more than 0, not -1.0"),
    ((*DATA, "--remove_unused_columns", "true"), "--remove_unused_columns is not supported"),
    (
        ("null.yaml", *DATA),
        "the recipe null.yaml: save_total_limit has no value; leave the key out for its default",
    ),
    ((*DATA, "--seed", "-1"), "--seed must be at least 0 and below 4,294,967,296"),
    (
        (*DATA, "--metric_for_best_model", "acuracy"),
        (
            "--metric_for_best_model acuracy is not measured on these validation rows; it is "
            "one of loss, "
        ),
    ),
    (
        (*DATA, *RANDOM, "--report_to", "nothing_of_the_kind"),
        "cannot set up training: nothing_of_the_kind is not supported",
    ),
    ((*DATA, "--fp16", "true"), "--fp16 needs a GPU: leave it out"),
    ((*DATA, "--save_total_limit", "0"), "--save_total_limit must be at least 1"),
    ((*DATA, "--enable_jit_checkpoint", "true"), "--enable_jit_checkpoint is not supported"),
    (
        (
            *DATA,
            "--eval_strategy",
            "steps",
            "--save_strategy",
            "steps",
            "--eval_steps",
            "1",
            "--save_steps",
            "3",
        ),
        (
            "--load_best_model_at_end needs a save at every evaluation: give the same "
            "--eval_steps and --save_steps"
        ),
    ),
    (
        (*DATA, *RANDOM, "--lr_scheduler_type", "warmup_stable_decay"),
        "cannot set up --lr_scheduler_type",
    ),
    ((*DATA, *RANDOM, "--adam_beta1", "2"), "cannot set up the optimizer: Invalid beta parameter"),
    (
        (*DATA, "--eval_strategy", "no", "--save_strategy", "no"),
        "also give --load_best_model_at_end false",
    ),
    (
        (*DATA, "--lr_scheduler_type", "reduce_lr_on_plateau"),
        "--lr_scheduler_type must not follow a metric",
    ),
    ((*DATA, "--accelerator_config", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
    ((*DATA, "--model_revision", "main"), "--model_revision main does not apply to the folder"),
    ((*DATA, "--output_dir", "/proc/results"), NO_FOLDER),
    ((*NOWHERE, "--output_dir", "project"), f"--output_dir project: project/README.md, {NOT_OURS}"),
    (
        (*NOWHERE, "--output_dir", "analysis", "--do_train", "false"),
        f"analysis/test_predictions.csv, {NOT_OURS}",
    ),
    (
        (*DATA, "--resume_from_checkpoint", "nowhere"),
        "cannot resume from nowhere: there is no such folder",
    ),
    (
        (*DATA, "--do_train", "false", "--renamed_nodes", "{}"),
        "renames no nodes: leave out --renamed_nodes",
    ),
    ((*DATA, "--do_train", "false"), "--do_train false needs a trained checkpoint"),
]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Make a folder with the files that the cases name, and change to it."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    shutil.copytree(CHECKPOINT / "encoder", tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(main: Callable, *words: object) -> str:
    """Run a command that must be refused.

    Return the message, after checking that it is one line and no file is left.
    """
    before = {path for path in Path().rglob("*") if "__pycache__" not in path.parts}
    with pytest.raises(Exception) as refused:  # noqa: PT011 - the types are checked below
        main([str(word) for word in words])
    message = (
        user_error_message(refused.value, train.ADVICE)
        if main is train.main
        else str(refused.value)
    )
    assert main is train.main or isinstance(refused.value, InputError), repr(refused.value)
    assert message is not None, repr(refused.value)
    assert len(message) < 1500
    assert "\n" not in message
    assert "Traceback" not in message
    new = {path for path in Path().rglob("*") if "__pycache__" not in path.parts} - before
    # train.py writes these as soon as the data is valid
    assert {path.name for path in new} <= {"results", "data_report.json", "trained_texts.json"}
    print(message)
    return message


def refusal_to_train(*words: object) -> str:
    """Return the message with which train.py refuses flags, after a recipe if the first word is no
    flag.
    """
    recipe = [word for word in words[:1] if not str(word).startswith("-")]
    given = ("--model_name_or_path", "encoder", "--output_dir", "results")
    return refusal(train.main, *recipe, *given, *words[len(recipe) :])


PREDICTION = (
    "--model",
    "checkpoint",
    "--input",
    "good.csv",
    "--output",
    "out.jsonl",
    "--dtype",
    "fp32",
)


@pytest.mark.parametrize(
    ("words", "message"),
    TRAIN,
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else "",
)
def test_train_refuses_bad_flags_and_files(place, words, message):
    assert message in refusal_to_train(*words)
    assert not (place / "ran").exists()


# ── encoders and checkpoints ──────────────────────────────────────────────────────────────────────


def edit(file: str, *keys: str, **changes: object) -> Callable[[Path], None]:
    """Return a function that changes a JSON file of a checkpoint, in the object under ``keys``."""

    def change(folder: Path) -> None:
        content = place = json.loads((folder / file).read_text())
        for key in keys:
            place = place[key]
        place |= changes
        (folder / file).write_text(json.dumps(content))

    return change


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def remove(*files: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / file).unlink() for file in files]


def cut(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def lose(file: str, tensor: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        del tensors[tensor]
        save_file(tensors, folder / file, {"format": "pt"})

    return change


def not_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"heads.weight": tensors["heads.weight"] * float("nan")},
        folder / "model.safetensors",
    )


def more_tokens(folder: Path) -> None:
    known = json.loads((folder / "tokenizer.json").read_text())
    known["model"]["vocab"] |= {f"word{i}": 24 + i for i in range(50)}
    (folder / "tokenizer.json").write_text(json.dumps(known))


def slow_tokenizer(folder: Path) -> None:
    """Replace the tokenizer by BERTweet's, which has no fast version."""
    remove("tokenizer.json")(folder)
    write("vocab.txt", b"text 9\nnumber 9\na</w> 9\n")(folder)
    write("bpe.codes", b"t e 9\n")(folder)
    edit("tokenizer_config.json", tokenizer_class="BertweetTokenizer")(folder)


def without_linear_layers(folder: Path) -> None:
    """Replace the encoder by GPT-2, whose layers are transposed convolutions."""
    config = GPT2Config(
        vocab_size=74, n_embd=16, n_layer=1, n_head=2, n_positions=64, pad_token_id=0
    )
    GPT2Model(config).save_pretrained(folder)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def pickled(folder: Path) -> None:
    remove("model.safetensors")(folder)
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")


def hostile_code(**changes: object) -> Callable[[Path], None]:
    """Return a function that adds custom code, which would make the folder "ran", to an encoder."""

    def change(folder: Path) -> None:
        classes = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
        edit("config.json", auto_map=classes, **changes)(folder)
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["hostile.Slow", "hostile.Fast"]})(
            folder
        )
        (folder / "hostile.py").write_text("import os\nos.mkdir('ran')\n")

    return change


ENCODERS = {
    "config missing": (
        remove("config.json"),
        "cannot load the encoder encoder: Unrecognized model",
    ),
    "config torn": (cut("config.json"), "config.json is not a configuration"),
    "of no known type": (edit("config.json", model_type="magic"), "model type `magic`"),
    "of images": (edit("config.json", model_type="vit"), "lacks"),
    "activation unknown": (edit("config.json", hidden_act="magic"), "KeyError: 'magic'"),
    "weights missing": (remove("model.safetensors"), "no file named model.safetensors"),
    "weights torn": (cut("model.safetensors"), "SafetensorError"),
    "weights pickled": (pickled, "which could run code: it is not loaded"),
    "tokenizer missing": (remove("tokenizer.json", "tokenizer_config.json"), "holds no tokenizer"),
    "tokenizer torn": (cut("tokenizer.json"), "/encoder: Expecting value: line"),
    "tokenizer of another": (
        more_tokens,
        "/encoder does not belong to this encoder: its largest token id is 73",
    ),
    "tokenizer slow": (
        slow_tokenizer,
        (
            "BertweetTokenizer is not a fast tokenizer (of the tokenizers library), which "
            "serving the checkpoint requires"
        ),
    ),
    "no linear layers": (
        without_linear_layers,
        "GPT2Model has no linear layers: give --tuning full",
    ),
    "code of its own": (hostile_code(model_type="hostile"), "contains custom code"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_train_refuses_an_unusable_encoder(place, name):
    change, message = ENCODERS[name]
    change(place / "encoder")
    assert message in refusal_to_train(*DATA, "--quantization", "none")
    assert not (place / "ran").exists()


def test_code_of_an_encoder_that_transformers_knows_is_neither_run_nor_named_by_the_checkpoint(
    place,
):
    """Train and predict with an encoder of a known type, custom code, and attention kernels in a
    repository on the Hub.
    """
    hostile_code(_attn_implementation="kernels-community/flash-attn")(place / "encoder")
    train.main(
        [
            *DATA,
            *RANDOM,
            "--model_name_or_path",
            "encoder",
            "--output_dir",
            "results",
            "--max_steps",
            "1",
        ]
    )
    assert "hostile" not in (place / "results" / "tokenizer_config.json").read_text()
    words = (
        "--model",
        "results",
        "--input",
        "good.csv",
        "--output",
        "out.jsonl",
        "--dtype",
        "fp32",
    )
    assert predict.main([*words]) == 0
    assert not (place / "ran").exists()


HEADS = "heads.safetensors"
WHOLE = "model.safetensors"
ADAPTER = "adapter/adapter_model.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
CHECKPOINTS = {
    "config torn": ("adapter_form", cut("config.json"), "config.json is not a configuration"),
    "format of another release": (
        "self_contained",
        edit("config.json", format_version=2),
        "its format_version is 2",
    ),
    "lexical weights of all tokens": (
        "self_contained",
        edit("config.json", lexical_entries=None),
        "and the calibration's lexical_weight must be given together",
    ),
    "of another kind": ("encoder", lambda folder: None, "it is not a checkpoint of this project"),
    "taxonomy a text": (
        "adapter_form",
        edit("config.json", taxonomy="abc"),
        "a taxonomy is a list or a mapping",
    ),
    "thresholds of another": (
        "self_contained",
        edit("config.json", calibration={"thresholds": [0.5]}),
        "thresholds must be a list of 7 numbers",
    ),
    "recall not a list": (
        "self_contained",
        edit("config.json", calibration={"set_thresholds": 0.3}),
        "calibration: set_thresholds must be a list of 99 numbers",
    ),
    "another width": (
        "self_contained",
        edit("config.json", "text_config", hidden_size=32),
        "have other shapes than its configuration says",
    ),
    "words without weight": (
        "adapter_form",
        edit("config.json", calibration={}),
        "and the calibration's lexical_weight must be given together",
    ),
    "encoder elsewhere": (
        "adapter_form",
        edit("config.json", encoder_name_or_path="/nowhere"),
        "the encoder is the folder /nowhere",
    ),
    "encoder not pinned": (
        "adapter_form",
        edit("config.json", encoder_name_or_path="a/b"),
        "encoder_revision must be the commit",
    ),
    "adapter lost": (
        "adapter_form",
        lose(ADAPTER, "base_model.model.encoder.layer.0.output.dense.lora_A.weight"),
        "the adapter weight",
    ),
    "heads lost": ("adapter_form", lose(HEADS, "weight"), "the heads weight 'weight' is missing"),
    "adapter config torn": (
        "adapter_form",
        cut(ADAPTER_CONFIG),
        "adapter_config.json is not the configuration of a PEFT adapter",
    ),
    "weights lost": (
        "self_contained",
        lose(WHOLE, "heads.weight"),
        "lacks 1 weights of a Hierarchical",
    ),
    "weights left over": (
        "self_contained",
        edit("config.json", lexical_vocab_size=None, lexical_entries=None, calibration={}),
        "does not fit its config.json",
    ),
    "weights torn": ("self_contained", cut(WHOLE), "SafetensorError"),
    "weights not numbers": ("self_contained", not_numbers, "its weights are damaged"),
    "tokenizer of another": (
        "self_contained",
        more_tokens,
        "the tokenizer of checkpoint does not belong to this encoder: its largest token id is 73",
    ),
    "tokenizer without limit": (
        "self_contained",
        edit("tokenizer_config.json", model_max_length=10**9),
        "beyond the encoder's 32 positions",
    ),
    "tokenizer missing": (
        "self_contained",
        remove("tokenizer.json", "tokenizer_config.json"),
        "cannot use the model checkpoint",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_predict_refuses_an_unusable_checkpoint(place, name):
    form, change, message = CHECKPOINTS[name]
    change(copy_checkpoint(form, place / "checkpoint"))
    assert message in refusal(predict.main, *PREDICTION)


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        (remove("tokenizer.json"), "--test_file", "checkpoint holds no tokenizer"),
        (remove(), "--data_path", "of one file, give it as --test_file"),
    ],
)
def test_a_checkpoint_is_scored_with_its_vocabulary_and_on_whole_files(
    place, change, rows, message
):
    change(copy_checkpoint("self_contained", place / "checkpoint"))
    words = (
        "--do_train",
        "false",
        "--do_predict",
        "--model_name_or_path",
        "checkpoint",
        rows,
        "rows.csv",
    )
    assert message in refusal(train.main, *words, "--output_dir", "results")


def test_commands_refuse_a_newer_format_and_predict_runs_the_code_that_comes_with_it(place):
    folder = copy_checkpoint("self_contained", place / "checkpoint")
    edit("config.json", format_version=4)(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    expected = "config.json cannot be used: its format_version is 4, "
    expected += "and this code reads version 3: "
    expected += (
        "use another release, or trust_remote_code=True, which runs the code that the "
        "checkpoint holds"
    )
    model = ("--model_name_or_path", "checkpoint", "--output_dir", "results")
    assert expected in refusal(
        train.main, *model, "--do_train", "false", "--do_predict", "--test_file", "rows.csv"
    )
    assert expected in refusal(train.main, *model, "--train_file", "rows.csv")
    assert expected in refusal(
        push_to_hub.main, "--model", "checkpoint", "--repo_id", "someone/model"
    )
    code = (folder / "configuration_hierarchical.py").read_text()
    newer = code.replace("FORMAT_VERSION = 3", "FORMAT_VERSION = 4")
    assert newer != code
    (folder / "configuration_hierarchical.py").write_text(newer)
    assert predict.main([*PREDICTION]) == 0


# ── code of other repositories ────────────────────────────────────────────────────────────────────

# transformers would run the newest foreign.py of this repository
FOREIGN = "other/code--foreign.Class"


def auto_map(**classes: str) -> Callable[[Path], None]:
    return edit("config.json", "auto_map", **classes)


def pipeline_entry(**changes: object) -> Callable[[Path], None]:
    return edit("config.json", "custom_pipelines", "hierarchical-text-classification", **changes)


def tokenizer_map(value: object) -> Callable[[Path], None]:
    return edit("tokenizer_config.json", auto_map=value)


def other_configuration_file(folder: Path) -> None:
    """Name a second configuration, which transformers reads in place of config.json."""
    known = (folder / "config.json").read_text()
    auto_map(AutoConfig=FOREIGN)(folder)
    (folder / "config.json").rename(folder / "config.5.0.0.json")
    (folder / "config.json").write_text(known)
    edit("config.json", configuration_files=["config.5.0.0.json"])(folder)


def processor(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a function that adds a processor, and makes transformers load it."""

    def add(folder: Path) -> None:
        (folder / "processor_config.json").write_text(
            json.dumps({"auto_map": {"AutoProcessor": FOREIGN}})
        )
        change(folder)

    return add


def without_model(folder: Path) -> None:
    """Make the model's own class fail, and name another one."""
    lose(WHOLE, "heads.weight")(folder)
    edit("config.json", architectures=["AutoProcessor"])(folder)


def code_elsewhere(folder: Path) -> None:
    """Name a Python file by its path, without a repository."""
    (folder.parent / "foreign.py").write_bytes(FOREIGN_CODE)
    tokenizer_map({"AutoTokenizer": [None, f"{folder.parent}/foreign.Class"]})(folder)


def adapter_beside(folder: Path) -> None:
    """Add an adapter, whose model transformers would load in place of the checkpoint's."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "other/code"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))


FOREIGN_CODE = b"import os\nos.mkdir(os.environ['MARKER'])\n"
ENTRIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "configuration": (
        auto_map(AutoConfig=FOREIGN),
        "config.json of checkpoint names 'other/code--foreign.Class' in auto_map",
    ),
    "model": (auto_map(AutoModelForSequenceClassification=FOREIGN), "Class' in auto_map"),
    "pipeline": (pipeline_entry(impl=FOREIGN), "Class' in custom_pipelines"),
    "tokenizer": (
        tokenizer_map({"AutoTokenizer": [None, FOREIGN]}),
        "tokenizer_config.json of checkpoint names",
    ),
    "tokenizer, as a list": (
        tokenizer_map([FOREIGN, None]),
        "tokenizer_config.json of checkpoint names",
    ),
    "a second configuration": (other_configuration_file, "Class' in auto_map"),
    "a processor": (
        processor(pipeline_entry(pt=["AutoProcessor"])),
        "names 'AutoProcessor' in custom_pipelines",
    ),
    "a processor, without a model": (
        processor(without_model),
        "names 'AutoProcessor' in architectures",
    ),
    "a path": (code_elsewhere, "foreign.Class' in auto_map"),
    "an adapter": (
        adapter_beside,
        "adapter_config.json of checkpoint names 'other/code' in base_model_name_or_path",
    ),
}


@pytest.fixture(scope="module")
def foreign_hub(hub) -> HubServer:
    """Serve a Hub with a repository whose code makes the folder that the variable MARKER names."""
    config = {"auto_map": {"AutoConfig": "foreign.Class"}}
    hub.add_repo(
        "other/code", {"foreign.py": FOREIGN_CODE, "config.json": json.dumps(config).encode()}
    )
    return hub


def refusal_of_code(hub: HubServer, place: Path, command: str, *words: object) -> str:
    """Return the message with which a command refuses a checkpoint, without running code of other
    repositories.
    """
    settings = hub.environment(token="hf_alice") | {"MARKER": str(place / "ran")}
    settings["GRADIO_SERVER_PORT"] = str(free_port())
    done = run(*words, command=command, check=False, cwd=place, settings=settings)
    assert not (place / "ran").exists()
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ENTRIES)
def test_code_of_another_repository_is_refused(foreign_hub, place, name):
    change, message = ENTRIES[name]
    change(copy_checkpoint("self_contained", place / "checkpoint"))
    assert message in refusal_of_code(foreign_hub, place, "predict.py", *PREDICTION)


SCORE = (
    "--do_train",
    "false",
    "--do_predict",
    "--test_file",
    "rows.csv",
    "--output_dir",
    "results",
)
CONTINUE = (
    *(
        "--train_file",
        "rows.csv",
        "--validation_size",
        0,
        "--tuning",
        "full",
        "--quantization",
        "none",
    ),
    *("--output_dir", "results", "--max_steps", 1),
)
DOORS: dict[str, tuple[str, tuple[object, ...]]] = {
    "predict at a commit": (
        "predict.py",
        (*PREDICTION[2:], "--model", "someone/model", "--revision"),
    ),
    "score": ("train.py", (*SCORE, "--model_name_or_path", "checkpoint")),
    "continue at a commit": (
        "train.py",
        (*CONTINUE, "--model_name_or_path", "someone/model", "--model_revision"),
    ),
    "publish": (
        "push_to_hub.py",
        ("--repo_id", "alice/model", "--onnx", "--dry_run", "--model", "checkpoint"),
    ),
    "the Space, from the Hub": ("space/app.py", ("--model", "someone/model", "--revision")),
    "the example": ("examples/classify.py", ("checkpoint", "rows.csv")),
    "the halved encoder": ("examples/half_encoder.py", ("checkpoint", "half")),
}


@pytest.mark.parametrize("door", DOORS)
def test_each_command_refuses_code_of_another_repository(foreign_hub, place, door):
    folder = copy_checkpoint("self_contained", place / "checkpoint")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    auto_map(AutoConfig=FOREIGN)(folder)
    command, words = DOORS[door]
    if str(words[-1]).endswith("revision"):
        words += (foreign_hub.add_repo("someone/model", folder),)
    assert f"{FOREIGN!r} in auto_map, which could run" in refusal_of_code(
        foreign_hub, place, command, *words
    )


PREDICT = [
    (("--input", "header.jsonl"), "--input header.jsonl has no rows"),
    (("--output", "good.csv/out.jsonl"), "cannot write to the folder good.csv (File exists)"),
    (("--model", "good.csv"), "cannot load the model good.csv"),
    (("--coverage", "nan"), "coverage must be a number above 0 and at most 0.99, not nan"),
    (("--input", "-"), "--input_format"),
    (
        ("--input", "pipe.csv"),
        "pipe.csv: it is not a regular file; pipe its content to standard input (-)",
    ),
    (("--text_column", "body"), "no column 'body' (--text_column): there are 'text', 'label'"),
    (("--batch_size", "0"), "batch_size must be a whole number of at least 1, not 0"),
    (("--output_format", "parquet"), "--output_format is for a folder"),
    (("--ray_gpus_per_actor", "1"), "--ray_gpus_per_actor need --ray"),
    (
        ("--dtype", "int8", "--backend", "torch"),
        "--dtype int8 is OpenVINO's: leave out --backend torch",
    ),
    (("--ray", "local", "--ray_gpus_per_actor", "-1"), "or a fraction of one, not -1"),
    (("--output", "out.txt"), "must end in one of"),
    (("--output", "hf://datasets/me/out/"), "write to a disk or an object store"),
    (("--output", os.fsdecode(b"out\xe9/")), "surrogates not allowed"),
    (("--output", "kept.jsonl"), "already exists"),
    (("--model", "/nothing"), "/nothing: there is no such folder"),
    (("--outptu", "x"), "unrecognized arguments"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    PREDICT,
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_predict_refuses_bad_flags_and_files(place, words, message):
    copy_checkpoint("self_contained", place / "self_contained")
    if "pipe.csv" in words:
        os.mkfifo("pipe.csv")
    given = {
        "--model": "self_contained",
        "--input": "good.csv",
        "--output": "out.jsonl",
        "--dtype": "fp32",
    }
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert message in refusal(predict.main, *(word for pair in given.items() for word in pair))
    assert (place / "kept.jsonl").read_text() == "kept\n"


# ── texts where names should be ───────────────────────────────────────────────────────────────────

PATIENT = "Mrs Example of Nowhere Lane 7 was admitted with chest pain and is 54"
OTHERS = [
    f"The patient number {i} of this file was seen in the clinic and sent home" for i in range(39)
]
TEXTS: dict[str, str] = {
    "headerless.csv": "".join(
        f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate([PATIENT, *OTHERS])
    ),
    "keys.jsonl": json.dumps({PATIENT: "a", "label": "b"}) + "\n",
    "data.csv": "text,label\n"
    + "".join(f'"{text}",{"ab"[i % 2]}\n' for i, text in enumerate([PATIENT, *OTHERS])),
    "codes.csv": f'code,name\na,"{PATIENT}"\na,"{OTHERS[0]}"\n',
    "parents_of_texts.csv": f'parent,child\n,a\n,"{PATIENT}."\n"{PATIENT}",b\n',
    "cycle_of_texts.csv": f'parent,child\na,"{PATIENT}"\n"{PATIENT}",a\n,b\n',
    "broken.yaml": f"- a\n- {PATIENT}: {PATIENT}: [\n",
    "mrn.csv": "20190731,4711-0815-99\na,b\n",
}
WITH_TEXTS = [
    (("--train_file", "headerless.csv"), "(a value of 68 characters): is the header missing?"),
    (("--train_file", "mrn.csv"), "is the header missing?"),
    (("--train_file", "keys.jsonl"), "(a value of 68 characters): is the header missing?"),
    (
        ("--train_file", "data.csv", "--text_column", "label", "--label_column", "text"),
        "40 of 40 labels are texts, not names",
    ),
    (
        (
            "--train_file",
            "data.csv",
            "--text_column",
            "label",
            "--label_column",
            "text",
            "--taxonomy",
            "aliased.yaml",
        ),
        "the label (a value of 68 characters) is not in the taxonomy; it has 'x', 'y', …",
    ),
    (
        (
            "--train_file",
            "data.csv",
            "--text_column",
            "label",
            "--label_column",
            "text",
            "--class_names",
            '{"a": "b"}',
        ),
        "the label (a value of 68 characters) is neither a code nor a name",
    ),
    (("--train_file", "data.csv", "--class_names", "codes.csv"), "the code 'a' has two names"),
    (
        ("--train_file", "data.csv", "--taxonomy", "headerless.csv"),
        "expected columns 'parent' and 'child'",
    ),
    (
        ("--train_file", "data.csv", "--taxonomy", "parents_of_texts.csv"),
        "the parent (a value of 68 characters) has no row of its own; did you mean (a value of 69",
    ),
    (
        ("--train_file", "data.csv", "--taxonomy", "cycle_of_texts.csv"),
        "the taxonomy has a cycle: ",
    ),
    (
        ("--train_file", "data.csv", "--taxonomy", "broken.yaml"),
        "mapping values are not allowed here, line 2",
    ),
]


@pytest.mark.parametrize(
    ("words", "message"),
    WITH_TEXTS,
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, tuple) else "",
)
def test_training_shows_no_text_in_place_of_a_name(place, capfd, words, message):
    for name, content in {**TEXTS, "aliased.yaml": "- x\n- y\n"}.items():
        (place / name).write_text(content)
    assert message in refusal_to_train(*words, "--validation_size", 0)
    shown = "".join(capfd.readouterr()) + "".join(
        path.read_text() for path in place.glob("results/**/*") if path.is_file()
    )
    for secret in ("Example", "The patient", "4711", "admitted"):
        assert secret not in shown


def test_predicting_shows_no_text_in_place_of_a_name(place):
    (place / "headerless.csv").write_text(TEXTS["headerless.csv"])
    copy_checkpoint("self_contained", place / "checkpoint")
    message = refusal(predict.main, *PREDICTION, "--input", "headerless.csv")
    assert "a value of" in message
    assert "admitted" not in message


# ── commands in their own process ─────────────────────────────────────────────────────────────────


def test_a_traceback_is_shown_on_request(place):
    words = ("--model", "x", "--input", "none.csv", "--output", "out.jsonl")
    done = run(
        *words,
        command="predict.py",
        check=False,
        cwd=place,
        settings={"HIERARCHICAL_TRACEBACK": "1"},
    )
    assert done.returncode == 2
    assert "Traceback (most recent call last):" in done.stderr
    assert (
        done.stderr.splitlines()[-1] == "predict.py: error: --input none.csv: there is no such file"
    )


def test_a_bug_of_this_project_is_shown_as_a_traceback(place):
    """The exit code of predict.py is 3, because 1 means that rows could not be read."""
    copy_checkpoint("self_contained", place / "checkpoint")
    fault = (
        "import hierarchical_clinicalbert.prediction.rows as module; module.RowFormat.row = None"
    )
    script = str(ROOT / "predict.py")
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); {fault}; sys.argv = "
        f"[{script!r}, *{PREDICTION!r}]"
    )
    done = complete("-c", f"{code}; runpy.run_path({script!r}, run_name='__main__')", cwd=place)
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("TypeError: ")
    assert done.returncode == 3
    assert not (place / "out.jsonl").exists()


def test_a_failed_download_is_reported_in_one_line_without_the_token(place):
    token = "hf_" + "secret" * 5
    with HubServer() as hub:
        hub.add_user("alice", token)
        hub.add_repo(
            "alice/model", copy_checkpoint("self_contained", place / "published"), private=True
        )
        for attempt in range(1, 20):
            hub.fail_at(attempt, "GET /alice/model/resolve/.*safetensors", "403")
        words = (
            "--model",
            "alice/model",
            "--input",
            "good.csv",
            "--output",
            "out.jsonl",
            "--dtype",
            "fp32",
        )
        settings = hub.environment(place / "home", token)
        done = run(*words, command="predict.py", check=False, cwd=place, settings=settings)
        assert any(
            request.headers.get("authorization", "").endswith(token) for request in hub.requests
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "predict.py: error: cannot use the model alice/model: "
    )
    assert "Traceback" not in done.stderr
    assert token not in done.stdout + done.stderr
    assert not list(place.glob("out*"))
    holding = [
        path for path in place.rglob("*") if path.is_file() and token.encode() in path.read_bytes()
    ]
    assert holding == []


# runs a command in a locale whose encoding is not UTF-8
IN_C = """
import locale, runpy, sys
locale.setlocale(locale.LC_CTYPE, "C")
assert locale.getencoding() != "utf-8"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_with_hostile_names_and_in_any_locale_a_run_writes_utf_8_into_its_folder_and_leaks_no_token(
    place,
):
    """Class names may appear in plots, the card and tables, but not in paths.

    A token may appear nowhere.
    """
    tokens = ("hf_" + "inheritance" * 3, "hf_" + "argument" * 4)
    names = (
        "../../../escaped",
        "/etc/escaped",
        "<script>alert(1)</script> 心臓病",
        "=cmd|'/C calc'!A0",
    )
    lines = [f'text number {i},"{names[i % 4]}"\n' for i in range(64)]
    (place / "hostile.csv").write_text("text,Étiquette\n" + "".join(lines), encoding="utf-8")
    before = {path for path in place.rglob("*") if path.is_file()}
    words = (
        "--train_file",
        "hostile.csv",
        "--label_column",
        "Étiquette",
        "--label_separator",
        "|||",
        "--max_steps",
        1,
    )
    words += (
        "--model_name_or_path",
        "encoder",
        "--output_dir",
        "results",
        "--hub_token",
        tokens[1],
    )
    words += (
        "--eval_strategy",
        "steps",
        "--eval_steps",
        1,
        "--save_strategy",
        "steps",
        "--save_steps",
        1,
    )
    words += ("--report_to", "tensorboard")
    settings = os.environ | {"HF_TOKEN": tokens[0]}
    done = complete("-c", IN_C, ROOT / "train.py", *words, cwd=place, environment=settings)
    assert done.returncode == 0, done.stderr[-4000:]
    written = {path for path in place.rglob("*") if path.is_file()} - before
    assert {path.relative_to(place).parts[0] for path in written} == {"results"}
    assert "心臓病" in (place / "results" / "README.md").read_text(encoding="utf-8")
    assert not any("escaped" in str(path) for path in [*written, *Path("/etc").glob("escaped*")])
    for path in written:
        assert not any(token.encode() in path.read_bytes() for token in tokens), path
    assert not any(token in done.stdout + done.stderr for token in tokens)

    words = (
        "--model",
        "results",
        "--input",
        "hostile.csv",
        "--output",
        "out.jsonl",
        "--dtype",
        "fp32",
    )
    done = complete("-c", IN_C, ROOT / "predict.py", *words, cwd=place)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [
        json.loads(line) for line in (place / "out.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["label"] for row in rows} <= {*names}


def test_a_full_disk_leaves_no_partial_output(place, small_disk):
    disk = small_disk("16k")
    (place / "many.csv").write_text("text\n" + "a headache\n" * 3000)
    model = copy_checkpoint("self_contained", place / "model")
    words = ("--model", model, "--input", "many.csv", "--output", disk / "out.csv")
    done = run(*words, command="predict.py", check=False, cwd=place)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith("predict.py: error: ")
    assert message.endswith("make room; the same command continues from here")
    assert "Traceback" not in done.stderr
    assert not (disk / "out.csv").exists()
