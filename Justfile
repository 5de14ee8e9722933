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

# Run the whole pipeline on this machine, for a task: real text, small real models, no key, no GPU
[group('start')]
demo task="summarize" *options: setup _demo_models
    #!/usr/bin/env bash
    set -euo pipefail
    export HF_HUB_OFFLINE=1
    unset HF_TOKEN TOGETHER_API_KEY TOGETHER_BASE_URL HF_ENDPOINT
    config={{ demo_config }} of=(--task "$1" --data data/demo)
    run=$([ "$1" = summarize ] || echo "$1-")smollm2-135m-sft
    step() { printf '\n== %s\n' "$1"; }
    step "1/7 parts: articles shipped by gensim, SmolLM2-135M-Instruct, MiniLM"
    {{ python }} -m demo.prepare_parts
    step "2/7 extracts: passages from inside the articles"
    {{ python }} -m data_prep.sample_extracts --input data/demo/wikipedia.jsonl --data data/demo \
        --tokenizer models/smollm2-135m-instruct --passages --min-tokens 100 --max-tokens 220 \
        --min-chars 450 --max-chars 950 --train 600 --test 128
    step "3/7 replies of the teacher, Qwen2.5-Coder-1.5B-Instruct, from the recording"
    {{ python }} -m demo.replies serve -- {{ python }} -m data_prep.generate_replies "${of[@]}" \
        --single --model Qwen2.5-Coder-1.5B-Instruct --temperature 0 --concurrency 8 --limit {{ demo_pairs }}
    step "4/7 pairs, with nothing rejected: for SFT, which does better here than DPO+SFT"
    {{ python }} -m data_prep.build_pairs "${of[@]}" --rejected none \
        --tokenizer models/smollm2-135m-instruct
    step "5/7 dataset"
    {{ python }} -m data_prep.build_dataset "${of[@]}"
    step "6/7 training: SFT on the chosen answers"
    {{ python }} -m training.train_adapter $config --method sft --name $run "${of[@]}" \
        --set group_by_length=true --cpu --num_cpu_threads_per_process {{ num_cpus() }}
    step "7/7 evaluation: merge, answers to held-out texts, scores"
    {{ python }} -m eval.evaluate $run --n {{ demo_texts }} --systems instructed tuned lead \
        --max-new-tokens 64 --encoder models/minilm --encoder-layers 6 --ledger outputs/ledger.csv
    cat <<END
    Where things are:
      data/demo/extracts, data/demo/$1/{replies,pairs}   what each stage wrote, JSON Lines
      data/demo/$1/hub   the dataset as it would stand on the Hub
      outputs/$run       the adapter; merged/ the merged model; eval/ answers and scores
    Next: just run $1 FILE --max-prompt-tokens 300 (it was taught on passages, so it reads as much),
      or just serve $run and, beside it, just play;
      just demo-preferences: pairs that differ in what the text says, trained on from this adapter (summaries);
      the same with a large teacher on RedPajama: TOGETHER_API_KEY=... just dataset
    END

# Go on from `just demo`: preferences that teach not to make things up, scored beside SFT
[group('start')]
demo-preferences *options: setup _demo_models
    #!/usr/bin/env bash
    set -euo pipefail
    export HF_HUB_OFFLINE=1
    unset HF_TOKEN TOGETHER_API_KEY TOGETHER_BASE_URL HF_ENDPOINT
    run=smollm2-135m-sft config={{ demo_config }} data=data/demo
    step() { printf '\n== %s\n' "$1"; }
    step "1/3 pairs: the teacher's answer, and the same with one name or number exchanged"
    {{ python }} -m data_prep.build_pairs --data $data --rejected corrupted --name corrupted \
        --tokenizer models/smollm2-135m-instruct
    {{ python }} -m data_prep.build_dataset --data $data --name corrupted
    step "2/3 training: DPO with a little SFT, on from the adapter of just demo"
    {{ python }} -m training.train_adapter $config --method sft-then-dpo-sft --name $run-then-dpo --data $data \
        --set lora_model_dir=outputs/$run datasets.0.path=$data/summarize/hub-corrupted learning_rate=1e-4 \
        'dpo_loss_weights=[1.0,0.1]' micro_batch_size=4 --cpu --num_cpu_threads_per_process {{ num_cpus() }}
    step "3/3 evaluation: SFT and SFT then preferences, side by side"
    {{ python }} -m eval.evaluate $run-then-dpo --n {{ demo_texts }} --systems instructed outputs/$run/merged tuned lead \
        --max-new-tokens 64 --encoder models/minilm --encoder-layers 6 --ledger outputs/ledger.csv "$@"

demo_config := "smollm2-135m-dpo-sft-lora"
demo_pairs := "192"
demo_texts := "96"

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
