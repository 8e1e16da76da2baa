"""Measure a checkpoint's test of itself: ``python benchmarks/self_test.py --model CHECKPOINT``.

Measured are its milliseconds, and how far the log-probabilities of its text move, in nats: by the
dtypes, and by damage that loads without an error. `SELF_TEST_TOLERANCES` must lie between the two.
"""

import statistics
import time
from pathlib import Path

import torch
from harness import flag_parser, write_results
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from checkpoint_hierarchical import SELF_TEST_TEXT, SELF_TEST_TOLERANCES, self_test_log_probs

ROUNDS = 20


def main() -> None:
    parser = flag_parser(__doc__, "self_test.json")
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()

    def load(**settings):
        return AutoModel.from_pretrained(arguments.model, trust_remote_code=True, **settings).eval()

    stored = load().config.self_test
    found: dict[str, float] = {}

    def report(name: str, model) -> None:
        log_probs = self_test_log_probs(model, stored["input_ids"])
        found[name] = (log_probs - torch.tensor(stored["log_probs"])).abs().max().item()
        print(f"{name}: {found[name]:.2g} nats")

    # ── Time ──────────────────────────────────────────────────────────────────────────────────────
    model = load()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        tokenizer(SELF_TEST_TEXT)
        self_test_log_probs(model, stored["input_ids"])
        seconds.append(time.perf_counter() - started)
    found["milliseconds, first"] = 1000 * seconds[0]
    found["milliseconds, median"] = 1000 * statistics.median(seconds)
    print(
        f"{found['milliseconds, first']:.1f} ms at first, "
        f"{found['milliseconds, median']:.1f} ms in the median"
    )
    print("tolerances:", SELF_TEST_TOLERANCES)

    # ── Rounding ──────────────────────────────────────────────────────────────────────────────────
    report("float32", model)
    report("float16", load(dtype=torch.float16))
    report("bfloat16", load(dtype=torch.bfloat16))
    report("8 bits", load(quantization_config=BitsAndBytesConfig(load_in_8bit=True)))
    report("4 bits", load(quantization_config=BitsAndBytesConfig(load_in_4bit=True)))

    # ── Damage ────────────────────────────────────────────────────────────────────────────────────
    model = load()
    torch.manual_seed(0)
    model.heads.weight.data.normal_(std=model.config.text_config.initializer_range)
    report("random heads", model)
    model = load(merge_adapter=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.zero_()
    report("a missing adapter", model)
    model = load()
    for module in model.encoder.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = torch.nn.ReLU()
    report("ReLU for GELU", model)
    model = load()
    for module in model.encoder.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = torch.nn.GELU(approximate="tanh")
    report("an approximate GELU", model)
    write_results(arguments.output, found)


if __name__ == "__main__":
    main()
