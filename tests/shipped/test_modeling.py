import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, same_weights, untrained_model
from peft import LoraConfig, inject_adapter_in_model
from small_encoders import small_encoder
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, initialization

from configuration_hierarchical import Calibration, HierarchicalConfig
from hierarchical_clinicalbert.checkpoint_files import find_damage
from modeling_hierarchical import HierarchicalForSequenceClassification
from taxonomy_hierarchical import Taxonomy

UNEVEN = Taxonomy({"a": {"b": ["c", "d"], "e": None}, "f": ["g"], "h": None})
AUTO_CLASSES = (HierarchicalForSequenceClassification, AutoModel)
FORMS = pytest.mark.parametrize("form", ["adapter", "whole"])
KINDS = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert")


def small_model(
    kind: str = "bert", taxonomy: Taxonomy = UNEVEN, **settings
) -> HierarchicalForSequenceClassification:
    config = HierarchicalConfig(text_config=small_encoder(kind), taxonomy=taxonomy, **settings)
    return HierarchicalForSequenceClassification(config).eval()


def save(form: str, adapted: HierarchicalForSequenceClassification, folder: Path) -> None:
    (adapted if form == "adapter" else small_model()).save_pretrained(folder)


def batch(rows: int = 3, length: int = 10) -> dict[str, torch.Tensor]:
    """Return token ids with padding at the end of all rows but the first."""
    ids = torch.randint(5, 64, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}


def naive_log_probs(
    model: HierarchicalForSequenceClassification, pooled: torch.Tensor
) -> torch.Tensor:
    """Compute the log-probabilities naively: each inclusive value, each decision's softmax and each
    path separately.
    """
    tree = model.config.tree
    own = pooled @ model.heads.weight.T + model.heads.bias

    def score(node: int) -> torch.Tensor:
        below = [score(child) for child in tree.children(node)]
        return own[:, node] + torch.stack(below).logsumexp(0) if below else own[:, node]

    scores = torch.stack([score(node) for node in range(tree.num_nodes)], 1)
    conditional = torch.empty_like(scores)
    for parent in [-1, *range(tree.num_leaves, tree.num_nodes)]:
        children = tree.children(parent)
        conditional[:, children] = scores[:, children].log_softmax(-1)
    return torch.stack([conditional[:, tree.path(i)].sum(-1) for i in range(tree.num_nodes)], 1)


@pytest.mark.parametrize(
    "taxonomy", [UNEVEN, Taxonomy(["x", "y", "z"]), Taxonomy({"only": {"root": ["p", "q"]}})]
)
def test_node_probabilities_are_products_along_the_path(taxonomy):
    model = small_model(taxonomy=taxonomy)
    nn.init.normal_(model.heads.weight, std=20)  # scores whose powers overflow
    nn.init.normal_(model.heads.bias)
    pooled = torch.randn(5, 32)
    found, logits = model.heads.decisions(model.heads(pooled)[0])
    torch.testing.assert_close(found, naive_log_probs(model, pooled))
    torch.testing.assert_close(model.heads.decisions.log_probs(logits), found)
    torch.testing.assert_close(logits.softmax(1), found[:, : model.config.tree.num_leaves].exp())


@pytest.mark.parametrize(
    ("kind", "pooling"), [*product(KINDS, ["mean"]), ("bert", "label_attention")]
)
def test_every_encoder_trains_saves_and_comes_back_the_same(kind, pooling, tmp_path):
    model = small_model(kind, pooling=pooling)
    inputs = batch()
    model.resize_token_embeddings(80)
    inputs["input_ids"][0, 0] = 79
    assert not any("pooler" in name for name, _ in model.named_parameters())
    model.train()
    model(**inputs, labels=torch.tensor([0, 5, 6])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    for auto in AUTO_CLASSES:
        loaded, info = auto.from_pretrained(
            tmp_path, trust_remote_code=True, output_loading_info=True
        )
        torch.testing.assert_close(
            loaded(**inputs).logits, model(**inputs).logits, atol=1e-6, rtol=0
        )
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )


