"""Configurations of encoders with two small layers, for tests with random weights and token ids
below 64.
"""

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
OWN = {
    "roberta": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
    },
    "modernbert": {
        "pad_token_id": 0,
        "cls_token_id": 1,
        "bos_token_id": 1,
        "sep_token_id": 2,
        "eos_token_id": 2,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
    },
    "longformer": {"pad_token_id": 1, "attention_window": 8, "max_position_embeddings": 66},
}


def small_encoder(kind: str, **more: object) -> dict:
    """Return the configuration of an encoder of a kind, such as "bert"."""
    return {"model_type": kind, **SIZES, **OWN.get(kind, {}), **more}
