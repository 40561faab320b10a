#!/usr/bin/env python3
"""Runs lm-evaluation-harness against `anser serve` and compares every log-likelihood with `anser eval pairs`.

    pip install "lm-eval[api]"
    tools/serve_lm_eval.py target/release/anser [blimp/*.jsonl] [--limit N] [--model M] [--dtype f32]

The harness reads minimal pairs as a task of multiple choice through its `local-completions` client: it has the server's tokenizer
(`/tokenizer_info`, `/tokenize`) and asks for the log probabilities of prompts (`echo`). Accuracy and every log-likelihood must be those of
`anser eval pairs` to the last bit. Without files the pairs are made here.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
try:
    import lm_eval
    from lm_eval.tasks import TaskManager
except ImportError as e:
    sys.exit(f'{e}: pip install "lm-eval[api]"')

ROOT = Path(__file__).resolve().parent.parent
TASK = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def own_pairs():
    """Verbs, reflexives and determiners that agree, or don't."""
    nouns = [("cat", "cats"), ("boy", "boys"), ("teacher", "teachers"), ("letter", "letters"), ("captain", "captains")]
    verbs = [("sees", "see"), ("annoys", "annoy"), ("follows", "follow")]
    others = ["Tim", "the dog", "a house by the river", "Élodie"]
    for (noun, many), (one, more), other in itertools.product(nouns, verbs, others):
        yield f"The {many} {more} {other}.", f"The {many} {one} {other}."
        yield f"This {noun} {one} {other}.", f"These {noun} {one} {other}."
    for who, right, wrong in [("Mary", "herself", "himself"), ("John", "himself", "herself"), ("They", "themselves", "himself")]:
        yield from ((f"{who} {verb} {right}.", f"{who} {verb} {wrong}.") for verb in ("hurt", "saw", "had not known"))


def write_tasks(folder, files):
    """A task for each file, which holds the two sentences of every pair alone: the names of the tasks and their files."""
    tasks = {}
    for i, lines in enumerate(files):
        file = folder / f"pairs-{i}.jsonl"
        pairs = [{key: pair[key] for key in ("sentence_good", "sentence_bad")} for pair in lines]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / f"pairs-{i}.yaml").write_text(TASK.format(task=f"pairs-{i}", file=file))
        tasks[f"pairs-{i}"] = file
    return tasks


def harness(said, folder, tasks):
    """What lm-evaluation-harness finds: by task its accuracy and the log-likelihoods of each pair's sentences."""
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"http://{said['address']}/v1/completions",
            "model": said["model"],
            "tokenizer_backend": "remote",
            # A sentence stands at the beginning of a document.
            "custom_prefix_token_id": 0,
            "num_concurrent": 8,
            "max_length": 4096,
        },
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=16,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {task: sorted(found["samples"][task], key=lambda s: s["doc_id"]) for task in tasks}
    return {
        task: (found["results"][task]["acc,none"], [[float(r[0]) for r in s["filtered_resps"]] for s in samples[task]])
        for task in tasks
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("anser")
    parser.add_argument("files", nargs="*", type=Path, help='lines with "sentence_good" and "sentence_bad"')
    parser.add_argument("--model", default=ROOT / "models/anser-12m.safetensors")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--limit", type=int, help="pairs of a file at most")
    args = parser.parse_intermixed_args()
    own = [{"sentence_good": good, "sentence_bad": bad} for good, bad in own_pairs()]
    files = [[json.loads(line) for line in f.read_text().splitlines()][: args.limit] for f in args.files] or [own]
    common = ["--model", args.model, "--dtype", args.dtype, "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_tasks(Path(folder), files)
        server = subprocess.Popen([args.anser, "serve", "--port", "0", "--json", *common], stdout=subprocess.PIPE, text=True)
        try:
            theirs = harness(json.loads(server.stdout.readline()), Path(folder), tasks)
        finally:
            server.terminate()
        command = [args.anser, "eval", "pairs", "--each", "--json", *common, *tasks.values()]
        ours = json.loads(subprocess.check_output(command))["files"]
    differ, largest, count = 0, 0.0, 0
    for task, mine in zip(tasks, ours, strict=True):
        accuracy, each = theirs[task]
        for a, b in zip(itertools.chain(*each), itertools.chain(*mine["log_likelihoods"]), strict=True):
            count, differ, largest = count + 1, differ + (a != b), max(largest, abs(a - b))
        print(f"{task}: accuracy {accuracy:.6f} by the harness, {mine['accuracy']:.6f} by anser, {mine['pairs']} pairs")
        differ += abs(accuracy - mine["accuracy"]) > 1e-12
    print(f"{count} log-likelihoods, {differ} differ, by {largest:g} at most")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
