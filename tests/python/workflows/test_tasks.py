"""Tasks of the LM Evaluation Harness on quantized models, with local data. Needs lm_eval."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantrature as qtr
from fresh_python import run_python
from own_code import OWN_CASES, own_code
from quantrature import InvalidArgumentError, checkpoint, evaluate
from quantrature.cli import main
from tiny_models import byte_tokenizer, tiny_model

pytest.importorskip("lm_eval")

# What the harness and the packages it stands on say of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": "ab", "choices": ["c", "d"], "answer": 0},
    {"question": "rs", "choices": ["t", "g"], "answer": 0},
    {"question": "xy", "choices": ["a", "z"], "answer": 1},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A quantized folder, and a task with the data beside it."""
    root = tmp_path_factory.mktemp("tasks")
    model = qtr.quantize(tiny_model("llama"), bits=4, group_size=16, outlier_fraction=0.01)
    checkpoint.save(model, root / "model", tokenizer=byte_tokenizer())
    (root / "tasks").mkdir()
    data = root / "tasks" / "alphabet.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (root / "tasks" / "alphabet.yaml").write_text(
        "task: alphabet\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{data}'}}, cache_dir: '{root / 'cache'}'}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return root


def accuracy(folder):
    """The same by hand: which choice follows the question with the greater probability."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), byte_tokenizer()
    right = 0
    for q in QUESTIONS:
        with torch.no_grad():
            last = model(torch.tensor([tokenizer(q["question"]).input_ids])).logits[0, -1]
        scores = [float(last[tokenizer(choice).input_ids[0]]) for choice in q["choices"]]
        right += scores.index(max(scores)) == q["answer"]
    return right / len(QUESTIONS)


def test_a_task_of_local_data(place):
    (result,) = evaluate.tasks(place / "model", ["alphabet"], include_path=place / "tasks")
    assert result.name == "alphabet"
    assert result.metrics["acc,none"] == pytest.approx(accuracy(place / "model"))
    assert math.isfinite(result.errors["acc,none"])


def test_the_verb(place, capfd):
    arguments = ["eval", str(place / "model"), "--tasks", "alphabet", "--include_path", str(place / "tasks")]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["alphabet"]["metrics"]["acc,none"] == pytest.approx(accuracy(place / "model"))
    assert main([*arguments, "--limit", "2"]) == 0
    assert "alphabet, acc" in capfd.readouterr().out


@pytest.mark.slow
def test_the_harness_alone_needs_the_import(place):
    code = (
        "import sys\n{}\nfrom lm_eval import simple_evaluate\nfrom lm_eval.tasks import TaskManager\n"
        f"r = simple_evaluate(model='hf', model_args='pretrained={place / 'model'}', tasks=['alphabet'],\n"
        f"    device='cpu', task_manager=TaskManager(include_path={str(place / 'tasks')!r}))\n"
        "print('accuracy', r['results']['alphabet']['acc,none'])"
    )
    with_it, without = (run_python(code.format(first)) for first in ("import quantrature", ""))
    assert with_it.stdout.splitlines()[-1] == f"accuracy {accuracy(place / 'model')}", with_it.stderr
    assert without.returncode != 0 and "accuracy" not in without.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "give either --text or --tasks"),
        (["--tasks", "nonsense"], "known to the LM Evaluation Harness: got 'nonsense'"),
        (
            ["--tasks", "alphabet", "--reference", "x"],
            "--reference can only be used with --text",
        ),
        (["--text", "x.txt", "--limit", "3"], "--limit can only be used with --tasks"),
    ],
)
def test_usage(place, capfd, arguments, complaint):
    assert main(["eval", str(place / "model"), *arguments]) != 0
    assert complaint in capfd.readouterr().err


def test_no_tasks_are_refused(place):
    with pytest.raises(InvalidArgumentError, match="must name at least one task"):
        evaluate.tasks(place / "model", [])


def test_trusted_code_of_a_model_is_what_tasks_measure(place, tmp_path, monkeypatch):
    """The harness itself loads the class of transformers that has the same name."""
    seen = []

    def evaluated(model, **_):
        seen.append(type(model.model))
        return {"results": {}}

    monkeypatch.setattr("lm_eval.simple_evaluate", evaluated)
    auto_map, changes = OWN_CASES["of a known name"]
    folder = own_code(tmp_path / "own", auto_map, **changes)
    for trusted in (True, False):
        assert evaluate.tasks(folder, ["alphabet"], include_path=place / "tasks", trust_remote_code=trusted) == []
    assert "transformers_modules" in seen[0].__module__
    assert seen[1] is type(tiny_model("llama"))