def test_heads_calibration_and_logits_stay_in_float32(tmp_path):
    stored = small_model()
    lexical = {"idf": torch.rand(64), "weight": torch.randn(5, 64), "bias": torch.randn(5)}
    stored.set_calibration(
        Calibration(0.5, np.linspace(0.7, 2.9646, UNEVEN.num_nodes).tolist()), lexical
    )
    stored.save_pretrained(tmp_path)
    model = HierarchicalForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.heads.scale.equal(stored.heads.scale)
    assert model.encoder.dtype == torch.bfloat16
    assert model.heads.weight.dtype == model.heads.lexical.weight.dtype == torch.float32
    output = model(**batch())
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(3))
    assert model.to(torch.bfloat16)(**batch()).logits.isfinite().all()


@FORMS
def test_the_dtype_argument_works_as_for_any_model(form, adapted, tmp_path):
    model = adapted if form == "adapter" else small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    # the adapter form stores no encoder
    stored = torch.float32 if form == "adapter" else torch.bfloat16
    expected = {torch.float16: torch.float16, "bfloat16": torch.bfloat16, "auto": stored}
    for auto, dtype in product(AUTO_CLASSES, expected):
        loaded = auto.from_pretrained(tmp_path, trust_remote_code=True, dtype=dtype)
        assert {p.dtype for p in loaded.encoder.parameters()} == {expected[dtype]}
        assert {p.dtype for p in loaded.heads.parameters()} == {torch.float32}


@FORMS
def test_the_permissions_of_saved_files_follow_the_umask(form, adapted, tmp_path):
    before = os.umask(0o027)
    try:
        save(form, adapted, tmp_path)
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()
    }
    assert modes == dict.fromkeys(modes, 0o640)


@FORMS
def test_the_caller_and_not_a_stored_configuration_chooses_the_attention(form, adapted, tmp_path):
    """transformers would fetch an implementation that is named as a repository, at no pinned
    commit.
    """
    save(form, adapted, tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        kernel = {key: "kernels-community/flash-attn"}
        path.write_text(
            json.dumps({**stored, **kernel, "text_config": {**stored["text_config"], **kernel}})
        )
        for auto in AUTO_CLASSES:
            loaded = auto.from_pretrained(tmp_path, trust_remote_code=True)
            assert loaded.encoder.config._attn_implementation == "sdpa"
            chosen = auto.from_pretrained(
                tmp_path, trust_remote_code=True, attn_implementation="eager"
            )
            assert chosen.encoder.config._attn_implementation == "eager"
    chosen.save_pretrained(tmp_path / "again")
    assert "attn_implementation" not in (tmp_path / "again" / "config.json").read_text()


def test_weights_that_bitsandbytes_repacked_are_not_saved(tmp_path):
    wide = small_encoder("bert", hidden_size=64, intermediate_size=128)  # whole blocks of 64
    config = HierarchicalConfig(text_config=wide, taxonomy=UNEVEN)
    HierarchicalForSequenceClassification(config).save_pretrained(tmp_path / "plain")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = HierarchicalForSequenceClassification.from_pretrained(
        tmp_path / "plain", quantization_config=four_bits
    )
    inputs = batch()
    model.save_pretrained(tmp_path / "before")
    with torch.inference_mode():
        expected = model(**inputs).logits
    states = [getattr(weight, "quant_state", None) for weight in model.parameters()]
    # on a CPU with AVX-512 BF16
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        with pytest.raises(ValueError, match="was repacked by bitsandbytes"):
            model.save_pretrained(tmp_path / "after")
        assert not (tmp_path / "after").exists()
    loaded = HierarchicalForSequenceClassification.from_pretrained(tmp_path / "before")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "problem_type", ["single_label_classification", "multi_label_classification"]
)
def test_the_loss_compiles_without_a_graph_break(problem_type):
    model = small_model(problem_type=problem_type)
    inputs = batch()
    labels = model.heads.decisions.targets([[0], [1], [6]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss
    )


def test_checkpoints_that_load_in_threads_change_nothing_of_the_process(
    adapted, tmp_path, monkeypatch
):
    """Load folders that each have a copy of the code, as repositories on the Hub have."""
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        adapted.save_pretrained(folder)
    # Not in the threads: transformers parses the code here, and the parser of Python 3.11.7 can
    # fail in threads.
    classes = [
        type(AutoModel.from_pretrained(folder, trust_remote_code=True)) for folder in folders
    ]
    before = transformers.logging.get_verbosity()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: classes[i].from_pretrained(folders[i]), [0, 1] * 4))
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ
    assert transformers.logging.get_verbosity() == before
    originals = initialization.TORCH_INIT_FUNCTIONS
    assert all(getattr(torch.nn.init, name) is function for name, function in originals.items())


