"""The adapter under the real harness: a local task over local JSON, in a process that may not ask the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from heads_lightning.composition import compose
from heads_lightning.evaluation.lm_eval import continue_texts, score_continuations, score_texts
from heads_lightning.experiment import load
from heads_lightning.run import train

DOCUMENTS = [
    {
        "context": "import os\nimport ",
        "choices": ["sys", "zebra crossings"],
        "gold": 0,
        "text": "def f(x):\n    return x\n",
        "answer": "sys",
    },
    {
        "context": "def f(x):\n    return",
        "choices": [" x", " \u20ac"],
        "gold": 1,
        "text": "for i in range(10): print(i)\n" * 9,
        "answer": "x",
    },
    {"context": "", "choices": ["class", "a = 1"], "gold": 0, "text": "\u00e9" * 30, "answer": "none"},
]
TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "go_on": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
HARNESS = """
import json, sys
import lm_eval, heads_lightning.evaluation.lm_eval
from lm_eval.tasks import TaskManager
found = lm_eval.simple_evaluate(
    "heads_lightning", model_args=f"checkpoint={sys.argv[1]}", tasks=json.loads(sys.argv[3]), bootstrap_iters=0,
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
)
samples = {name: [[sample["resps"], sample["doc_id"]] for sample in rows] for name, rows in found["samples"].items()}
print("FOUND" + json.dumps([found["results"], samples]))
"""


@pytest.mark.slow
def test_the_harness_finds_what_the_adapter_says(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    run = tmp_path / "run"
    train(compose([*tiny, "objective=causal"]), run)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path / 'data.jsonl'}}}\ntest_split: train\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}", encoding="utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    asked = subprocess.run(
        [sys.executable, "-c", HARNESS, str(run), str(tmp_path), json.dumps([*TASKS])],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
    results, samples = json.loads(asked.stdout.rpartition("FOUND")[2])

    model = load(str(run))
    pairs = [(d["context"], choice) for d in DOCUMENTS for choice in d["choices"]]
    scores = [score for score, _ in score_continuations(model, pairs)]
    best = [int(scores[2 * k + 1] > scores[2 * k]) for k in range(len(DOCUMENTS))]
    assert results["choose"]["acc,none"] == pytest.approx(sum(b == d["gold"] for b, d in zip(best, DOCUMENTS, strict=True)) / 3)
    answered = {number: [float(response[0][0]) for response in responses] for responses, number in samples["choose"]}
    assert answered == {k: pytest.approx(scores[2 * k : 2 * k + 2], rel=1e-4) for k in range(3)}

    nats = -sum(score_texts(model, [d["text"] for d in DOCUMENTS]))
    num_bytes = sum(len(d["text"].encode()) for d in DOCUMENTS)
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / 0.6931471805599453, rel=1e-4)

    settings = {"until": ["\n"], "max_gen_toks": 6}
    answers = continue_texts(model, [(d["context"], settings) for d in DOCUMENTS])
    assert {number: responses[0][0] for responses, number in samples["go_on"]} == dict(enumerate(answers))