@pytest.mark.parametrize("label", [-1, 99])
def test_a_label_that_is_no_node_is_an_error(label):
    with pytest.raises(RuntimeError, match="Class values must be"):
        small_model()(**batch(), labels=torch.tensor([0, label, 1]))


@pytest.fixture(scope="module")
def adapted(minilm) -> HierarchicalForSequenceClassification:
    """Return MiniLM with an adapter that changes its output."""
    torch.manual_seed(0)
    model = untrained_model(minilm, None)
    lora = LoraConfig(r=4, target_modules=["query", "value", "dense"], init_lora_weights=False)
    inject_adapter_in_model(lora, model.encoder)
    nn.init.normal_(model.heads.weight)
    return model.eval()


def test_the_adapter_form_holds_adapter_and_heads_alone_and_comes_back_the_same(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    } == {
        *(path.name for path in ROOT.glob("*_hierarchical.py")),
        *(
            "config.json",
            "heads.safetensors",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        ),
    }
    inputs = batch(length=20)
    injected = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, merge_adapter=False)
    torch.testing.assert_close(
        injected(**inputs).logits, adapted(**inputs).logits, atol=1e-6, rtol=0
    )
    merged = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert (injected.has_adapter, merged.has_adapter) == (True, False)
    torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=0)
    half = HierarchicalForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16, merge_adapter=False
    )
    half.save_pretrained(tmp_path / "half")  # the adapter beside bfloat16 weights is not rounded
    assert same_weights(tmp_path, tmp_path / "half")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        # it takes no attention mask
        ("fnet", "FNetModel gives other outputs when its inputs are padded"),
        ("convbert", "ConvBertModel gives other outputs when its inputs are padded"),
        ("nystromformer", "NystromformerModel gives other outputs when its inputs are padded"),
        ("bart", "BartModel has a decoder"),
    ],
)
def test_models_that_cannot_read_a_text_alone_are_refused(kind, message):
    sizes = {
        "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
        "convbert": {"embedding_size": 32},
    }
    config = small_encoder(kind, **sizes.get(kind, {}))
    with pytest.raises(ValueError, match=message):
        HierarchicalForSequenceClassification(
            HierarchicalConfig(taxonomy=["a", "b"], text_config=config)
        )


def test_big_bird_predicts_a_long_text_equally_before_and_after_a_short_one():
    blocks = {"max_position_embeddings": 256, "block_size": 4, "num_random_blocks": 1}
    config = small_encoder("big_bird", **blocks)
    model = HierarchicalForSequenceClassification(
        HierarchicalConfig(taxonomy=["a", "b"], text_config=config)
    ).eval()
    long = batch(length=200)
    short = batch(length=10)
    before = model(**long).logits
    model(**short)
    torch.testing.assert_close(model(**long).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"page": {"title": 1}}, "page holds title .*, not title: 1"),
        ({"page": {"logo": "x"}}, "not logo: 'x'"),
        ({"pooling": "max"}, "pooling must be one of mean, cls, label_attention, family_attention"),
        (
            {"calibration": {"scales": [1.0, 1.0]}},
            r"calibration: scales must be a list of \d numbers",
        ),
        ({"calibration": {"set_bands": 0.4}}, "calibration: set_bands must be a list"),
        (
            {"calibration": {"set_bands": [0.4], "set_thresholds": [[0.1]] * 99}},
            "set_thresholds must be a list of 2 numbers",
        ),
        (
            {"calibration": {"set_thresholds": [["a"]] * 99}},
            "an entry of set_thresholds must be a list of 1 numbers",
        ),
        ({"calibration": {"prior": [0.5]}}, "calibration: prior must be a list of 5 numbers"),
        (
            {"calibration": {"set_scores": [0.5]}},
            "calibration: set_scores must be a list of 0 numbers",
        ),
        (
            {"calibration": {"set_scores": [0.5], "set_labels": [[99]]}},
            r"set_labels must hold lists of node ids, not \[99\]",
        ),
        (
            {"calibration": {"temperatures": [1.0]}},
            "calibration has unknown fields: .*'temperatures'",
        ),
        (
            {"id2label": dict(enumerate("hgedc"))},
            "id2label is not the list of the taxonomy's classes",
        ),
        ({"num_labels": 3}, "or num_labels not their number"),
        (
            {"taxonomy": ["x", "y"]},
            "cannot be replaced at loading: load the model, then call its add_nodes",
        ),
        ({"problem_type": "regression"}, "problem_type must be 'single_label_classification' or"),
    ],
)
def test_what_is_given_at_loading_is_checked_like_what_was_stored(given, message, tmp_path):
    small_model().save_pretrained(tmp_path)
    for auto in AUTO_CLASSES:
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(tmp_path, trust_remote_code=True, **given)


def test_offloaded_weights_predict_as_in_memory_or_are_refused(adapted, tmp_path):
    inputs = batch(length=20)
    adapted.save_pretrained(tmp_path / "adapter")
    layers = {f"encoder.layer.{i}": "cpu" for i in range(5)}
    load = AutoModel.from_pretrained
    for last in ("disk", "cpu"):
        places = {"embeddings": "cpu", **layers, "encoder.layer.5": last}
        options = {
            "device_map": places,
            "offload_folder": tmp_path / "offloaded",
            "trust_remote_code": True,
        }
        if last == "disk":
            with pytest.raises(
                ValueError,
                match=r"layer\.5\..* is offloaded, and the adapter cannot be added to it",
            ):
                load(tmp_path / "adapter", **options)
        else:
            found = load(tmp_path / "adapter", **options)(**inputs).logits
            torch.testing.assert_close(found, adapted(**inputs).logits, atol=1e-4, rtol=0)
    load(tmp_path / "adapter", trust_remote_code=True).save_pretrained(tmp_path / "whole")
    for places in ({"encoder": "cpu", "heads": "disk"}, {"encoder": "disk", "heads": "cpu"}):
        whole = load(tmp_path / "whole", **(options | {"device_map": places}))
        with torch.inference_mode():
            torch.testing.assert_close(
                whole(**inputs).logits, adapted(**inputs).logits, atol=1e-4, rtol=0
            )


def test_files_of_an_earlier_save_are_neither_loaded_nor_kept(adapted, tmp_path):
    whole = small_model()
    inputs = batch(length=20)
    for shards in ({"max_shard_size": "8KB"}, {}, {"max_shard_size": "8KB"}):
        with torch.no_grad():
            whole.heads.weight.mul_(-1.5)
        whole.save_pretrained(tmp_path, **shards)
        names = {path.name for path in tmp_path.iterdir()}
        assert ("model.safetensors" in names) == (shards == {})
        assert ("model.safetensors.index.json" in names) == (shards != {})
        assert find_damage(tmp_path) is None
        loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
        torch.testing.assert_close(
            loaded(**inputs).logits, whole(**inputs).logits, atol=1e-5, rtol=0
        )
    adapted.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("model*.safetensors*")]
    assert find_damage(tmp_path) is None
    whole.save_pretrained(tmp_path)
    assert not [*tmp_path.glob("heads*"), *(tmp_path / "adapter").iterdir()]


def test_hidden_states_and_attentions_are_returned_on_request(tmp_path):
    small_model().save_pretrained(tmp_path)
    options = {"output_hidden_states": True, "output_attentions": True}
    inputs = batch()
    eager = {"attn_implementation": "eager"}
    plain = HierarchicalForSequenceClassification.from_pretrained(tmp_path, **eager)
    at_loading = HierarchicalForSequenceClassification.from_pretrained(tmp_path, **eager, **options)
    for output in (plain(**inputs, **options), at_loading(**inputs)):
        assert (len(output.hidden_states), output.attentions[0].shape) == (3, (3, 2, 10, 10))
    output = plain(**inputs)
    assert (output.hidden_states, output.attentions) == (None, None)
    torch.testing.assert_close(plain(**inputs, return_dict=False)[0], output.logits)
    embedded = plain.get_input_embeddings()(inputs["input_ids"])
    again = plain(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(again.logits, output.logits, atol=1e-5, rtol=1e-4)


def test_weights_that_cannot_be_loaded_again_are_not_saved(adapted, tmp_path):
    renamed = small_model()
    renamed.config.id2label = dict(enumerate("hgedcb"))
    folder = tmp_path / "results"
    for model, options, message in (
        (renamed, {}, "id2label is not the list of the taxonomy's classes"),
        (adapted, {"push_to_hub": True}, r"run push_to_hub\.py on that folder"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(folder, **options)
    assert not folder.exists()
    with pytest.raises(
        ValueError, match=r"encoder is a folder of this machine: .* run push_to_hub\.py --merge"
    ):
        adapted.push_to_hub("someone/model")
